"""One prompt, one answer, with what it was made from: what the command line and the demo do."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from emt.citations.citing import Citation, RowCitation, cite, cite_tokens, content_layers
from emt.citations.passages import CitedPassage, cite_passages
from emt.errors import ConfigError, MemoryUseError
from emt.ingest.documents import is_utf8
from emt.memory.memory import Memory
from emt.model.devices import input_device
from emt.model.positions import max_positions


@dataclass(frozen=True)
class Answer:
    """A generated text with its sources.

    Attributes:
        prompt: as given.
        text: what was generated, without special tokens.
        token_ids: the generated ids, special ones included.
        tokens: the text of each generated id.
        num_redone: how many of them were chosen in a step that was redone with more memories.
        num_retrieved: rows that the queries which chose them retrieved, over all layers and heads.
        citations: the passages that carried most memory attention, in `content_layers`.
        token_citations: the same, row by row, for each generated token.
        passages: those that were recalled for the prompt, in passage mode, by the attention they
            received in `content_layers`.
        timings: seconds, and tokens a second.
    """

    prompt: str
    text: str
    token_ids: list[int]
    tokens: list[str]
    num_redone: int
    num_retrieved: int
    citations: list[Citation]
    token_citations: list[list[RowCitation]]
    passages: list[CitedPassage]
    timings: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return the answer as plain JSON types."""
        cited = self.token_citations or [[] for _ in self.token_ids]
        return {
            "prompt": self.prompt,
            "text": self.text,
            "token_ids": self.token_ids,
            "timings": self.timings,
            "num_redone": self.num_redone,
            "num_retrieved": self.num_retrieved,
            "citations": [asdict(citation) for citation in self.citations],
            "passages": [asdict(passage) for passage in self.passages],
            "tokens": [
                {"id": token_id, "text": text, "rows": [asdict(row) for row in rows]}
                for token_id, text, rows in zip(self.token_ids, self.tokens, cited, strict=True)
            ],
        }


def generate(
    model: PreTrainedModel,
    memory: Memory,
    prompt: str,
    *,
    chat: bool | None = None,
    max_new_tokens: int = 64,
    use_memory: bool = True,
    mode: Literal["token", "passage", "auto"] | None = None,
    topk: int | Literal["auto"] | None = None,
    uncertainty: Mapping[str, Any] | None = None,
    documents: Sequence[str] | None = None,
    where: Mapping[str, Any] | None = None,
) -> Answer:
    """Answer one prompt greedily.

    Args:
        model: the model the memory is attached to.
        memory: with a tokenizer.
        prompt: the user's message, or plain text to go on from.
        chat: put the prompt into the chat template; None for "if the tokenizer has one".
        max_new_tokens: where to stop at the latest.
        use_memory: False for the plain model.
        mode: how the memory is used, as in `MemoryConfig`; its own setting if None.
        topk: memories for each query; the memory's own setting if None.
        uncertainty: when a step is redone, and with how many memories, as in `MemoryConfig`; the
            memory's own setting if None.
        documents: names of those that may be read; None for all.
        where: metadata that they must have, as in `Memory.using`.

    Raises:
        DocumentError: a document is unknown, or `where` is not a filter.
        ConfigError: the prompt is empty, not Unicode or too long, a number is below 1,
            `uncertainty` is wrong, `chat` is True and there is no template, or `mode` is "passage"
            and there is no head profile.
        MemoryUseError: the memory has no tokenizer.
    """
    tokenizer = memory.tokenizer
    if tokenizer is None:
        raise MemoryUseError("generating from text needs a tokenizer. Pass one to attach().")
    if not prompt.strip():
        raise ConfigError("the prompt is empty. Ask something.")
    if not is_utf8(prompt):
        raise ConfigError("the prompt is not UTF-8. Convert it.")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1; got {max_new_tokens}.")
    input_ids = _prompt_ids(tokenizer, prompt, chat).to(input_device(model))
    num_prompt = input_ids.shape[1]
    positions = max_positions(model.config.get_text_config())
    if positions is not None and num_prompt + max_new_tokens > positions:
        raise ConfigError(
            f"the prompt's {num_prompt} tokens and {max_new_tokens} new ones must fit the model's "
            f"{positions} positions. Shorten the prompt, or index it as a document."
        )
    pad = tokenizer.pad_token_id
    given = {
        "mode": mode,
        "topk": topk,
        "uncertainty": uncertainty,
        "documents": documents,
        "where": where,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if not use_memory:
        changes["enabled"] = False
    started = time.perf_counter()
    with memory.using(**changes), memory.recording() as recording:
        output = cast(Any, model).generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=pad if pad is not None else tokenizer.eos_token_id,
        )
    seconds = time.perf_counter() - started
    token_ids = output[0, num_prompt:].tolist()
    layers = content_layers(memory)
    return Answer(
        prompt=prompt,
        text=str(tokenizer.decode(token_ids, skip_special_tokens=True)).strip(),
        token_ids=token_ids,
        tokens=[str(tokenizer.decode([token_id])) for token_id in token_ids],
        num_redone=recording.num_redone,
        num_retrieved=recording.num_retrieved,
        citations=cite(memory, recording, layers=layers),
        token_citations=cite_tokens(memory, recording, layers=layers),
        passages=cite_passages(memory, recording),
        timings={
            "generate_seconds": round(seconds, 3),
            "tokens_per_second": round(len(token_ids) / seconds, 2),
        },
    )


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool | None) -> torch.Tensor:
    has_template = bool(tokenizer.chat_template)
    if chat and not has_template:
        raise ConfigError("this model's tokenizer has no chat template. Use --no-chat.")
    use_template = has_template if chat is None else chat
    if use_template:
        message = [{"role": "user", "content": prompt}]
        prompt = cast(
            str,
            tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False),
        )
    add_special_tokens = not use_template  # a template writes its own
    encoded = tokenizer(prompt, add_special_tokens=add_special_tokens, verbose=False)
    return torch.tensor([encoded["input_ids"]], dtype=torch.long)
