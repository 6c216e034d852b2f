"""Errors of heads whose rest is kept from an earlier step: against the published rules, written out for every age."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from ditopt.calls import NetworkCalls
from ditopt.decisions import Sparse, pattern_text
from ditopt.geometry import Geometry
from ditopt.kernels.patterns._infra import Pattern
from ditopt.kernels.patterns.choice import SparseChoice
from ditopt.kernels.patterns.kept import FORMS
from ditopt.measures import Table
from ditopt.profiler import kept_errors
from ditopt.profiler.kept_errors import EVERY, IN_ORDER, IN_RASTER, kept_of
from tests.literal_kept import LITERAL
from tests.profiler.attention_rig import operands, planted, steps
from tests.profiler.test_pattern_errors import attend, heads_weight, measured, norm, of_video, total

SMALL = Geometry(4, 4, 4)
BEFORE = Geometry(3, 3, 4, text=6, text_first=True)
LARGER = Geometry(3, 8, 7)  # blocks of 16, the last one short


def kept_rests(table: Table) -> dict[str, int]:
    """Where the candidates with a kept rest stand in a table."""
    names = [str(name) for name in table.labels["candidate"]]
    return {name: at for at, name in enumerate(names) if "kept" in str(json.loads(name).get("rest"))}


def choice_of(name: str) -> SparseChoice:
    return SparseChoice.from_data(Sparse(pattern=name).settings)


def generation(tokens: int, heads: tuple[int, int], count: int) -> list[Tensor]:
    """Operands that move from step to step."""
    first = operands(tokens, heads, sharp=1.5)
    return [first + 0.2 * step * operands(tokens, heads, seed=step, sharp=1.0) for step in range(count)]


def at_age(
    choice: SparseChoice, inputs: tuple[Tensor, Tensor], heads: tuple[int, int], sizes: tuple[Geometry, int]
) -> Tensor:
    """``[H, S, 8]`` float64: heads in the second of two steps, with what they kept in the first."""
    geometry, block = sizes
    assert isinstance(choice.pattern, Pattern) and choice.kept is not None
    there = None if choice.order is None else choice.order.of_video(geometry, block)
    attended = torch.from_numpy(choice.pattern.block_map(geometry, block, order=there))
    sequence = torch.arange(geometry.tokens)
    if choice.order is not None:
        sequence = torch.from_numpy(choice.order.of_sequence(geometry, block))
    place = sequence.argsort() // block
    mask = attended[place][:, place]
    found = []
    for head in range(heads[0]):
        group = head * heads[1] // heads[0]
        of_steps = [(x[0, head], x[0, heads[0] + group], x[0, heads[0] + heads[1] + group]) for x in inputs]
        earlier, now = ((q.double(), k.double(), v.double()) for q, k, v in of_steps)
        found.append(LITERAL[choice.kept.form](earlier, now, mask, 8**-0.5))
    return torch.stack(found)


@pytest.mark.parametrize(("geometry", "heads"), [(SMALL, (2, 2)), (BEFORE, (4, 2)), (LARGER, (2, 2))])
def test_errors_are_means_over_the_ages_of_a_rest(geometry: Geometry, heads: tuple[int, int]) -> None:
    settings = {"enable_gqa": True} if heads[0] != heads[1] else {}
    inputs = generation(geometry.tokens, heads, 5)
    captured = planted(inputs[0], None, heads, **settings)
    table = measured(captured, geometry, *inputs, calls=steps(5))
    weight, video, block = heads_weight(captured, heads[0]), of_video(geometry), table.facts["block_queries"]
    places = kept_rests(table)
    assert len(places) >= 14 and {"order" in name for name in places} == {True, False}
    dense = [attend(x, heads)[:, video] for x in inputs]
    for name, at in places.items():
        choice = choice_of(name)
        assert choice.kept is not None
        for step in (0, 1, 2, 4):
            oldest = min(choice.kept.refresh - 1, step)
            squares = torch.zeros(heads[0], dtype=torch.float64)
            for age in range(1, oldest + 1):
                out = at_age(choice, (inputs[step - age], inputs[step]), heads, (geometry, block))[:, video]
                squares += norm(out - dense[step], weight) ** 2
            expected = (squares / (oldest + 1)).sqrt() / total(dense[step], weight)
            found = table["error"].values[0, step, 0, :, at]
            np.testing.assert_allclose(found, expected, atol=3e-5, err_msg=f"{name} in step {step}")


@pytest.mark.parametrize("geometry", [SMALL, LARGER, BEFORE])
def test_density_is_that_of_a_dense_step_and_those_up_to_the_next(geometry: Geometry) -> None:
    x = operands(geometry.tokens)
    table = measured(planted(x), geometry, x)
    names, density = [str(name) for name in table.labels["candidate"]], table["density"].values
    for name, at in kept_rests(table).items():
        choice = choice_of(name)
        assert choice.kept is not None
        alone = names.index(pattern_text(SparseChoice(choice.pattern, order=choice.order).to_data()))
        every = choice.kept.refresh
        assert density[at] == pytest.approx((1 + (every - 1) * density[alone]) / every, rel=1e-5)


def test_attention_that_does_not_move_errs_in_no_form() -> None:
    x = operands(LARGER.tokens)
    table = measured(planted(x), LARGER, x, calls=steps(4))
    errors = table["error"].values[0, :, 0][..., list(kept_rests(table).values())]
    assert errors.max() < 1e-5 < 0.1 < table["error"].values[0, 3, 0, :, 0].min()


def test_steps_that_a_branch_leaves_out_are_no_ages() -> None:
    """The second branch has no step 1: its rest in step 2 is of step 0."""
    inputs = generation(SMALL.tokens, (2, 2), 5)
    calls = NetworkCalls((3.0, 2.0, 1.0), ((0, 0), (0, 1), (1, 0), (2, 0), (2, 1)), 2, False)
    captured = planted(inputs[0])
    table = measured(captured, SMALL, *inputs, calls=calls)
    weight, block = heads_weight(captured), table.facts["block_queries"]
    name, at = next((name, at) for name, at in kept_rests(table).items() if "merge" in name and '"refresh": 2' in name)
    dense = attend(inputs[4])
    error = at_age(choice_of(name), (inputs[1], inputs[4]), (2, 2), (SMALL, block)) - dense
    expected = norm(error, weight) / 2**0.5 / total(dense, weight)
    np.testing.assert_allclose(table["error"].values[0, 2, 1, :, at], expected, atol=2e-5)
    assert np.isnan(table["error"].values[0, 1, 1]).all()


def test_of_few_remembered_rows_errors_come_near(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = Geometry(6, 16, 16, text=12)
    inputs = [operands(geometry.tokens, sharp=1.0) + 0.3 * operands(geometry.tokens, seed=n) for n in range(1, 4)]
    captured = planted(inputs[0])
    table = measured(captured, geometry, *inputs, calls=steps(3))
    monkeypatch.setattr(kept_errors, "VALUES", 100 * 2 * 8)
    fewer = measured(captured, geometry, *inputs, calls=steps(3))
    places = list(kept_rests(table).values())
    others = [at for at in range(len(table.labels["candidate"])) if at not in places]
    one, other = (each["error"].values[0, 2, 0] for each in (table, fewer))
    np.testing.assert_allclose(other[:, places], one[:, places], rtol=0.25)
    np.testing.assert_array_equal(other[:, others], one[:, others])
    assert not np.array_equal(other[:, places], one[:, places])


def test_the_names_are_those_of_decisions_and_few() -> None:
    table = measured(planted(operands(SMALL.tokens)), SMALL, operands(SMALL.tokens))
    choices = [choice_of(name) for name in kept_rests(table)]
    assert [pattern_text(choice.to_data()) for choice in choices] == list(kept_rests(table))
    assert {choice.kept.form for choice in choices if choice.kept} == {*FORMS}
    tried = ({"pattern": "skip"}, {"pattern": "spatial", "frames": 0}, {"pattern": "spatial", "frames": 1})
    names = tuple(map(pattern_text, tried))
    found = kept_of(names, False)
    assert found.bases == (0, 1) and len(found.names) == len(EVERY) * (1 + len(FORMS))
    assert not kept_of(names, True).names
    assert len(EVERY) * (1 + 3 * len(IN_RASTER[1:]) + 3 * len(IN_ORDER)) == 26


def test_guidance_branches_remember_their_own() -> None:
    """Called apart and in a batch: the same numbers."""
    inputs = generation(SMALL.tokens, (2, 2), 6)
    apart = measured(planted(inputs[0]), SMALL, *inputs, calls=steps(3, 2))
    together = [torch.cat(inputs[at : at + 2]) for at in (0, 2, 4)]
    batched = measured(planted(together[0]), SMALL, *together, calls=steps(3, 2, batched=True))
    places = list(kept_rests(apart).values())
    one, other = (each["error"].values[..., places] for each in (apart, batched))
    np.testing.assert_allclose(one, other, atol=1e-5)
    assert one[0, 2].min() > 1e-3
