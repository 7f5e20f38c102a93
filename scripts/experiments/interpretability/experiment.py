"""Interpretability: what memories are attended to, and what the answer owes to how many there are.

Each document is remembered by itself, and its question asked under each condition: with more and
more memories, with `topk: auto`, with active retrieval. Of each answer there is kept what it says,
how likely the right and the original answer were, how many rows it retrieved, which passage it
would cite first, and how much attention each layer and head gave to memories.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList

from emt.attach import attach, detach
from emt.errors import ConfigError
from emt.model.loading import LoadedModel
from experiments.interpretability.attention_mass import attention_mass, share_of_passages_with
from experiments.interpretability.settings import InterpretabilitySettings
from experiments.items import Item, chosen, load_items
from experiments.results import Results
from experiments.texts import fingerprint

EXPERIMENT = "interpretability"
_DOCUMENT = "document"


def run_interpretability(
    settings: InterpretabilitySettings, loaded: LoadedModel, path: Path | str
) -> Results:
    """Ask what was not asked yet.

    Args:
        settings: what to ask.
        loaded: who answers.
        path: the results file, `.jsonl`.

    Raises:
        ConfigError: a wrong setting, or results of other settings are there.
        DocumentError: items cannot be used.
    """
    items = chosen(load_items(str(settings.items)), settings.splits, settings.limit)
    digest = fingerprint(str(settings.items))
    asked = {**dataclasses.asdict(settings), "items_sha256": digest}
    del asked["limit"]  # a later run may ask more
    results = Results(path, EXPERIMENT, asked)
    conditions = settings.conditions()
    keys = [f"{item.id}/{name}" for item in items for name in conditions]
    finished = sum(key in results for key in keys)
    with tqdm(total=len(keys), initial=finished, unit="answer", disable=None) as bar:
        for item in items:
            left = {
                key: (name, options)
                for name, options in conditions.items()
                if (key := f"{item.id}/{name}") not in results
            }
            if not left:
                continue
            asking = _Asking(loaded, item, settings)
            try:
                for key, (name, options) in left.items():
                    results.add(key, {"condition": name, **asking.ask(options)})
                    bar.update()
            finally:
                asking.close()
    return results


class _Asking:
    """One item's document in a memory of its own, and its question."""

    def __init__(self, loaded: LoadedModel, item: Item, settings: InterpretabilitySettings) -> None:
        self._model = loaded.model
        self._tokenizer = loaded.tokenizer
        self._item = item
        self._settings = settings
        self._prompt, self._is_chat = self._prompt_ids()
        self._memory = attach(loaded.model, settings.config(), tokenizer=loaded.tokenizer)
        try:
            started = time.perf_counter()
            self._memory.write(item.context, document=_DOCUMENT)
            self._seconds = time.perf_counter() - started
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the model back as it was."""
        detach(self._model)
        self._memory.close()

    def ask(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Ask under one condition; return a record of plain types."""
        item, memory = self._item, self._memory
        with memory.using(**options):
            started = time.perf_counter()
            with memory.recording() as recording:
                ids = self._generate(self._settings.max_new_tokens)[0]
            seconds = time.perf_counter() - started
            log_prob = self._log_prob(item.answer)
            original = item.original_answer
            original_log_prob = None if original is None else self._log_prob(original)
            layers = memory.layers
        document = memory.backend.catalog.document(_DOCUMENT)
        text = str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()
        cited = recording.citations(top=1)
        return {
            "item": item.id,
            "split": item.split,
            "title": item.title,
            "text": text,
            "token_ids": ids,
            "right": item.answer.lower() in text.lower(),
            "log_prob": log_prob,
            "original_log_prob": original_log_prob,
            "num_rows": len(memory),
            "num_redone": recording.num_redone,
            "num_retrieved": recording.num_retrieved,
            "cited": cited[0].text if cited else None,
            "cited_share": cited[0].share if cited else None,
            "cited_answer": bool(cited) and item.answer.lower() in cited[0].text.lower(),
            "chance": share_of_passages_with(document, item.answer),
            "layers": layers,
            "mass": attention_mass(recording, document, item.answer).to_json(),
            "seconds": round(seconds, 3),
            "remember_seconds": round(self._seconds, 3),
        }

    def _log_prob(self, answer: str) -> float:
        """Return an answer's mean log-probability a token, in nats.

        Its tokens are generated like any others, whatever the model would have said: so active
        retrieval takes part in it.
        """
        ids = self._ids(answer if self._is_chat else f" {answer}")
        forced = LogitsProcessorList([_Forced(ids, len(self._prompt))])
        _, logits = self._generate(len(ids), logits_processor=forced)
        log_probs = torch.cat(logits).float().log_softmax(-1)  # (n, V)
        return float(log_probs[torch.arange(len(ids)), torch.tensor(ids)].mean())

    def _generate(self, num_tokens: int, **options: Any) -> tuple[list[int], tuple[Tensor, ...]]:
        """Generate greedily; return ids and each step's logits (1, V)."""
        tokenizer, device = self._tokenizer, self._model.device
        pad = tokenizer.pad_token_id
        input_ids = torch.tensor([self._prompt], device=device)
        output = cast(Any, self._model).generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=pad if pad is not None else tokenizer.eos_token_id,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
        ids = output.sequences[0, len(self._prompt) :].tolist()
        return ids, tuple(step.cpu() for step in output.logits)

    def _prompt_ids(self) -> tuple[list[int], bool]:
        """Return the question's tokens, and if they are in the chat template."""
        tokenizer, wanted = self._tokenizer, self._settings.chat
        has_template = bool(tokenizer.chat_template)
        if wanted and not has_template:
            raise ConfigError("this model's tokenizer has no chat template. Set chat to false.")
        message = self._settings.question.replace("{question}", self._item.question)
        if not (has_template if wanted is None else wanted):
            encoded = tokenizer(f"{message}\nAnswer:", verbose=False)
            return cast(list[int], encoded["input_ids"]), False
        turns = [{"role": "user", "content": message}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return self._ids(cast(str, text)), True

    def _ids(self, text: str) -> list[int]:
        encoded = self._tokenizer(text, add_special_tokens=False, verbose=False)
        return cast(list[int], encoded["input_ids"])


class _Forced(LogitsProcessor):
    """Makes `generate` say given tokens."""

    def __init__(self, ids: list[int], num_prompt: int) -> None:
        self._ids = ids
        self._num_prompt = num_prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Leave only the next of the given tokens possible: scores (B, V)."""
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self._ids[input_ids.shape[1] - self._num_prompt]] = 0.0
        return forced
