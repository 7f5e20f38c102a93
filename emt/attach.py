"""`attach` and `detach`: put a memory into a model, prove that it works, take it out."""

from __future__ import annotations

import contextlib
import functools
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast
from weakref import ReferenceType

from torch import nn
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase

from emt.calls import GenerateOptions, Generation, overriding
from emt.config import MemoryConfig
from emt.errors import MemoryUseError, UnsupportedModelError
from emt.memory.memory import Memory
from emt.model.adapters import installing as adapters
from emt.model.adapters.installing import Adapted
from emt.model.attached import AttachedModel
from emt.model.devices import input_device, no_autocast
from emt.model.hook import bind, is_bound, unbind
from emt.model.identity import identity_of
from emt.model.implementations import Implementations
from emt.model.probe import dry_run, layout_of
from emt.model.references import alive
from emt.modes.token.redo import redoing
from emt.turn import keeping_turn


@dataclass(frozen=True)
class _Attachment:
    """What `detach` needs to put everything back."""

    memory: Memory
    decoder: ReferenceType[PreTrainedModel]
    modules: list[nn.Module]
    implementations: Implementations | None  # None for a family with an adapter
    adapted: list[Adapted]
    generate: Callable[..., Any] | None  # the model's own, if it is not its class's


_attached: weakref.WeakKeyDictionary[PreTrainedModel, _Attachment] = weakref.WeakKeyDictionary()


def attach(
    model: PreTrainedModel,
    config: MemoryConfig | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Memory:
    """Give a model a memory. Until something is written, the model computes what it always did.

    A deep copy of the model has no memory until it is attached itself.

    Args:
        model: a causal language model as `from_pretrained` gives it, any dtype, any device;
            what `torch.compile` made of one, or a PEFT model around one, adapters included.
        config: the memory's settings; if None, those that the model was loaded with
            (`emt.ExtendedMindForCausalLM`), or else the defaults.
        tokenizer: needed to write text (ids need none), to find the special ids, and to cite.

    Returns:
        The memory, opened from `config.path` if there is a store.

    Raises:
        UnsupportedModelError: the model's attention cannot be reached, naming the layers; memories
            cannot be given to an attention function that the user registered; or a PEFT model puts
            tokens of its own before a prompt.
        MemoryUseError: the model has a memory already.
        ConfigError: `config.layers` names layers that the model does not have.
        MemoryMismatchError: the store at `config.path` was written by another model.
        StoreError: the store at `config.path` is damaged.
        IndexFactoryError: FAISS rejects `config.index`.
    """
    if config is None:
        config = getattr(model, "memory_settings", None) or MemoryConfig()
    model = _unwrapped(model)
    decoder = _decoder_of(model)
    if any(is_bound(module) for module in decoder.modules()):
        raise MemoryUseError(
            "this model already has a memory. "
            "Use the Memory that attach() returned, or detach() first."
        )
    adapted = adapters.install(decoder)
    # An inline family reads its implementation to choose masks and code paths: leave it alone.
    implementations = None if adapted else Implementations(decoder)
    try:
        with no_autocast(input_device(decoder)):
            layers = dry_run(decoder)
            if implementations is not None:
                implementations.prove(next(iter(layers.values())).call)
        modules = [layer.call.module for layer in layers.values()]
        layout = layout_of(layers)
        memory = Memory(
            AttachedModel(
                model=weakref.ref(model),
                decoder=weakref.ref(decoder),
                config=decoder.config,
                layout=layout,
                unrotations={idx: layer.unrotation for idx, layer in layers.items()},
                query_heads={idx: layer.call.query.shape[1] for idx, layer in layers.items()},
                full_attention_layers=tuple(
                    idx for idx, layer in layers.items() if not layer.is_sliding
                ),
                identity=identity_of(model, decoder, layout, tokenizer),
            ),
            config,
            tokenizer,
        )
    except BaseException:
        adapters.remove(adapted)
        if implementations is not None:
            implementations.restore()
        raise
    bind(decoder, modules, memory, None if implementations is None else implementations.follow)
    own = vars(model).get("generate")
    if getattr(own, "__func__", None) is _generate:  # a copy of an attached model
        own = None
    _attached[model] = _Attachment(
        memory, weakref.ref(decoder), modules, implementations, adapted, own
    )
    if isinstance(model, GenerationMixin) and not getattr(model, "guards_generate", False):
        vars(model)["generate"] = types.MethodType(_generate, model)
    return memory


def detach(model: PreTrainedModel) -> None:
    """Undo `attach`: the model computes bit for bit what it did before. Its memory stays readable.

    Raises:
        MemoryUseError: the model has no memory, or is generating.
    """
    model = _unwrapped(model)
    attachment = _attached.get(model)
    if attachment is None:
        raise MemoryUseError("this model has no memory to detach. Call attach() first.")
    with attachment.memory.activity.alone("detach"):
        attachment.memory.forget_model()
        del _attached[model]
        unbind(alive(attachment.decoder, "detach"), attachment.modules)
        vars(model).pop("generate", None)
        if attachment.generate is not None:
            vars(model)["generate"] = attachment.generate
        adapters.remove(attachment.adapted)
        if attachment.implementations is not None:
            attachment.implementations.restore()


def _unwrapped(model: Any) -> PreTrainedModel:
    """Return the model inside a compiled or a PEFT model, with the adapters that are in it."""
    if hasattr(model, "_orig_mod"):  # torch.compile's
        return _unwrapped(model._orig_mod)
    if isinstance(model, PreTrainedModel) or not hasattr(model, "get_base_model"):
        return cast(PreTrainedModel, model)
    if model.active_peft_config.is_prompt_learning:
        raise UnsupportedModelError(
            f"{type(model).__name__} puts trained tokens before every prompt, which documents are "
            "not read with. Attach to a model with adapters in its weights, such as LoRA's."
        )
    return _unwrapped(model.get_base_model())


def _decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    decoder: object = None
    if isinstance(model, PreTrainedModel) and not model.config.is_encoder_decoder:
        get_decoder = cast(Callable[[], object], model.get_decoder)
        decoder = get_decoder()
        if not isinstance(decoder, PreTrainedModel):  # ModernBERT's `decoder` is its output layer
            decoder = model.base_model
        if decoder is model:  # Llama 4's names lead nowhere
            inner = [part for part in model.children() if isinstance(part, PreTrainedModel)]
            decoder = inner[0] if len(inner) == 1 else model
    if not isinstance(decoder, PreTrainedModel):
        raise UnsupportedModelError(
            f"expected a decoder-only causal language model; got {type(model).__name__}. "
            "Load the checkpoint with AutoModelForCausalLM."
        )
    return decoder


@functools.wraps(GenerationMixin.generate)
def _generate(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Let the memory know while `generate` runs, so that nobody writes meanwhile.

    A bound method in the attached model's `__dict__`: a deep copy binds it to the copy, which is
    not attached.
    """
    attachment = _attached.get(model)
    generate: Callable[..., Any] | None = None if attachment is None else attachment.generate
    if generate is None:
        generate = functools.partial(cast(Any, type(model)).generate, model)
    if attachment is None:
        return generate(*args, **kwargs)
    positional = dict(zip(("inputs", "generation_config"), args, strict=False))
    with generating(model, {**positional, **kwargs}) as generation:
        output = generate(*args, **kwargs)
        generation.end(output)
        return output


@contextlib.contextmanager
def generating(model: PreTrainedModel, keywords: Mapping[str, Any]) -> Iterator[Generation]:
    """Keep the memory from being changed while `generate(**keywords)` runs, and redo its steps.

    Raises:
        ConfigError: options that the mode in force cannot serve.
        MemoryUseError: the memory is being changed.
    """
    attachment = _attached[model]
    if attachment.implementations is not None:
        attachment.implementations.follow()  # masks for caches of fixed size are made beforehand
    memory, options = attachment.memory, GenerateOptions(model, keywords)
    turn = memory.new_turn()
    is_draft = turn.overrides.generation is not None
    generation = Generation(options.prompt_width, options.num_given, is_draft)
    if turn.mode is not None:
        turn.mode.check(turn, options)
    with contextlib.ExitStack() as call:
        call.enter_context(memory.activity.shared("generate"))
        call.enter_context(keeping_turn())
        call.enter_context(overriding(memory, generation=generation))
        if turn.config.uncertainty is not None and turn.mode is not None and turn.mode.retrieves:
            call.enter_context(redoing(model, memory, generation))
        yield generation


def memory_of(model: PreTrainedModel) -> Memory | None:
    """Return the memory that is attached to a model, or None."""
    attachment = _attached.get(model)
    return None if attachment is None else attachment.memory
