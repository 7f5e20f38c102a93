"""Asking questions under one condition: what is put before them, and what is kept of an answer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from emt.ingest.rereading import Rereader
from emt.memory.memory import Memory
from emt.passage import Routed
from experiments.comparison.library import Library
from experiments.comparison.sets import Question
from experiments.comparison.settings import ComparisonSettings, Condition
from experiments.items import says
from experiments.prompts import Prompt, closed_book, with_chunks, with_document
from experiments.spans import Span, covers, span_of

Asking = Callable[[Question], dict[str, Any]]


@contextlib.contextmanager
def asking(
    condition: Condition, settings: ComparisonSettings, library: Library
) -> Iterator[Asking]:
    """Make a condition's function from a question to its record; its memory is attached meanwhile.

    A question that nothing answers is routed, and not answered.
    """
    if condition.retriever is not None:
        library.chunks.prepare(condition.retriever)
    with library.remembered(condition) as memory:

        def ask(question: Question) -> dict[str, Any]:
            with _scope(memory, question):
                return _Asked(condition, settings, library, memory, question).record()

        yield ask


def _scope(
    memory: Memory | None, question: Question, **more: Any
) -> contextlib.AbstractContextManager[Any]:
    choice = {**({} if question.where is None else {"where": dict(question.where)}), **more}
    return memory.using(**choice) if memory is not None and choice else contextlib.nullcontext()


def _bytes_per_token(memory: Memory | None) -> int | None:
    return None if memory is None else memory.backend.catalog.bytes_per_row


def _forget_what_was_read(memory: Memory) -> None:
    """Let the next prompt read its passages as if it was the first to be asked."""
    if isinstance(memory.backend.row_source, Rereader):
        memory.backend.row_source.forget()


class _Asked:
    """One question under one condition."""

    def __init__(
        self,
        condition: Condition,
        settings: ComparisonSettings,
        library: Library,
        memory: Memory | None,
        question: Question,
    ) -> None:
        self._condition = condition
        self._settings = settings
        self._library = library
        self._responder = library.responder
        self._memory = memory
        self._question = question

    def record(self) -> dict[str, Any]:
        """Ask, and return what the report is made of.

        Returns:
            `found` and `found_any`, whether what was put has all of the evidence or some piece of
            it; `first_document`, whether the first passage or chunk is of a document with evidence;
            `bytes_per_token`, what a row of the memory takes; `recalled`, how many tokens were put;
            `is_relevant`, whether any were; what `_answered` returns; and seconds, to find what is
            put, and to the first token.
        """
        started = time.perf_counter()
        prompt, put = self._prompt()
        found_seconds = time.perf_counter() - started
        routed, route_seconds = None, 0.0
        if self._memory is not None and self._condition.is_routed:
            routed, route_seconds = self._routed(self._memory, prompt)
            put = [*(span_of(self._memory, part.passage) for part in routed.passages), *put]
        record = {
            **self._judged(prompt, put),
            "bytes_per_token": _bytes_per_token(self._memory),
            "recalled": self._num_put(prompt, routed),
            "is_relevant": None if routed is None else bool(routed.passages),
            "told_without_document": self._told_without_document(prompt),
            "routing_seconds": round(found_seconds + route_seconds, 4),
        }
        if not self._settings.generate or not self._question.answers:
            return record
        beside = found_seconds
        if self._condition.mode == "passage_and_token":  # else the model's forward routes
            beside += route_seconds
        return {**record, **self._answered(prompt, routed, beside)}

    def _prompt(self) -> tuple[Prompt, list[Span]]:
        """Return the prompt, and the chunks in it."""
        question, templates = self._question, self._settings.templates
        if self._condition.prompt == "question":
            return closed_book(question.question, templates), []
        if self._condition.prompt == "chunks":
            best = self._library.chunks.best(
                str(self._condition.retriever),
                question.question,
                self._settings.chunks,
                self._library.documents_of(question),
            )
            texts = [chunk.text for chunk in best]
            prompt = with_chunks(texts, question.question, self._responder, templates)
            kept = [chunk.span for chunk in best if chunk.text.strip() in (prompt.text or "")]
            return prompt, kept
        if self._condition.prompt == "evidence":
            texts = [self._library.text_of(span) for span in question.evidence]
        else:
            num_tokens = self._settings.document_tokens // max(len(question.documents), 1)
            texts = [
                self._library.around(name, question.evidence, num_tokens)
                for name in question.documents
            ]
        text = "\n\n".join(texts)
        return with_document(text, question.question, self._responder, templates), []

    def _routed(self, memory: Memory, prompt: Prompt) -> tuple[Routed, float]:
        token_ids = self._responder.prompt_ids(prompt.message)
        started = time.perf_counter()
        routed = memory.route(token_ids)
        return routed, time.perf_counter() - started

    def _judged(self, prompt: Prompt, put: list[Span]) -> dict[str, bool | None]:
        evidence = self._question.evidence
        if self._condition.prompt in ("evidence", "document"):
            has = [self._library.text_of(span) in (prompt.text or "") for span in evidence]
            first = None
        elif self._condition.prompt == "chunks" or self._condition.is_routed:
            has = [covers(put, span) for span in evidence]
            first = bool(put) and put[0].document in self._question.documents
        else:
            has, first = [], None
        if not has:
            return dict.fromkeys(("found", "found_any", "first_document"))
        return {"found": all(has), "found_any": any(has), "first_document": first}

    def _num_put(self, prompt: Prompt, routed: Routed | None) -> int:
        """Count the tokens before the question: in the prompt, and recalled."""
        in_prompt = 0 if prompt.text is None else self._library.num_tokens(prompt.text)
        passages = [] if routed is None else [part.passage for part in routed.passages]
        return in_prompt + sum(passage.stop - passage.first for passage in passages)

    def _told_without_document(self, prompt: Prompt) -> bool | None:
        """Tell whether nothing is found relevant once the documents with the evidence are gone."""
        documents = self._question.documents
        if self._memory is None or not self._settings.without_documents or not documents:
            return None
        if self._condition.mode != "passage" or self._condition.prompt != "question":
            return None
        others = [name for name in self._library.names if name not in documents]
        with _scope(self._memory, self._question, documents=others):
            routed, _ = self._routed(self._memory, prompt)
        return not routed.passages

    def _answered(self, prompt: Prompt, routed: Routed | None, beside: float) -> dict[str, Any]:
        """Answer.

        Returns:
            `right`, whether any answer is in the greedy tokens; `log_prob` and `original_log_prob`,
            mean per token in nats; `preferred`, whether the first is above the second; `is_cited`,
            of a right answer from memory, whether its first citation has a piece of the evidence.
        """
        question, memory = self._question, self._memory
        if memory is not None:
            _forget_what_was_read(memory)
        with contextlib.ExitStack() as stack:
            recording = None if memory is None else stack.enter_context(memory.recording())
            if memory is not None and self._condition.mode == "passage_and_token" and routed:
                best_last = [part.passage for part in reversed(routed.passages)]
                stack.enter_context(
                    memory.recalling(best_last, at=routed.question.at, retrieve=True)
                )
            response = self._responder.respond(prompt.message, question.candidates)
        log_prob, original, *_ = (*(response.log_probs or ()), None, None)
        is_right = any(says(response.text, answer) for answer in question.answers)
        is_cited = None
        if is_right and recording is not None:
            by: Any = "passage" if self._condition.is_routed else "sentence"
            cited = recording.citations(by, num_tokens=len(response.token_ids), top=1)
            is_cited = any(
                _has(Span(one.document, one.start or 0, one.end or 0), span)
                for one in cited
                for span in question.evidence
            )
        return {
            "right": is_right,
            "log_prob": log_prob,
            "original_log_prob": original,
            "preferred": None if None in (log_prob, original) else log_prob > original,
            "is_cited": is_cited,
            "num_prompt_tokens": response.num_prompt_tokens,
            "first_token_seconds": round(beside + (response.prompt_seconds or 0.0), 4),
            "text": response.text,
        }


def _has(cited: Span, evidence: Span) -> bool:
    """Tell whether a citation has the evidence, or is a part of it."""
    return covers([cited], evidence) or (cited.stop > cited.start and covers([evidence], cited))
