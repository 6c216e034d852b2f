"""Every kind of decision has its five pieces: a variant, a row, a candidate of the search, a cost and a pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import get_args

import pytest
import torch

from ditopt.cost_models.measured import MeasuredCost
from ditopt.decisions import DTYPES, KINDS, Decision, Dense, decision_from_data, decision_to_data
from ditopt.errors import AuditError
from ditopt.forms import in_dtype, simplified
from ditopt.passes._infra import PassManager, StepPlan
from ditopt.passes.audit import audit
from ditopt.passes.cast import MIN_ROWS
from ditopt.passes.prune import prune
from ditopt.plan import DevicePrint, ModelPrint, Plan, Rule, SamplerPrint
from ditopt.profiler import timing
from ditopt.quality import Quality
from ditopt.runtime.program import Program
from ditopt.runtime.schedule import BoundPlan, bind
from ditopt.search import solve_kept
from ditopt.search.solution import form_rules
from ditopt.target import Target
from tests.search.problems import random_problem
from tests.tiny import compiled_tiny, euler, make_model, narrow_products_are_faster, with_tangents

STEPS = 6
FASTER = [*(kind for kind in KINDS if kind != "dense"), *(f"dense {dtype}" for dtype in DTYPES), "dense simplify"]
SIMPLIFY, SECOND_ORDER = "dense simplify", "dense second_order"
CHOICES = [*FASTER, SECOND_ORDER]
"""Whatever may be done in place of computing as the model does."""


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    with compiled_tiny(with_tangents(make_model()), lambda model: euler(model, "a", 0, STEPS, MIN_ROWS)) as (_, found):
        yield found


@pytest.fixture(scope="module")
def seconds(program: Program) -> dict[str, float]:
    """What a profile would have timed, by a clock that tells predicted steps and forms from others."""

    def prepared(program: Program, plan: StepPlan, arguments: object) -> timing.Timed:
        taken = 0.1 if plan.predicted else 0.5 if plan.dtype else 0.9 if plan.simplify else 1.0
        return lambda: taken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "prepared", prepared)
        narrow_products_are_faster(patch)
        plain = timing.measure_seconds(program, (), (), DTYPES, simplify=False)
        return plain | timing.measure_seconds(program, (), ())


def searched(choice: str, seconds: Mapping[str, float]) -> tuple[Rule, ...]:
    """The rules of a search in which nothing else may be done."""
    kind, _, dtype = choice.partition(" ")
    if choice == SECOND_ORDER:
        return solve_kept(replace(random_problem(0, STEPS), second_order=0.25), STEPS).rules
    if not dtype:
        return solve_kept(random_problem(0, STEPS, techniques=(kind,)), STEPS - 1).rules
    if choice == SIMPLIFY:
        return tuple(form_rules(simplified(random_problem(0, STEPS), seconds)))
    flawless = Quality(90.0, 90.0, 0.0, (90.0,))
    problem = in_dtype(
        replace(random_problem(0, STEPS), seconds_full=seconds["full"]),
        seconds,
        dtype,
        Target(min_psnr=42.0),
        lambda rules: flawless,
    )
    return tuple(form_rules(problem))


def bound(rules: tuple[Rule, ...]) -> BoundPlan:
    times = tuple(1.0 - step / STEPS for step in range(STEPS))
    plan = Plan(
        model=ModelPrint(class_name="WanTransformer3DModel", structure="sha256:00ff", blocks=4),
        sampler=SamplerPrint(
            class_name="FlowMatchEulerDiscreteScheduler",
            steps=STEPS,
            timesteps={"transformer": tuple(1000 * time for time in times)},
            sigmas={"transformer": times},
        ),
        device=DevicePrint(device="cpu", torch=torch.__version__, dtype="float32"),
        rules=rules,
    )
    return bind(plan, "transformer", {})


def test_the_table_has_a_row_for_every_variant() -> None:
    assert set(KINDS.values()) == set(get_args(Decision))
    assert all(variant.model_fields["kind"].default == kind for kind, variant in KINDS.items())


@pytest.mark.parametrize("choice", CHOICES)
def test_the_search_decides_it_and_a_plan_file_holds_it(choice: str, seconds: dict[str, float]) -> None:
    kind, _, setting = choice.partition(" ")
    found = [rule.do for rule in searched(choice, seconds)]
    assert found and all(do.kind == kind for do in found)
    settings = {SIMPLIFY: {"simplify": True}, SECOND_ORDER: {"second_order": 0.25}}
    asked = Dense.model_validate(settings.get(choice, {"dtype": setting or None}))
    assert all(do == asked for do in found if isinstance(do, Dense))
    assert [decision_from_data(decision_to_data(do)) for do in found] == found


@pytest.mark.parametrize("choice", FASTER)  # a share of second order is two operations on the output, and free
def test_it_has_a_cost(choice: str, seconds: dict[str, float]) -> None:
    cost = MeasuredCost(seconds)
    steps = bound(searched(choice, seconds)).steps
    taken = [
        cost.step_seconds([each.site for each in step.predictions], step.variant.dtype, step.variant.simplify)
        for step in steps
    ]
    assert min(taken) < seconds["full"]


@pytest.mark.parametrize("choice", CHOICES)
def test_a_pass_puts_it_into_the_graph_and_the_audit_refuses_one_without(
    choice: str, program: Program, seconds: dict[str, float]
) -> None:
    cache = program.variants
    (variant,) = {replace(step.variant, recorded=()) for step in bound(searched(choice, seconds)).steps} - {StepPlan()}
    cache.graph(variant)  # which audits it
    untouched = PassManager([prune]).run(cache.trace.gm, variant, cache.index)
    with pytest.raises(
        AuditError, match=r"does not read factors_(step|second_order)|products are to run in|is to be simplified"
    ):
        audit(untouched, variant, cache.index, {})
