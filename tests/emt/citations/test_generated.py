"""Citations where one forward is not one generated token: as those of a plain run that says it."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
import pytest
from transformers import LogitsProcessor, LogitsProcessorList

from emt import Passage
from emt.errors import MemoryUseError
from tests.emt.citations.recordings import remembering
from tests.emt.routing.worlds import asked, routing
from tests.families import build

TEXT = "\n".join(f"w{n} w{n + 7} w{n + 3} w{n + 1} w{n + 9}" for n in range(10, 80, 7))
PROMPT = torch.tensor([[5, 9, 33, 60, 12, 71, 9]])
NEW = 10
PASSAGE = Passage("d", first=8, stop=30)


def generate(model, prompt=PROMPT, **options):
    options = {"do_sample": False, "min_new_tokens": NEW, **options}
    return model.generate(prompt, max_new_tokens=NEW, **options)


def shares(rows):
    return [{row.row: row.share for row in of_token} for of_token in rows]


def cited(memory, model, recalls, prompt=PROMPT, whole_prompt=False, **options):
    """Generate; return the new tokens, and all kinds of citations of the first sequence."""
    with memory.recording(whole_prompt=whole_prompt) as recording:
        if recalls:
            with memory.recalling([PASSAGE]):
                output = generate(model, prompt, **options)
        else:
            output = generate(model, prompt, **options)
    by = "passage" if recalls else "sentence"
    tokens = output[0, -NEW:].tolist()
    return tokens, recording.token_citations(top=None), recording.citations(by, top=None)


def saying(tokens, width):
    return {"prefix_allowed_tokens_fn": lambda _, ids: [tokens[min(len(ids) - width, NEW - 1)]]}


def assert_same(got, plain):
    tokens, rows, citations = got
    assert tokens == plain[0]
    assert len(rows) == len(plain[1]) == NEW
    for given, expected in zip(shares(rows), shares(plain[1]), strict=True):
        assert given
        assert given == pytest.approx(expected, abs=1e-4)
    assert len(citations) == len(plain[2])
    by_place = {(each.document, each.start): each for each in plain[2]}
    for citation in citations:
        expected = by_place[citation.document, citation.start]
        assert citation.share == pytest.approx(expected.share, abs=1e-4)
        assert citation.copied == pytest.approx(expected.copied, abs=1e-4)
        assert citation.token_attention == pytest.approx(expected.token_attention, abs=1e-4)


def assistant():
    """Return a model that drafts tokens of which some are right."""
    model = build("llama", vocab_size=97)
    with torch.no_grad():
        noise = torch.Generator().manual_seed(1)
        model.lm_head.weight += 0.01 * torch.randn(97, 64, generator=noise)
    model.generation_config.num_assistant_tokens = 4
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.assistant_confidence_threshold = 0
    return model


class OtherPrompts(LogitsProcessor):
    """Runs the model on other prompts in between, with caches of their own and without."""

    def __init__(self, model):
        self.model = model
        self.cache = None

    def __call__(self, input_ids, scores):
        self.model(input_ids[:, :3], use_cache=False)
        self.cache = self.model(input_ids[:, -1:], past_key_values=self.cache).past_key_values
        return scores


NEGATIVE = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10]])  # one longer than the prompt
RUNS = {
    "assistant": lambda model: {"assistant_model": assistant()},
    "the model itself": lambda model: {"assistant_model": model},
    "early exit": lambda model: {"assistant_early_exit": 1},
    "lookup": lambda model: {"prompt_lookup_num_tokens": 3},
    "sampled drafts": lambda model: {"assistant_model": assistant(), "do_sample": True},
    "guidance": lambda model: {"guidance_scale": 1.5},
    "guidance, negative": lambda model: {"guidance_scale": 2, "negative_prompt_ids": NEGATIVE},
    "guidance, no cache": lambda model: {
        "guidance_scale": 2,
        "negative_prompt_ids": NEGATIVE,
        "use_cache": False,
    },
    "chunks": lambda model: {"prefill_chunk_size": 3},
    "chunks of one": lambda model: {"prefill_chunk_size": 1},
    "no cache": lambda model: {"use_cache": False},
    "static": lambda model: {"cache_implementation": "static"},
    "other prompts": lambda model: {"logits_processor": LogitsProcessorList([OtherPrompts(model)])},
}


CASES = [("llama", run) for run in RUNS]
CASES += [("gemma3_text", run) for run in ("assistant", "lookup", "guidance", "chunks")]
CASES += [("bloom", run) for run in ("lookup", "guidance", "no cache")]


@pytest.fixture(scope="module")
def remembered():
    def of_family(name):
        if name not in made:
            made[name] = remembering({"d": TEXT}, name, mode="token", topk=4)
        return made[name]

    made = {}
    return of_family


@pytest.mark.parametrize("recalls", [False, True], ids=["token", "passage"])
@pytest.mark.parametrize(("family", "run"), CASES)
def test_as_a_plain_run_that_says_the_same(remembered, family, run, recalls):
    model, memory = remembered(family)
    torch.manual_seed(0)
    got = cited(memory, model, recalls, whole_prompt=recalls, **RUNS[run](model))
    assert_same(got, cited(memory, model, recalls, **saying(got[0], PROMPT.shape[1])))


@pytest.fixture(scope="module")
def plain(remembered):
    """Citations of a plain run, and what it says."""
    model, memory = remembered("llama")
    return cited(memory, model, recalls=False)


def _all(width):
    return {"attention_mask": torch.ones(1, width, dtype=torch.long)}


def test_a_cache_that_has_the_beginning_of_the_prompt(remembered, plain):
    model, memory = remembered("llama")
    for given in (PROMPT, PROMPT[:, 4:]):  # of the rest alone, the mask is that of all
        with torch.no_grad():
            cache = model(PROMPT[:, :4]).past_key_values
        more = {"past_key_values": cache, **_all(PROMPT.shape[1])}
        assert_same(cited(memory, model, False, prompt=given, **more), plain)


def test_embeddings(remembered, plain):
    model, memory = remembered("llama")
    embeds = model.get_input_embeddings()(PROMPT).detach()
    for prompt, more in ((None, {}), (PROMPT, {}), (None, {"prefill_chunk_size": None})):
        assert_same(cited(memory, model, False, prompt=prompt, inputs_embeds=embeds, **more), plain)


def test_several_calls_and_forwards_by_hand_one_after_the_other(remembered, plain):
    model, memory = remembered("llama")
    with memory.recording() as recording, torch.no_grad():
        generate(model, prefill_chunk_size=2)
        output = generate(model, prompt_lookup_num_tokens=3)
        past = model(output[:, :8]).past_key_values
        model(output[:, 8:9], past_key_values=past)
    expected = shares(plain[1])
    expected = [*expected, *expected, *expected[1:3]]  # of tokens 8 and 9 of the text
    for given, wanted in zip(shares(recording.token_citations(top=None)), expected, strict=True):
        assert given == pytest.approx(wanted, abs=1e-4)
    share = {(each.document, each.start): each.share for each in plain[2]}
    first = recording.citations(num_tokens=NEW, top=None)
    assert {(each.document, each.start): each.share for each in first} == pytest.approx(share)


def test_each_sequence_of_a_padded_batch(remembered):
    model, memory = remembered("llama")
    prompts = torch.tensor([[0, 0, 5, 9, 33], [60, 12, 71, 9, 8]])
    mask = (prompts > 0).long()
    options = {"guidance_scale": 1.5, "do_sample": True, "num_return_sequences": 2}
    torch.manual_seed(0)
    with memory.recording() as recording:
        output = generate(model, prompts, attention_mask=mask, prefill_chunk_size=2, **options)
    for sequence, said in enumerate(output):
        prompt = prompts[sequence // 2][mask[sequence // 2] > 0][None]
        alone = cited(memory, model, False, prompt, **saying(said[5:].tolist(), prompt.shape[1]))
        given = shares(recording.token_citations(sequence=sequence, top=None))
        for got, expected in zip(given, shares(alone[1]), strict=True):
            assert got == pytest.approx(expected, abs=1e-4)


def test_beams_with_guidance(remembered):
    model, memory = remembered("llama")
    with memory.recording() as recording:
        output = generate(
            model,
            num_beams=3,
            guidance_scale=1.5,
            return_dict_in_generate=True,
            output_scores=True,
        )
    said = output.sequences[0, PROMPT.shape[1] :].tolist()
    alone = cited(memory, model, False, **saying(said, PROMPT.shape[1]))
    given = recording.token_citations(beam_indices=output.beam_indices[0], top=None)
    for got, expected in zip(shares(given), shares(alone[1]), strict=True):
        assert got == pytest.approx(expected, abs=1e-4)


def test_drafts_after_the_end_are_not_cited(remembered, plain):
    model, memory = remembered("llama")
    end = plain[0][3]
    assert end not in plain[0][:3]
    with memory.recording() as recording:
        output = model.generate(
            PROMPT, max_new_tokens=NEW, do_sample=False, eos_token_id=end, assistant_model=model
        )
    assert output[0, PROMPT.shape[1] :].tolist() == plain[0][:4]
    given = shares(recording.token_citations(top=None))
    for got, expected in zip(given, shares(plain[1])[:4], strict=True):
        assert got == pytest.approx(expected, abs=1e-4)


def test_an_unconditional_prompt_is_not_among_what_was_routed():
    model = build("llama")
    memory = routing(model)
    with memory.recording() as recording:
        generate(model, asked(1)[None], guidance_scale=1.5)
    assert len(recording.routed) == len(recording.recalled) == 1
    assert len(recording) == len(recording.token_citations()) == NEW


def _by_hand(copied):
    def decode(model, input_ids, **options):
        cache = options["past_key_values"]
        for number in range(NEW):
            cache = copy.deepcopy(cache) if copied else cache
            new = input_ids if not number else input_ids[:, -1:]
            logits = model(new, past_key_values=cache).logits[:, -1]
            input_ids = torch.cat([input_ids, logits.argmax(-1, keepdim=True)], dim=1)
        return input_ids

    return decode


def test_a_loop_of_the_callers_own(remembered, plain):
    model, memory = remembered("llama")
    got = cited(memory, model, False, custom_generate=_by_hand(copied=False))
    assert_same(got, plain)
    with memory.recording() as recording:
        generate(model, custom_generate=_by_hand(copied=True))
    for cite in (recording.citations, recording.token_citations):
        with pytest.raises(MemoryUseError, match=f"{NEW} generated tokens.*custom_generate"):
            cite()


def test_a_call_that_is_broken_off(remembered, plain):
    class Stops(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] == PROMPT.shape[1] + 3:
                raise KeyboardInterrupt
            return scores

    model, memory = remembered("llama")
    with memory.recording() as recording, pytest.raises(KeyboardInterrupt):
        generate(model, logits_processor=LogitsProcessorList([Stops()]))
    given = shares(recording.token_citations(top=None))
    for got, expected in zip(given, shares(plain[1])[:4], strict=True):
        assert got == pytest.approx(expected, abs=1e-4)


def test_two_threads_at_once(remembered, plain):
    class Waits(LogitsProcessor):
        def __call__(self, input_ids, scores):
            both.wait(timeout=60)
            return scores

    model, memory = remembered("llama")
    both = threading.Barrier(2)
    with memory.recording() as recording, ThreadPoolExecutor(2) as threads:
        runs = [
            threads.submit(generate, model, logits_processor=LogitsProcessorList([Waits()]))
            for _ in range(2)
        ]
        for run in runs:
            run.result()
    for got, expected in zip(
        shares(recording.token_citations(top=None)), shares(plain[1]) * 2, strict=True
    ):
        assert got == pytest.approx(expected, abs=1e-4)
