"""Active retrieval: `generate` against a loop over forwards that never takes anything back."""

import copy

import torch
import pytest
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import LinearAttentionLayer

import emt
from emt import MemoryConfig, attach
from emt.errors import ConfigError
from emt.modes.token.redo import next_token_entropy
from emt.published import ExtendedLlamaConfig
from tests.emt.modes.generation import run_together
from tests.families import VOCAB_SIZE, build

PROMPT = torch.tensor([[5, 9, 33, 60, 41, 18]])
PROMPTS = [PROMPT, PROMPT[:, :2], PROMPT[:, 2:]]
NEW = 10
LOW, HIGH = 2, 9
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "use_cache": True}
LOGITS = {"return_dict_in_generate": True, "output_logits": True}
# windows of 5 tokens, which the prompt is longer than
FAMILIES = {
    "llama": {},
    "gemma2": {"sliding_window": 5},
    "gpt_oss": {"sliding_window": 5},
    "gpt_neox": {},
    "gpt2": {},
    "mpt": {},
}


def remembering(model_type="llama", *, num_rows=80, **settings):
    model = build(model_type, **FAMILIES[model_type])
    memory = attach(model, MemoryConfig.published(topk=LOW, **settings))
    memory.write(torch.randint(3, VOCAB_SIZE, (num_rows,)), document="d")
    return model, memory


@torch.no_grad()
def by_hand(model, memory, prompt, entropy):
    """Generate greedily; return tokens, each step's logits, and which steps were redone.

    Each forward starts from a copy of the cache, so nothing is ever taken back.
    """
    tokens, logits, redone = prompt, [], []
    cache = DynamicCache(config=model.config)
    with memory.using(topk=LOW):
        model(prompt[:, :-1], past_key_values=cache)
    for _ in range(NEW):
        for topk in (LOW, HIGH):
            after = copy.deepcopy(cache)
            with memory.using(topk=topk):
                found = model(tokens[:, -1:], past_key_values=after).logits[:, -1]
            uncertain = float(torch.distributions.Categorical(logits=found).entropy()) > entropy
            if not (topk == LOW and uncertain):
                break
        redone.append(topk == HIGH)
        logits.append(found)
        cache = after
        allowed = found.clone()
        allowed[:, 2] = -torch.inf  # min_new_tokens
        tokens = torch.cat([tokens, allowed.argmax(-1, keepdim=True)], dim=-1)
    return tokens, torch.cat(logits), redone


def middle(model, prompt=PROMPT):
    """Return an entropy between those of the steps of a plain generation."""
    found = model.generate(prompt, **GREEDY, **LOGITS).logits
    return float(torch.cat([next_token_entropy(step) for step in found]).median())


def batch():
    input_ids = torch.cat([torch.nn.functional.pad(p, (6 - p.shape[1], 0)) for p in PROMPTS])
    return {"input_ids": input_ids, "attention_mask": (input_ids > 0).long()}


# -- the steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("threshold", ["always", "sometimes"])
def test_uncertain_steps_are_redone_on_the_same_cache(model_type, threshold):
    model, memory = remembering(model_type)
    entropy = 0.0 if threshold == "always" else middle(model)
    tokens, logits, redone = by_hand(model, memory, PROMPT, entropy)
    assert all(redone) if threshold == "always" else 0 < sum(redone) < NEW
    plain = model.generate(PROMPT, **GREEDY, **LOGITS)
    with memory.using(uncertainty={"entropy": entropy, "topk": HIGH}):
        found = model.generate(PROMPT, **GREEDY, **LOGITS)
    assert found.sequences.tolist() == tokens.tolist()
    torch.testing.assert_close(torch.cat(found.logits), logits, atol=3e-5, rtol=0)
    assert float((torch.cat(found.logits) - torch.cat(plain.logits)).abs().max()) > 1e-2
    again = model.generate(PROMPT, **GREEDY, **LOGITS)
    assert all(map(torch.equal, again.logits, plain.logits))


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3}], ids=str)
def test_certain_steps_are_left_bit_for_bit(model_type, options):
    model, memory = remembering(model_type)
    drawn = []
    for uncertainty in (None, {"entropy": float("inf"), "topk": HIGH}):
        torch.manual_seed(3)
        with memory.using(uncertainty=uncertainty):
            drawn.append(model.generate(**batch(), **{**GREEDY, **LOGITS, **options}))
    assert torch.equal(drawn[0].sequences, drawn[1].sequences)
    assert all(map(torch.equal, drawn[0].logits, drawn[1].logits))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_each_sequence_of_a_batch_decides_for_itself(model_type):
    model, memory = remembering(model_type)
    entropy = middle(model)
    by_prompt = [by_hand(model, memory, prompt, entropy) for prompt in PROMPTS]
    assert any(
        0 < sum(step) < len(PROMPTS) for step in zip(*(r for *_, r in by_prompt), strict=True)
    )
    uncertain = memory.using(uncertainty={"entropy": entropy, "topk": HIGH})
    with uncertain, memory.recording() as recording:
        found = model.generate(**batch(), **GREEDY)
    for row, (tokens, _, _) in zip(found, by_prompt, strict=True):
        assert row[6:].tolist() == tokens[0, -NEW:].tolist()
    assert recording.num_redone == sum(sum(redone) for *_, redone in by_prompt)


def test_beams_that_are_always_redone_are_those_of_more_memories():
    model, memory = remembering()
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 3}
    # of a prompt of one token, the last is the first: nothing differs but how it was computed
    prompt = PROMPT[:, :1]
    with memory.using(topk=HIGH):
        expected = model.generate(prompt, **options).tolist()
    assert model.generate(prompt, **options).tolist() != expected
    with memory.using(uncertainty={"entropy": 0, "topk": HIGH}):
        assert model.generate(prompt, **options).tolist() == expected


def test_sampling_that_is_always_redone_is_that_of_more_memories():
    model, memory = remembering()
    options = {**GREEDY, "do_sample": True, "num_return_sequences": 4}

    def draw(**settings):
        torch.manual_seed(3)
        with memory.using(**settings):
            return model.generate(PROMPT[:, :1], **options).tolist()

    always = draw(uncertainty={"entropy": 0, "topk": HIGH})
    assert always == draw(topk=HIGH) != draw()


def test_entropy_is_that_of_the_distribution():
    logits = torch.randn(5, VOCAB_SIZE) * 3
    logits[0, 3:] = -torch.inf
    shares = torch.softmax(logits.double(), dim=-1).numpy()
    expected = [-sum(p * torch.tensor(p).log().item() for p in row if p > 0) for row in shares]
    assert next_token_entropy(logits).tolist() == pytest.approx(expected, abs=1e-5)
    assert float(next_token_entropy(torch.zeros(1, 8))) == pytest.approx(2.0794415)


# -- what is recorded ---------------------------------------------------------------------------


def test_a_redone_step_is_recorded_once_and_all_its_rows_are_counted():
    model, memory = remembering()
    entropy = middle(model)
    tokens, _, redone = by_hand(model, memory, PROMPT, entropy)
    uncertain = memory.using(uncertainty={"entropy": entropy, "topk": HIGH})
    with uncertain, memory.recording() as last, memory.recording(whole_prompt=True) as whole:
        model.generate(PROMPT, **GREEDY)
    assert len(last) == len(whole) == NEW
    shown = [int((step[1].ids >= 0).sum(-1).unique()) for step in last]
    assert shown == [HIGH if again else LOW for again in redone]
    assert (last.num_redone, whole.num_redone) == (sum(redone), sum(redone))
    heads = 3 * 4  # layers, query heads
    per_step = LOW * NEW + HIGH * sum(redone)
    assert last.num_retrieved == heads * per_step
    assert whole.num_retrieved == heads * (per_step + LOW * (PROMPT.shape[1] - 1))
    # the rows are those of the redo: what a forward with more memories retrieves by itself
    at = redone.index(True, 1)
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), memory.using(topk=LOW):
        model(tokens[:, :6], past_key_values=cache)
    for step in range(at + 1):
        with torch.no_grad(), memory.using(topk=HIGH if redone[step] else LOW):
            cache = cache if step else crop(cache)
            with memory.recording() as alone:
                model(tokens[:, 5 + step : 6 + step], past_key_values=cache)
    assert torch.equal(last[at][2].ids, alone[0][2].ids)
    torch.testing.assert_close(last[at][2].weights, alone[0][2].weights, atol=1e-5, rtol=0)


def crop(cache):
    cache.crop(-1)
    return cache


def test_a_batch_records_what_each_sequence_used():
    model, memory = remembering()
    entropy = middle(model)
    redone = [by_hand(model, memory, prompt, entropy)[2] for prompt in PROMPTS]
    uncertain = memory.using(uncertainty={"entropy": entropy, "topk": HIGH})
    with uncertain, memory.recording() as recording:
        model.generate(**batch(), **GREEDY)
    for at, step in enumerate(recording):
        for row in range(len(PROMPTS)):
            used = HIGH if redone[row][at] else LOW
            for retrieved in step.values():
                has_weight = retrieved.weights[row] > 0
                assert torch.equal(has_weight, retrieved.ids[row] >= 0)
                assert has_weight.sum(-1).unique().tolist() == [used]


# -- where it does not apply --------------------------------------------------------------------


@pytest.mark.parametrize("why", ["off", "empty", "all found"])
def test_nothing_is_redone_where_there_is_nothing_more_to_find(why):
    model, memory = remembering(num_rows=LOW)
    options = {"enabled": why != "off"}
    if why == "empty":
        memory.clear()
    forwards = []
    model.get_decoder().register_forward_hook(lambda *_: forwards.append(1))
    with memory.using(uncertainty={"entropy": 0, "topk": HIGH}, **options):
        model.generate(PROMPT, **GREEDY)
    assert len(forwards) == NEW


def test_a_forward_outside_of_generate_is_not_redone():
    model, memory = remembering()
    with torch.no_grad():
        plain = model(PROMPT).logits
        with memory.using(uncertainty={"entropy": 0, "topk": HIGH}):
            assert torch.equal(model(PROMPT).logits, plain)


def test_hooks_are_gone_afterwards_and_threads_keep_apart():
    model, memory = remembering()
    expected, found = {}, {}
    with memory.using(uncertainty={"entropy": 0, "topk": HIGH}):
        for length in (2, 6):
            expected[length] = model.generate(PROMPT[:, :length], **GREEDY).tolist()

        def run(length):
            found[length] = model.generate(PROMPT[:, :length], **GREEDY).tolist()

        run_together(*(lambda length=length: run(length) for length in expected))
    assert found == expected
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"cache_implementation": "static"}, "StaticCache"),
        ({"use_cache": False}, "use_cache=False"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"prefill_chunk_size": 2}, "prefill_chunk_size"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"generation_config": GenerationConfig(output_hidden_states=True)}, "output_hidden"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_redone_is_refused(options, named):
    model, memory = remembering()
    with memory.using(uncertainty={"entropy": 1.0, "topk": HIGH}):
        with pytest.raises(ConfigError, match=f"the setting uncertainty .* got {named}"):
            model.generate(PROMPT, max_new_tokens=2, **options)
        assert not model._forward_hooks
    assert model.generate(PROMPT, max_new_tokens=2, **options) is not None


@pytest.mark.parametrize("kind", ["offloaded", "linear"])
def test_other_layers_of_a_dynamic_cache_are_refused(kind):
    model, memory = remembering()
    cache = DynamicCache(config=model.config)
    if kind == "offloaded":
        cache.offloading = True
    else:
        cache.layers[1] = LinearAttentionLayer()
    with memory.using(uncertainty={"entropy": 1.0, "topk": HIGH}):
        with pytest.raises(ConfigError, match="takes a token back from a DynamicCache") as caught:
            model.generate(PROMPT, past_key_values=cache, **GREEDY)
        assert ("with LinearAttentionLayer." in str(caught.value)) == (kind == "linear")
        assert cache.get_seq_length() == 0


def test_a_prompt_goes_on_from_a_cache():
    model, memory = remembering()
    always = {"entropy": 0, "topk": HIGH}
    tokens, _, _ = by_hand(model, memory, PROMPT, 0.0)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(PROMPT[:, :3], past_key_values=cache)
    with memory.using(uncertainty=always):
        assert model.generate(PROMPT, past_key_values=cache, **GREEDY).tolist() == tokens.tolist()


def test_the_published_interface_takes_it_for_one_call():
    ids = torch.randint(3, VOCAB_SIZE, (1, 60))
    stock = build("llama")
    model = emt.ExtendedLlamaForCausalLM(
        ExtendedLlamaConfig(**stock.config.to_dict()), external_memories=ids, topk=LOW
    ).eval()
    model.load_state_dict(stock.state_dict())
    memory = attach(stock, MemoryConfig.published(topk=LOW, special_ids=(0, 1, 2)))
    memory.write(ids, document="d")
    with memory.using(uncertainty={"entropy": 0, "topk": HIGH}):
        expected = stock.generate(PROMPT, **GREEDY).tolist()
    uncertainty = {"entropy": 0, "topk": HIGH}
    assert model.generate(PROMPT, uncertainty=uncertainty, **GREEDY).tolist() == expected
    assert model.generate(PROMPT, **GREEDY).tolist() != expected
    with pytest.raises(ConfigError, match=r"uncertainty's topk \(2\) .* topk \(2\)"):
        model.generate(PROMPT, uncertainty={"entropy": 0, "topk": LOW}, **GREEDY)


def test_topk_auto_is_resolved_by_the_rows_there_are():
    model, memory = remembering()
    with torch.no_grad():
        with memory.using(topk=4):
            expected = model(PROMPT).logits
        with memory.using(topk="auto"), memory.recording() as recording:
            assert torch.equal(model(PROMPT).logits, expected)
    assert recording[0][0].ids.shape[-1] == 4


def test_a_forward_that_is_called_with_positions_is_redone():
    model, memory = remembering()
    with memory.using(uncertainty={"entropy": 0, "topk": HIGH}):
        expected = model.generate(PROMPT, **GREEDY, **LOGITS)

    class Positional(type(model)):
        def __call__(self, **inputs):
            first = ("input_ids", "attention_mask", "position_ids", "past_key_values")
            args = [inputs.pop(name, None) for name in first]
            return super().__call__(*args, **inputs)

    model.__class__ = Positional
    with memory.using(uncertainty={"entropy": 0, "topk": HIGH}), memory.recording() as recording:
        output = model.generate(PROMPT, **GREEDY, **LOGITS)
    assert recording.num_redone == NEW
    assert output.sequences.tolist() == expected.sequences.tolist()
    # a step that is recorded is computed in another order
    torch.testing.assert_close(output.logits, expected.logits, atol=2e-5, rtol=0)
