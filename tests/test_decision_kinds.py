"""Every kind of decision has its five pieces: a variant, a row, a candidate of the search, a cost and a pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch

from ditopt.cost_models.measured import MeasuredCost
from ditopt.cost_models.sparse import SparseCost
from ditopt.decisions import DTYPES, KINDS, Decision, Dense, decision_from_data, decision_to_data
from ditopt.errors import AuditError
from ditopt.exact import hoist_rules
from ditopt.forms import in_dtype, simplified
from ditopt.geometry import Geometry
from ditopt.measures import Measure, Table
from ditopt.passes._infra import PassManager, SparseAttention, StepPlan
from ditopt.passes.audit import audit
from ditopt.passes.cast import MIN_ROWS
from ditopt.passes.prune import prune
from ditopt.passes.sparse import list_names
from ditopt.plan import DevicePrint, ModelPrint, Plan, Rule, SamplerPrint
from ditopt.profiler import timing
from ditopt.quality import Quality
from ditopt.runtime.program import Program
from ditopt.runtime.schedule import BoundPlan, BoundStep, bind
from ditopt.runtime.sparse import AttentionSites, places_of
from ditopt.search import SearchProblem, solve_kept
from ditopt.search.heads import SKIP
from ditopt.search.joint import dense
from ditopt.search.solution import form_rules
from ditopt.search.sparse import choose, head_candidates, sparse_rules
from ditopt.target import Target
from tests.search.problems import random_problem
from tests.search.toy import Toy
from tests.tiny import compiled_tiny, euler, make_model, narrow_products_are_faster, with_tangents

STEPS = 6
FASTER = [
    *(kind for kind in KINDS if kind not in ("dense", "hoist")),
    *(f"dense {dtype}" for dtype in DTYPES),
    "dense simplify",
]
SIMPLIFY, SECOND_ORDER, SPARSE, HOIST = "dense simplify", "dense second_order", "sparse", "hoist"
CHOICES = [*FASTER, SECOND_ORDER, HOIST]
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
    if choice == SPARSE:
        return sparse_heads()
    if choice == HOIST:
        return hoist_rules(made_plan(()))
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


ATTENTION = SparseCost(dense=0.3, overhead=0.01, efficiency=0.9)
"""What attention takes of a step that takes 1."""


def sparse_heads() -> tuple[Rule, ...]:
    """The rules of a search in which one head of one site may be skipped."""
    network = Toy(steps=STEPS).profile()
    along = ("prompt", "step", "branch")
    patterns = Table(
        {
            "error": Measure((*along, "head", "candidate"), np.full((6, STEPS, 1, 2, 1), 0.1)),
            "output": Measure(along, np.ones((6, STEPS, 1))),
            "density": Measure(("candidate",), np.zeros(1)),
        },
        {"candidate": (SKIP,)},
        {"elements": 16},
    )
    growth = Measure(("anchor", "error"), np.ones((2, 1)))
    sensitivity = Table({"to_output": growth}, {"anchor": (0, 4), "error": ("head",)})
    network.tables.update({"patterns": {"blocks.1": patterns}, "sensitivity": {"blocks.1": sensitivity}})
    problem = SearchProblem.from_profile(network)
    found = head_candidates(network, problem, dense(problem), {"blocks.1": ATTENTION}, [range(1, STEPS)])
    return sparse_rules(each.choice for each in choose(found, 0.0))


def density(step: BoundStep, site: SparseAttention) -> float:
    """The share of blocks that lists with room for all have."""
    _, counts = list_names(site.site)
    return float(step.lists[counts].float().mean()) / site.width


def bound(rules: tuple[Rule, ...], program: Program) -> BoundPlan:
    return bind(made_plan(rules), "transformer", {}, attention=AttentionSites(places_of(program.variants.trace)))


def made_plan(rules: tuple[Rule, ...]) -> Plan:
    times = tuple(1.0 - step / STEPS for step in range(STEPS))
    return Plan(
        model=ModelPrint(class_name="WanTransformer3DModel", structure="sha256:00ff", blocks=4),
        sampler=SamplerPrint(
            class_name="FlowMatchEulerDiscreteScheduler",
            steps=STEPS,
            timesteps={"transformer": tuple(1000 * time for time in times)},
            sigmas={"transformer": times},
        ),
        tokens={"transformer": Geometry(1, 8, 8)},
        device=DevicePrint(device="cpu", torch=torch.__version__, dtype="float32"),
        rules=rules,
    )


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


# A share of second order is two operations on the output, and free; of hoisting whole generations are timed.
@pytest.mark.parametrize("choice", FASTER)
def test_it_has_a_cost(choice: str, seconds: dict[str, float], program: Program) -> None:
    cost = MeasuredCost(seconds)
    steps = bound(searched(choice, seconds), program).steps
    taken = [
        cost.step_seconds([each.site for each in step.predictions], step.variant.dtype, step.variant.simplify)
        + sum(ATTENTION.seconds(density(step, each)) - ATTENTION.dense for each in step.variant.sparse)
        for step in steps
    ]
    assert min(taken) < seconds["full"]


@pytest.mark.parametrize("choice", CHOICES)
def test_a_pass_puts_it_into_the_graph_and_the_audit_refuses_one_without(
    choice: str, program: Program, seconds: dict[str, float]
) -> None:
    cache = program.variants
    (variant,) = {replace(step.variant, recorded=()) for step in bound(searched(choice, seconds), program).steps} - {
        StepPlan()
    }
    cache.graph(variant)  # which audits it
    untouched = PassManager([prune]).run(cache.trace.gm, variant, cache.index)
    with pytest.raises(
        AuditError,
        match=r"does not read factors_(step|second_order)|products are to run in|is to be simplified|sparse by|"
        r"computed ahead",
    ):
        audit(untouched, variant, cache.index, {})
