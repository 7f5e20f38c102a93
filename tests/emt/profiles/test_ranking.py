"""Ranking the heads of a tiny model by questions, and choosing the best."""

import torch
import pytest

from emt import MemoryConfig, attach
from emt.errors import ConfigError, MemoryUseError
from emt.profiles.examples import Example
from emt.profiles.ranking import HeadRanking, choose_heads
from tests.emt.routing.worlds import attached_model, tokens
from tests.emt.words import word_tokenizer
from tests.families import build


def examples(count=4, each=4):
    """Return questions in the words of the sentence that answers them."""
    questions = []
    for number in range(count):
        names = [f"w{token}" for token in tokens(120, 40 + number).tolist()]
        text = " ".join(names)
        for question in range(each):
            at = 10 + 25 * question
            start = len(" ".join(names[:at])) + 1
            around = " ".join(names[at - 4 : at] + names[at + 1 : at + 4])
            questions.append(Example(text, around, start, start + len(names[at])))
    return questions


def memory_of(model, **settings):
    return attach(model, MemoryConfig.published(**settings), tokenizer=word_tokenizer())


def ranked_by(memory, questions, **options):
    """Rank the heads of a memory's model; options of `HeadRanking.rank`."""
    model = attached_model(memory)
    ranking = HeadRanking(model, memory.tokenizer, memory.read)
    return ranking.rank(questions, name="tiny", **options)


@pytest.fixture(scope="module")
def world():
    """A model and its empty memory, which no test changes."""
    model = build("llama")
    return model, memory_of(model)


def test_a_profile_is_made_and_fits():
    model, read = build("llama"), []
    memory = memory_of(model)
    ranked = memory.rank_heads(
        examples(), name="tiny", source="words", on_tokens=lambda *counts: read.append(counts)
    )
    profile, attached = ranked.profile, attached_model(memory)
    profile.check(attached.query_heads, attached.layout)
    assert profile.sketch.to_json() == attached.identity["sketch"]
    assert (profile.model, profile.source) == ("tiny", "words")
    assert 0 <= ranked.agreement <= 1
    assert (ranked.num_questions, ranked.num_rows) == (16, 4 * 120)
    total = 4 * 120 + 16 * 8  # words of the texts, and of the questions with <bos>
    assert (read[0], read[-1]) == ((0, total), (total, total))
    assert [num_read for num_read, _ in read] == sorted({num_read for num_read, _ in read})
    assert {num_tokens for _, num_tokens in read} == {total}
    assert len(memory) == 0  # nothing is written
    memory.write(torch.arange(3, 60), document="d")
    memory.keep_profile(profile)
    with memory.using(mode="passage"):
        memory.route(torch.arange(3, 20))


def test_the_best_heads_are_chosen_one_of_each_layer_first(world):
    ranked = ranked_by(world[1], examples())
    deviations = [score.deviations for score in ranked.scores.values()]
    assert len(deviations) == 12
    assert deviations == sorted(deviations, reverse=True)
    good = [head for head in ranked.scores if ranked.scores[head].deviations >= deviations[0] / 4]
    of_layer = {layer: (layer, head) for layer, head in reversed(good)}
    chosen = [(head.layer, head.head) for head in ranked.profile.heads]
    assert set(of_layer.values()) <= set(chosen)
    assert len(chosen) == min(5, len(good)) > len(of_layer) > 1
    assert chosen == [head for head in good if head in chosen]
    hit_rates = [ranked.scores[head].hit_rate for head in chosen]
    assert [head.hit_rate for head in ranked.profile.heads] == hit_rates


def test_it_is_the_same_each_time(world):
    first, second, other = (
        ranked_by(world[1], examples(6), num_questions=12, num_texts=4, seed=seed)
        for seed in (0, 0, 1)
    )
    assert first.profile.to_json() == second.profile.to_json()
    assert first.scores == second.scores
    assert first.num_questions == 12
    assert other.profile.to_json() != first.profile.to_json()


def test_only_full_attention_layers_route():
    model = build("gemma3_text", sliding_window=16)
    ranked = ranked_by(memory_of(model), examples())
    assert {layer for layer, _ in ranked.scores} == {1}


def test_a_head_that_copies_is_chosen():
    """Keys and queries of one head are the tokens' embeddings: it finds the same words."""
    model = build("llama")
    layer = model.model.layers[0].self_attn
    with torch.no_grad():
        projection = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
        layer.q_proj.weight[16:32] = projection
        layer.k_proj.weight[:16] = projection
    ranked = ranked_by(memory_of(model), examples())
    (best, of_best), (_, of_second) = list(ranked.scores.items())[:2]
    assert best == (0, 1)
    assert of_best.deviations > 1.3 * of_second.deviations
    assert of_best.hit_rate >= 0.5


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ([], "at least 4 questions about 2 texts.*got 0"),
        (examples(4, 1)[:3], "got 3"),
        (examples(1, 4), "2 texts"),
        ([Example("w5 " * 4000, "w5", 9000, 9002)] * 9, "first 8000 characters; got 0"),
    ],
)
def test_too_few_questions(world, questions, message):
    with pytest.raises(ConfigError, match=message):
        ranked_by(world[1], questions)


def test_without_a_tokenizer():
    model = build("llama")
    with pytest.raises(MemoryUseError, match="a head profile needs a tokenizer"):
        ranked_by(attach(model), examples())


def test_a_model_without_full_attention():
    layers = ["sliding_attention"] * 3
    model = build("gemma3_text", sliding_window=16, layer_types=layers)
    with pytest.raises(ConfigError, match="see the whole context"):
        ranked_by(memory_of(model, layers=(0,)), examples())


def test_heads_of_neighbouring_layers_are_not_both_chosen():
    heads = [(9, 0), (10, 0), (9, 1), (11, 1), (30, 0), (29, 0), (0, 1), (1, 1), (2, 1), (4, 1)]
    assert choose_heads(heads, 32) == [(9, 0), (11, 1), (30, 0), (0, 1), (2, 1)]
    assert choose_heads(heads, 16) == [(9, 0), (10, 0), (11, 1), (30, 0), (29, 0)]
    # Where too few are apart, the best of the others are chosen, too.
    assert choose_heads(heads[:6], 32) == [(9, 0), (10, 0), (9, 1), (11, 1), (30, 0)]
    assert choose_heads([(5, 1), (5, 0), (5, 2)], 32) == [(5, 1), (5, 0), (5, 2)]
    assert choose_heads([], 32) == []
