"""Rows to records and back."""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
import numpy as np
import pytest

from memory_backends import LayerLayout, StoreError
from memory_backends.rows.codecs import CODEC_NAMES, TEXT, row_codec
from memory_backends.rows.codecs.bits import (
    BitPacking,
    allocate,
    distortions,
    gaussian_points,
    quantise,
    rings,
)
from memory_backends.rows.codecs.quantised import QuantisedCodec

CODECS = [name for name in CODEC_NAMES if name != TEXT]  # those that keep rows

LAYERS = [LayerLayout(2, 16, 16), LayerLayout(3, 7, 5), LayerLayout(1, 1, 1), LayerLayout(2, 12, 4)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LEAST_ERROR = {
    "exact": 0.0,
    "float16": 1e-6,
    "bfloat16": 2e-5,
    "int8": 1e-3,
    "int5.5": 0.03,
    "int4": 0.05,
}


def rows_of(layer: LayerLayout, num_rows: int, seed: int) -> torch.Tensor:
    """Rows with a mean and wide and narrow directions, like keys; the first four are tiny."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.Generator().manual_seed(1)  # the same for all seeds
    dim = layer.row_dim
    mixed = torch.randn(dim, dim, generator=mixing) / torch.arange(1, dim + 1)
    noise = torch.randn(num_rows, layer.num_key_value_heads, dim, generator=generator)
    rows = noise @ mixed + 2 * torch.randn(dim, generator=mixing)
    rows[:4] *= 0.01
    return rows


def relative_error(decoded: torch.Tensor, rows: torch.Tensor) -> float:
    rows = rows.double()
    spread = (rows - rows.mean(0)).square().sum()
    return float((decoded.double() - rows).square().sum() / spread)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("name", CODECS)
def test_rows_come_back_from_records_of_the_promised_size(
    name: str, layer: LayerLayout, dtype: torch.dtype
) -> None:
    codec = row_codec(name, dtype)
    rows = rows_of(layer, 600, seed=0).to(dtype)
    coder = codec.coder(layer, codec.learn(layer, rows[:300]))
    records = coder.encode(rows)
    assert records.dtype == torch.uint8
    assert records.shape == (600, layer.num_key_value_heads, codec.record_bytes(layer))
    decoded = coder.decode(records, head_axis=1)
    assert decoded.dtype == dtype
    assert decoded.shape == rows.shape
    if layer.row_dim > 2 or name != "int4":  # two numbers in a byte and a half are a rough guess
        rounding = torch.finfo(dtype).eps ** 2
        assert relative_error(decoded, rows) <= LEAST_ERROR[name] + rounding


@pytest.mark.parametrize("name", CODECS)
def test_a_gather_decodes_as_a_span_does(name: str) -> None:
    layer = LAYERS[1]
    codec = row_codec(name, torch.float32)
    rows = rows_of(layer, 2500, seed=0)  # more than one chunk
    coder = codec.coder(layer, codec.learn(layer, rows))
    records = coder.encode(rows)
    whole = coder.decode(records, head_axis=1)
    ids = torch.randint(0, 2500, (3, 5, 2), generator=torch.Generator().manual_seed(2))
    heads = torch.arange(3).view(3, 1, 1)
    decoded = coder.decode(records[ids, heads], head_axis=0)  # (Hkv, 5, 2, record_bytes)
    torch.testing.assert_close(decoded, whole[ids, heads], rtol=1e-5, atol=1e-5)
    span = coder.decode(records[7:19], head_axis=1)
    torch.testing.assert_close(span, whole[7:19], rtol=1e-5, atol=1e-5)
    assert coder.decode(records[:0], head_axis=1).shape == (0, 3, 12)
    assert coder.encode(rows[:0]).shape == (0, 3, codec.record_bytes(layer))


def test_four_bits_are_a_quarter_of_float16_and_eight_are_a_half() -> None:
    for layer in (LayerLayout(3, 64, 64), LayerLayout(8, 128, 128), LayerLayout(1, 256, 256)):
        assert row_codec("int4", torch.float32).record_bytes(layer) * 4 == 2 * layer.row_dim
        assert row_codec("int5.5", torch.float32).record_bytes(layer) * 32 == 22 * layer.row_dim
        assert row_codec("int8", torch.float32).record_bytes(layer) == layer.row_dim + 2
        assert row_codec("exact", torch.float32).record_bytes(layer) == 4 * layer.row_dim


def test_half_a_bit_more_halves_the_error() -> None:
    layer = LayerLayout(2, 64, 64)
    rows = torch.randn(2000, 2, 128, generator=torch.Generator().manual_seed(0))
    errors = []
    for bits in (3.5, 4, 4.5, 5, 5.5, 6, 6.5):
        codec = QuantisedCodec("any", bits, torch.float32)
        coder = codec.coder(layer, codec.learn(layer, rows[:600]))
        errors.append(relative_error(coder.decode(coder.encode(rows), 1)[..., 64:], rows[..., 64:]))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] / errors[-1] == pytest.approx(2.0 ** (2 * 3), rel=0.15)


@pytest.mark.parametrize("name", ["int8", "int5.5", "int4"])
def test_the_first_rows_are_exact_and_others_like_them_are_near(name: str) -> None:
    layer = LAYERS[0]
    codec = row_codec(name, torch.float32)
    rows = rows_of(layer, 500, seed=0)
    later = rows_of(layer, 500, seed=3)
    coder = codec.coder(layer, codec.learn(layer, rows))
    assert torch.equal(coder.decode(coder.encode(rows), head_axis=1)[:4], rows[:4])
    decoded = coder.decode(coder.encode(later), head_axis=1)
    assert (decoded[:4] - later[:4]).norm() < 0.05 * rows[4:].norm(dim=-1).mean()


@pytest.mark.parametrize("num_rows", [1, 2, 5, 9])
@pytest.mark.parametrize("name", ["int8", "int5.5", "int4"])
def test_a_store_may_begin_with_a_few_rows(name: str, num_rows: int) -> None:
    layer = LAYERS[0]
    codec = row_codec(name, torch.float32)
    rows = rows_of(layer, 500, seed=0)[4:]
    coder = codec.coder(layer, codec.learn(layer, rows[:num_rows]))
    error = relative_error(coder.decode(coder.encode(rows), head_axis=1), rows)
    assert error < {"int8": 0.005, "int5.5": 0.15, "int4": 0.3}[name]


@pytest.mark.parametrize("factor", [0.0, 1e-3, 30.0, 1e6])
@pytest.mark.parametrize("name", ["int8", "int5.5", "int4"])
def test_later_rows_of_another_size_stay_finite_and_point_the_same_way(
    name: str, factor: float
) -> None:
    layer = LAYERS[0]
    codec = row_codec(name, torch.float32)
    rows = rows_of(layer, 500, seed=0)
    coder = codec.coder(layer, codec.learn(layer, rows))
    later = factor * rows[4:]
    decoded = coder.decode(coder.encode(later), head_axis=1)
    assert decoded.isfinite().all()
    if factor == 30.0:
        cosine = torch.nn.functional.cosine_similarity(decoded, later, dim=-1)
        assert cosine.mean() > 0.9


@pytest.mark.parametrize("name", ["int8", "int5.5", "int4"])
def test_rows_that_do_not_vary_are_kept(name: str) -> None:
    layer = LAYERS[0]
    codec = row_codec(name, torch.float32)
    rows = torch.ones(20, 2, 32)
    coder = codec.coder(layer, codec.learn(layer, rows))
    decoded = coder.decode(coder.encode(rows), head_axis=1)
    torch.testing.assert_close(decoded, rows, rtol=0.01, atol=0)
    nothing = torch.zeros(20, 2, 32)
    coder = codec.coder(layer, codec.learn(layer, nothing))
    assert coder.decode(coder.encode(nothing), head_axis=1).abs().max() < 1e-5


@pytest.mark.parametrize("name", CODECS)
def test_the_same_rows_give_the_same_bytes(name: str) -> None:
    layer = LAYERS[1]
    codec = row_codec(name, torch.float32)
    rows = rows_of(layer, 100, seed=0)
    state = codec.learn(layer, rows)
    assert state == codec.learn(layer, rows.clone())
    records = codec.coder(layer, state).encode(rows)
    assert torch.equal(records[40:60], codec.coder(layer, state).encode(rows[40:60]))


def test_any_bytes_decode_to_finite_numbers() -> None:
    layer = LAYERS[1]
    for name in ("int8", "int5.5", "int4"):
        codec = row_codec(name, torch.float16)
        coder = codec.coder(layer, codec.learn(layer, rows_of(layer, 50, seed=0)))
        size = (300, 3, codec.record_bytes(layer))
        records = torch.randint(
            0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
        assert coder.decode(records, head_axis=1).isfinite().all()


@pytest.mark.parametrize("name", ["int8", "int5.5", "int4"])
def test_a_state_that_does_not_fit_is_refused(name: str) -> None:
    layer = LAYERS[0]
    codec = row_codec(name, torch.float32)
    state = codec.learn(layer, rows_of(layer, 50, seed=0))
    wide = state[:12] + bytes([200]) + state[13:]
    numbers = 12 + 16  # after the widths of 16 pairs
    nan = state[:numbers] + b"\xff\xff\xff\xff" + state[numbers + 4 :]
    for damaged in (b"", state[:-1], state + b"\0", b"XXXX" + state[4:], nan, wide):
        with pytest.raises(StoreError, match="statistics"):
            codec.coder(layer, damaged)
    with pytest.raises(StoreError, match=r"expected .* bytes of statistics"):
        codec.coder(LayerLayout(2, 8, 24), state)
    assert codec.coder(layer, state)


def test_widths_of_another_codec_are_refused() -> None:
    layer = LAYERS[0]
    state = row_codec("int8", torch.float32).learn(layer, rows_of(layer, 50, seed=0))
    with pytest.raises(StoreError, match="bits"):
        row_codec("int4", torch.float32).coder(layer, state)
    with pytest.raises(StoreError, match="has no state"):
        row_codec("exact", torch.float32).coder(layer, state)


def points_of(width: int) -> torch.Tensor:
    return gaussian_points()[:, 2**width - 1 : 2 ** (width + 1) - 1]


def test_few_points_are_those_of_the_tables() -> None:
    """Max (1960), table I, of which two and four points are made; a pair has twice the error."""
    level = math.sqrt(2 / math.pi)
    two = torch.tensor([[level, -level], [0.0, 0.0]])
    torch.testing.assert_close(points_of(1), two, rtol=0, atol=1e-3)
    torch.testing.assert_close(
        points_of(2).norm(dim=0), torch.full((4,), level * math.sqrt(2)), rtol=1e-3, atol=0
    )
    assert distortions()[:3].tolist() == pytest.approx([1.0, (1 + 0.3634) / 2, 0.3634], rel=1e-3)
    assert points_of(0).abs().max() < 1e-12


def test_many_points_are_as_good_as_points_in_a_plane_can_be() -> None:
    """Zador's limit for square cells: 2 pi 2^2 / 12 of 2^-width; scalar levels need 30 % more."""
    limits = 8 * math.pi / 12 * 2.0 ** -np.arange(17)
    assert (distortions()[8:] <= 1.01 * limits[8:]).all()
    assert (distortions()[8:] >= 0.96 * limits[8:]).all()
    assert (np.diff(np.diff(distortions())) >= -1e-5).all()  # one bit at a time finds the best
    assert distortions()[4] < 0.125  # of two bits a number


@pytest.mark.parametrize("width", range(17))
def test_rings_are_the_same_on_every_machine(width: int) -> None:
    """Points are counted by rounding, which the last digit of a number must not decide."""
    counts, radius = rings(width)
    assert counts.sum() == 2**width
    assert (counts >= 1).all()
    assert (radius.diff() > 0).all()
    edge = [2 * NormalDist().inv_cdf((k / len(counts) + 1) / 2) for k in range(len(counts))]
    inside = [2**width * (1 - math.exp(-(r**2) / 4)) for r in edge]
    assert counts.cumsum(0).tolist() == [*map(round, inside[1:]), 2**width]
    assert min(abs(number % 1 - 0.5) for number in inside) > 1e-6


def test_bits_go_where_they_help_most() -> None:
    assert allocate(np.array([16.0, 1.0, 1e-9]), 10).tolist() == [7, 3, 0]
    assert allocate(np.ones(8), 32).tolist() == [4] * 8
    assert allocate(np.ones(3), 1000).tolist() == [16] * 3


@pytest.mark.parametrize("width", range(13))
def test_pairs_get_a_point_that_is_as_near_as_any_almost(width: int) -> None:
    """The nearest ring is chosen on average over angles, so a point beside may be nearer."""
    pairs = torch.randn(2, 1, 2000, generator=torch.Generator().manual_seed(0))
    turn = torch.atan2(pairs[1], pairs[0]) / (2 * math.pi) % 1.0
    places = quantise(torch.hypot(*pairs), turn, torch.tensor([width]))
    distance = torch.cdist(pairs[:, 0].T.double(), points_of(width).T.double())
    least = distance.amin(1).square().mean()
    got = (pairs - gaussian_points()[:, places]).square().sum(0).mean()
    assert least <= got + 1e-6
    assert got < 1.08 * least


def test_codes_of_all_widths_are_packed_and_unpacked() -> None:
    widths = torch.tensor([3, 0, 8, 1, 7, 16, 15, 2, 6, 13, 9, 0])
    packing = BitPacking(widths, 10)
    generator = torch.Generator().manual_seed(0)
    codes = (torch.rand(12, 50, generator=generator) * 2.0 ** widths[:, None]).long()
    places = codes + 2 ** widths[:, None] - 1
    packed = packing.pack(places)
    assert packed.shape == (10, 50)
    assert torch.equal(packing.unpack(packed), places)
    as_number = sum(int(byte) << (8 * i) for i, byte in enumerate(packed[:, 0]))
    for width, code in zip(widths.tolist(), codes[:, 0].tolist(), strict=True):
        assert as_number & (2**width - 1) == code
        as_number >>= width
