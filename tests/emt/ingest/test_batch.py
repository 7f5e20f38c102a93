"""Documents read together against the same documents read one by one."""

import numpy as np
import pytest

from emt.ingest.batch import BATCH_TOKENS, batches, encode_batch
from tests.emt.ingest.encoding import (
    SLIDING,
    assert_same_rows,
    families,
    in_one_forward,
    joined,
    random_ids,
    row_reader,
)
from tests.families import build


def assert_padding_changes_no_row(model):
    reader = row_reader(model, {7, 8})
    documents = [random_ids(length, seed=length) for length in (9, 31, 1, 18)]
    for token_ids, rows in zip(documents, encode_batch(reader, documents), strict=True):
        assert_same_rows(joined([rows]), in_one_forward(reader, token_ids))


@pytest.mark.parametrize("family", families())
def test_padding_changes_no_row(family):
    assert_padding_changes_no_row(family.build())


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        *((model_type, {"sliding_window": 6}) for model_type in SLIDING),
        ("llama", {"attn_implementation": "eager"}),
    ],
)
def test_padding_changes_no_row_with_windows_and_in_eager_attention(model_type, options):
    assert_padding_changes_no_row(build(model_type, **options))


def test_batches_have_little_padding():
    lengths = np.random.default_rng(0).integers(1, 400, 60).tolist()
    result = batches(lengths)
    assert sorted(number for batch in result for number in batch) == list(range(60))
    assert len(result) < 20
    for batch in result:
        tokens = [lengths[number] for number in batch]
        assert max(tokens) * len(tokens) <= 1.25 * sum(tokens)
    assert batches([7, 7, 7]) == [[0, 1, 2]]
    assert BATCH_TOKENS == 4096
