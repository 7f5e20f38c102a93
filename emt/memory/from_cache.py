"""Rows of tokens that a model has run, taken from its cache: nothing is read again.

A cache holds the keys and values of a conversation as they were computed: each token has seen those
before it, and what was recalled for them. Keys were rotated to where their tokens stood, behind the
rows of recalled passages; they are brought back to position 0, as those of documents are.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import numpy as np
import numpy.typing as npt
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from emt.citations.characters import text_of_tokens
from emt.errors import DocumentError, MemoryUseError, UnsupportedModelError
from emt.ingest.documents import Source
from emt.ingest.encoder import Encoder
from emt.model.attached import AttachedModel
from emt.model.attention_call import AttentionCall
from emt.model.devices import input_device, no_autocast
from emt.model.references import alive
from emt.model.watch import watching
from emt.modes.passage.rows import sequences_per_prompt
from emt.modes.passage.state import state_in
from memory_backends import Document, Rows
from memory_backends.layout import Int64Array, Metadata

Span = tuple[int, int]  # first token, and the one after the last
_SEPARATOR = "\n"  # between the texts of two spans


class _Kept(NamedTuple):
    """Where a cache has a layer's keys and values.

    Attributes:
        layer_idx: the layer of the cache.
        times: how often each of its KV heads is there.
        kind: the class of the cache's layer.
    """

    layer_idx: int
    times: int
    kind: type


class CacheReader:
    """Takes the rows of tokens from caches of one model.

    Args:
        model: the attached model.
    """

    def __init__(self, model: AttachedModel) -> None:
        self._model = model

    def read(
        self,
        cache: Any,
        token_ids: Source,
        name: str,
        encoder: Encoder,
        *,
        spans: Sequence[Span] | None = None,
        sequence: int = 0,
        attention_mask: Tensor | None = None,
        metadata: Metadata | None = None,
    ) -> tuple[Document, Rows]:
        """Return a document of some tokens of a cache, and their rows; see `Memory.remember`.

        Raises:
            As `Memory.remember`.
        """
        reader = encoder.row_reader()  # refuses a model that has changed
        layers = self._layers(cache)
        # A cache with recurrent layers counts otherwise.
        num_cached = max(int(layer.get_seq_length()) for layer in layers.values())
        batch = len(next(iter(layers.values())).keys)
        whole = encoder.document(token_ids, name, metadata=metadata)
        num_given = len(whole.token_ids)
        if isinstance(token_ids, str) or not num_cached <= num_given <= num_cached + 1:
            got = "text" if isinstance(token_ids, str) else f"{num_given} ids"
            raise DocumentError(
                f"token_ids of '{name}' must be the {num_cached} that the cache holds, and after "
                f"them at most the one that was chosen last; got {got}."
            )
        if type(sequence) is not int or not 0 <= sequence < batch:
            raise DocumentError(
                f"sequence must be one of the cache's, 0 to {batch - 1}; got {sequence!r}."
            )
        is_token = _is_token(attention_mask, num_cached, sequence)
        chosen = _chosen(spans, num_given, name)
        document = _document(whole, chosen, encoder.tokenizer)
        tokens = np.concatenate([np.arange(*span) for span in chosen])
        has_row = np.isin(document.token_ids, sorted(reader.drop_ids), invert=True)
        has_row &= (tokens < num_cached) & np.pad(is_token, (0, 1))[tokens]
        if not has_row.any():
            raise DocumentError(
                f"document '{name}' has no token to remember: only special ones, padding, or one "
                "that the model has not run. Leave it out."
            )
        places = tokens[has_row]
        index = is_token.cumsum()[places] - 1
        positions = self._positions(cache, torch.from_numpy(index), sequence, batch)
        keys, values = self._taken(layers, places, positions, sequence, num_cached)
        # Sinks are told by queries, which no cache has; nearly all of them are first tokens.
        rows = Rows(keys, values, np.flatnonzero(has_row).astype(np.int32), index == 0)
        return document, rows

    def _taken(
        self,
        layers: Mapping[int, Any],
        places: Int64Array,
        positions: Tensor,
        sequence: int,
        num_cached: int,
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Return layer -> keys (Hkv, n, D), at position 0, and layer -> values (Hkv, n, Dv).

        Args:
            layers: of the model -> of the cache.
            places: (n,), ascending, where the tokens stand in the cache.
            positions: (n,) int64, those that their keys were rotated to.
            sequence: of the cache.
            num_cached: tokens that the cache was given.
        """
        unrotations, dtype = self._model.unrotations, self._model.layout.dtype
        embeddings = self._model.angles.at(positions[None])
        keys, values = {}, {}
        for idx, layer in layers.items():
            num_dropped = num_cached - layer.keys.shape[2]
            if places[0] < num_dropped:
                raise UnsupportedModelError(
                    f"layer {idx} has a sliding window, and token {places[0]} has left it: the "
                    f"cache has the last {layer.keys.shape[2]} of {num_cached} tokens. Remember "
                    "tokens before they leave the window, or write their text."
                )
            at = torch.from_numpy(places - num_dropped).to(layer.keys.device)
            key, value = (
                part[sequence, :: self._kept[idx].times].index_select(1, at)
                for part in (layer.keys, layer.values)
            )
            unrotate = unrotations[idx]
            if unrotate is not None:
                key = unrotate(key[None], embeddings[idx])[0]
            keys[idx], values[idx] = key.to(dtype), value.to(dtype)
        return keys, values

    def _layers(self, cache: Any) -> dict[int, Any]:
        """Return the layers of a cache that have the keys and values of the model's.

        Raises:
            MemoryUseError: it is no cache, or has no tokens.
            UnsupportedModelError: it keeps something else.
        """
        kept_layers = getattr(cache, "layers", None)
        if not kept_layers or all(getattr(layer, "keys", None) is None for layer in kept_layers):
            got = type(cache).__name__ + ("" if kept_layers is None else " without tokens")
            raise MemoryUseError(
                "remembering needs the cache that tokens were run with, such as a DynamicCache "
                f"given to generate(); got {got}."
            )
        layers: dict[int, Any] = {}
        for idx, kept in self._kept.items():
            layer = cache.layers[kept.layer_idx] if kept.layer_idx < len(cache.layers) else None
            if type(layer) not in (DynamicLayer, kept.kind):
                raise UnsupportedModelError(
                    f"layer {idx} must be kept as a {kept.kind.__name__}, with keys and values as "
                    f"they were computed; this cache has a {type(layer).__name__}. Generate with "
                    "a DynamicCache, or write the text."
                )
            layers[idx] = layer
        return layers

    def _positions(self, cache: Any, index: Tensor, sequence: int, batch: int) -> Tensor:
        """Return where tokens of a sequence stand, behind the rows recalled for it: (n,) int64.

        Args:
            cache: with `batch` sequences.
            index: (n,) int64, ascending, which token of the sequence each is, without padding.
            sequence: of the cache.
            batch: sequences of the cache.

        Raises:
            UnsupportedModelError: the model rotates keys there in another way.
        """
        state = state_in(cache)
        if state is not None:
            rows = state.rows
            prompt = sequence // sequences_per_prompt(batch, len(rows.at))
            index = index + int(rows.lengths[prompt]) * (index >= int(rows.at[prompt]))
        longest, last = self._model.angles.longest, int(index[-1])
        if longest is not None and last >= longest:
            raise UnsupportedModelError(
                f"tokens can be remembered up to position {longest - 1}, as far as the model "
                f"rotates all keys alike; got position {last}. Write the text instead."
            )
        return index

    @functools.cached_property
    def _kept(self) -> Mapping[int, _Kept]:
        """Where a cache has each layer's keys and values; found once, by running two tokens.

        Raises:
            UnsupportedModelError: it has something else than what a layer attends to.
        """
        decoder = alive(self._model.decoder, "remember")
        size, device = decoder.config.vocab_size, input_device(decoder)
        token_ids = torch.tensor([[size // 2, size // 3]], device=device)
        with torch.no_grad(), watching(decoder) as seen, no_autocast(device):
            output = decoder(input_ids=token_ids, use_cache=True, return_dict=True)
        layers: list[Any] = list(getattr(output.get("past_key_values"), "layers", ()))
        calls = {call.layer_idx: call for call in seen.calls}
        kept = {}
        for idx in self._model.layout.layers:
            # Some models let their last layers share the keys and values of earlier ones.
            order = [idx, *range(idx), *range(idx + 1, len(layers))]
            places = (_place(layers, other, calls[idx]) for other in order)
            place = next((place for place in places if place is not None), None)
            if place is None:
                raise UnsupportedModelError(
                    f"{decoder.config.model_type}: layer {idx} does not keep the keys and values "
                    "it attends to in the cache, so they cannot be remembered from there. Write "
                    "the text instead."
                )
            kept[idx] = place
        return kept


def _place(layers: Sequence[Any], layer_idx: int, call: AttentionCall) -> _Kept | None:
    """Return how a layer of a cache keeps what an attention call attends to; None if it does not.

    The cache has the tokens of the call, and no others.
    """
    layer = layers[layer_idx] if layer_idx < len(layers) else None
    if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.values is None:
        return None
    times = max(layer.keys.shape[1] // call.key.shape[1], 1)  # Falcon repeats KV heads
    pairs = (layer.keys[:, ::times], call.key), (layer.values[:, ::times], call.value)
    is_same = all(torch.equal(cached, attended) for cached, attended in pairs)
    return _Kept(layer_idx, times, type(layer)) if is_same else None


def _is_token(mask: Tensor | None, num_cached: int, sequence: int) -> npt.NDArray[np.bool_]:
    """Return which places of a sequence are no padding, (num_cached,).

    Raises:
        DocumentError: the mask is not one of the cache.
    """
    if mask is None:
        return np.ones(num_cached, dtype=bool)
    mask = torch.as_tensor(mask)
    if mask.ndim != 2 or not sequence < len(mask) or mask.shape[1] < num_cached:
        raise DocumentError(
            f"attention_mask must be (batch, tokens) with the {num_cached} tokens of the cache; "
            f"got {tuple(mask.shape)}. Give the one of the last forward."
        )
    is_token: npt.NDArray[np.bool_] = (mask[sequence, :num_cached] != 0).cpu().numpy()
    return is_token


def _chosen(spans: Sequence[Span] | None, num_tokens: int, name: str) -> list[Span]:
    """Return the spans of tokens to remember.

    Raises:
        DocumentError: they are not in order, or not among the tokens.
    """
    try:
        chosen = [(0, num_tokens)] if spans is None else [(int(a), int(b)) for a, b in spans]
    except (TypeError, ValueError):
        chosen = []
    borders = [border for span in chosen for border in span]
    if not chosen or borders != sorted(borders) or borders[0] < 0 or borders[-1] > num_tokens:
        raise DocumentError(
            f"spans of '{name}' must be pairs (first token, one after the last) in order, from 0 "
            f"to {num_tokens}; got {spans!r:.100}."
        )
    return chosen


def _document(
    whole: Document, spans: Sequence[Span], tokenizer: PreTrainedTokenizerBase | None
) -> Document:
    """Return a document of some spans of another's tokens, their texts one below the other."""
    token_ids = np.concatenate([whole.token_ids[slice(*span)] for span in spans])
    if tokenizer is None:
        return replace(whole, token_ids=token_ids)
    text, offsets = "", []
    for span in spans:
        text += _SEPARATOR if text else ""
        for piece in text_of_tokens(whole.token_ids[slice(*span)].tolist(), tokenizer):
            offsets.append((len(text), len(text) + len(piece)))
            text += piece
    return replace(
        whole, token_ids=token_ids, text=text, offsets=np.array(offsets, np.int32).reshape(-1, 2)
    )
