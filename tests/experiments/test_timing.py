"""Timing: break-even arithmetic, answers of each way, what is timed, resuming, errors."""

import random
from contextlib import contextmanager

import torch
import pytest
from experiments.timing.cost import Cost
from experiments.timing.report import costs, draw, summary
from experiments.timing.run import measure, run_timing
from experiments.timing.settings import TimingSettings
from experiments.timing.ways import answer, cached, prompt, remembered

from emt import MemoryConfig, attach, detach
from emt.attach import memory_of
from emt.errors import ConfigError
from tests.experiments.fakes import random_ids, write_texts
from tests.experiments.fakes import tiny_of_words as tiny

WINDOWS = {"stride": 8, "max_length": 16}
DOCUMENT, QUERIES = random_ids(40, 1), [random_ids(5, 5), random_ids(5, 3)]


def settings(data, **changes):
    given = {"lengths": [20, 40], "queries": [1, 4], "query_tokens": 5, "new_tokens": 3}
    given |= {"measured": 2, "rounds": 2, "memory": WINDOWS}
    return TimingSettings(data=str(data), **{**given, **changes})


def run(asked, folder, loaded=None):
    return run_timing(asked, folder, lambda: loaded or tiny())


@pytest.fixture
def data(tmp_path):
    return write_texts(tmp_path / "texts.jsonl", 60)


def test_break_even_by_counting():
    draw = random.Random(0)
    counts = set()
    for _ in range(500):
        mine, other = (Cost(draw.randint(0, 40), draw.randint(1, 6)) for _ in range(2))
        ahead = [mine.once + n * mine.each <= other.once + n * other.each for n in range(1, 200)]
        behind = [n for n, is_ahead in enumerate(ahead, start=1) if not is_ahead]
        expected = None if not ahead[-1] else 1 + max(behind, default=0)
        assert mine.break_even(other) == expected
        counts.add(expected)
    assert {None, 1, 2, 5} <= counts


def test_the_mean_shares_what_is_done_once():
    assert [Cost(12, 2).mean(n) for n in (1, 4)] == [14, 5]


def greedy_by_generate(model, token_ids, count):
    """Greedy tokens by transformers' own loop."""
    output = model.generate(
        token_ids[None],
        attention_mask=torch.ones_like(token_ids)[None],
        do_sample=False,
        max_new_tokens=count,
        min_new_tokens=count,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, len(token_ids) :].tolist()


@pytest.mark.parametrize(
    ("model_type", "options"),
    [("llama", {}), ("gpt2", {}), ("mistral", {"sliding_window": 16})],  # the last cannot crop
)
def test_prompt_and_cached_give_the_same_tokens(model_type, options):
    model = tiny(model_type, **options).model
    expected = [greedy_by_generate(model, torch.cat([DOCUMENT, q]), 6) for q in QUERIES]
    assert expected[0] != expected[1]
    for way in (prompt, cached):
        with way(model, 6, DOCUMENT) as ask:
            assert [ask(query) for query in [*QUERIES, QUERIES[0]]] == [*expected, expected[0]]


@pytest.mark.parametrize("memory_type", ["manual", "vector_db"])
def test_remembered_gives_the_tokens_of_a_memory_written_by_hand(memory_type):
    loaded, config = tiny(), MemoryConfig.published(**WINDOWS, topk=4)
    without = answer(loaded.model, QUERIES[0], 8)
    attach(loaded.model, config, tokenizer=loaded.tokenizer).write(DOCUMENT, document="by hand")
    expected = [greedy_by_generate(loaded.model, query, 8) for query in QUERIES]
    detach(loaded.model)
    # The padding id's embedding is 0, so its query finds all memories equally near.
    assert not any(0 in answer for answer in expected)
    with remembered(loaded, 8, config.replace(memory_type=memory_type), DOCUMENT) as ask:
        assert [ask(query) for query in QUERIES] == expected
    assert memory_of(loaded.model) is None
    assert expected[0] != without == answer(loaded.model, QUERIES[0], 8)


def test_a_memory_that_cannot_be_written_is_detached():
    loaded = tiny()
    with (
        pytest.raises(ValueError, match="token ids"),
        remembered(loaded, 1, MemoryConfig.published(), DOCUMENT + 90),
    ):
        pass
    assert memory_of(loaded.model) is None


def test_what_is_done_once_and_each_query_are_timed_apart(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("experiments.timing.run.time.perf_counter", lambda: now[0])

    @contextmanager
    def condition(document):
        now[0] += len(document)

        def ask(query):
            now[0] += float(query.sum())
            return []

        yield ask
        now[0] += 1000  # taking it down is not timed

    found = measure(condition, torch.arange(7), [torch.tensor([2]), torch.tensor([3, 5])])
    assert found == {"once": 7.0, "queries": [2.0, 8.0]}


def test_a_run_goes_on_where_it_was_stopped(data, tmp_path, monkeypatch):
    full = run(settings(data), tmp_path)
    turns = [(r["length"], r["round"], r["condition"]) for r in full.items.values()]
    names = ["prompt", "prompt, cached", "EMT manual", "EMT vector_db"]
    assert turns == [(n, turn, name) for n in (20, 40) for turn in (0, 1) for name in names]
    assert all(min(record["queries"]) > 0 for record in full.items.values())
    lines = full.path.read_text().splitlines(keepends=True)
    full.path.write_text("".join(lines[:-2]))
    timed = []
    counting = lambda *given: timed.append(given) or measure(*given)  # noqa: E731
    monkeypatch.setattr("experiments.timing.run.measure", counting)
    again = run(settings(data), tmp_path)
    assert list(again.items) == list(full.items)
    assert len(timed) == 2
    assert again.path.read_text().splitlines()[:-2] == [line.rstrip("\n") for line in lines[:-2]]


def test_a_prompt_beyond_the_positions_is_left_out_and_said(data, tmp_path):
    loaded = tiny(max_position_embeddings=30)
    results = run(settings(data, rounds=1), tmp_path, loaded)
    reason = "48 tokens are beyond the model's 30 positions"
    left_out = {key: record.get("left_out") for key, record in results.items.items()}
    assert left_out == {
        **{f"20 / 0 / {name}": None for name in ("prompt", "prompt, cached")},
        **{f"40 / 0 / {name}": reason for name in ("prompt", "prompt, cached")},
        **{f"{n} / 0 / EMT {kind}": None for n in (20, 40) for kind in ("manual", "vector_db")},
    }
    assert f"* 40 tokens: `prompt`, because {reason}" in summary(results.header, results.items)


def item(turn, condition, once, *queries):
    return {"length": 8, "round": turn, "condition": condition, "once": once, "queries": queries}


ITEMS = dict(
    enumerate(
        [
            *(item(turn, "prompt", 0.0, 2.0, 4.0) for turn in range(3)),
            item(0, "EMT", 10.0, 1.0, 1.0),
            item(1, "EMT", 90.0, 1.5, 0.5),
            item(2, "EMT", 9.0, 40.0, 60.0),  # one slow round moves no median
        ]
    )
)


def test_medians_of_rounds(data, tmp_path):
    assert costs(ITEMS) == {8: {"prompt": Cost(0.0, 3.0), "EMT": Cost(10.0, 1.0)}}
    header = run(settings(data, lengths=[8]), tmp_path).header
    lines = summary(header, ITEMS).splitlines()
    assert "| EMT | 10.00 | 1.000 | 11.000 | 3.500 | 5 queries |" in lines
    assert "| prompt | 0.00 | 3.000 | 3.000 | 3.000 |  |" in lines
    assert draw(header, ITEMS, tmp_path) == [tmp_path / "timing.png"]
    assert (tmp_path / "timing.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": [20, 51]}, "need a text of 61 tokens; .* has 60"),
        ({"queries": [2, 1]}, "queries: expected ascending"),
        ({"rounds": 0}, "rounds: Input should be greater than 0"),
        ({"memory": {"path": "x"}}, "memory: 'path' cannot be set"),
        ({"memories": {"prompt": {}}}, "cannot be called 'prompt'"),
        ({"memories": {"EMT": {"stride": 17}}}, r"max_length \(16\)"),
        ({"memory": {}}, r"max_length \(3072\) must be at most the model's 64 positions"),
    ],
)
def test_settings_that_cannot_be_run_are_refused(data, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run(settings(data, **changes), tmp_path, tiny(max_position_embeddings=64))
    assert not (tmp_path / "results.jsonl").exists()
