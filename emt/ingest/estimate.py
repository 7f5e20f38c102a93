"""The cost of encoding a corpus, and errors that it would raise, before anything is written."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import torch
import numpy as np

from emt.errors import DocumentError
from emt.ingest.corpus import Corpus
from emt.ingest.encoder import Encoder, encode_all
from emt.ingest.rows import RowReader
from emt.ingest.windows import Windows
from emt.model.devices import input_device
from memory_backends import Document, MemoryBackend, MemoryLayout, content_hash
from memory_backends.faiss.index import bytes_per_key, factory_for

_FEWEST_TIMED, _MOST_TIMED = 128, 1024  # tokens that are read to know how long it takes
_TIMED_SHARE = 0.05  # of all tokens
_WARM_UP = 16  # tokens
_ATTENTION = 1.5  # attention takes so much longer a multiply-add than a product with weights
_INDEXING = 300_000  # multiply-adds a row and head to make lists; measured with 64,000 rows
_MATRIX = 512  # rows and columns of the timed product


class Estimate(NamedTuple):
    """What writing the documents of a corpus that are new or changed will take.

    Attributes:
        tokens: of these documents, special ones included.
        rows: that they will leave.
        bytes: of rows and index on disk, estimated.
        seconds: estimated from one timed forward, and from how much longer others take.
    """

    tokens: int
    rows: int
    bytes: int
    seconds: float


def estimate(
    encoder: Encoder,
    backend: MemoryBackend,
    heads: Mapping[int, Collection[int]],
    corpus: Corpus,
    *,
    other_tokens: int = 0,
) -> Estimate:
    """Tokenize a corpus without encoding it, so that no document stops a run halfway.

    Documents that the store has already cost nothing.

    Args:
        encoder: reads the documents.
        backend: where they will be written.
        heads: layer -> KV heads, those that will be indexed.
        corpus: documents that cannot be written are left out of it.
        other_tokens: short prompts that the model will read beside the documents.

    Raises:
        MemoryUseError: the encoder has no tokenizer, or its model is not ready.
        DocumentError: a document that `Memory.write` would refuse, unless the corpus skips errors;
            a CorpusError if there are several.
        ConfigError: `max_length` is beyond the model's positions, and a document is as long; or
            it leaves no room for carried context.
        UnsupportedModelError: the model's context cannot be carried.
    """
    reader, windows, catalog = encoder.row_reader(), encoder.windows, backend.catalog
    work_of = Work(reader, encoder.model.query_heads, backend.layout)
    tokens = rows = 0
    work = other_tokens * work_of.forward(1)
    sample: list[Document] = []  # the first documents
    longest = Document("", np.empty(0, np.int32))
    for document, num_rows in _documents(encoder, corpus):
        if catalog.content_hash(document.name) == content_hash(document):
            continue
        num_tokens = len(document.token_ids)
        tokens, rows = tokens + num_tokens, rows + num_rows
        work += work_of.document(windows, num_tokens)
        part = Document(document.name, document.token_ids[: windows.max_length])
        if sum(len(each.token_ids) for each in sample) < _MOST_TIMED:
            sample.append(part)
        if num_tokens > len(longest.token_ids):
            longest = part
    corpus.check()
    if not tokens:
        return Estimate(0, 0, 0, 0.0)
    sample = _cut(sample, longest, int(np.clip(_TIMED_SHARE * tokens, _FEWEST_TIMED, _MOST_TIMED)))
    sampled = sum(work_of.forward(len(document.token_ids)) for document in sample)
    seconds = work / sampled * _timed(reader, backend, sample, windows)
    num_bytes = rows * backend.catalog.bytes_per_row
    if encoder.config.memory_type in ("vector_db", "sharded"):
        factory = factory_for(encoder.config.index, rows, backend.layout.largest_head_dim)
        num_bytes += rows * _bytes_of_keys(factory, backend.layout, heads)
        if factory.startswith("IVF"):
            num_heads = sum(map(len, heads.values()))
            seconds += rows * num_heads * _INDEXING * _seconds_per_multiply_add()
    return Estimate(tokens, rows, num_bytes, seconds)


def _documents(encoder: Encoder, corpus: Corpus) -> Iterator[tuple[Document, int]]:
    """Yield documents with their numbers of rows; those that cannot be written are left out."""
    drop_ids = sorted(encoder.drop_ids)
    for source in corpus:
        try:
            document = encoder.document(source.text, source.name, metadata=source.metadata)
            num_rows = int(np.isin(document.token_ids, drop_ids, invert=True).sum())
            if not num_rows:
                raise DocumentError(
                    f"document '{document.name}' has nothing but special tokens. Leave it out."
                )
        except DocumentError as error:
            corpus.leave_out(source, error)
        else:
            yield document, num_rows


def _bytes_of_keys(factory: str, layout: MemoryLayout, heads: Mapping[int, Collection[int]]) -> int:
    """Return what the indexes keep of one token, in bytes."""
    return sum(
        len(of_layer) * bytes_per_key(factory, layout.layers[layer_idx].head_dim)
        for layer_idx, of_layer in heads.items()
    )


class Work:
    """What a model does to encode documents, counted in multiply-adds.

    A token costs what the weights cost, and a pair of a token and one that it attends to what the
    query heads cost: windows of thousands of tokens take much longer a token than short ones.
    """

    def __init__(self, reader: RowReader, query_heads: Mapping[int, int], layout: MemoryLayout):
        decoder = reader.decoder
        embeddings = sum(part.numel() for part in decoder.get_input_embeddings().parameters())
        self._of_token = sum(part.numel() for part in decoder.parameters()) - embeddings
        self._of_pair = _ATTENTION * sum(
            query_heads[layer_idx] * layer.row_dim for layer_idx, layer in layout.layers.items()
        )

    def forward(self, num_tokens: float, num_before: float = 0) -> float:
        """Return the work of tokens that attend to one another, and to those before them."""
        pairs = num_tokens * (num_before + num_tokens / 2)
        return num_tokens * self._of_token + pairs * self._of_pair

    def document(self, windows: Windows, num_tokens: int) -> float:
        """Return the work of encoding a document."""
        if not windows.carry_context:
            cut = windows.cut(num_tokens)
            return sum(self.forward(window.stop - window.start) for window in cut)
        first = min(windows.max_length, num_tokens)
        work = self.forward(first)
        for start in range(first, num_tokens, windows.stride):
            new = min(windows.stride, num_tokens - start)
            work += self.forward(new, min(start, windows.max_length - new))
        return work


def _cut(sample: list[Document], longest: Document, num_tokens: int) -> list[Document]:
    """Return so many tokens to time: of one window, or of short documents that share a forward."""
    if len(longest.token_ids) >= num_tokens:
        return [Document("timed", longest.token_ids[:num_tokens])]
    stops = np.cumsum([len(document.token_ids) for document in sample])
    return sample[: int(np.searchsorted(stops, num_tokens)) + 1]


def _timed(
    reader: RowReader, backend: MemoryBackend, sample: list[Document], windows: Windows
) -> float:
    """Return how many seconds documents take, from tokens to rows in a memory in RAM."""
    device = input_device(reader.decoder)
    trial = MemoryBackend(backend.layout, "manual", row_codec=backend.catalog.row_codec)
    with contextlib.closing(trial):
        reader.forward(torch.from_numpy(sample[0].token_ids[:_WARM_UP]).long()[None])
        started = time.perf_counter()
        for _ in trial.add_many(encode_all(reader, sample, windows)):
            pass
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started


def _seconds_per_multiply_add() -> float:
    """Return how fast the CPU multiplies matrices, which is most of making an index."""
    matrix = torch.ones(_MATRIX, _MATRIX)
    product = matrix @ matrix  # warm up
    started = time.perf_counter()
    torch.matmul(matrix, matrix, out=product)
    return (time.perf_counter() - started) / _MATRIX**3
