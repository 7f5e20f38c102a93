"""Sentences of a part of a document are those of the whole document."""

import numpy as np
import pytest

from emt.citations.sentences import sentences_of
from memory_backends import StoredDocument

PIECES = [
    "word",
    "Dr",
    "end.",
    'said."',
    "why?",
    "\n",
    "\n\n",
    "  ",
    "\u6587\u3002",
    "x" * 30,
    "\t",
]


def random_document(seed):
    """Return a document of pieces, each of which is a token unless it is blank."""
    rng = np.random.default_rng(seed)
    often = rng.random(len(PIECES)) ** 3  # some texts have hardly any sentence's end
    text, spans = "", []
    for piece in rng.choice(PIECES, 3000, p=often / often.sum()).tolist():
        if not piece.isspace():
            spans.append((len(text), len(text) + len(piece)))
        elif rng.random() < 0.1:  # a special token, which stands nowhere
            spans.append((len(text), len(text)))
        text += piece + " " * int(rng.integers(2))
    ids = np.arange(len(spans), dtype=np.int32)
    return StoredDocument("d", ids, text, np.array(spans, dtype=np.int32), row_tokens=ids)


@pytest.mark.parametrize("seed", range(12))
def test_a_part_has_the_sentences_of_the_whole(seed):
    document = random_document(seed)
    total = len(document.token_ids)
    whole = sentences_of(document)
    assert whole[0, 0] == 0
    assert whole[-1, 1] == total
    assert (whole[1:, 0] == whole[:-1, 1]).all()
    rng = np.random.default_rng(seed)
    stands = np.flatnonzero(np.diff(document.offsets))  # not special tokens
    for _ in range(40):
        first, last = sorted(rng.choice(stands, 2).tolist())
        stop = last + 1
        part = sentences_of(document, first, stop)
        inner = whole[(whole[:, 0] > first) & (whole[:, 0] < stop), 0]
        assert part[:, 0].tolist() == [first, *inner.tolist()]
        assert part[:, 1].tolist() == [*inner.tolist(), stop]


def test_a_part_of_ids_has_the_runs_of_the_whole():
    document = StoredDocument("d", np.arange(100, dtype=np.int32))
    assert sentences_of(document)[:, 0].tolist() == [0, 32, 64, 96]
    assert sentences_of(document, 32, 70).tolist() == [[32, 64], [64, 70]]
    assert sentences_of(document, 40, 41).tolist() == [[40, 41]]
    assert sentences_of(document, 40, 90).tolist() == [[40, 64], [64, 90]]
