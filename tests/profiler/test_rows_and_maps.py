"""Which rows of attention maps are looked at, and how their mass is pooled and compared."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditopt.profiler.maps import by_distance, mass_in, pooled_keys, pooled_rows, top_blocks
from ditopt.profiler.rows import anchor_steps
from ditopt.profiler.sample import sample_rows


@given(tokens=st.integers(1, 3000), block=st.sampled_from([1, 4, 16, 64]), wanted=st.integers(1, 900))
def test_sampled_rows_are_spread_over_all_blocks(tokens: int, block: int, wanted: int) -> None:
    sample = sample_rows(tokens, block, wanted)
    found = sample.rows[sample.real]
    assert (found.diff() > 0).all() and found.max() < tokens and (sample.rows.view(-1).diff() >= 0).all()
    assert sample.real.any(1).all() and len(found) >= min(wanted, tokens) * 0.9 - block
    inside = (sample.rows // block) == torch.arange(sample.blocks)[:, None]
    assert inside.all()
    assert float(sample.weights(0, tokens).sum()) == pytest.approx(1, abs=1e-5)
    if len(found) == tokens:
        weights = sample.weights(0, max(1, tokens // 2)).view(-1)
        assert torch.allclose(weights[weights > 0], torch.tensor(1 / max(1, tokens // 2)))


@given(st.integers(1, 200), st.integers(2, 9))
def test_anchors_are_spread_from_the_first_step_to_the_last(count: int, anchors: int) -> None:
    found = anchor_steps(count, anchors)
    assert found[0] == 0 and found[-1] == count - 1 and len(found) == min(count, anchors)
    assert np.ptp(np.diff(found)) <= 1 if len(found) > 1 else True


def test_small_functions_do_what_they_say() -> None:
    mass = torch.tensor([[[1.0, 3.0], [3.0, 1.0]], [[0.5, 0.5], [9.0, 9.0]]])
    real = torch.tensor([[True, True], [True, False]])
    assert pooled_rows(mass, real).tolist() == [[2.0, 2.0], [0.5, 0.5]]
    assert pooled_keys(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), 2).tolist() == [6.0, 9.0]
    assert pooled_keys(torch.tensor([1.0, 2.0]), 5).tolist() == [1.0, 2.0]
    found = by_distance(torch.tensor([[0.1, 0.2, 0.7], [0.0, 1.0, 0.0]]), [0, 5], torch.tensor([1.0, 1.0]), 2)
    np.testing.assert_allclose(found, [0, 0, 0.1, 0.2, 0.7])


@given(st.integers(1, 7), st.integers(1, 9), st.floats(0.1, 0.99), st.integers(0, 99))
def test_top_blocks_are_the_fewest_that_hold_the_share(height: int, width: int, share: float, seed: int) -> None:
    maps = torch.rand(height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(-1)
    top = top_blocks(maps, share)
    for row, kept in zip(maps.tolist(), top.tolist(), strict=True):
        count, held = 0, 0.0
        for value in sorted(row, reverse=True):
            if held < share * sum(row) - 1e-12:
                count, held = count + 1, held + value
        assert sum(kept) == count and sum(value for value, k in zip(row, kept, strict=True) if k) == pytest.approx(held)
    assert float(mass_in(maps, top)) == pytest.approx(float((maps * top).sum() / height))
    assert top_blocks(torch.full((1, 4), 0.25), 0.5).tolist() == [[True, True, False, False]]
