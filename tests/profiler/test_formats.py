"""Candidate precisions against plain loops, exact invariances, and outliers that smoothing and rotation must tame."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ditopt.profiler.formats import (
    FORMATS,
    decibels,
    fp8_e4m3,
    int8_dynamic,
    int8_rotated,
    int8_smooth,
    int8_weight,
    rotated,
    smoothing,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def half_even(value: float) -> float:
    return float(round(value))  # Python rounds halves to even, as torch does


def e4m3(value: float) -> float:
    """The nearest number with 3 bits of mantissa and exponents from -6 on."""
    if value == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(value))), -6)
    step = 2.0 ** (exponent - 3)
    return half_even(value / step) * step


def bf16(value: float) -> float:
    """The nearest number with 7 bits of mantissa."""
    if value == 0:
        return 0.0
    step = 2.0 ** (math.floor(math.log2(abs(value))) - 7)
    return half_even(value / step) * step


def rows_to(values: list[list[float]], largest: float, nearest: Callable[[float], float]) -> list[list[float]]:
    found = []
    for row in values:
        scale = max(abs(value) for value in row) / largest
        found.append([nearest(value / scale) * scale for value in row])
    return found


def product(x: list[list[float]], w: list[list[float]]) -> Tensor:
    entries = [[math.fsum(a * b for a, b in zip(row, channel, strict=True)) for channel in w] for row in x]
    return torch.tensor(entries, dtype=torch.float64)


def plain(name: str, x: Tensor, w: Tensor) -> Tensor:
    """Each format by loops over Python's floats."""
    rows, channels = x.tolist(), w.tolist()
    if name == "bfloat16":
        rounded = product([[bf16(v) for v in row] for row in rows], [[bf16(v) for v in row] for row in channels])
        return torch.tensor([[bf16(v) for v in row] for row in rounded.tolist()], dtype=torch.float64)
    if name == "fp8_e4m3":
        return product(rows_to(rows, 448, e4m3), rows_to(channels, 448, e4m3))
    if name == "int8_weight":
        return product(rows, rows_to(channels, 127, half_even))
    if name == "int8_smooth":
        inputs = range(x.shape[1])
        s = [math.sqrt(max(abs(r[i]) for r in rows) / max(abs(r[i]) for r in channels)) for i in inputs]
        rows = [[row[i] / s[i] for i in inputs] for row in rows]
        channels = [[row[i] * s[i] for i in inputs] for row in channels]
    elif name == "int8_rotated":
        turn = hadamard(x.shape[1])
        rows, channels = (x @ turn).tolist(), (w @ turn).tolist()
    return product(rows_to(rows, 127, half_even), rows_to(channels, 127, half_even))


def hadamard(size: int) -> Tensor:
    """The whole block-diagonal matrix, entry by entry: the sign is the parity of the common bits of row and column."""
    block = next(2**k for k in range(20, -1, -1) if size % 2**k == 0)
    found = torch.zeros(size, size, dtype=torch.float64)
    for i in range(size):
        for j in range(size):
            if i // block == j // block:
                found[i, j] = (-1) ** ((i % block) & (j % block)).bit_count() / math.sqrt(block)
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_what_plain_loops_make_of_it(name: str) -> None:
    x, w = normal(5, 12), normal(7, 12, seed=1) / 30
    assert torch.allclose(FORMATS[name](x, w), plain(name, x, w), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", FORMATS)
def test_float32_gives_what_float64_does(name: str) -> None:
    x, w = normal(16, 48), normal(24, 48, seed=1) / 7
    found = FORMATS[name](x.float(), w.float())
    assert found.dtype == torch.float32
    # values that lie between two codes may fall to either side
    assert decibels(found.double(), FORMATS[name](x, w)) > 60


@pytest.mark.parametrize("size", [1, 6, 12, 64, 192, 256])
def test_the_rotation_is_the_orthonormal_matrix(size: int) -> None:
    turn = hadamard(size)
    assert torch.allclose(turn @ turn.T, torch.eye(size, dtype=torch.float64))
    values = normal(9, size)
    assert torch.allclose(rotated(values), values @ turn)


def test_rotation_and_smoothing_leave_the_product_as_it_is() -> None:
    x, w = normal(9, 96), normal(5, 96, seed=1)
    scale = smoothing(x, w)
    assert torch.allclose(rotated(x) @ rotated(w).T, x @ w.T)
    assert torch.allclose((x / scale) @ (w * scale).T, x @ w.T)
    assert torch.allclose((x / scale).abs().amax(0), (w * scale).abs().amax(0))  # both sides have it equally hard


@pytest.mark.parametrize("features", [64, 1024, 5000])
def test_int8_of_whole_numbers_is_exact(features: int) -> None:
    drawing = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (6, features), generator=drawing).float()
    w = torch.randint(-127, 128, (4, features), generator=drawing).float()
    x[:, 0], w[:, 0] = 127, -127  # so that every scale is 1
    exact = (x.long() @ w.long().T).float()
    assert torch.equal(int8_dynamic(x, w), exact)
    x[:], w[:] = 127, 127  # the largest sum there is
    assert torch.equal(int8_dynamic(x, w), torch.full((6, 4), features * 127.0 * 127.0))


def test_numbers_that_fp8_holds_stay_as_they_are() -> None:
    x = torch.tensor([[448.0, -1.125, 0.875, 2.0**-6], [448.0, 3.5, -208.0, 0.0]], dtype=torch.float64)
    w = torch.tensor([[448.0, 2.0, 0.5, -2.25]], dtype=torch.float64)
    assert torch.equal(fp8_e4m3(x, w), x @ w.T)


def test_only_the_weight_is_rounded() -> None:
    w = torch.tensor([[127.0, -3.0], [254.0, 8.0]], dtype=torch.float64)
    x = normal(4, 2)
    assert torch.allclose(int8_weight(x, w), x @ w.T)


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_give_zeros(name: str) -> None:
    x, w = normal(4, 8), normal(3, 8)
    x[1], w[2], x[:, 5], w[:, 6] = 0, 0, 0, 0
    found = FORMATS[name](x, w)
    assert torch.isfinite(found).all()
    assert not found[1].any() and not found[:, 2].any()
    assert not FORMATS[name](torch.zeros(4, 8), torch.zeros(3, 8)).any()


def test_smoothing_and_rotation_tame_an_outlier_channel() -> None:
    x, w = normal(64, 128), normal(96, 128, seed=1)
    reference = x @ w.T
    usual = decibels(int8_dynamic(x, w), reference)
    x[:, 17] *= 60
    reference = x @ w.T
    hurt = decibels(int8_dynamic(x, w) - x[:, 17:18] @ w[:, 17:18].T, reference - x[:, 17:18] @ w[:, 17:18].T)
    assert hurt < usual - 15
    apart = x[:, 17:18] @ w[:, 17:18].T  # the other channels' part is what gets lost
    for helped in (int8_smooth, int8_rotated):
        assert decibels(helped(x, w) - apart, reference - apart) > hurt + 6


def test_decibels() -> None:
    reference = torch.tensor([[3.0, 4.0]])
    assert decibels(reference + torch.tensor([[0.05, 0.0]]), reference) == pytest.approx(40)
    assert decibels(reference, reference) == 200
    assert decibels(reference, torch.zeros(1, 2)) == -200
    assert decibels(torch.zeros(1, 2), torch.zeros(1, 2)) == 200
