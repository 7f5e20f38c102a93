"""Texts ranked by an embedding model, as most people's retrieval does it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
import numpy as np
import numpy.typing as npt
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

from emt.errors import ConfigError

_BATCH = 32
_MAX_TOKENS = 256  # all-MiniLM-L6-v2 was trained with no more


class Dense:
    """Cosines between embeddings: means over the tokens of a model's last layer.

    Args:
        texts: the texts that are ranked.
        model: a folder, or a hub name, of an encoder that pools so.
        folder: keeps the embeddings of the texts.

    Raises:
        ConfigError: the model cannot be loaded.

    Source:
        Reimers and Gurevych, Sentence-BERT (arXiv 1908.10084).
    """

    def __init__(self, texts: Sequence[str], model: str, folder: Path) -> None:
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(model)
            self._model = AutoModel.from_pretrained(model).eval()
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"embedding_model '{model}' cannot be loaded: {reason}") from error
        digest = hashlib.sha256("\0".join([Path(model).name, *texts]).encode()).hexdigest()[:16]
        path = folder / f"embeddings-{digest}.npy"
        if path.exists():
            self._embeddings = np.load(path)
            return
        self._embeddings = self._embedded(texts)
        folder.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".partial").open("wb") as file:
            np.save(file, self._embeddings)
        path.with_suffix(".partial").rename(path)

    def scores(self, question: str) -> npt.NDArray[np.float32]:
        """Return how well each text suits, (n,): 1 + cosine, so that each is a hit."""
        scores: npt.NDArray[np.float32] = 1 + self._embeddings @ self._embedded([question])[0]
        return scores

    @torch.no_grad()
    def _embedded(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return unit vectors, (n, D)."""
        embeddings = []
        starts = range(0, len(texts), _BATCH)
        for start in tqdm(starts, desc="embedding", disable=None, leave=False):
            encoded = self._tokenizer(
                list(texts[start : start + _BATCH]),
                padding=True,
                truncation=True,
                max_length=_MAX_TOKENS,
                return_tensors="pt",
            )
            hidden = self._model(**encoded).last_hidden_state  # (b, T, D)
            mask = encoded["attention_mask"][..., None].to(hidden.dtype)
            mean = (hidden * mask).sum(1) / mask.sum(1)
            embeddings.append(torch.nn.functional.normalize(mean, dim=-1).float().numpy())
        return np.concatenate(embeddings)
