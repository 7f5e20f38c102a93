"""Models that accelerate has placed, all on the CPU: in RAM, offloaded to RAM, or to a disk."""

import itertools

import torch
import pytest
from accelerate import cpu_offload, disk_offload, dispatch_model
from transformers import AutoModelForCausalLM

from emt import MemoryConfig, attach, detach
from emt.answer import answer
from emt.cli import quiet
from emt.errors import MemoryMismatchError
from emt.model.devices import input_device
from emt.model.identity import identity_of
from tests.emt.words import word_tokenizer
from tests.families import VOCAB_SIZE, build

CPU = torch.device("cpu")
PROMPT = torch.tensor([[5, 9, 33, 60, 41, 18]])
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
TEXT = " ".join(f"w{(7 * number) % 90 + 5}" for number in range(80))


def whole(model, folder):
    return dispatch_model(model, {"": "cpu"})


def in_ram(model, folder):
    return cpu_offload(model, execution_device=CPU)


def on_disk(model, folder):
    disk_offload(model, folder / "weights", execution_device=CPU)
    return model


def in_parts(model, folder):
    """Put embeddings and every other block on the disk."""
    decoder, prefix = model.get_decoder(), model.base_model_prefix
    embedding = model.get_input_embeddings()
    places = {}
    for name, module in decoder.named_children():
        if isinstance(module, torch.nn.ModuleList):
            places |= {f"{prefix}.{name}.{at}": ("cpu", "disk")[at % 2] for at in range(3)}
        else:
            places[f"{prefix}.{name}"] = "disk" if module is embedding else "cpu"
    places["lm_head"] = places[next(k for k in places if k.endswith(("embed_tokens", "wte")))]
    with quiet():
        return dispatch_model(model, places, main_device="cpu", offload_dir=folder / "weights")


def loaded(places):
    def place(model, folder):
        model.save_pretrained(folder / "checkpoint")
        with quiet():
            return AutoModelForCausalLM.from_pretrained(
                folder / "checkpoint", device_map=places, offload_folder=folder / "offload"
            ).eval()

    return place


PLACES = {
    "dispatched": whole,
    "cpu offload": in_ram,
    "disk offload": on_disk,
    "in parts": in_parts,
    "device_map cpu": loaded({"": "cpu"}),
    "device_map disk": loaded({"": "disk"}),
}
MODELS = ["llama", "gemma2", "gpt2"]  # the last two tie their embeddings
BY_DEFAULT = {  # each place, each backend, tied embeddings where weights move
    *(("llama", place, "manual") for place in PLACES),
    ("llama", "disk offload", "vector_db"),
    ("gpt2", "in parts", "vector_db"),
    ("gemma2", "device_map disk", "manual"),
}


def combinations():
    for case in itertools.product(MODELS, PLACES, ("manual", "vector_db")):
        marks = [] if case in BY_DEFAULT else [pytest.mark.slow]
        yield pytest.param(*case, marks=marks, id="-".join(case))


def identity(model, memory):
    return identity_of(model, model.get_decoder(), memory.backend.layout, None)


@pytest.mark.parametrize(("model_type", "place", "memory_type"), list(combinations()))
def test_placed_and_plain_models_share_a_store_and_its_tokens(
    model_type, place, memory_type, tmp_path
):
    def config(name):
        return MemoryConfig.published(memory_type=memory_type, topk=4, path=str(tmp_path / name))

    tokenizer = word_tokenizer()
    plain, model = build(model_type), PLACES[place](build(model_type), tmp_path)
    without = plain.generate(PROMPT, **GREEDY).tolist()
    assert input_device(model) == input_device(model.get_decoder()) == CPU

    memory = attach(plain, config("plain"), tokenizer=tokenizer)
    memory.write(TEXT, document="d")
    memory.save()
    expected = plain.generate(PROMPT, **GREEDY).tolist()
    expected_answer = answer(plain, memory, "w5 w9 w33", max_new_tokens=4)
    assert expected != without
    assert identity(model, memory) == identity(plain, memory)
    detach(plain)

    opened = attach(model, config("plain"), tokenizer=tokenizer)  # what the plain one wrote
    assert model.generate(PROMPT, **GREEDY).tolist() == expected
    again = answer(model, opened, "w5 w9 w33", max_new_tokens=4)
    assert again.token_ids == expected_answer.token_ids
    detach(model)
    placed = attach(model, config("placed"), tokenizer=tokenizer)
    placed.write(TEXT, document="d")
    placed.save()
    assert model.generate(PROMPT, **GREEDY).tolist() == expected
    detach(model)
    assert model.generate(PROMPT, **GREEDY).tolist() == without

    reopened = attach(plain, config("placed"), tokenizer=tokenizer)
    assert reopened.documents == ["d"]
    assert plain.generate(PROMPT, **GREEDY).tolist() == expected


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_another_model_is_refused_wherever_its_weights_are(place, tmp_path):
    config = MemoryConfig.published(path=str(tmp_path / "store"))
    attach(build("llama"), config).write([5, 9, 33], document="d")
    other = build("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.001)
    with pytest.raises(MemoryMismatchError, match="weights: the memory has"):
        attach(place(other, tmp_path), config)


def test_blocks_that_are_brought_as_a_whole_have_the_same_fingerprint(tmp_path):
    """`preload_module_classes`: one hook a block, for the weights of all that is in it."""
    plain = build("llama")
    layout = attach(plain).backend.layout
    expected = identity_of(plain, plain.get_decoder(), layout, None)
    model = build("llama")
    disk_offload(
        model,
        tmp_path,
        execution_device=CPU,
        preload_module_classes=["LlamaDecoderLayer", "LlamaModel"],
    )
    assert input_device(model) == input_device(model.get_decoder()) == CPU
    assert identity_of(model, model.get_decoder(), layout, None) == expected
    attach(model).write(torch.randint(3, VOCAB_SIZE, (20,)), document="d")


def test_weights_that_nobody_has_leave_the_field_out():
    model = build("llama")
    layout = attach(model).backend.layout
    assert "weights" in identity_of(model, model.get_decoder(), layout, None)
    detach(model)
    empty = model.to("meta")
    assert not {"weights", "sketch"} & identity_of(empty, empty.get_decoder(), layout, None).keys()
    assert input_device(empty) == torch.device("meta")
