"""One prompt, one answer, with what it was made from: what the command line and the demo do."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from emt.citations.characters import text_of_tokens
from emt.citations.citing import Citation, RowCitation
from emt.errors import ConfigError, MemoryUseError
from emt.ingest.documents import is_utf8
from emt.memory.memory import Memory
from emt.model.chat import prompt_ids
from emt.model.devices import input_device
from emt.model.positions import max_positions
from emt.model.text_pieces import TextPieces, text_of


@dataclass(frozen=True)
class Answer:
    """A generated text with its sources.

    Attributes:
        text: what was generated, without special tokens.
        token_ids: the generated ids, special ones included.
        timings: seconds, and tokens a second.
        num_redone: how many of the ids were chosen in a step that was redone with more memories.
        num_retrieved: rows that their queries retrieved, over all layers and heads.
        citations: the sentences that carried most memory attention.
        passages: those that were recalled for the prompt, by the attention they received.
        tokens: the text that each generated id adds, together the generated text; of ids that make
            up one character the last has it.
        token_citations: the rows that carried most memory attention, for each generated token.
    """

    prompt: str
    text: str
    token_ids: list[int]
    timings: dict[str, float]
    num_redone: int
    num_retrieved: int
    citations: list[Citation]
    passages: list[Citation]
    tokens: list[str]
    token_citations: list[list[RowCitation]]

    def to_json(self) -> dict[str, Any]:
        """Return the answer as plain JSON types."""
        plain = asdict(self)
        rows = plain.pop("token_citations") or [[] for _ in self.token_ids]
        plain["tokens"] = [
            {"id": token_id, "text": text, "rows": of_token}
            for token_id, text, of_token in zip(self.token_ids, self.tokens, rows, strict=True)
        ]
        return plain


def answer(
    model: PreTrainedModel,
    memory: Memory,
    prompt: str,
    *,
    chat: bool | None = None,
    max_new_tokens: int = 64,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    on_text: Callable[[str], object] | None = None,
    **settings: Any,
) -> Answer:
    """Answer one prompt: greedily, or by sampling if `temperature` or `top_p` is given.

    Args:
        model: the model the memory is attached to.
        memory: with a tokenizer.
        prompt: the user's message, or plain text to go on from.
        chat: put the prompt into the chat template; None for "if the tokenizer has one".
        max_new_tokens: where to stop at the latest.
        temperature: logits are divided by it; 0 for greedy.
        top_p: sample from the fewest tokens with this probability together, above 0 and up to 1.
        seed: of sampling: the same gives the same answer. Other random numbers stay as they are.
        on_text: called with each piece of the text when it is generated; all pieces are the text.
        **settings: as in `Memory.using`: `enabled=False` for the plain model, `topk`, `documents`
            and so on.

    Raises:
        ConfigError: the prompt is empty, not Unicode or too long, a number is out of range, a
            setting is wrong, `chat` is True and there is no template, or `routing` is "heads" and
            there is no head profile.
        DocumentError: a document is unknown, or `where` is not a filter.
        MemoryUseError: the memory has no tokenizer.
    """
    sampling = sampling_options(temperature, top_p, seed)
    input_ids = _input_ids(model, tokenizer_of(memory), prompt, chat, max_new_tokens)
    with memory.using(**settings), seeded(seed, input_ids.device):
        return answer_to(
            model,
            memory,
            input_ids,
            prompt,
            max_new_tokens=max_new_tokens,
            on_text=on_text,
            **sampling,
        )[0]


def answer_to(
    model: PreTrainedModel,
    memory: Memory,
    input_ids: torch.Tensor,
    prompt: str,
    *,
    on_text: Callable[[str], object] | None = None,
    **options: Any,
) -> tuple[Answer, Any]:
    """Answer token ids, (1, T) int64 on the model's device; return the cache that is filled, too.

    Args:
        model: the model the memory is attached to.
        memory: with a tokenizer.
        input_ids: of the whole prompt, what a cache among the options holds included.
        prompt: what was asked, for the answer.
        on_text: as for `answer`.
        **options: of `generate`.
    """
    tokenizer = tokenizer_of(memory)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    started = time.perf_counter()
    streamer = None if on_text is None else TextPieces(tokenizer, on_text)
    with memory.recording() as recording:
        output = cast(Any, model).generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            num_beams=1,
            use_cache=True,
            pad_token_id=pad,
            streamer=streamer,
            return_dict_in_generate=True,
            **options,
        )
    seconds = time.perf_counter() - started
    token_ids = output.sequences[0, input_ids.shape[1] :].tolist()
    answered = Answer(
        prompt=prompt,
        text=text_of(tokenizer, token_ids),
        token_ids=token_ids,
        tokens=text_of_tokens(token_ids, tokenizer),
        num_redone=recording.num_redone,
        num_retrieved=recording.num_retrieved,
        citations=recording.citations(),
        token_citations=recording.token_citations(),
        passages=recording.citations("passage", top=None),
        timings={
            "generate_seconds": round(seconds, 3),
            "tokens_per_second": round(len(token_ids) / seconds, 2),
        },
    )
    return answered, output.past_key_values


def tokenizer_of(memory: Memory) -> PreTrainedTokenizerBase:
    """Return a memory's tokenizer.

    Raises:
        MemoryUseError: it has none.
    """
    if memory.tokenizer is None:
        raise MemoryUseError("generating from text needs a tokenizer. Pass one to attach().")
    return memory.tokenizer


def sampling_options(
    temperature: float | None, top_p: float | None, seed: int | None
) -> dict[str, Any]:
    """Return keywords of `generate`; what is not given is the checkpoint's own.

    Raises:
        ConfigError: a number is out of range.
    """
    for name, value, is_right, expected in (
        ("temperature", temperature, lambda t: 0 <= t < math.inf, "a number of at least 0"),
        ("top_p", top_p, lambda p: 0 < p <= 1, "a number above 0 and up to 1"),
        ("seed", seed, lambda s: type(s) is int and 0 <= s < 2**63, "a whole number, 0 to 2**63-1"),
    ):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (is_number and is_right(value)):
            raise ConfigError(f"{name} must be {expected}; got {value!r}.")
    given = {"temperature": temperature, "top_p": top_p}
    given = {name: float(value) for name, value in given.items() if value is not None}
    if not given or temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, **given}


@contextlib.contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draw random numbers from a seed, and put back the state of the generators after that."""
    if seed is None:
        yield
        return
    is_cpu = device.type == "cpu"  # its generator is always put back
    kind = "cuda" if is_cpu else device.type
    with torch.random.fork_rng([] if is_cpu else [device], device_type=kind):
        torch.manual_seed(seed)
        yield


def _input_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    chat: bool | None,
    max_new_tokens: int,
) -> torch.Tensor:
    """Return the prompt's tokens on the model's device, (1, T) int64; refuse what does not fit."""
    check_prompt(prompt)
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1; got {max_new_tokens}.")
    input_ids = prompt_ids(tokenizer, prompt, chat)[None].to(input_device(model))
    num_prompt = input_ids.shape[1]
    positions = max_positions(model.config.get_text_config())
    if positions is not None and num_prompt + max_new_tokens > positions:
        raise ConfigError(
            f"the prompt's {num_prompt} tokens and {max_new_tokens} new ones must fit the model's "
            f"{positions} positions. Shorten the prompt, or index it as a document."
        )
    return input_ids


def check_prompt(prompt: str, noun: str = "prompt") -> None:
    """Refuse a prompt, which errors call `noun`, that says nothing.

    Raises:
        ConfigError: it is empty, or not Unicode.
    """
    if not prompt.strip():
        raise ConfigError(f"the {noun} is empty. Ask something.")
    if not is_utf8(prompt):
        raise ConfigError(f"the {noun} is not UTF-8. Convert it.")
