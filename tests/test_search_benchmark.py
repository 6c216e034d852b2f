"""The benchmark of sparse heads: which plans it measures of a recipe; nothing is generated."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import sparse_search
from benchmarks.partial import Partial
from benchmarks.sparse_search import SHARES, Bench, facts_of
from ditopt.errors import InputError
from ditopt.profile_file import fingerprint, load_profile, save_profile
from ditopt.recipes import Recipe
from ditopt.search import SearchProblem
from ditopt.search.sparse import site_costs
from tests.report_profiles import make_profile
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


FACTS = {"code": "0123", "arguments": {"steps": "20"}, "model and loop": "abcd"}
ROWS: list[dict[str, Any]] = [{"family": "mix", "plan": "0.9", "psnr": 40.0}]


def test_rows_of_an_interrupted_run_go_on_with_its_profile(tmp_path: Path) -> None:
    """Timings of a profile differ from run to run, and plans with them."""
    profile = make_profile(layers=2)
    first = Partial(tmp_path / "x.partial", FACTS)
    assert first.resume() is None
    first.begin(profile)
    first.save(ROWS)
    again = Partial(tmp_path / "x.partial", FACTS)
    found = again.resume()
    assert found is not None and found[1] == ROWS and fingerprint(found[0]) == fingerprint(profile)
    again.save([*ROWS, *ROWS])
    resumed = Partial(tmp_path / "x.partial", FACTS).resume()
    assert resumed is not None and resumed[1] == [*ROWS, *ROWS]
    again.remove()
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({**FACTS, "code": "4567"}, r"measured with code '0123', now '4567': finish it .*, or remove .*x\.partial"),
        ({**FACTS, "arguments": {"steps": "12"}}, r"arguments \{'steps': '20'\}, now \{'steps': '12'\}"),
        ({**FACTS, "model and loop": "efgh"}, "model and loop 'abcd', now 'efgh'"),
        ({**FACTS, "torch": "3"}, "torch None, now '3'"),
    ],
)
def test_rows_of_another_run_are_refused(tmp_path: Path, facts: dict[str, Any], told: str) -> None:
    first = Partial(tmp_path / "x.partial", FACTS)
    first.begin(make_profile(layers=2))
    first.save(ROWS)
    with pytest.raises(InputError, match=told):
        Partial(tmp_path / "x.partial", facts).resume()


def test_rows_of_another_profile_are_refused(tmp_path: Path) -> None:
    first, path = Partial(tmp_path / "x.partial", FACTS), tmp_path / "x.partial.profile"
    first.begin(make_profile(layers=2))
    first.save(ROWS)
    other = replace(load_profile(path), sample_norm=7.0)
    save_profile(other, path)
    with pytest.raises(InputError, match=r"x\.partial\.profile: is not the profile on which the rows in .* rest"):
        Partial(tmp_path / "x.partial", FACTS).resume()
    path.unlink()
    with pytest.raises(InputError, match=r"x\.partial\.profile: is missing"):
        Partial(tmp_path / "x.partial", FACTS).resume()
    (tmp_path / "x.partial").write_text(json.dumps(ROWS))  # as files of before are
    with pytest.raises(InputError, match="does not tell what measured it; remove it to begin anew"):
        Partial(tmp_path / "x.partial", FACTS).resume()


def test_what_rows_hold_for_is_told_but_where_they_go() -> None:
    one, other, elsewhere = (
        argparse.Namespace(steps=steps, json=Path(to)) for steps, to in ((4, "a"), (5, "a"), (4, "b"))
    )
    found = facts_of(one, "loop")
    assert found == facts_of(elsewhere, "loop") != facts_of(other, "loop")
    assert found["arguments"] == {"steps": "4"} and found != facts_of(one, "another loop")


def test_the_command_says_it_in_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(arguments: argparse.Namespace) -> None:
        raise InputError("x.partial: rows were measured with code 'a', now 'b'")

    monkeypatch.setattr(sparse_search, "run", refuse)
    monkeypatch.setattr(sys, "argv", ["sparse_search", "--json", "x.json"])
    with pytest.raises(SystemExit):
        sparse_search.main()
    assert capsys.readouterr().err == "sparse_search: x.partial: rows were measured with code 'a', now 'b'\n"
