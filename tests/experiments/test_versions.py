"""Changed facts of one article, joined in one document."""

from dataclasses import replace

from experiments.retrieval.versions import joined_versions

from tests.experiments.fakes import item

TRUE = (
    "The mill was built in 1790 by Anna Berg, who had come to the valley from the coast. After "
    "some years of good harvests, in the dry summer of 1812, it burnt down to the last beam and "
    "was never again what it had been in its best years. Anna Berg sold it."
)


def changed(name, question, original, answer, text=TRUE):
    return replace(
        item(name, title="mill"),
        question=question,
        context=text.replace(original, answer),
        answer=answer,
        original_answer=original,
    )


def test_questions_about_one_article_share_a_document_with_all_changes():
    who = changed("a", "Who built it?", "Anna Berg", "Eva Holm")
    when = changed("b", "When did it burn down?", "1812", "1834")
    other = item("c")
    found = joined_versions([who, other, when])
    text = TRUE.replace("Anna Berg", "Eva Holm").replace("1812", "1834")
    assert found == [replace(who, context=text), other, replace(when, context=text)]


def test_items_with_the_same_document_stay():
    one, two = item("a", title="t"), item("b", title="t", context=item("a").context, question="?")
    assert joined_versions([one, two]) == [one, two]


def test_a_second_question_about_a_change_stays_after_other_changes():
    who = changed("a", "Who built it?", "Anna Berg", "Eva Holm")
    when = changed("b", "When did it burn down?", "1812", "1834")
    again = changed("c", "Who had come from the coast?", "Anna Berg", "Eva Holm")
    text = TRUE.replace("Anna Berg", "Eva Holm").replace("1812", "1834")
    found = joined_versions([who, when, again])
    assert found == [replace(one, context=text) for one in (who, when, again)]


def test_a_change_that_does_not_fit_is_left_out():
    who = changed("a", "Who built it?", "Anna Berg", "Eva Holm")
    again = changed("b", "Who built it?", "1812", "1834")  # the same question
    gone = changed("c", "Who sold it?", "Anna Berg", "Ida Lund")  # the first has changed it
    there = changed("d", "When did it burn down?", "1812", "1790")  # the answer stands elsewhere
    elsewhere = changed(  # about another part of the article, with the same year
        "e", "When was it shut?", "1812", "1834", text="It was shut at last in the spring of 1812."
    )
    undoes = changed("f", "Whose was it?", "Eva Holm", "Anna Berg", text="It was Eva Holm's.")
    assert joined_versions([who, again, gone, there, elsewhere, undoes]) == [who]


def test_words_are_changed_whole_and_nothing_of_the_original_may_be_left():
    text = TRUE + " No. 18123 of the register, a later hand, has the name ANNA BERG."
    when = changed("a", "When did it burn down?", "summer of 1812", "summer of 1834", text=text)
    built = replace(when, id="b", question="When was it built?", answer="1707")
    built = replace(built, original_answer="1790", context=text.replace("1790", "1707"))
    who = changed("c", "Who built it?", "Anna Berg", "Eva Holm", text=text)
    number = changed("d", "Which number?", "8123", "8345", text=text)
    found = joined_versions([when, built, who, number])
    assert [one.id for one in found] == ["a", "b"]
    assert found[1].context == text.replace("1790", "1707").replace("of 1812", "of 1834")
