"""What the tests of encoding share: readers, token ids, and rows joined and compared."""

import torch
import pytest

from emt import MemoryConfig, attach
from emt.ingest.encoder import encode
from emt.ingest.rows import RowReader
from emt.ingest.windows import Windows
from tests.families import FAMILIES, VOCAB_SIZE

# One family for each kind of attention; the slow tests have all of them.
_KINDS = {"llama", "gemma3_text", "gpt_oss", "gpt2", "llama4_text", "deepseek_v3", "gemma4_text"}
_KINDS |= {"mpt", "falcon", "codegen"}
SLIDING = ["mistral", "gemma2", "gemma3_text", "gpt_oss"]


def families(*, carrying=False):
    """Return test parameters: families, of which those of no other kind are slow."""
    return [
        pytest.param(
            family,
            marks=[] if family.model_type in _KINDS else [pytest.mark.slow],
            id=f"{family.model_type}: {family.note}",
        )
        for family in FAMILIES
        if family.carries or not carrying
    ]


def row_reader(model, drop_ids=()):
    attached = attach(model, MemoryConfig.published(layers=[0]))._attached("test")
    return RowReader(attached.decoder(), attached.unrotations, drop_ids)


def random_ids(length, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (length,), generator=generator)


def in_one_forward(reader, token_ids):
    return joined(encode(reader, token_ids, Windows(len(token_ids), len(token_ids))))


def joined(runs):
    """Return all rows of a document: tokens, and tensors by part and layer."""
    runs = list(runs)
    tensors = {
        (part, idx): torch.cat([getattr(run, part)[idx] for run in runs], dim=1)
        for part in ("keys", "values", "queries")
        for idx in getattr(runs[0], part)
    }
    tokens = [token for run in runs for token in run.tokens.tolist()]
    return tokens, tensors


def assert_same_rows(rows, expected, tolerance=1e-5):
    """Compare rows that were joined."""
    assert rows[0] == expected[0]
    torch.testing.assert_close(rows[1], expected[1], atol=tolerance, rtol=tolerance)


def count_forwards(monkeypatch):
    """Return a list that each forward adds its number of tokens to, padding included."""
    numbers, forward = [], RowReader.forward

    def counting(self, input_ids, **options):
        numbers.append(input_ids.numel())
        return forward(self, input_ids, **options)

    monkeypatch.setattr(RowReader, "forward", counting)
    return numbers
