"""The benchmark of sparse heads: which plans it measures of a recipe; nothing is generated."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.sparse_search import SHARES, Bench
from ditopt.recipes import Recipe
from ditopt.search import SearchProblem
from ditopt.search.sparse import site_costs
from tests.search.test_sparse import STEPS, with_attention
from tests.search.toy import Toy

ALL = Recipe("all", "All", "0000.00000", ({"pattern": "skip"}, {"pattern": "band"}, {"pattern": "spatial"}))
NONE = replace(ALL, forms=({"pattern": "radial"},))


@pytest.fixture(scope="module")
def bench() -> Bench:
    found = object.__new__(Bench)  # without a model
    found.network = with_attention(Toy(steps=STEPS).profile())
    found.problem = SearchProblem.from_profile(found.network)
    found.costs, _ = site_costs(found.network, "full")
    return found


def test_every_share_of_time_has_its_choice_of_least_error(bench: Bench) -> None:
    free = list(bench.parts(None))
    whole, in_kernel = STEPS * bench.costs["attn"].dense, STEPS * bench.costs["attn"].seconds(1.0)
    needed = {f"{share:g}": whole - share * in_kernel for share in SHARES}
    assert [name for name, _ in free] == [name for name, seconds in needed.items() if seconds > 0]
    assert len(free) > 4 and all(part.saved >= needed[name] for name, part in free)
    errors = [part.error for _, part in free]
    assert errors == sorted(errors)
    assert [(name, part.rules) for name, part in bench.parts(ALL)] == [(name, part.rules) for name, part in free]


def test_a_recipe_that_is_not_so_fast_ends_with_its_fastest_choice(bench: Bench) -> None:
    slow = list(bench.parts(replace(ALL, dense_first=0.5)))
    free = [name for name, _ in bench.parts(None)]
    assert [name for name, _ in slow] == [*free[: len(slow) - 1], "fastest"] and 1 < len(slow) <= len(free)
    assert slow[-1][1].saved >= max(part.saved for _, part in slow[:-1])
    assert not list(bench.parts(NONE))
