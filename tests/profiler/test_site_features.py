"""Features of tiny diffusers models against full tensors and plain least squares."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ditopt.calls import NetworkCalls
from ditopt.components import modules
from ditopt.errors import InputError
from ditopt.measures import Numbers
from ditopt.profiler import site_features
from ditopt.profiler.drawn import (
    COORDINATES,
    ENTRIES,
    centred,
    coordinates,
    drawn,
    drawn_tokens,
    fitted,
    relative_error,
)
from ditopt.profiler.interpret import Moment, Seen
from ditopt.profiler.ranges import candidate_spans
from ditopt.profiler.site_features import FeatureTables, features_of
from ditopt.sites import range_name
from tests.profiler.watched_models import (
    BATCHED,
    INTERVAL,
    ONE,
    SEPARATE,
    STEPS,
    Full,
    Keeper,
    generate,
    kept_by,
    trace_of,
)
from tests.trace.models import CASES


def collect(name: str, calls: NetworkCalls, **settings: Any) -> tuple[FeatureTables, Full]:
    seed = settings.pop("seed", 0)
    trace = trace_of(name)
    collector = FeatureTables(trace, calls, **settings)
    keeper = Keeper(collector.wanted)
    generate(name, calls, collector, keeper, seed=seed)
    return collector, Full(trace, keeper)


PATTERNS = [
    ("Wan", SEPARATE),
    ("Wan", INTERVAL),
    ("SD3", BATCHED),
    ("Flux", SEPARATE),
    ("PixArt", BATCHED),
    ("PixArt", ONE),
    ("HunyuanVideo", ONE),  # its stream begins as a view with strides
]


@pytest.mark.parametrize(("name", "calls"), PATTERNS)
def test_grams_are_those_of_the_full_features(name: str, calls: NetworkCalls) -> None:
    collector, full = collect(name, calls)
    tables = collector.tables()
    assert {*CASES[name].blocks, "step"} <= tables.keys()
    for site, table in tables.items():
        rows: list[Tensor | None] = []
        for branch in range(calls.branches):
            for step in range(STEPS):
                parts = full.parts(site, step, branch)
                rows.append(None if parts is None else torch.cat([part.flatten() for part in parts]))
        size = next(row.numel() for row in rows if row is not None)
        matrix = torch.stack([torch.zeros(size, dtype=torch.float64) if row is None else row for row in rows])
        gram = table["gram"]
        assert gram.axes == ("prompt", "row", "column") and gram.values.dtype == np.float64
        expected = (matrix @ matrix.T).numpy()
        np.testing.assert_allclose(gram.values[0], expected, rtol=2e-5, atol=1e-6 * expected.max(), err_msg=site)


def least_squares(x: Numbers, y: Numbers) -> Numbers:
    """a = Cov / Var and b per channel."""
    gain = ((x - x.mean(0)) * (y - y.mean(0))).sum(0) / ((x - x.mean(0)) ** 2).sum(0)
    return np.stack([gain, y.mean(0) - gain * x.mean(0)])


def apart(xs: Sequence[Numbers], ys: Sequence[Numbers], fits: Sequence[Numbers]) -> float:
    missed = sum(float(((a * x + b - y) ** 2).sum()) for x, y, (a, b) in zip(xs, ys, fits, strict=True))
    return float(np.sqrt(missed / sum(float((y**2).sum()) for y in ys)))


def pairs(calls: NetworkCalls, lags: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    return ((step, branch, lag) for branch in range(calls.branches) for step in range(STEPS) for lag in lags)


@pytest.mark.parametrize(("name", "calls"), PATTERNS)
def test_errors_per_lag_are_those_of_plain_least_squares(name: str, calls: NetworkCalls) -> None:
    collector, full = collect(name, calls)
    known = 0
    for site, table in collector.tables().items():
        assert table.labels["lag"] == (1, 2, 3) and table["affine"].partial
        for step, branch, lag in pairs(calls, (1, 2, 3)):
            found = {key: table[key].values[0, step, branch, lag - 1] for key in ("affine", "affine_shared", "plain")}
            now = full.tokens(site, step, branch)
            before = full.tokens(site, step - lag, branch) if step >= lag else None
            if now is None or before is None:
                assert np.isnan(list(found.values())).all()
                continue
            known += 1
            fits = [least_squares(x, y) for x, y in zip(before, now, strict=True)]
            same = [np.stack([np.ones(x.shape[1]), np.zeros(x.shape[1])]) for x in before]
            assert found["affine"] == pytest.approx(apart(before, now, fits), rel=1e-3, abs=1e-6)
            assert found["plain"] == pytest.approx(apart(before, now, same), rel=1e-3, abs=1e-6)
            assert np.isnan(found["affine_shared"]), "these coefficients were fitted on this very prompt"
        assert table.facts["channels"] == sum(part.shape[1] for part in full.tokens(site, 4, 0) or ())
        assert table.facts["tokens"] == sum(len(part) for part in full.tokens(site, 4, 0) or ())
    assert known >= len(collector.tables()) * (STEPS - 1)


def test_later_prompts_use_the_coefficients_of_the_first() -> None:
    first, _ = collect("Flux", INTERVAL)
    second, full = collect("Flux", INTERVAL, shared=first.coefficients, seed=1)
    own = collect("Flux", INTERVAL, seed=1)[0].tables()
    for site, table in second.tables().items():
        fits = first.coefficients[site].numpy()
        assert fits.shape == (STEPS - 1, 2, 3, 2, table.facts["channels"]) and fits.dtype == np.float32
        np.testing.assert_array_equal(table["affine"].values, own[site]["affine"].values)
        assert (table["affine_shared"].values >= table["affine"].values - 1e-6)[~np.isnan(table["affine"].values)].all()
        for step, branch, lag in pairs(INTERVAL, (1, 2, 3)):
            now = full.tokens(site, step, branch)
            before = full.tokens(site, step - lag, branch) if step >= lag else None
            found = table["affine_shared"].values[0, step, branch, lag - 1]
            if now is None or before is None:
                assert np.isnan(found) and (not step or np.isnan(fits[step - 1, branch, lag - 1]).all())
                continue
            channels = np.cumsum([part.shape[1] for part in now])[:-1]
            parts = np.split(fits[step - 1, branch, lag - 1].astype(np.float64), channels, axis=1)
            assert found == pytest.approx(apart(before, now, parts), rel=1e-3, abs=1e-6)
    assert second.coefficients.keys() == first.coefficients.keys()


def test_corrections_are_of_fewer_steps_where_they_would_take_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = collect("Wan", ONE)[0]
    tried = collect("Wan", ONE, shared=whole.coefficients, seed=1)[0].tables()
    of_step = sum(value[0].numel() for value in whole.coefficients.values()) * 4
    monkeypatch.setattr(site_features, "COEFFICIENT_BYTES", 3 * of_step)
    first = collect("Wan", ONE)[0]
    steps = list(first.fitted_steps)
    assert len(steps) == 3 < STEPS and steps[-1] == STEPS - 1
    tables = collect("Wan", ONE, shared=first.coefficients, seed=1)[0].tables()
    for site, value in first.coefficients.items():
        torch.testing.assert_close(
            value, whole.coefficients[site][[step - 1 for step in steps]], rtol=0, atol=0, equal_nan=True
        )
        np.testing.assert_array_equal(tables[site]["affine"].values, tried[site]["affine"].values)
        found, expected = (of[site]["affine_shared"].values[0] for of in (tables, tried))
        np.testing.assert_array_equal(found[steps], expected[steps])
        assert np.isnan(np.delete(found, steps, axis=0)).all()


def test_coefficients_that_do_not_fit_are_named() -> None:
    first, _ = collect("Wan", ONE)
    shared = dict(first.coefficients)
    shared["blocks.1"] = shared["blocks.1"][:, :, :2]
    with pytest.raises(InputError, match=r"blocks.1 need shape \[4, 1, 3, 2, 24\]; there is shape \[4, 1, 2, 2, 24\]"):
        collect("Wan", ONE, shared=shared)
    del shared["blocks.1"]
    with pytest.raises(InputError, match="there is none"):
        collect("Wan", ONE, shared=shared)


@pytest.mark.parametrize("lags", [(), (0, 1), (2, 2)])
def test_lags_that_make_no_sense_are_refused(lags: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="lags"):
        FeatureTables(trace_of("Wan"), ONE, lags=lags)


def test_every_kind_of_site_is_there() -> None:
    found = {each.site: each.kind for each in features_of(trace_of("Wan"))}
    blocks = CASES["Wan"].blocks
    expected = {f"{block}.{child}": kind for block in blocks for child, kind in CHILDREN.items()}
    expected |= dict.fromkeys(blocks, "block")
    expected |= {range_name(blocks[a], blocks[b]): "range" for a, b in candidate_spans(len(blocks))}
    assert found == expected | {"step": "step"}


CHILDREN = {"attn1": "self", "attn2": "cross", "ffn": "mlp"}


def test_attention_without_a_feature_is_named() -> None:
    reasons = FeatureTables(trace_of("Flux"), ONE).reasons
    assert [reason.split(":")[0] for reason in reasons] == ["transformer_blocks.0.attn", "transformer_blocks.1.attn"]
    assert not FeatureTables(trace_of("Wan"), ONE).reasons


def test_a_value_that_branches_cannot_share_is_skipped_by_name() -> None:
    collector = FeatureTables(trace_of("Wan"), BATCHED)
    node = modules(trace_of("Wan"))[0].node
    collector.see(Seen(Moment(0, (0, 1)), node, (), {}, torch.ones(1, 4, 8)))
    assert list(collector.reasons) == [
        f"{node.name}: shape [1, 4, 8] does not divide into branches, tokens and channels"
    ]
    assert not collector.tables()


def test_the_same_generation_gives_the_same_bits() -> None:
    one, two = (collect("Wan", INTERVAL)[0] for _ in range(2))
    first, second = one.tables(), two.tables()
    for site, table in first.items():
        for name, measure in table.measures.items():
            assert measure.values.tobytes() == second[site][name].values.tobytes()
        assert one.coefficients[site].numpy().tobytes() == two.coefficients[site].numpy().tobytes()


def test_ranges_are_drawn_like_the_streams_that_they_are_differences_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_features, "coordinates", functools.partial(coordinates, count=200))
    collector, full = collect("Flux", ONE)
    tables = collector.tables()
    checked = [site for site in tables if tables[site].facts["kind"] in ("block", "range")]
    assert len(checked) == 10
    for site in checked:
        rows = []
        for step in range(STEPS):
            parts = [part.flatten() for part in full.parts(site, step, 0) or ()]
            some = [part[drawn(len(part), 200)] * max(len(part) / 200, 1) ** 0.5 for part in parts]
            rows.append(torch.cat(some))
        expected = (torch.stack(rows) @ torch.stack(rows).T).numpy()
        np.testing.assert_allclose(tables[site]["gram"].values[0], expected, rtol=2e-5, atol=1e-6 * expected.max())


def test_drawn_positions_are_one_in_each_equal_part() -> None:
    assert drawn(7, 7).tolist() == list(range(7)) and drawn(3, 8).tolist() == [0, 1, 2]
    found = drawn(1000, 50)
    assert ((found >= torch.arange(0, 1000, 20)) & (found < torch.arange(20, 1020, 20))).all()
    assert torch.equal(found, drawn(1000, 50))
    # over many sizes, which have seeds of their own, a position is as likely anywhere in its part
    within = torch.cat([drawn(size, 5) * 5 / size % 1 for size in range(1000, 2000)])
    assert within.mean() == pytest.approx(0.5, abs=0.02) and within.var() == pytest.approx(1 / 12, rel=0.05)


def test_drawn_coordinates_keep_inner_products_and_differences() -> None:
    a, b = torch.randn(2, 700, 96, 5, generator=torch.Generator().manual_seed(0)).unbind()
    b = 0.8 * a + 0.6 * b
    one, two = coordinates(a), coordinates(b)
    assert one.numel() == COORDINATES
    assert float(one @ one) == pytest.approx(float(a.square().sum()), rel=0.05)
    assert float(one @ two) == pytest.approx(float((a * b).sum()), rel=0.05)
    torch.testing.assert_close(one - two, coordinates(a - b))
    strided = a.permute(2, 0, 1)
    assert torch.equal(coordinates(strided), coordinates(strided.contiguous()))
    assert torch.equal(coordinates(a, count=a.numel()), a.flatten())


def test_drawn_tokens_are_whole_tokens_of_all_rows() -> None:
    value = torch.arange(4 * 500 * 3).reshape(4, 500, 3).permute(1, 0, 2)
    found = drawn_tokens(value, 100)
    flat = value.reshape(-1, 3)
    assert torch.equal(found, flat[drawn(2000, 100)].float())
    assert len(drawn_tokens(torch.zeros(1, 4000, 4096))) == ENTRIES // 4096


def test_planted_gain_and_offset_are_found() -> None:
    drawing = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=drawing) * torch.tensor([1e-3, 1, 1, 10, 1e3, 1]) + 5
    x[:, 5] = 3.7  # constant
    gain, offset = torch.tensor([0.5, 1.0001, -2, 1, 1.5, 9]), torch.tensor([0.0, 1, 2, -3, 100, 4])
    y = gain * x + offset
    fit = fitted(centred(x), centred(y))
    torch.testing.assert_close(fit[0, :5], gain[:5], rtol=1e-4, atol=1e-4)
    assert fit[0, 5] == 1 and fit[1, 5] == pytest.approx(float(y[0, 5] - x[0, 5]), rel=1e-5)
    assert relative_error([centred(x)], [centred(y)], [fit], [64]) < 1e-6


def test_relative_errors_weigh_tensors_by_the_tokens_they_stand_for() -> None:
    x, y = [torch.zeros(2, 1), torch.zeros(4, 1)], [torch.ones(2, 1), 2 * torch.ones(4, 1)]
    fits = [torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0], [2.0]])]
    before, now = [centred(each) for each in x], [centred(each) for each in y]
    assert relative_error(before, now, fits, [20, 4]) == pytest.approx((20 / (20 + 16)) ** 0.5)
    zero = [centred(torch.zeros(2, 1))]
    assert relative_error(zero, zero, fits[:1], [2]) == 0
    assert relative_error(now[:1], zero, fits[:1], [2]) == np.inf


def test_nothing_as_large_as_a_value_is_kept() -> None:
    trace = trace_of("Wan")
    collector = FeatureTables(trace, ONE)
    order = [node for node in trace.gm.graph.nodes if node.name in collector.wanted]
    for step in range(4):
        for node in order:
            collector.see(Seen(Moment(step, (0,)), node, (), {}, torch.randn(1, 4096, 512)))
    held = list(kept_by(collector))
    assert len(held) > 100
    assert max(tensor.untyped_storage().nbytes() for tensor in held) <= 4 * ENTRIES < 4 * 4096 * 512 / 8
    assert len(collector.tables()) == len(features_of(trace))
