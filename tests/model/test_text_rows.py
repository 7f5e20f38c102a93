"""SmolLM2 with a store that keeps no rows: the bytes, the passages and the answers."""

import json

import torch
import pytest
from cost_model import MODELS

from emt import MemoryConfig, attach, detach
from emt.cli.command import main
from tests.model.conftest import DEMO

pytestmark = pytest.mark.model


def test_bytes_passages_and_rows_are_as_with_kept_rows(smollm2, tmp_path, capsys):
    text = (DEMO / "documents" / "beans.txt").read_text(encoding="utf-8")[:6000]
    found = {}
    for codec in ("float16", "text"):
        path = tmp_path / codec
        config = MemoryConfig(
            memory_type="vector_db",
            path=str(path),
            row_codec=codec,
            routing="heads",
            index="Flat",
            reread_context=10**6,
            relevance=None,
        )
        memory = attach(smollm2.model, config, tokenizer=smollm2.tokenizer)
        try:
            memory.write_all([("book", text)])
            routed = memory.route("When should the beans be sown?")
            found[codec] = routed.passages, memory.backend.fetch_layers(torch.arange(50, 90))
        finally:
            detach(smollm2.model)
            memory.close()
        main(["info", str(path), "--json"])
        sizes = json.loads(capsys.readouterr().out)["bytes"]
        assert sizes["per_row"] == MODELS[0].row_bytes(codec)
    (kept, kept_rows), (text, text_rows) = found.values()
    assert [each.passage for each in text] == [each.passage for each in kept] != []
    for layer_idx, parts in kept_rows.items():
        for one, other in zip(parts, text_rows[layer_idx], strict=True):
            torch.testing.assert_close(other, one, rtol=2e-3, atol=2e-2)
