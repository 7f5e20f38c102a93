"""The texts and questions that come with emt."""

import re

from emt import attach
from emt.profiles.built_in_examples import built_in_examples
from emt.profiles.ranking import HeadRanking
from emt.profiles.trial import MAX_CHARACTERS
from tests.emt.bytes import BYTES_VOCAB_SIZE, byte_tokenizer
from tests.emt.routing.worlds import attached_model
from tests.families import build


def words(text, questions):
    return len(" ".join([text, *questions]).split())


def test_every_question_has_one_answer_in_its_text():
    examples = built_in_examples(words, 10**6)
    assert len(examples) == 72
    documents = list(dict.fromkeys(example.document for example in examples))
    assert len(documents) == 4
    for example in examples:
        assert example.end <= MAX_CHARACTERS
        assert example.document.count(example.document[example.start : example.end]) >= 1
    passages = [passage for document in documents for passage in document.split("\n\n")]
    assert len(passages) == len(set(passages)) == 24
    first = examples[0]
    assert first.question == "How many inhabitants does Kelmouth have?"
    assert first.document[first.start : first.end] == "four thousand"


def test_an_answer_stands_once_in_its_passage_and_not_in_its_question():
    for example in built_in_examples(words, 10**6):
        answer = example.document[example.start : example.end]
        begin = example.document.rfind("\n\n", 0, example.start) + 2
        passage = example.document[max(begin, 0) :].split("\n\n")[0]
        assert len(re.findall(rf"\b{re.escape(answer)}\b", passage)) == 1
        assert answer.lower() not in example.question.lower()


def test_a_smaller_budget_leaves_out_the_last_passages():
    everything = built_in_examples(words, 10**6)
    for budget in (0, 100, 1000, 2000):
        fewer = built_in_examples(words, budget)
        assert [each.question for each in fewer] == [
            each.question for each in everything[: len(fewer)]
        ]
        assert len(fewer) % 3 == 0
        documents = dict.fromkeys(each.document for each in fewer)
        used = sum(words(text, []) for text in documents)
        used += sum(words("", [each.question]) for each in fewer)
        assert used <= budget
        assert used > budget - 200  # no more is left than a passage needs


def test_a_profile_reads_at_most_6000_tokens_whatever_the_tokenizer():
    model = build("llama", vocab_size=BYTES_VOCAB_SIZE)
    memory, counts = attach(model, tokenizer=byte_tokenizer()), []
    tokens_run = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, options: tokens_run.append(options["input_ids"].numel()),
        with_kwargs=True,
    )
    ranking = HeadRanking(attached_model(memory), memory.tokenizer, memory.read)
    ranked = ranking.rank_built_in(name="tiny", on_tokens=lambda *count: counts.append(count))
    hook.remove()
    assert ranked.num_questions >= 18  # of bytes, a third fits
    num_read, total = counts[-1]
    assert num_read == total <= 6000
    # Prompts of similar lengths share a forward: little is padding, and nothing is run twice.
    assert total <= sum(tokens_run) <= 1.05 * total
    assert ranked.profile.source == "texts of emt"
