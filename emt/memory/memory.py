"""`Memory`: what a model remembers. Write, remove, choose settings, record what is retrieved."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import Cache, PreTrainedTokenizerBase

from emt.calls import overrides_of
from emt.citations.citing import Sources
from emt.citations.recording import Recording
from emt.config import MemoryConfig
from emt.errors import DocumentError, MemoryUseError, StoreError
from emt.ingest.changes import Changes, Written, counting
from emt.ingest.documents import Source
from emt.ingest.encoder import Encoder
from emt.memory.activity import Activity
from emt.memory.from_cache import CacheReader
from emt.memory.head_profiles import HeadProfiles
from emt.memory.make_backend import make_backend
from emt.memory.modes import Modes
from emt.memory.using import UsingBlocks, changes_scope, documents_without
from emt.model.attached import AttachedModel, reading_layers
from emt.model.attention_call import AttentionCall
from emt.model.forward import Forward
from emt.modes.passage.sources import Fixed
from emt.modes.passage.state import state_of
from emt.passage import Passage, Routed
from emt.profiles.examples import Example
from emt.profiles.ranking import Ranked
from emt.routing.head_profile import HeadProfile
from emt.turn import Turn, begun_turn, set_turn
from memory_backends import Document, MemoryBackend, Rows
from memory_backends.errors import StoreReplacedError
from memory_backends.layout import Metadata
from memory_backends.registry import SHARDED
from memory_backends.store.directory import check_directory, has_no_store

_logger = logging.getLogger(__name__)
_LACKS_FILES = (
    "the store has no FAISS files of some heads that this memory searches: it was saved with "
    "another head profile, or in another mode. Their indexes are made in RAM at the first search, "
    "in each process again, which takes long for %d rows. save() writes the files."
)


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
        self.config = config
        self._modes = Modes(model, tokenizer)
        self._cache_reader = CacheReader(model)
        self._profiles = HeadProfiles(model, tokenizer, self._modes, self.read)
        self.backend = self._make_backend(model, config)

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
        self._check_open("write")
        encoder = self.encoder
        tokenized = encoder.document(source, document, metadata=metadata)
        rows = encoder.encode(tokenized)
        with self._alone("write"):
            self.before_first_write(self.backend)
            return self.backend.add(tokenized, rows, replace=replace)

    def write_all(
        self,
        documents: Iterable[tuple[str, Source] | tuple[str, Source, Metadata | None]],
        *,
        on_rows: Callable[[int], object] | None = None,
        before_save: Callable[[], object] | None = None,
        on_tokens: Callable[[int, int], object] | None = None,
        save: bool = True,
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
            on_tokens: as in `save`.
            save: bring the index up to date; else a later `save` does it.

        Returns:
            How many documents were added, replaced and skipped.

        Raises:
            DocumentError: as `write`, or a name comes twice.
            MemoryUseError, ConfigError, StoreError: as `write`.
        """
        encoder = self.encoder
        with self._alone("write"):
            self.before_first_write(self.backend, on_tokens)
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
        self._using.forget_scopes()
        if before_save is not None:
            before_save()
        if save and self.config.path is not None:  # else nothing is kept
            self.save(on_tokens=on_tokens)
        return changes.counts

    def remember(
        self,
        cache: Cache,
        token_ids: Source,
        *,
        document: str,
        spans: Sequence[tuple[int, int]] | None = None,
        sequence: int = 0,
        attention_mask: torch.Tensor | None = None,
        replace: bool = False,
        metadata: Metadata | None = None,
    ) -> range:
        """Remember tokens that the model has run, from its cache: nothing is read again.

        Their rows are what was computed in the conversation, where they had seen all that was said
        and recalled before; rows that `write` makes of the same tokens have seen these only.

        Args:
            cache: filled by `generate(past_key_values=cache)` or by forwards.
            token_ids: what the cache holds, (T,) or (1, T), padding included; the token that
                `generate` chose last may follow, and has no row.
            document: as in `write`.
            spans: (first, stop) of the tokens to remember, in order, such as a message without its
                template; None for all. Special ids leave no rows, as in `write`.
            sequence: which of the cache's sequences it is.
            attention_mask: (B, T) of the cache's sequences; None if none is padded.
            replace: as in `write`.
            metadata: as in `write`.

        Returns:
            The row ids of the tokens.

        Raises:
            UnsupportedModelError: the cache does not have these tokens as they were computed: it is
                quantised or of fixed size, a sliding window has left them behind, or the model
                caches something else than keys and values.
            MemoryUseError: as `write`; or `cache` is none, or is empty.
            DocumentError: as `write`; or ids, spans, sequence or mask are not those of the cache.
            StoreError: as `write`.
        """
        read = self.read_cache(
            cache,
            token_ids,
            document=document,
            spans=spans,
            sequence=sequence,
            attention_mask=attention_mask,
            metadata=metadata,
        )
        return self.add(*read, replace=replace)

    def read_cache(
        self, cache: Cache, token_ids: Source, *, document: str, **options: Any
    ) -> tuple[Document, Rows]:
        """Return what `remember` would write, for `add`; write nothing. May run while generating.

        It raises what `remember` raises.

        Args:
            cache: as for `remember`, and so are the others.
            token_ids: of the cache.
            document: its name.
            **options: spans, sequence, attention_mask, metadata.
        """
        self._check_open("remember")
        return self._cache_reader.read(cache, token_ids, document, self.encoder, **options)

    def add(self, document: Document, rows: Rows, *, replace: bool = False) -> range:
        """Write what `read_cache` has read; return the row ids.

        Raises:
            DocumentError: the name is taken.
            MemoryUseError: while generating, or after `close`.
            StoreError: the store cannot be written; it is as it was before.
        """
        with self._alone("remember"):
            self.before_first_write(self.backend)
            return self.backend.add(document, [rows], replace=replace)

    def read(
        self, source: Source, *, stride: int | None = None, max_length: int | None = None
    ) -> Iterator[Rows]:
        """Read text or token ids as `write` does, and remember nothing; special ids have rows.

        It raises what `write` raises.

        Args:
            source: as in `write`.
            stride: instead of the setting.
            max_length: instead of the setting.
        """
        config = self.config.replace(
            stride=self.config.stride if stride is None else stride,
            max_length=self.config.max_length if max_length is None else max_length,
            remove_special_ids=False,
        )
        encoder = Encoder(self._attached("write"), config, self.tokenizer)
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

        A store that has taken the place of the one that was opened is opened instead. A forward
        that another thread runs meanwhile goes on with the rows that it began with.

        Raises:
            MemoryUseError: while generating, or after `close`.
            MemoryMismatchError: another model wrote the store that is there now.
            StoreError: the store cannot be read, or was removed; the memory is as it was.
        """
        with self._alone("refresh"):
            try:
                self.backend.refresh()
            except StoreReplacedError:
                path = self._attached_config.path
                if self._model is None or path is None or has_no_store(Path(path)):
                    raise
                self.backend = self._make_backend(self._model, self._attached_config)

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
        self._check_open("list documents")
        return self.backend.catalog.document_names()

    @property
    def missing_shards(self) -> tuple[int, ...]:
        """The shards of a sharded store that are not there, and whose documents are not found.

        None are missing unless the setting `missing_shards` is "warn".
        """
        return self.backend.missing_shards

    @property
    def layers(self) -> list[int]:
        """The layers that read memories now, ascending; the setting `heads` may leave some out."""
        return sorted(self._layers)

    @property
    def heads_to_index(self) -> Mapping[int, Sequence[int]]:
        """The KV heads that `save` makes indexes of, by layer.

        Raises:
            ConfigError: as `mode`.
        """
        heads = self._heads_to_index(self.config, self.backend)
        if heads is None:
            layers = self.backend.layout.layers
            return {idx: range(layers[idx].num_key_value_heads) for idx in self.layers}
        return heads

    @property
    def mode(self) -> Literal["token", "passage"]:
        """The mode in force, with "auto" decided.

        Raises:
            ConfigError: the settings name a head profile that cannot be used.
        """
        return self._modes.name(self.config, self.backend)

    def __len__(self) -> int:
        """Rows that a query may find."""
        return len(self.backend)

    # -- keeping --------------------------------------------------------------------------------

    def save(
        self,
        path: Path | str | None = None,
        *,
        on_tokens: Callable[[int, int], object] | None = None,
    ) -> None:
        """Bring the store up to date, or write a copy of this memory to a new directory.

        At its own `path`, a memory that needs a head profile is given one, made if its
        model has none and kept for all memories of the model. That takes about as long as reading
        6,000 tokens, which the log says, and is not done where the store cannot be written. A copy
        has what the memory has.

        Args:
            path: a directory that does not exist or is empty; None for the memory's own `path`.
            on_tokens: told how many tokens were read of how many, while a head profile is made.

        Raises:
            StoreError: there is no path, it is taken, or it cannot be written.
            MemoryUseError: while generating, or after `close`.
        """
        self._check_open("save")
        if path is None and self.config.path is None:
            raise StoreError(
                "this memory has no path. Give save() one, or set `path` in the config."
            )
        with self._alone("save"):
            if path is None and self._model is not None:
                self._profiles.prepare(self.config, self.backend, on_tokens)
            if self._model is not None:  # else what is indexed stays as it was
                self._index_heads(self.backend, self.config)
            self.backend.save(path)
            if path is None and self._model is not None:
                self._modes.keep(self.config, self.backend)

    def open(self, path: Path | str) -> None:
        """Read from another store from now on; the one before is closed.

        Raises:
            StoreError: there is no store at `path`, or it is damaged; the memory is as it was.
            MemoryMismatchError: another model wrote it; the memory is as it was.
            MemoryUseError: while generating, or after `detach`.
        """
        model = self._attached("open")
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

    # -- options --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def using(self, **settings: Any) -> Iterator[Memory]:
        """Change settings for the calls in a `with` block, from any thread.

        Args:
            **settings: settings that `help(MemoryConfig)` marks as changed by `using`; `documents`,
                names of those whose rows may be found, or a list of names for each prompt of a
                batch, whose beams and returned sequences have their prompt's; and `where`, which
                asks for documents whose `metadata` has, for every key, the value, or one of a list
                of values; it may be a list for each prompt, too. What both allow is read. Of blocks
                in one another, the innermost that names a setting decides; None is no restriction.

        Raises:
            ConfigError: a setting that is unknown, fixed, or of a wrong value.
            DocumentError: a document is unknown, or `where` is not a filter.
            MemoryUseError: after `detach`; documents are chosen after `close`.
        """
        changed = self._using.check(settings, self.config)
        if changes_scope(settings):
            self._check_open("choose documents")
        model = self._attached("change settings")
        reading_layers(model, changed)  # refuse before anything has changed
        if self._is_open:
            self._heads_to_index(changed, self.backend)
        try:
            with self._using.open(settings, self.backend):
                self._settle(model)
                yield self
        finally:
            self._settle(model)

    def documents_without(self, hidden: Collection[str], settings: Mapping[str, Any]) -> Any:
        """Return what `documents` has to be in a `using` block for it to leave some out.

        Args:
            hidden: names of documents.
            settings: of the block, with or without `documents`.
        """
        chosen = settings.get("documents", self._using.documents)
        return documents_without(chosen, hidden, self.documents)

    @contextlib.contextmanager
    def recording(self, *, whole_prompt: bool = False) -> Iterator[Recording]:
        """Record what every query retrieves in a `with` block, from any thread.

        Args:
            whole_prompt: record all queries of a prompt, not only the last, which chooses a token.
        """
        recording = self.new_recording(whole_prompt=whole_prompt)
        self._recordings.append(recording)
        try:
            yield recording
        finally:
            self._recordings.remove(recording)

    def new_recording(self, *, whole_prompt: bool = False) -> Recording:
        """Return an empty recording that cites this memory's documents."""
        sources = Sources(lambda: self.backend, lambda: self.layers, self.tokenizer)
        return Recording(sources, whole_prompt=whole_prompt)

    @contextlib.contextmanager
    def recalling(
        self,
        passages: Sequence[Passage] | Sequence[Sequence[Passage]],
        *,
        at: int | Sequence[int] = 0,
        sinks: bool | None = None,
        retrieve: bool = False,
    ) -> Iterator[Fixed]:
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
        self._attached("recall")
        self._check_open("recall")
        with contextlib.ExitStack() as block:
            with self.activity.shared("recall"):
                source = block.enter_context(
                    self._modes.recalling(
                        self.backend, passages, at=at, sinks=sinks, retrieve=retrieve
                    )
                )
            yield source

    def route(self, prompt: Source) -> Routed:
        """Find the passages that a prompt is about, as the passage mode does; recall nothing.

        Args:
            prompt: text, as it is given to the model, or token ids as for `write`.

        Raises:
            ConfigError: heads are to find them, and there is no head profile; or words, and there
                is no tokenizer.
            DocumentError: the prompt is empty, or has an id the model does not have.
            MemoryUseError: the model was detached or is gone; the memory is being changed, or was
                closed.
        """
        self._check_open("route")
        document = self.encoder.document(prompt, "prompt")
        token_ids = torch.from_numpy(document.token_ids).long()
        with self.activity.shared("route"):
            (routed,) = self._modes.routing.route(self.new_turn(), [token_ids])
        return routed

    # -- head profiles --------------------------------------------------------------------------

    @property
    def profile(self) -> HeadProfile | None:
        """The head profile that passages are found with; None if there is none.

        Raises:
            ConfigError: the file that the settings name is none, or of a model of another shape.
            MemoryUseError: the memory was closed.
        """
        self._check_open("look for a head profile")
        return self._modes.profiles.find(self.config, self.backend)

    @property
    def lacks_profile(self) -> bool:
        """Whether heads would be searched if the model had a head profile; it has none.

        Raises:
            ConfigError, MemoryUseError: as `profile`.
        """
        self._check_open("look for a head profile")
        return self._profiles.is_lacking(self.config, self.backend)

    def rank_heads(
        self,
        examples: Sequence[Example] | None = None,
        *,
        name: str = "",
        source: str = "",
        on_tokens: Callable[[int, int], object] | None = None,
        **options: Any,
    ) -> Ranked:
        """Rank the model's heads by whether they find the passage of a question; keep nothing.

        Args:
            examples: questions about texts; None for those that come with emt.
            name: of the model, for people; as the model's config says if it is empty.
            source: of the questions, for people.
            on_tokens: told how many tokens were read, and how many will be.
            **options: further arguments of `HeadRanking.rank`.

        Raises:
            ConfigError: there are too few questions, no head finds anything, no layer sees the
                whole context, or the tokenizer is not a fast one.
            MemoryUseError: there is no tokenizer, or no model any more; or the memory was closed.
        """
        self._check_open("rank heads")
        self._attached("rank heads")
        return self._profiles.rank(
            examples, name=name, source=source, on_tokens=on_tokens, **options
        )

    def make_profile(self, *, on_tokens: Callable[[int, int], object] | None = None) -> HeadProfile:
        """Make a head profile, and keep it for all memories of the model, and with this one.

        It takes about as long as reading 6,000 tokens.

        Args:
            on_tokens: told how many tokens were read, and how many will be.

        Raises:
            ConfigError, MemoryUseError: as `rank_heads`.
            StoreError: the store is being written to by another process.
        """
        self._check_open("make a head profile")
        profile = self.rank_heads(on_tokens=on_tokens).profile
        self._profiles.keep_made(profile, self.config, self.backend)
        return profile

    def keep_profile(self, profile: HeadProfile) -> None:
        """Keep a head profile in the memory's store, for all who open it, and nowhere else.

        Raises:
            ConfigError: it is of a model of another shape.
            MemoryUseError: the model was detached, or the memory closed.
            StoreError: the store cannot be written.
        """
        self._check_open("keep a head profile")
        self._attached("keep a head profile")
        self._profiles.keep(profile, self.config, self.backend)

    # -- forwards: called by the model, through its hook ----------------------------------------

    def new_turn(self) -> Turn:
        """Return what holds for a forward that begins now in this thread."""
        overrides = overrides_of(self)
        turn = Turn(
            memory=self,
            config=overrides.config or self.config,
            backend=self.backend,
            scopes=self._using.scopes(self.backend) if self._is_open else None,
            layers=self._layers,
            recordings=(*self._recordings, *overrides.recordings),
            overrides=overrides,
        )
        if self._is_open and self._model is not None:
            turn.mode = self._modes.of_turn(turn)
        return turn

    def begin(self, forward: Forward) -> Forward:
        """Begin a forward of the decoder."""
        turn, state = self.new_turn(), state_of(forward)
        if state is not None:
            turn.mode = self._modes.of_cache(turn.mode, state)
        set_turn(turn)
        return turn.begin(forward)

    def attend(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute a layer's attention."""
        # A layer that is run again for its gradients is in no forward of the decoder.
        turn = begun_turn(self) or self.new_turn()
        if turn.backend.is_closed:  # by another thread
            turn.layers = frozenset()
        return turn.attend(call)

    def end(self, output: Any) -> None:
        """End a forward of the decoder."""
        turn = begun_turn(self)
        set_turn(None)
        if turn is not None:
            turn.end(output)

    # -- for emt --------------------------------------------------------------------------------

    @property
    def encoder(self) -> Encoder:
        """What reads documents, with the settings in force.

        Raises:
            MemoryUseError: the model was detached.
        """
        return Encoder(self._attached("write"), self.config, self.tokenizer)

    def before_first_write(
        self, backend: MemoryBackend, on_tokens: Callable[[int, int], object] | None = None
    ) -> None:
        """Choose the heads of a store that will keep no rows, which it cannot change later."""
        if backend.keeps_rows or backend.catalog.path is not None:
            return
        self._profiles.before_first_write(self.config, backend, on_tokens)
        self._index_heads(backend, self.config)

    def second_backend(self) -> MemoryBackend:
        """Return another backend over this memory's store, to close when it is not needed.

        One thread can write with it while others read with the first, which shows what was written
        when it is refreshed.

        Raises:
            MemoryUseError: the model was detached.
            StoreError: the memory is in RAM, or its store cannot be opened.
        """
        if self.backend.path is None:
            raise StoreError("a memory in RAM has one backend. Give it a path.")
        config = self._attached_config.replace(path=str(self.backend.path))
        if config.memory_type != SHARDED:  # else it makes a store with shards, too
            config = config.replace(memory_type="manual")
        return self._make_backend(self._attached("write"), config)

    def forget_model(self) -> None:
        """Let go of the model; called by `detach`."""
        self._model = None

    def _settle(self, model: AttachedModel) -> None:
        """Put into force what `attach` was given, as changed by the open `using` blocks."""
        config = self._using.config_of(self._attached_config)
        self._layers = reading_layers(model, config)
        self.config = config

    @contextlib.contextmanager
    def _alone(self, action: str) -> Iterator[None]:
        """Change the memory in a `with` block; its store may have another head profile then."""
        if action not in ("open", "close"):
            self._check_open(action)
        with self.activity.alone(action):
            try:
                yield
            finally:
                if self._is_open and self._model is not None:
                    self._modes.profiles.look_again(self.config, self.backend)

    def _make_backend(self, model: AttachedModel, config: MemoryConfig) -> MemoryBackend:
        backend = make_backend(model, config)
        try:
            self._index_heads(backend, config)
        except BaseException:
            backend.close()
            raise
        # An index without training is made as fast as its rows are read.
        if backend.lacks_files and not backend.searches_exactly:
            _logger.warning(_LACKS_FILES, len(backend))
        return backend

    def _index_heads(self, backend: MemoryBackend, config: MemoryConfig) -> None:
        """Let a backend index the heads that are searched, and no others."""
        backend.index_heads(self._heads_to_index(config, backend))

    def _heads_to_index(
        self, config: MemoryConfig, backend: MemoryBackend
    ) -> Mapping[int, Sequence[int]] | None:
        """Return the KV heads that are searched with some settings, by layer; None for all."""
        return self._modes.of_settings(config, backend).heads_to_index(config, backend)

    def _attached(self, action: str) -> AttachedModel:
        """Return what is known of the model.

        Args:
            action: what needs it, named in the error.

        Raises:
            MemoryUseError: the model was detached.
        """
        if self._model is None:
            raise MemoryUseError(f"cannot {action}: the model was detached. Call attach() again.")
        return self._model

    def _check_open(self, action: str) -> None:
        """Refuse an action that needs rows once their files were let go of.

        Raises:
            MemoryUseError: the memory was closed.
        """
        if not self._is_open:
            raise MemoryUseError(
                f"cannot {action}: the memory was closed. Call open() with the path of a store."
            )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:10]) or "none"
    return shown + (f" and {len(names) - 10} more" if len(names) > 10 else "")
