"""Names of places and peoples whose type is known without a question about them."""

from __future__ import annotations

COUNTRIES = frozenset(
    """Afghanistan;Albania;Algeria;Angola;Argentina;Armenia;Australia;Austria;Azerbaijan;Bahrain;
    Bangladesh;Belarus;Belgium;Bolivia;Bosnia;Botswana;Brazil;Bulgaria;Burma;Cambodia;Cameroon;
    Canada;Chad;Chile;China;Colombia;Costa Rica;Croatia;Cuba;Cyprus;Denmark;Ecuador;Egypt;England;
    Eritrea;Estonia;Ethiopia;Finland;France;Gabon;Germany;Ghana;Greece;Guatemala;Haiti;Honduras;
    Hungary;Iceland;India;Indonesia;Iran;Iraq;Ireland;Israel;Italy;Jamaica;Japan;Jordan;Kazakhstan;
    Kenya;Kuwait;Laos;Latvia;Lebanon;Liberia;Libya;Lithuania;Luxembourg;Madagascar;Malaysia;Mali;
    Malta;Mexico;Moldova;Mongolia;Morocco;Mozambique;Namibia;Nepal;Netherlands;New Zealand;
    Nicaragua;Nigeria;North Korea;Norway;Oman;Pakistan;Palestine;Panama;Paraguay;Peru;Philippines;
    Poland;Portugal;Prussia;Qatar;Romania;Russia;Rwanda;Saudi Arabia;Scotland;Senegal;Serbia;
    Sierra Leone;Singapore;Slovakia;Slovenia;Somalia;South Africa;South Korea;Soviet Union;Spain;
    Sri Lanka;Sudan;Sweden;Switzerland;Syria;Taiwan;Tanzania;Thailand;Tunisia;Turkey;Uganda;Ukraine;
    United Kingdom;United States;Uruguay;Uzbekistan;Venezuela;Vietnam;Wales;Yemen;Zambia;Zimbabwe;
    Great Britain;Britain""".replace("\n    ", "").split(";")
)
STATES = frozenset(
    """Alabama;Alaska;Arizona;Arkansas;California;Colorado;Connecticut;Delaware;Florida;Hawaii;Idaho;
    Illinois;Indiana;Iowa;Kansas;Kentucky;Louisiana;Maine;Maryland;Massachusetts;Michigan;Minnesota;
    Mississippi;Missouri;Montana;Nebraska;Nevada;New Hampshire;New Jersey;New Mexico;North Carolina;
    North Dakota;Ohio;Oklahoma;Oregon;Pennsylvania;Rhode Island;South Carolina;South Dakota;
    Tennessee;Texas;Utah;Vermont;Virginia;West Virginia;Wisconsin;Wyoming""".replace(
        "\n    ", ""
    ).split(";")
)
CONTINENTS = frozenset({"Africa", "Antarctica", "Asia", "Europe", "North America", "South America"})
PEOPLES = frozenset(
    """Albanian;American;Arabic;Armenian;Australian;Austrian;Belgian;Brazilian;British;Bulgarian;
    Canadian;Chinese;Croatian;Czech;Danish;Dutch;Egyptian;English;Finnish;Flemish;French;German;
    Greek;Hebrew;Hindi;Hungarian;Indian;Irish;Italian;Japanese;Korean;Latin;Mongolian;Norwegian;
    Persian;Polish;Portuguese;Prussian;Russian;Scottish;Serbian;Spanish;Swahili;Swedish;Swiss;
    Turkish;Ukrainian;Welsh""".replace("\n    ", "").split(";")
)
WEEKDAYS = frozenset({"Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"})

KNOWN = {
    **dict.fromkeys(COUNTRIES, "country"),
    **dict.fromkeys(STATES, "state"),
    **dict.fromkeys(CONTINENTS, "continent"),
    **dict.fromkeys(PEOPLES, "people or language"),
    **dict.fromkeys(WEEKDAYS, "weekday"),
}
