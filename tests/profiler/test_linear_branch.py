"""Linear rests fitted to earlier prompts: errors on the next one, and the plan's projections, from full maps."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from ditopt.decisions import pattern_text
from ditopt.geometry import Geometry
from ditopt.kernels.patterns.candidates import block_for
from ditopt.kernels.patterns.choice import Linear, SparseChoice
from ditopt.kernels.patterns.draft import Draft
from ditopt.kernels.patterns.registry import pattern_from_data
from ditopt.measures import Table, joined
from ditopt.profile_check import _of_table
from ditopt.profiled_tensors import RIDGE, profiled_tensors
from ditopt.profiler import linear_branch
from ditopt.profiler.pattern_errors import PatternCollector
from tests.profiler.attention_rig import SITE, operands, planted, run, steps, trace_of
from tests.profiler.test_draft_blocks import expanded, kept
from tests.profiler.test_listed_blocks import BEFORE, LINE, STEPS, network_of, prompt
from tests.profiler.test_pattern_errors import attend, heads_weight, norm, of_video, total


def fitted(table: Table) -> dict[str, int]:
    """Where candidates with a linear rest stand in a table."""
    names = [str(name) for name in table.labels["candidate"]]
    return {name: at for at, name in enumerate(names) if json.loads(name).get("rest") == "linear"}


def lost_and_linear(x: Tensor, heads: tuple[int, int], geometry: Geometry, name: str) -> tuple[Tensor, Tensor]:
    """``[H, S, 8]`` each, float64, of the video: what a pattern's output lacks, and linear attention to its rest."""
    block = block_for(geometry.tokens)
    choice = SparseChoice.from_data(json.loads(name))
    assert isinstance(choice.rest, Linear)
    order = torch.arange(geometry.tokens)
    if choice.order is not None:
        order = torch.from_numpy(choice.order.of_sequence(geometry, block))
    data = {key: each for key, each in json.loads(name).items() if key not in ("rest", "order")}
    if isinstance(choice.pattern, Draft):
        of_blocks = kept(x[:, :, order], heads, geometry, block, pattern_text(data))
    else:
        of_blocks = torch.from_numpy(pattern_from_data(data).block_map(geometry, block)).expand(heads[0], -1, -1)
    place = order.argsort()
    mask = expanded(of_blocks, block, geometry.tokens)[:, place][..., place]
    query, key, value = x[0].double().split((heads[0], heads[1], heads[1]), 0)
    lost, linear = [], []
    for head in range(heads[0]):
        group = head * heads[1] // heads[0]
        lost.append((attend(x, heads) - attend(x, heads, mask[head]))[head])
        shares = query[head].softmax(-1) @ key[group].softmax(-1).T * ~mask[head]
        linear.append(shares @ value[group] / shares.sum(-1, keepdim=True).clamp(min=1e-30))
    video = of_video(geometry)
    return torch.stack(lost)[:, video], torch.stack(linear)[:, video]


def projections(inputs: list[Tensor], heads: tuple[int, int], geometry: Geometry, name: str) -> Tensor:
    """``[H, 8, 8]``: least squares with the ridge, head by head, over some calls."""
    parts = [lost_and_linear(x, heads, geometry, name) for x in inputs]
    lost, linear = (torch.cat([part[which] for part in parts], 1) for which in range(2))
    found = []
    for head in range(heads[0]):
        gram = linear[head].T @ linear[head]
        ridge = RIDGE * gram.diagonal().mean()
        found.append(torch.linalg.solve(gram + ridge * torch.eye(8), linear[head].T @ lost[head]))
    return torch.stack(found)


@pytest.mark.parametrize(("geometry", "heads"), [(LINE, (2, 2)), (BEFORE, (4, 2))])
def test_a_prompt_is_measured_with_projections_that_others_gave(geometry: Geometry, heads: tuple[int, int]) -> None:
    """Of every head and period, in raster order and in tiles; the plan's are of all prompts."""
    first, gave = prompt(geometry, heads, 0, [], linear=True)
    table, inputs = prompt(geometry, heads, 1, [first], linear=True)
    captured = planted(inputs[0], None, heads, **({"enable_gqa": True} if heads[0] != heads[1] else {}))
    weight = heads_weight(captured, heads[0])
    periods, names = [0, 0, 1, 2], fitted(table)
    assert len(names) == 2 * len(linear_branch.FITTED) - 1
    assert {json.loads(name).get("order") is None for name in names} == {True, False}
    for name, at in names.items():
        assert np.isnan(first["error"].values[..., at]).all(), "nobody had a say before the first prompt"
        for step, x in enumerate(inputs):
            of_period = [each for at_step, each in enumerate(gave) if periods[at_step] == periods[step]]
            lost, linear = lost_and_linear(x, heads, geometry, name)
            error = lost - linear @ projections(of_period, heads, geometry, name)
            expected = norm(error, weight) / total(attend(x, heads)[:, of_video(geometry)], weight)
            found = table["error"].values[0, step, 0, :, at]
            np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-4, err_msg=name)
        plain = {key: each for key, each in json.loads(name).items() if key != "rest"}
        work = table["density"].values[table.position("candidate", pattern_text(plain))]
        assert work < table["density"].values[at] <= 1 or table["density"].values[at] == 1
    both_prompts = joined([first, table])
    assert not list(_of_table(both_prompts, {"prompt": 2, "step": STEPS, "branch": 1})), "a file takes it"
    whole = profiled_tensors("net", network_of(both_prompts, geometry))
    assert [each.pattern for each in whole.projections] == list(names)
    both = gave[3], inputs[3]
    for entry in whole.projections:
        assert entry.complaint() is None and entry.starts == (0, 2, 3) and entry.heads == tuple(range(heads[0]))
        of_both = projections(list(both), heads, geometry, entry.pattern).numpy()
        np.testing.assert_allclose(entry.packed[2], of_both, rtol=0.02, atol=5e-3, err_msg=entry.pattern)


def test_moments_that_would_be_too_large_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    x = operands(LINE.tokens)
    captured, calls = planted(x), steps(STEPS)
    needed = 2 * 4 * 3 * 3 * (2 * 2 * 8**2)
    monkeypatch.setattr(linear_branch, "MOST_BYTES", needed)
    assert fitted(PatternCollector(trace_of(captured), calls, LINE, linear=True).tables()[SITE])
    monkeypatch.setattr(linear_branch, "MOST_BYTES", needed - 1)
    collector = PatternCollector(trace_of(captured), calls, LINE, linear=True)
    run(captured, calls, [collector], x)
    table = collector.tables()[SITE]
    assert not fitted(table) and not any(name.startswith("linear") for name in table.measures)
    assert [*collector.reasons] == ["moments of linear attention would be too large: no linear rest is fitted"]
