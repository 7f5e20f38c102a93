"""Counterfactual items: what they promise, over made cases and over the small articles."""

import json
import os
import random
import re
import unicodedata
from pathlib import Path

import pytest
from experiments.builder.articles import Article, Question, read_articles
from experiments.builder.build import build_items, token_counter
from experiments.builder.counterfactual import counterfactual
from experiments.builder.cutting import cut
from experiments.builder.edits import Rejected
from experiments.builder.pool import NamePool, answers_of
from experiments.builder.settings import BuildSettings
from experiments.settings import read_settings

from emt.errors import DocumentError
from tests.emt.commands import ROOT
from tests.experiments.fakes import write_rows
from tests.experiments.scripts import run_script

BASE = ROOT / "configs" / "experiments" / "build_items.yaml"
ARTICLES = ROOT / "configs" / "experiments" / "data" / "articles.json"
LARGE = Path(os.environ.get("EMT_DATA", "")) / "articles" / "squad_articles.json"  # of 24 articles


def plain(text):
    """Lower case without accents, thousands separators, or more than one space."""
    parts = unicodedata.normalize("NFD", text.lower())
    text = "".join(part for part in parts if unicodedata.category(part) != "Mn")
    return " ".join(re.sub(r"(?<=\d),(?=\d{3})", "", text).split())


def occurs(needle, text):
    padded = f" {re.sub(r'[^a-z0-9.%]+', ' ', plain(text))} ".replace(". ", " ")
    return f" {re.sub(r'[^a-z0-9.%]+', ' ', plain(needle)).strip('. ')} " in padded


def asked(text, question, answer, *, title="", others=()):
    """One article with one question, and a second article whose answers are the pool."""
    article = Article(title, text, [Question("q", question, ((answer, text.index(answer)),))])
    names = " ".join(f"{name}." for name in others)
    pool = [Question(name, question, ((name, names.index(name)),)) for name in others]
    return article, NamePool([article, Article("", names, pool)])


def made(*case, max_replacements=5, **more):
    article, pool = asked(*case, **more)
    return counterfactual(article, article.questions[0], pool, random.Random(0), max_replacements)


def test_the_answer_is_replaced_everywhere_and_stands_where_it_says():
    found = made(
        "In Lyon, Robert Koch spoke. Koch's talk was long.",
        "Who spoke in Lyon?",
        "Robert Koch",
        others=["Joseph Swan"],
    )
    assert found.text() == "In Lyon, Joseph Swan spoke. Swan's talk was long."
    assert (found.answer, found.original_answer) == ("Joseph Swan", "Robert Koch")
    assert found.text()[found.answer_start :].startswith("Joseph Swan")


def test_units_stay_and_are_part_of_the_answer():
    found = made(
        "It weighs 45,000 pounds; 45000 is much.", "How much does it weigh?", "45,000 pounds"
    )
    number = found.answer.removesuffix(" pounds")
    assert re.fullmatch(r"\d\d,000", number)
    assert number != "45,000"
    assert found.text() == f"It weighs {number} pounds; {number.replace(',', '')} is much."


@pytest.mark.parametrize(
    ("reason", "case", "more"),
    [
        ("no known type", ("It is green.", "What is it?", "green"), {}),
        ("in the title", ("Luther spoke.", "Who spoke?", "Luther"), {"title": "Martin Luther"}),
        ("in the question", ("Koch spoke.", "Who spoke of Koch?", "Koch"), {}),
        ("no other answer", ("Koch spoke.", "Who spoke?", "Koch"), {"others": []}),
        ("new to the article", ("Koch met Swan.", "Who met him?", "Koch"), {"others": ["Swan"]}),
        ("too frequent", ("12, 12, 12, 12, 12, 12", "How many?", "12"), {}),
        ("longer name", ("He was Robert Koch.", "Who was he?", "Koch"), {}),
        ("other units", ("It is 187 feet (57 m) high.", "How high?", "187 feet"), {}),
        ("remains", ("Koch saw. Kochian views.", "Who saw?", "Koch"), {}),
        ("a or an", ("He was an Ely man.", "Where was he from?", "Ely"), {"others": ["Rye"]}),
    ],
)
def test_what_is_rejected(reason, case, more):
    with pytest.raises(Rejected, match=reason):
        made(*case, **{"others": ["Swan", "Woolf"], **more})


def test_another_annotators_answer_must_go_too():
    text = "Koch, a priest, spoke."
    article = Article("", text, [Question("q", "Who spoke?", (("Koch", 0), ("priest", 8)))])
    _, pool = asked("Koch.", "Who spoke?", "Koch", others=["Swan"])
    with pytest.raises(Rejected, match="another annotator"):
        counterfactual(article, article.questions[0], pool, random.Random(0), 5)


def test_what_leads_up_to_an_answer_is_left_out():
    question = Question("q", "When?", (("Throughout the 1580s", 10), ("the 1580s.", 21)))
    assert [(answer.text, answer.start) for answer in answers_of(question)] == [
        ("1580s", 25),
        ("1580s", 25),
    ]


def test_a_cut_has_whole_sentences_within_its_limits():
    sentences = [f"Sentence number {i} is here." for i in range(100)]
    text = "Title\n\n" + " ".join(sentences)
    start = text.index("number 40 ")
    for seed in range(20):
        count = token_counter(None)
        part = cut(text, "Title", (start, start + 9), (60, 90), count, random.Random(seed))
        assert 60 <= part.n_tokens == count(part.context) <= 90
        assert part.construction == "truncated"
        assert part.context[part.answer_start :].startswith("number 40 ")
        assert set(re.findall(r"Sentence.*?here\.", part.context)) <= set(sentences)
        assert part.context == f"Title\n\n{text[part.start : part.stop]}"


def settings(**changes):
    given = [f"{key}={value}" for key, value in changes.items()]
    return BuildSettings(**read_settings(BASE, preset="smoke", changes=given))


@pytest.fixture(scope="module")
def built():
    chosen = settings(items_per_split="null", articles=ARTICLES)
    return build_items(read_articles(ARTICLES), chosen, token_counter(None)), chosen


def test_items_keep_what_they_promise(built):
    items, chosen = built[0].items, built[1]
    assert len(items) >= 15
    texts = {article.title: article.text for article in read_articles(ARTICLES)}
    for item in items:
        answer, context = item["answer"], item["context"]
        assert context[item["answer_start"] :].startswith(answer)
        assert not occurs(item["original_answer"], context)
        assert not occurs(answer, texts[item["title"]])
        assert not occurs(answer, item["question"])
        assert not occurs(item["original_answer"], item["question"])
        assert context.startswith(item["title"])
        low, high = chosen.splits[item["split"]]
        assert low <= item["n_tokens"] <= high
        assert item["n_replacements"] >= 1
    assert len({item["id"] for item in items}) == len(items)
    assert len({item["source_id"] for item in items}) == len(items)


def test_every_question_is_counted_once(built):
    report = built[0].report
    assert report["questions"] == 194
    assert report["counterfactuals"] + sum(report["rejected"].values()) == 194
    assert sum(report["items"].values()) == len(built[0].items)
    assert report["counterfactuals"] == len(built[0].items) + report["in no split"]


def test_the_same_seed_makes_the_same_items(built):
    again = build_items(read_articles(ARTICLES), built[1], token_counter(None))
    assert again == built[0]
    other = settings(items_per_split="null", articles=ARTICLES, seed=1)
    assert build_items(read_articles(ARTICLES), other, token_counter(None)).items != again.items


def test_limits_and_reuse():
    articles = read_articles(ARTICLES)
    chosen = settings(
        items_per_split=3, items_per_article=2, reuse_questions="true", kinds="[number]"
    )
    items = build_items(articles, chosen, token_counter(None)).items
    assert [item["split"] for item in items] == ["1k"] * 3 + ["2k"] * 3
    assert {item["answer_kind"] for item in items} == {"number"}
    firsts = [item["source_id"] for item in items]
    assert firsts[:3] == firsts[3:]


def test_rows_make_the_articles_that_squad_makes(tmp_path):
    rows = [
        {
            "title": entry["title"],
            "context": paragraph["context"],
            "question": asked["question"],
            "id": asked["id"],
            "answers": {
                "text": [one["text"] for one in asked["answers"]],
                "answer_start": [one["answer_start"] for one in asked["answers"]],
            },
        }
        for entry in json.loads(ARTICLES.read_text(encoding="utf-8"))["data"]
        for paragraph in entry["paragraphs"]
        for asked in paragraph["qas"]
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert read_articles(path) == read_articles(ARTICLES)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Who?", "answer": "Koch"}, r"row 1 has no field 'context'"),
        ({"context": "K.", "question": "Who?", "answer": "Swan"}, r"row 1: answer 'Swan' is not"),
        ({"context": "Koch.", "question": "Who?"}, r"row 1: 'answer' must be text"),
        ({"context": "Koch.", "question": 3, "answer": "K"}, r"row 1: 'question' must be text"),
    ],
)
def test_bad_rows(tmp_path, row, message):
    with pytest.raises(DocumentError, match=message):
        read_articles(write_rows(tmp_path / "rows.jsonl", [row]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ('{"data": [{"paragraphs": [{"qas": []}]}]}', r"layout of articles.*KeyError\('context'\)"),
        ('{"data": []}', "no question"),
    ],
)
def test_bad_squad_files(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DocumentError, match=message):
        read_articles(path)


def test_the_script(tmp_path):
    output = tmp_path / "items.jsonl"
    command = ["build_items", "--base", BASE, "--preset", "smoke", "--set", f"output={output}"]
    done = run_script(*command)
    assert done.returncode == 0, done.stderr
    lines = output.read_text(encoding="utf-8").splitlines()
    assert f"{len(lines)} items in" in done.stdout
    failed = run_script(*command, "--set", "articles=nowhere.json")
    assert failed.returncode == 2
    assert failed.stderr.startswith("'nowhere.json' cannot be read")
    assert failed.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(not LARGE.exists(), reason="EMT_DATA has no articles/squad_articles.json")
def test_many_articles():
    chosen = settings(splits="{2k: [1500, 2048], 16k: [11000, 16384]}")
    built = build_items(read_articles(LARGE), chosen, token_counter(None))
    assert built.report["items"] == {"2k": 8, "16k": 8}
    for item in built.items:
        assert not occurs(item["original_answer"], item["context"])
