"""``sparse-vdit``: the choice of every head against the paper's offline search (arXiv 2506.03065, equations 2 and 3).

For every head the losses ``L_i = MSE(O_i - O_0) + lambda (1 - S_i)`` of the modes skip, diagonal, multi-diagonal and
vertical stripe are compared; if all exceed epsilon the head stays full, else the mode of least loss replaces it.

Where ours departs:

- Full attention has the loss lambda by the same formula, and stays where no other has less: epsilon is lambda. (The
  paper sets epsilon = 1 and lambda = 0.5.) What lambda is follows from the price: the seconds that attention takes a
  head, over the price of a squared error.
- Errors of heads are measured behind the output projection and as they grow up to the sample; here there is none, and
  growth is the same for all, so that they are the paper's MSE times one factor.
- A mode comes in several widths, each with its own sparsity, and blocks are of 64 tokens (here of 16); stripes are
  the first frame's, beside a diagonal, as a query would not attend to itself otherwise.
- Neither sees the heads of a layer together: the kernel's own cost, which only ours has, is set to nothing here.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ditopt.cost_models.sparse import SparseCost
from ditopt.geometry import Geometry
from ditopt.measures import Measure, Table
from ditopt.profiler.pattern_errors import PatternCollector
from ditopt.recipes import RECIPES
from ditopt.search import SearchProblem
from ditopt.search.joint import dense
from ditopt.search.sparse import choose, head_candidates
from tests.profiler.attention_rig import SITE, planted, run, steps, trace_of
from tests.search.toy import Toy

GEOMETRY = Geometry(4, 4, 8)
HEADS, BLOCK, STEPS = 5, 16, 4
SPARSE_VDIT = RECIPES["sparse-vdit"]


def operands() -> Tensor:
    """``[1, 3 H, S, 8]``: heads that look along the diagonal, at a pixel, at the first frame, for nothing, at all."""
    generator = torch.Generator().manual_seed(3)
    tokens = GEOMETRY.tokens
    query = 0.3 * torch.randn(HEADS, tokens, 8, generator=generator)
    key = 0.3 * torch.randn(HEADS, tokens, 8, generator=generator)
    value = torch.randn(HEADS, tokens, 8, generator=generator)
    angles = torch.arange(tokens)[:, None] * torch.tensor([0.05, 0.11, 0.23, 0.47])
    along = 3 * torch.cat([angles.cos(), angles.sin()], 1)
    pixels = 3 * torch.sign(torch.randn(32, 8, generator=generator)).repeat(4, 1)
    for head, code in enumerate((along, pixels)):
        query[head] += code
        key[head] += code
    query[2, :, 0] += 4
    key[2, :32, 0] += 4
    value *= torch.tensor([1.0, 1.0, 10.0, 0.02, 10.0])[:, None, None]
    return torch.cat([query, key, value])[None]


def attention(x: Tensor, head: int, mask: Tensor | None = None) -> Tensor:
    """``[S, 8]`` float64: softmax(Q K^T / sqrt(d)) V of a head, where ``mask`` is true; O_0 without one."""
    query, key, value = (x[0, head + part * HEADS].double() for part in range(3))
    scores = query @ key.T / 8**0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ value


def token_mask(settings: dict[str, Any]) -> Tensor:
    """``[S, S]``: which keys a mode computes, pair by pair."""
    mask = torch.zeros(GEOMETRY.tokens, GEOMETRY.tokens, dtype=torch.bool)
    for i in range(GEOMETRY.tokens):
        for j in range(GEOMETRY.tokens):
            (_, row, column), (frame, other_row, other_column) = ((n // 32, n // 8 % 4, n % 8) for n in (i, j))
            if settings["pattern"] == "band":
                mask[i, j] = abs(i - j) <= settings["width"] * GEOMETRY.columns
            elif settings["pattern"] == "temporal":
                near = abs(row - other_row) <= settings["rows"] and abs(column - other_column) <= settings["columns"]
                mask[i, j] = near
            elif settings["pattern"] == "sink":
                mask[i, j] = frame < settings["frames"]
    if settings["pattern"] == "union":
        return token_mask(settings["of"][0]) | token_mask(settings["of"][1])
    return mask


def in_blocks(mask: Tensor) -> tuple[Tensor, float]:
    """The mask of whole blocks that hold what ``mask`` does, and S: the share of blocks that are not computed."""
    blocks = mask.view(GEOMETRY.tokens // BLOCK, BLOCK, -1, BLOCK).any(3).any(1)
    sparsity = 1 - float(blocks.double().mean())
    return blocks.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1), sparsity


def offline_search(losses: dict[str, tuple[float, float]], penalty: float, epsilon: float) -> str | None:
    """Equations 2 and 3 for one head; ``losses`` are (MSE, S) of the modes. None: full attention."""
    totals = {mode: mse + penalty * (1 - sparsity) for mode, (mse, sparsity) in losses.items()}
    if all(total > epsilon for total in totals.values()):
        return None
    return min(totals, key=lambda mode: totals[mode])


@pytest.fixture(scope="module")
def table() -> Table:
    """What our profiler measures of these heads."""
    captured = planted(operands(), None, (HEADS, HEADS), projected=False)
    collector = PatternCollector(trace_of(captured), steps(1), GEOMETRY)
    run(captured, steps(1), [collector])
    return collector.tables()[SITE]


@pytest.fixture(scope="module")
def losses(table: Table) -> list[dict[str, tuple[float, float]]]:
    """By head MSE and sparsity of every mode, from maps of tokens."""
    x = operands()
    modes = [str(name) for name in table.labels["candidate"] if SPARSE_VDIT.allows(str(name))]
    masks = {mode: in_blocks(token_mask(json.loads(mode))) for mode in modes}
    return [
        {
            mode: (float((attention(x, head, mask) - attention(x, head)).square().mean()), sparsity)
            for mode, (mask, sparsity) in masks.items()
        }
        for head in range(HEADS)
    ]


def test_heads_have_the_modes_that_the_papers_search_gives_them(
    table: Table, losses: list[dict[str, tuple[float, float]]]
) -> None:
    assert table.facts["block_queries"] == BLOCK
    network = Toy(steps=STEPS).profile()
    shape = (6, STEPS, 1)
    error = np.broadcast_to(table["error"].values, (*shape, *table["error"].values.shape[3:])).copy()
    output = np.broadcast_to(table["output"].values, shape).copy()
    measures = {"error": Measure(table["error"].axes, error), "output": Measure(table["output"].axes, output)}
    measures["density"] = table["density"]
    network.tables["patterns"] = {SITE: Table(measures, table.labels, table.facts)}
    growth = Measure(("anchor", "error"), np.ones((2, 2)))
    network.tables["sensitivity"] = {
        SITE: Table({"to_output": growth}, {"anchor": (0, STEPS - 1), "error": ("head", "pattern")})
    }
    problem = SearchProblem.from_profile(network)
    costs = {SITE: SparseCost(dense=float(HEADS), overhead=0.0, efficiency=1.0)}  # a second a head
    candidates = head_candidates(network, problem, dense(problem), costs, [[1]], SPARSE_VDIT)
    factors = [
        each.error / losses[each.choice.head][str(each.choice.candidate)][0]
        for of_head in candidates[0].heads
        for each in of_head
    ]
    assert len(factors) > 3 * HEADS / 2 and factors == pytest.approx([factors[0]] * len(factors), rel=1e-3)
    seen: set[str | None] = set()
    for penalty in np.geomspace(1e-5, 2.0, 40):
        chosen = {each.choice.head: each.choice.candidate for each in choose(candidates, 1 / penalty / factors[0])}
        expected = [offline_search(losses[head], penalty, epsilon=penalty) for head in range(HEADS)]
        assert [chosen.get(head) for head in range(HEADS)] == expected, penalty
        seen |= {None if mode is None else json.loads(mode)["pattern"] for mode in expected}
    assert seen == {None, "skip", "band", "temporal", "union"}, "every mode is the best of some head at some price"


def test_each_head_has_the_mode_that_was_planted(losses: list[dict[str, tuple[float, float]]]) -> None:
    found = [offline_search(of_head, 0.1, epsilon=0.1) for of_head in losses]
    patterns = [None if mode is None else json.loads(mode)["pattern"] for mode in found]
    assert patterns == ["band", "temporal", "union", "skip", None]
