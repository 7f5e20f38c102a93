"""The published interface: models that are given their memories as token ids."""

import copy
import inspect
import json

import torch
import pytest
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    pipeline,
)

import emt
from emt import MemoryConfig
from emt.errors import ConfigError, DocumentError, MemoryUseError
from emt.published import ExtendedLlamaConfig, ExtendedMptConfig
from emt.published.settings import PUBLISHED
from tests.emt.commands import make_model
from tests.emt.published.extended import LLAMA, MEMORY, PROMPT, llama, logits
from tests.emt.reference_fixtures import REFERENCE, case, published_folder
from tests.families import build

# -- checkpoints ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama_mha", "mpt"])
@pytest.mark.parametrize("trust_remote_code", [True, False, None])
def test_a_published_folder_loads_without_its_remote_code(name, trust_remote_code, tmp_path):
    expected = case(name, "b_memory")
    folder = published_folder(tmp_path / "model", name, expected.memory_settings)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        external_memories=expected.tensor("memory_ids"),
        trust_remote_code=trust_remote_code,
    )
    kind = emt.ExtendedMptForCausalLM if name == "mpt" else emt.ExtendedLlamaForCausalLM
    assert type(model) is kind
    found = logits(model, expected.tensor("input_ids")).numpy()
    assert abs(found - expected.arrays["logits"]).max() <= 1e-4
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))
    assert "auto_map" not in saved
    assert saved["model_type"] == ("extended-mpt" if name == "mpt" else "extended-llama")


@pytest.mark.parametrize("place", ["top", "attn_config", "memory_config"])
def test_settings_are_found_wherever_a_config_has_them(place):
    values = {"topk": 3, "use_external_mind_by_layer": [True, False, True]}
    attention = {"softmax_scale": 0.3}
    if place == "attn_config":
        attention |= values
    given = {"top": values, "attn_config": {}, "memory_config": {"memory_config": values}}[place]
    before = copy.deepcopy(attention)
    config = ExtendedMptConfig(n_layers=3, attn_config=attention, **given)
    assert config.memory_config == values
    assert config.attn_config.softmax_scale == 0.3
    assert not hasattr(config, "topk")
    assert not hasattr(config.attn_config, "topk")
    assert attention == before


def test_the_nearest_place_counts():
    config = ExtendedMptConfig(
        attn_config={"topk": 1, "mask_by_sim": False},
        topk=2,
        stride=64,
        memory_config={"topk": 3},
    )
    assert config.memory_config == {"topk": 3, "mask_by_sim": False, "stride": 64}


def test_published_defaults():
    assert ExtendedLlamaConfig().rms_norm_eps == 1e-5
    config = ExtendedMptConfig(max_seq_len_inference=77)
    assert (config.d_model, config.n_heads, config.n_layers) == (4096, 32, 32)
    assert (config.vocab_size, config.max_seq_len) == (50432, 77)
    assert llama(special_ids=None).config.rms_norm_eps == 1e-5
    found = emt.ExtendedLlamaForCausalLM.from_pretrained(LLAMA).memory.config
    assert found == MemoryConfig.published(special_ids=(0, 1, 2), max_length=512)
    found = emt.ExtendedMptForCausalLM.from_pretrained(REFERENCE / "mpt").memory.config
    assert found == MemoryConfig.published(
        mask_by_sim=True, remove_special_ids=False, special_ids=(0, 50278), max_length=512
    )
    found = emt.ExtendedMindForCausalLM.from_pretrained(LLAMA).memory.config
    assert found == MemoryConfig.published(max_length=512)


@pytest.mark.parametrize(
    ("extended", "stock", "model_type"),
    [(ExtendedLlamaConfig, LlamaConfig, "llama"), (ExtendedMptConfig, MptConfig, "mpt")],
)
def test_what_a_stock_config_does_not_say_is_as_in_the_stock_class(
    extended, stock, model_type, tmp_path
):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    found = extended.from_pretrained(tmp_path).to_dict()
    for name, value in stock.from_pretrained(tmp_path).to_dict().items():
        if name != "model_type":
            assert found[name] == value, name


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "remove_special_tokens"])
def test_every_setting_is_a_keyword_and_a_key(name, tmp_path):
    settings = {
        "memory_type": "vector_db",
        "memory_device": "cpu",
        "topk": 3,
        "mask_by_sim": True,
        "sim_threshold": 0.5,
        "use_external_mind": False,
        "use_external_mind_by_layer": [False, True, True],
        "tokenizer_all_special_ids": [5],
        "remove_special_ids": False,
        "stride": 64,
        "max_length": 128,
    }
    value = settings[name]
    here = {"stride": 64} if name == "max_length" else {}
    as_keyword = emt.ExtendedLlamaForCausalLM.from_pretrained(LLAMA, **{name: value}, **here)
    folder = published_folder(tmp_path / "model", "llama_gqa", {name: value, **here})
    as_key = AutoModelForCausalLM.from_pretrained(folder)
    found = as_keyword.memory.config
    assert found == as_key.memory.config
    if name != "memory_device":  # the CPU is where memories are anyway
        default = emt.ExtendedLlamaForCausalLM.from_pretrained(LLAMA, **here).memory.config
        assert found != default


def test_old_names_mean_the_same():
    one = llama(memory_type="faiss", remove_special_tokens=False, index="Flat")
    other = llama(memory_type="vector_db", remove_special_ids=False, index="Flat")
    assert one.memory.config == other.memory.config
    assert torch.equal(logits(one), logits(other))


def test_a_config_can_be_changed_before_the_model_is_made(tmp_path):
    folder = published_folder(tmp_path / "model", "llama_gqa", {"topk": 5})
    config = AutoConfig.from_pretrained(folder, topk=7, mask_by_sim=True)
    assert config.memory_config == {"topk": 7, "mask_by_sim": True}
    config.topk = 2
    model = AutoModelForCausalLM.from_pretrained(folder, config=config)
    assert (model.memory.config.topk, model.memory.config.mask_by_sim) == (2, True)


def test_strides_that_nobody_asked_for_are_at_most_as_long_as_windows():
    assert llama(max_length=30).memory.config.stride == 30
    assert llama(max_length=512).memory.config.stride == 512


def test_devices_and_homes_are_understood(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = llama(memory_device=torch.device("cpu"), path="~/memories")
    assert model.memory.config.memory_device is None
    assert model.memory.config.path == str(tmp_path / "memories")


def test_attach_takes_the_settings_a_model_was_loaded_with():
    model = llama()
    memory = emt.attach(model)
    assert memory is model.memory
    assert memory.config.topk == 3


@pytest.mark.parametrize("kind", ["qwen3", "llama4_text"])  # whose decoder is the whole model
def test_any_family(kind, tmp_path):
    build(kind).save_pretrained(tmp_path / "stock")
    model = emt.ExtendedMindForCausalLM.from_pretrained(
        tmp_path / "stock", external_memories=MEMORY, memory_type="vector_db", index="Flat", topk=3
    )
    attached = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    memory = emt.attach(attached, MemoryConfig.published(topk=3))
    memory.write(MEMORY, document="d")
    assert isinstance(model, type(attached))
    torch.testing.assert_close(logits(model), logits(attached), atol=1e-5, rtol=0)
    assert (logits(model) - logits(model, topk=0)).abs().max() > 1e-3


def test_extended_mind_is_made_by_from_pretrained():
    with pytest.raises(TypeError, match="from_pretrained"):
        emt.ExtendedMindForCausalLM()


# -- memories ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [list, torch.tensor, lambda ids: torch.tensor([ids])])
def test_memory_ids_in_any_form(form):
    model = llama(external_memories=form(MEMORY))
    assert model.memory_ids == MEMORY
    assert torch.equal(logits(model), logits(llama()))


def test_memories_are_made_by_the_first_call_and_forgotten_on_request(model):
    plain = LlamaForCausalLM.from_pretrained(LLAMA)
    assert len(model.memory) == 0
    remembering = logits(model)
    assert len(model.memory) == len(MEMORY)
    assert (remembering - logits(plain)).abs().max() > 1e-2
    model.clear_memories()
    assert model.memory_ids is None
    assert len(model.memory) == 0
    assert torch.equal(logits(model), logits(plain))
    model.memory_ids = MEMORY
    assert torch.equal(logits(model), remembering)
    model.clear_memory()
    assert torch.equal(logits(model), logits(plain))
    model.memory_ids = MEMORY
    model.memory_ids = None
    assert torch.equal(logits(model), logits(plain))


def test_a_model_made_from_a_config():
    config = ExtendedLlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = emt.ExtendedLlamaForCausalLM(config, external_memories=MEMORY, topk=2).eval()
    assert config.memory_config == {}  # another model may share it
    assert model.config.memory_config == {"topk": 2}
    assert (logits(model) - logits(model, topk=0)).abs().max() > 1e-6


def test_a_copy_has_memories_of_its_own(model):
    remembering = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), remembering)
    twin.memory_ids = list(range(50, 60))
    assert (logits(twin) - remembering).abs().max() > 1e-3
    assert torch.equal(logits(model), remembering)


def test_documents_that_were_written_otherwise_stay(tmp_path):
    model = llama(memory_type="vector_db", path=tmp_path / "m", index="Flat")
    model.memory.write([5, 6, 7, 8], document="mine")
    logits(model)
    assert model.memory.documents == ["mine", "external_memories"]
    indices = model(PROMPT, output_retrieved_memory_idx=True, topk=20).attentions[1][0]
    assert (indices == -1).any()  # rows of "mine" are no positions in memory_ids
    assert indices.max() == len(MEMORY) - 1
    model.clear_memories()
    assert model.memory.documents == ["mine"]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "must be text or token ids"),
        ([3, 256], "0 to 255; got 3 to 256"),
        ([0.5], "must be text or token ids"),
        ([[3, 4], [5, 6]], "must be text or token ids"),
        ("some text", "tokenizer"),
    ],
)
def test_memory_ids_that_are_none_are_refused_at_once(ids, message, model):
    with pytest.raises((DocumentError, MemoryUseError), match=message):
        model.memory_ids = ids
    assert model.memory_ids == MEMORY


def test_a_model_in_training_mode_does_not_read(model):
    model.train()
    with pytest.raises(MemoryUseError, match="evaluation mode"):
        logits(model)


def test_generate_cache_remembers_nothing(model):
    cache = model.generate_cache([MEMORY], stride=16, max_len=32)
    assert len(model.memory) == 0
    assert [tuple(part.shape) for part in cache[0]] == [(1, 2, len(MEMORY), 16)] * 2
    whole = model.generate_cache(MEMORY)
    torch.testing.assert_close(whole[2][0][:, :, :32], cache[2][0][:, :, :32], atol=1e-5, rtol=0)
    assert (whole[2][0] - cache[2][0]).abs().max() > 1e-3


# -- saving -----------------------------------------------------------------------------------


def test_settings_survive_saving(tmp_path):
    model = llama(
        mask_by_sim=True, sim_threshold=-0.5, use_external_mind_by_layer=[True, False, True]
    )
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", external_memories=MEMORY)
    assert type(again) is emt.ExtendedLlamaForCausalLM
    assert again.memory.config == model.memory.config
    assert torch.equal(logits(again), logits(model))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", topk=7)
    assert again.memory.config == model.memory.config.replace(topk=7)


@pytest.mark.parametrize("kind", [emt.ExtendedLlamaForCausalLM, emt.ExtendedMindForCausalLM])
@pytest.mark.parametrize("memory_type", ["manual", "vector_db"])
def test_memories_with_a_path_are_found_again(kind, memory_type, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = kind.from_pretrained(
        LLAMA, external_memories=MEMORY, memory_type=memory_type, path="memories", topk=3
    )
    remembering = logits(model)
    model.save_pretrained("saved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = kind.from_pretrained("../saved")
    assert torch.equal(logits(again), remembering)
    assert again.memory_ids == MEMORY
    again.clear_memories()
    third = kind.from_pretrained("../saved")
    assert third.memory_ids is None
    assert torch.equal(logits(third), logits(model, topk=0))


def test_what_extended_mind_saves_is_a_stock_checkpoint(tmp_path):
    model = emt.ExtendedMindForCausalLM.from_pretrained(LLAMA, external_memories=MEMORY, topk=3)
    model.save_pretrained(tmp_path / "saved")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(stock) is LlamaForCausalLM
    assert torch.equal(logits(stock), logits(model, topk=0))
    assert AutoConfig.from_pretrained(tmp_path / "saved").architectures == ["LlamaForCausalLM"]


def test_stock_and_extended_models_share_a_store(tmp_path):
    memory = emt.attach(
        LlamaForCausalLM.from_pretrained(LLAMA), MemoryConfig.published(path=str(tmp_path / "m"))
    )
    memory.write(MEMORY, document="d")
    model = llama(external_memories=None, path=tmp_path / "m")
    assert torch.equal(logits(model), logits(llama()))


@pytest.mark.parametrize("change", [{"stride": 16, "max_length": 32}, {"special_ids": [5, 6]}])
def test_a_store_that_was_read_otherwise_is_read_again(change, tmp_path):
    options = {"memory_type": "vector_db", "index": "Flat", "path": tmp_path / "m"}
    before = logits(llama(**options))
    assert torch.equal(logits(llama(**options)), before)
    changed = logits(llama(**options, **change))
    torch.testing.assert_close(changed, logits(llama(**change)), atol=1e-5, rtol=0)
    assert (changed - before).abs().max() > 1e-3
    assert torch.equal(logits(llama(**options)), before)


# -- calls ------------------------------------------------------------------------------------


def test_options_of_one_call(model):
    with_three = logits(model)
    assert torch.equal(logits(model, topk=0), logits(model, use_external_mind=False))
    one = logits(model, topk=1)
    assert torch.equal(one, logits(llama(topk=1)))
    assert torch.equal(logits(model), with_three)
    off = llama(use_external_mind=False)
    assert torch.equal(logits(off), logits(model, topk=0))
    assert torch.equal(logits(off, use_external_mind=True), with_three)


def test_generate_takes_the_same_options(model):
    def generated(**options):
        found = model.generate(
            PROMPT, max_new_tokens=3, do_sample=False, output_logits=True,
            return_dict_in_generate=True, **options,
        )  # fmt: skip
        return found.logits[0]

    for options in ({"topk": 1}, {"topk": 0}, {"use_external_mind": False}, {}):
        expected = logits(model, **options)[:, -1]
        torch.testing.assert_close(generated(**options), expected, atol=2e-5, rtol=0)
    assert (generated(topk=1) - generated()).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topk": -1}, "topk .* got -1"),
        ({"topk": True}, "topk .* got True"),
        ({"topk": 2.0}, r"topk .* got 2\.0"),
        ({"use_external_mind": "no"}, "enabled .* got 'no'"),
    ],
)
def test_wrong_options_of_a_call_are_refused(model, options, message):
    before = logits(model)
    with pytest.raises(ConfigError, match=message):
        logits(model, **options)
    with pytest.raises(ConfigError, match=message):
        model.generate(PROMPT, max_new_tokens=1, **options)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topkk": 3}, "'topkk'.*'topk'"),
        ({"topk": 4.0}, r"topk .* got 4\.0"),
        ({"memory_type": "redis"}, "memory_type .*'manual'.* got 'redis'"),
        ({"use_external_mind_by_layer": [True]}, "use_external_mind_by_layer .* list of 3"),
        ({"use_external_mind_by_layer": [1, 1, 1]}, "use_external_mind_by_layer .* list of 3"),
        ({"layers": [0], "use_external_mind_by_layer": [True] * 3}, "another name of the same"),
        ({"stride": 100, "max_length": 50}, r"max_length \(50\) .* stride \(100\)"),
    ],
)
def test_wrong_settings_are_refused_when_the_model_is_made(options, message):
    with pytest.raises(ConfigError, match=message):
        llama(**options)


def test_indices_and_weights_in_the_published_layout(model):
    out = model.generate(
        PROMPT,
        max_length=9,
        do_sample=False,
        eos_token_id=None,
        output_retrieved_memory_idx=True,
        return_dict_in_generate=True,
        output_attentions=True,
    )
    assert len(out.attentions) == 4
    for step, (weights, indices) in enumerate(out.attentions):
        num_queries = 5 if step == 0 else 1
        assert len(weights) == len(indices) == 3
        for layer in range(3):
            assert indices[layer].shape == (1, 4, num_queries * 3)
            assert indices[layer].dtype == torch.int64
            assert 0 <= indices[layer].min() <= indices[layer].max() < len(MEMORY)
            assert weights[layer].shape == (1, 4, num_queries, num_queries * 3 + 5 + step)
            torch.testing.assert_close(
                weights[layer].sum(-1), torch.ones(1, 4, num_queries), atol=1e-5, rtol=0
            )
    with_memory = out.attentions[0][0][0][0, 0]
    assert with_memory[1, :3].eq(0).all()  # another query's memories
    assert with_memory[1, 3:6].gt(0).all()


def test_indices_without_weights_and_weights_without_indices(model):
    common = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True}
    out = model.generate(PROMPT, output_retrieved_memory_idx=True, **common)
    assert [weights for weights, _ in out.attentions] == [None, None]
    plain = model.generate(PROMPT, output_attentions=True, **common)
    assert plain.attentions[0][0].shape == (1, 4, 5, 5 * 3 + 5)


def test_mpt_has_weights_too():
    model = emt.ExtendedMptForCausalLM.from_pretrained(
        REFERENCE / "mpt", external_memories=MEMORY, topk=3, mask_by_sim=False
    )
    out = model(PROMPT, output_attentions=True, output_retrieved_memory_idx=True)
    weights, indices = out.attentions
    assert weights[0].shape == (1, 4, 5, 5 * 3 + 5)
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(1, 4, 5), atol=1e-5, rtol=0)
    assert indices[0].shape == (1, 4, 15)


def test_indices_need_a_dict(model):
    with pytest.raises(ConfigError, match="return_dict_in_generate=True"):
        model.generate(PROMPT, output_retrieved_memory_idx=True)
    with pytest.raises(ConfigError, match="return_dict=True"):
        model(PROMPT, output_retrieved_memory_idx=True, return_dict=False)


def test_what_was_retrieved_can_be_cited(tmp_path):
    make_model(tmp_path / "model")
    model = emt.ExtendedMindForCausalLM.from_pretrained(
        tmp_path / "model", external_memories=list(range(5, 40)), topk=4
    )
    out = model.generate(
        torch.tensor([[7, 8, 9]]),
        max_new_tokens=3,
        do_sample=False,
        eos_token_id=None,
        output_retrieved_memory_idx=True,
        return_dict_in_generate=True,
    )
    assert len(out.recording) == 3
    cited = out.recording.citations()
    assert {citation.document for citation in cited} == {"external_memories"}
    by_token = out.recording.token_citations()
    for step, rows in enumerate(by_token):
        named = torch.cat([idx.flatten() for idx in out.attentions[step][1]])
        assert rows
        assert all(row.token in named for row in rows)


# -- the rest of transformers -----------------------------------------------------------------


def test_forward_says_what_it_takes(model):
    parameters = inspect.signature(model.forward).parameters
    stock = inspect.signature(LlamaForCausalLM.forward).parameters
    options = {"topk", "use_external_mind", "output_retrieved_memory_idx"}
    assert set(parameters) == (set(stock) - {"self"}) | options


def test_typing_errors_in_generate_are_still_found(model):
    with pytest.raises(ValueError, match="topkk"):
        model.generate(PROMPT, max_new_tokens=1, topkk=3)


def test_beams_are_those_of_the_attached_model(model):
    attached = LlamaForCausalLM.from_pretrained(LLAMA)
    memory = emt.attach(attached, MemoryConfig.published(topk=3))
    memory.write(MEMORY, document="d")
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    assert torch.equal(model.generate(PROMPT, **options), attached.generate(PROMPT, **options))
    options = {"max_new_tokens": 5, "do_sample": True, "num_return_sequences": 2}
    torch.manual_seed(3)
    found = model.generate(PROMPT, **options)
    torch.manual_seed(3)
    assert torch.equal(found, attached.generate(PROMPT, **options))


def test_a_pipeline(tmp_path):
    make_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = emt.ExtendedMindForCausalLM.from_pretrained(
        tmp_path / "model", external_memories=list(range(5, 40)), topk=4
    )
    ids = tokenizer("w7 w8 w9", return_tensors="pt").input_ids
    output = model.generate(ids, max_new_tokens=4, do_sample=False)
    expected = tokenizer.decode(output[0], skip_special_tokens=True)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    found = generator("w7 w8 w9", max_new_tokens=4, do_sample=False)
    assert found[0]["generated_text"].replace(" ", "") == expected.replace(" ", "")


def test_a_compiled_model_remembers(model):
    expected = logits(model)
    torch.testing.assert_close(
        logits(torch.compile(llama(), backend="eager")), expected, atol=1e-5, rtol=0
    )


def test_a_model_offloaded_by_accelerate_remembers(model):
    expected = model.generate(PROMPT, max_new_tokens=3, do_sample=False)
    offloaded = cpu_offload(llama(), execution_device="cpu")
    assert torch.equal(offloaded.generate(PROMPT, max_new_tokens=3, do_sample=False), expected)
    assert torch.equal(logits(offloaded), logits(model))
    placed = emt.ExtendedMindForCausalLM.from_pretrained(
        LLAMA, external_memories=MEMORY, topk=3, special_ids=[0, 1, 2], device_map="auto"
    )
    assert torch.equal(placed.generate(PROMPT, max_new_tokens=3, do_sample=False), expected)


# of a property of transformers that peft still reads
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_a_model_with_adapters_remembers(model):
    expected = logits(model)
    wrapped = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    wrapped.eval()
    torch.testing.assert_close(logits(wrapped), expected, atol=1e-5, rtol=0)
    found = wrapped.generate(input_ids=PROMPT, max_new_tokens=3, do_sample=False, topk=1)
    assert torch.equal(found, model.generate(PROMPT, max_new_tokens=3, do_sample=False, topk=1))


def test_nothing_is_written_while_generating(model):
    logits(model)

    class Changing:
        def put(self, value):
            with pytest.raises(MemoryUseError, match="cannot remove while the model is generating"):
                model.clear_memories()

        def end(self):
            pass

    model.generate(PROMPT, max_new_tokens=2, do_sample=False, streamer=Changing())
    assert len(model.memory) == len(MEMORY)


def test_detach_leaves_a_model_that_remembers_again_when_it_is_called(model):
    remembering = logits(model)
    emt.detach(model)
    assert torch.equal(logits(model), remembering)
