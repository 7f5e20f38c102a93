"""`Memory`: what a model remembers. Write, remove, choose options, record retrievals."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from emt.citations.recording import Recording
from emt.config import MemoryConfig
from emt.errors import DocumentError, MemoryUseError, StoreError
from emt.ingest.changes import Changes, Written, counting
from emt.ingest.documents import Source
from emt.ingest.encoder import Encoder
from emt.memory.activity import Activity
from emt.memory.attending import attend
from emt.memory.backend import make_backend
from emt.memory.overrides import Scopes, UsingBlocks, changes_scope
from emt.model.attached import AttachedModel as AttachedModel
from emt.model.attached import reading_layers
from emt.model.hook import AttentionCall
from emt.model.positions import Angles
from emt.modes.passage.mode import PassageMode
from emt.modes.passage.recall import Recall
from emt.modes.passage.rows import by_prompt, places
from emt.passage import Passage, Recalled, Routed
from emt.turn import asked_of
from memory_backends import MemoryBackend, Rows
from memory_backends.layout import Metadata
from memory_backends.validation import check_directory, has_no_store


class Memory:
    """The memory of one model. `emt.attach` makes it.

    Attributes:
        config: the settings in force; `using` changes them for a while.
        backend: where the rows are.
        tokenizer: what `attach` was given.
        activity: who is using the memory.

    Source:
        Klett and Ahle, Extended Mind Transformers (arXiv 2406.02332).
    """

    def __init__(
        self, model: AttachedModel, config: MemoryConfig, tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        self._model: AttachedModel | None = model
        self.tokenizer = tokenizer
        self.activity = Activity()
        self._recordings: list[Recording] = []
        self._attached_config = config
        self._using = UsingBlocks()
        self._layers = reading_layers(model, config)
        self._is_open = True
        self._recall: Recall | None = None
        self.config = config
        self.passages = PassageMode(self)
        self.backend = self._make_backend(model, config)
        self.passages.settle()

    # -- writing --------------------------------------------------------------------------------

    def write(
        self,
        source: Source,
        *,
        document: str,
        replace: bool = False,
        metadata: Metadata | None = None,
    ) -> range:
        """Read a document once and remember it.

        Args:
            source: text (needs the tokenizer given to `attach`), or token ids: (T,), or (1, T) as a
                tokenizer returns them.
            document: its name, unique in this memory.
            replace: remove the document of that name in the same step.
            metadata: what `using(where=...)` can ask for: text -> text, a number, True or False.

        Returns:
            The row ids of its tokens; special ids have no row unless `remove_special_ids` is off.

        Raises:
            MemoryUseError: while generating, after `detach` or `close`, or in training mode.
            DocumentError: the name is taken, or there is nothing to remember, or an id the model
                does not have, or metadata that is not flat.
            ConfigError: `max_length` is beyond the model's positions, or leaves no context to
                carry.
            UnsupportedModelError: `carry_context` is on, and the model's cannot be carried.
            StoreError: the store cannot be written; it is as it was before.
        """
        self.check_open("write")
        encoder = self.encoder
        tokenized = encoder.document(source, document, metadata=metadata)
        rows = encoder.encode(tokenized)
        with self._alone("write"):
            return self.backend.add(tokenized, rows, replace=replace)

    def write_all(
        self,
        documents: Iterable[tuple[str, Source] | tuple[str, Source, Metadata | None]],
        *,
        on_rows: Callable[[int], object] | None = None,
        before_save: Callable[[], object] | None = None,
    ) -> Written:
        """Remember many documents, each read on its own, and bring the store's index up to date.

        A document that is there already with the same content is skipped, so a run that was
        interrupted can be started again; one whose content has changed is replaced. Where nothing
        but the metadata has changed, that is written and the document skipped.

        Args:
            documents: name, text or token ids, and, if there is any, metadata of each, as in
                `write`; read a few ahead, to encode short ones together.
            on_rows: called with the number of new rows, for a progress bar.
            before_save: called when all documents are there, before indexes are made of them.

        Returns:
            How many documents were added, replaced and skipped.

        Raises:
            DocumentError: as `write`, or a name comes twice.
            MemoryUseError, ConfigError, StoreError: as `write`.

            Documents before the one that failed stay.
        """
        encoder = self.encoder
        with self._alone("write"):
            changes = Changes(
                self.backend,
                (
                    encoder.document(source, name, metadata=metadata[0] if metadata else None)
                    for name, source, *metadata in documents
                ),
            )
            encoded = encoder.encode_all(changes)
            counted = ((document, counting(rows, on_rows)) for document, rows in encoded)
            for name, _ in self.backend.add_many(counted, replace=True):
                changes.committed(name)
        self._using.forget()
        if before_save is not None:
            before_save()
        if self.config.path is not None:  # else nothing is kept
            self.save()
        return changes.counts

    def read(
        self, source: Source, *, stride: int | None = None, max_length: int | None = None
    ) -> Iterator[Rows]:
        """Read text or token ids as `write` does, and remember nothing; special ids have rows.

        Args:
            source: as in `write`.
            stride: instead of the setting.
            max_length: instead of the setting.

        Raises:
            As `write`.
        """
        config = self.config.replace(
            stride=self.config.stride if stride is None else stride,
            max_length=self.config.max_length if max_length is None else max_length,
            remove_special_ids=False,
        )
        encoder = Encoder(self.attached_model("write"), config, self.tokenizer)
        yield from encoder.encode(encoder.document(source, "input_ids"))

    def remove(self, *documents: str) -> int:
        """Forget documents; row ids of others never change. Returns how many rows they had.

        Raises:
            DocumentError: a name is unknown; nothing is removed.
            MemoryUseError: while generating, or after `close`.
        """
        with self._alone("remove"):
            for name in documents:
                if not self.backend.catalog.has_document(name):
                    raise DocumentError(
                        f"no document '{name}' in this memory; nothing was removed. "
                        f"The documents are {_some(self.documents)}."
                    )
            return sum(self.backend.remove_document(name) for name in dict.fromkeys(documents))

    def clear(self) -> None:
        """Forget everything. Row ids are not used again.

        Raises:
            MemoryUseError: while generating, or after `close`.
        """
        with self._alone("clear"):
            self.backend.clear()

    def refresh(self) -> None:
        """See what other processes have written to the store since.

        Raises:
            MemoryUseError: while generating, or after `close`.
            StoreError: the store cannot be read.
        """
        with self._alone("refresh"):
            self.backend.refresh()

    def compact(self) -> int:
        """Give back the space of what was removed; return how many bytes.

        Raises:
            MemoryUseError: while generating, or after `close`.
            StoreError: the store cannot be written; it is as it was before.
        """
        with self._alone("compact"):
            return self.backend.compact()

    @property
    def documents(self) -> list[str]:
        """The names of all documents, in the order they were written.

        Raises:
            MemoryUseError: after `close`.
        """
        self.check_open("list documents")
        return self.backend.catalog.document_names()

    @property
    def layers(self) -> list[int]:
        """The layers that read memories now, ascending."""
        return sorted(self._layers)

    def __len__(self) -> int:
        """Rows that a query may find."""
        return len(self.backend)

    # -- keeping --------------------------------------------------------------------------------

    def save(self, path: Path | str | None = None) -> None:
        """Bring the store up to date, or write a copy of this memory to a new directory.

        At its own `path`, a memory that is read in passages is given what that needs: a head
        profile made of its own text, if its model has none and questions can be made of the text;
        and what prompts about nothing in particular find in it. The first takes about as long as
        reading 30,000 tokens, which the log says; neither is done where the store cannot be
        written. A copy has what the memory has.

        Args:
            path: a directory that does not exist or is empty; None for the memory's own `path`.

        Raises:
            StoreError: there is no path, it is taken, or it cannot be written.
            MemoryUseError: while generating, or after `close`.
        """
        self.check_open("save")
        if path is None and self.config.path is None:
            raise StoreError(
                "this memory has no path. Give save() one, or set `path` in the config."
            )
        with self._alone("save"):
            if path is None:
                self.passages.make_profile_if_needed()
            if self._model is not None:  # else what is indexed stays as it was
                self.passages.prepare(self.backend, self.config)
            self.backend.save(path)
            if path is None:
                self.passages.measure_relevance()

    def open(self, path: Path | str) -> None:
        """Read from another store from now on; the one before is closed.

        Raises:
            StoreError: there is no store at `path`, or it is damaged; the memory is as it was.
            MemoryMismatchError: another model wrote it; the memory is as it was.
            MemoryUseError: while generating, or after `detach`.
        """
        model = self.attached_model("open")
        if has_no_store(check_directory(Path(path))):
            raise StoreError(
                f"expected a memory store at '{path}'; there is nothing. Correct the path."
            )
        with self._alone("open"):
            config = self._attached_config.replace(path=str(path))
            backend = self._make_backend(model, config)
            self.backend.close()
            self._attached_config, self.backend = config, backend
            self._is_open = True
            self._settle(model)

    def close(self) -> None:
        """Let go of files; until `open`, the model is the plain one.

        Raises:
            MemoryUseError: while generating.
        """
        with self._alone("close"):
            self._is_open = False
            self.backend.close()
            self._settle_recall()

    # -- options --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def using(self, **settings: Any) -> Iterator[Memory]:
        """Change settings for the calls in a `with` block, from any thread.

        Args:
            **settings: `enabled`, `mode`, `recall_rows`, `recall_passages`, `routing`,
                `relevance`, `reroute`, `topk`, `uncertainty`, `layers`, `mask_by_sim` or
                `sim_threshold`; `documents`,
                names of those whose rows may be found, or a list of names for each prompt of a
                batch, whose beams and returned sequences have their prompt's; and `where`, which
                asks for documents whose `metadata` has, for every key, the value, or one of a list
                of values. What both allow is read. Of blocks in one another, the innermost that
                names a setting decides; None is no restriction.

        Raises:
            ConfigError: a setting that is unknown, fixed, or of a wrong value.
            DocumentError: a document is unknown, or `where` is not a filter.
            MemoryUseError: after `detach`; documents are chosen after `close`.
        """
        changed = self._using.check(settings, self.config)
        if changes_scope(settings):
            self.check_open("choose documents")
        model = self.attached_model("change settings")
        reading_layers(model, changed)  # refuse before anything has changed
        try:
            with self._using.open(settings, self.backend):
                self._settle(model)
                yield self
        finally:
            self._settle(model)

    @contextlib.contextmanager
    def recording(self, *, whole_prompt: bool = False) -> Iterator[Recording]:
        """Record what every query retrieves in a `with` block, from any thread.

        Args:
            whole_prompt: record all queries of a prompt, not only the last, which chooses a token.
        """
        recording = Recording(whole_prompt=whole_prompt)
        self._recordings.append(recording)
        try:
            yield recording
        finally:
            self._recordings.remove(recording)

    @contextlib.contextmanager
    def recalling(
        self,
        passages: Sequence[Passage] | Sequence[Sequence[Passage]],
        *,
        at: int | Sequence[int] = 0,
        sinks: bool | None = None,
        retrieve: bool = False,
    ) -> Iterator[Recall]:
        """Put passages into the prompts of a `with` block, from any thread.

        Their rows are attended to by every layer, in order, as if their text stood in the prompt;
        the tokens before them do not see them, those after them stand as many positions further
        back. Without passages the model is the plain one. Attention weights that the model is
        asked for have a column for each row, before those of local keys.

        Args:
            passages: what every prompt is given, in order; or one sequence for each prompt of a
                batch. Beams and returned sequences have their prompt's.
            at: the token of the prompt that they are put before, padding not counted; of every
                prompt, or one for each. 0 is before the prompt.
            sinks: put the first passage after the first rows of its document, where attention
                parks itself; None for yes before a prompt, and no inside of it, where the prompt's
                own first tokens are there for that.
            retrieve: let queries retrieve single memories, too.

        Raises:
            DocumentError: a document is unknown, or does not have these rows any more.
            ConfigError: passages of one prompt share rows, or end beyond the model's positions.
            MemoryUseError: the memory is being changed or was closed, or another block is open; in
                a forward, also a cache that was filled without the passages, a batch of another
                size, or a model in training mode.
            UnsupportedModelError: in a forward: nothing says how far a layer sees.
        """
        model = self.attached_model("recall")
        self.check_open("recall")
        if self._recall is not None:
            raise MemoryUseError(
                "passages are being recalled already. Close that recalling() block first, or give "
                "all passages to one."
            )
        with self.activity.shared("recall"):
            chosen, starts = by_prompt(passages, at)
            recall = Recall.of(
                model,
                self.backend,
                places(self.backend, chosen, starts, sinks),
                self.angles,
                retrieves=retrieve,
                passages=[[Recalled(passage) for passage in prompt] for prompt in chosen],
            )
        self._recall = recall
        self._settle_recall()
        try:
            with recall.open():
                yield recall
        finally:
            self._recall = None

    # -- for emt --------------------------------------------------------------------------------

    def route(self, prompt: Source) -> Routed:
        """Find the passages that a prompt is about, as the passage mode does; recall nothing.

        Args:
            prompt: text, as it is given to the model, or token ids as for `write`.

        Raises:
            ConfigError: there is no head profile of the model.
            DocumentError: the prompt is empty, or has an id the model does not have.
            MemoryUseError: the model was detached or is gone; the memory is being changed, or was
                closed.
        """
        self.check_open("route")
        read = self.encoder.document(prompt, "prompt")
        with self.activity.shared("route"):
            (routed,) = self.passages.finder.route([torch.from_numpy(read.token_ids).long()])
        return routed

    @property
    def angles(self) -> Angles:
        """The model's cosines and sines."""
        return self.attached_model("recall").angles

    @property
    def is_open(self) -> bool:
        """Whether the model has this memory: it was not closed."""
        return self._is_open

    def check_open(self, what: str) -> None:
        """Refuse what needs the rows once files were let go of.

        Args:
            what: is wanted of them, for the error.

        Raises:
            MemoryUseError: the memory was closed.
        """
        if not self._is_open:
            raise MemoryUseError(
                f"cannot {what}: the memory was closed. Call open() with the path of a store."
            )

    @property
    def in_force(self) -> MemoryConfig:
        """The settings that hold for this thread's calls."""
        return asked_of(self).config or self.config

    @property
    def scope(self) -> Scopes:
        """The rows that this thread's calls may find, or those of each prompt; None for all."""
        return self._using.scopes(self.backend)

    @property
    def num_in_scope(self) -> list[int]:
        """How many rows a query may find, in each of the scopes there are."""
        scope = self.scope
        scopes = scope if isinstance(scope, tuple) else (scope,)
        return [self.backend.num_searchable(one) for one in scopes]

    @property
    def recordings(self) -> list[Recording]:
        """The recordings that are being made of this thread's calls."""
        return [*self._recordings, *asked_of(self).recordings]

    def reads(self, layer_idx: int) -> bool:
        """Tell whether a layer reads memories now."""
        return layer_idx in self._layers

    @property
    def is_read(self) -> bool:
        """Whether a forward of this thread would find anything in this memory."""
        if not (self._is_open and self.in_force.enabled):
            return False
        if self._recall is not None:  # a block says so itself, whatever the mode
            return self._recall.retrieves and any(self.num_in_scope)
        return self.passages.mode == "token" and any(self.num_in_scope)

    @property
    def is_recalling(self) -> bool:
        """Whether a `recalling` block is open."""
        return self._recall is not None

    @property
    def recalls_passages(self) -> bool:
        """Whether a prompt of this thread would be given passages of this memory by itself."""
        is_on = self._recall is None and self._is_open and self.in_force.enabled
        return is_on and self.passages.mode == "passage" and any(self.num_in_scope)

    def search_options(self, number: int, num_prompts: int) -> dict[str, Any]:
        """Return keywords of a backend's `search` for one of several prompts.

        Raises:
            MemoryUseError: documents were given for another number of prompts.
        """
        scope = self.scope
        if isinstance(scope, tuple):
            if num_prompts % len(scope):
                raise MemoryUseError(
                    f"documents were given for {len(scope)} prompts; got {num_prompts}. Give a "
                    "list for each prompt of the batch, or one for all of them."
                )
            scope = scope[number // (num_prompts // len(scope))]
        return {} if scope is None else {"scope": scope}

    def attend(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute a layer's attention; called by the model through `emt.model.hook`."""
        return attend(self, call)

    def _settle(self, model: AttachedModel) -> None:
        """Put into force what `attach` was given, as changed by the open `using` blocks."""
        config = self._using.config_of(self._attached_config)
        self._layers = reading_layers(model, config)
        self.config = config
        self._settle_recall()
        self.passages.settle()

    def _settle_recall(self) -> None:
        """Let an open `recalling` block recall only while the model has this memory."""
        if self._recall is not None:
            is_on = self._model is not None and self._is_open and self.config.enabled
            self._recall.switch(is_on)

    def forget_model(self) -> None:
        """Let go of the model; called by `detach`."""
        self._model = None
        self._settle_recall()
        self.passages.settle()

    def decoder_or_none(self) -> PreTrainedModel | None:
        """Return the model without its language-model head; None once it is gone or detached."""
        return None if self._model is None else self._model.decoder()

    @contextlib.contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        """Change the memory in a `with` block, and see then which mode it is of."""
        if what not in ("open", "close"):
            self.check_open(what)
        with self.activity.alone(what):
            try:
                yield
            finally:
                self.passages.settle(anew=True)

    def _make_backend(self, model: AttachedModel, config: MemoryConfig) -> MemoryBackend:
        backend = make_backend(model, config)
        try:
            self.passages.prepare(backend, config)
        except BaseException:
            backend.close()
            raise
        self.passages.say_what_takes_long(backend)
        return backend

    @property
    def encoder(self) -> Encoder:
        """What encodes documents, with the settings in force now."""
        return Encoder(self.attached_model("write"), self.config, self.tokenizer)

    @property
    def read_as(self) -> dict[str, Any]:
        """How documents are read, as plain JSON types: what their rows depend on."""
        return self.encoder.settings

    def attached_model(self, what: str) -> AttachedModel:
        """Return what is known of the model.

        Args:
            what: is wanted of it, for the error.

        Raises:
            MemoryUseError: it was detached.
        """
        if self._model is None:
            raise MemoryUseError(f"cannot {what}: the model was detached. Call attach() again.")
        return self._model


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:10]) or "none"
    return shown + (f" and {len(names) - 10} more" if len(names) > 10 else "")
