"""Plans whose sparse heads attend to what they skip by its means: against eager models with that written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditopt.backend import Session
from ditopt.decisions import Dense, Sparse, decision_from_data, decision_to_data, pattern_text
from ditopt.errors import PlanMismatchError
from ditopt.geometry import Geometry
from ditopt.kernels.patterns._infra import Pattern
from ditopt.kernels.patterns.choice import Pooled, SparseChoice
from ditopt.kernels.patterns.temporal import Temporal
from ditopt.passes.sparse import list_names, rest_name
from ditopt.plan import Plan, Rule
from ditopt.profiler.head_edits import BlockMask
from ditopt.profiler.interpret import Watched
from ditopt.runtime.program import Program
from ditopt.runtime.sparse import AttentionSites, Place
from ditopt.sites import AttentionSite
from tests.literal_rest import under_blocks_and_means
from tests.runtime.test_sparse import FRAMES, TIMES, call, check_plan_file, plan_of, rule, sparse, steps_of, wan_inputs
from tests.runtime.test_sparse import _fresh as _fresh
from tests.runtime.test_sparse import structure as structure
from tests.runtime.test_sparse import wan as wan
from tests.trace.models import compiled, interpreted

RULES = (
    rule("blocks.*.attn1", "1-4", sparse("spatial", rest="pooled")),
    rule("blocks.*.attn1", "1-3", sparse("temporal", rows=1, columns=2), "1"),
    rule("blocks.0.attn1", "2-4", Dense(), "0"),
    rule("blocks.1.attn1", "3", sparse("skip", rest={"pooled": 16}), "0-1"),
    rule("blocks.1.attn1", "4", Dense()),
)
"""Of block 0 one head has a rest in step 1, none in 2 and 3, the other in 4; block 1 changes its pool in step 3."""


def emulated(program: Program, plan: Plan, step: int, arguments: list[Any], geometry: Geometry) -> Tensor:
    """The captured graph, node by node, with heads as the plan has them, written out."""
    trace, edits = program.variants.trace, {}
    for site in trace.sites:
        masks, linear = {}, set()
        for head in range(site.heads if isinstance(site, AttentionSite) else 0):
            do = plan.head_decisions(site.name)[step].of(head + 1)[head]
            if isinstance(do, Sparse):
                choice = SparseChoice.from_data(do.settings)
                assert isinstance(choice.pattern, Pattern)
                kept = choice.pattern.block_map(geometry, 64, 64)
                masks[head] = (BlockMask(kept, 64, 64), choice.pooled.of(64) if choice.pooled is not None else 0)
                linear |= {head} if choice.pooled is not None and choice.pooled.first_order else set()
        if masks:
            edits[trace.site_nodes[site.name]] = under_blocks_and_means(masks, linear)
    with torch.no_grad():
        found: Tensor = Watched(trace, edits=edits).run(*arguments)[0]
    return found


def test_a_compiled_plan_file_is_the_eager_model_with_means_written_out(
    wan: nn.Module, structure: str, tmp_path: Path
) -> None:
    program = check_plan_file(wan, plan_of(structure, *RULES), tmp_path / "plan.yaml", emulated)
    bound = program.bound
    assert bound is not None
    assert [[each.pool for each in step.variant.sparse] for step in bound.steps] == [
        [],
        [64, 64],
        [64, 64],
        [64, 16],
        [64],
        [],
    ]
    assert bound.steps[1].variant == bound.steps[2].variant, "which heads have a rest is an input"
    heads = [step.lists.get(rest_name("blocks.0.attn1")) for step in bound.steps]
    assert [each.tolist() if each is not None else None for each in heads] == [
        None,
        [1, 0],
        [0, 0],
        [0, 0],
        [0, 1],
        None,
    ]


def test_a_rest_to_first_order_is_another_number_of_an_input(wan: nn.Module, structure: str) -> None:
    rules = (
        rule("blocks.*.attn1", "1-4", sparse("spatial", rest={"taylor": 16})),
        rule("blocks.0.attn1", "2", sparse("spatial", rest={"pooled": 16}), "0"),
        rule("blocks.0.attn1", "3", sparse("skip", rest={"taylor": 16}), "1"),
        rule("blocks.1.attn1", "3-4", sparse("spatial"), "0"),
    )
    plan = plan_of(structure, *rules)
    session = Session(plan=plan, check_passes=True)
    moved = []
    with interpreted():
        for step, found, arguments in steps_of(session, compiled(wan, session=session), wan_inputs()):
            (program,) = session.programs
            torch.testing.assert_close(found, emulated(program, plan, step, arguments, FRAMES), rtol=1e-4, atol=1e-5)
            moved.append(float((found - call(wan, wan_inputs(), TIMES[step])).norm() / found.norm()))
    assert min(moved[1:5]) > 1e-5
    assert program.bound is not None and len({step.variant for step in program.bound.steps[1:5]}) == 1
    heads = [program.bound.steps[step].lists[rest_name("blocks.0.attn1")].tolist() for step in range(1, 5)]
    assert heads == [[2, 2], [1, 2], [2, 2], [2, 2]]


def test_where_no_kernel_takes_it_to_first_order_the_plan_is_refused() -> None:
    """A device without any kernel stands for a GPU: nothing is computed."""
    site = AttentionSite("blocks.0.attn1", 0, 2, FRAMES.tokens, FRAMES.tokens, 8, False)
    sites = AttentionSites({site.name: Place(site, "blocks.0", True, torch.device("meta"))})
    plans = [plan_of("", rule(site.name, "1", sparse("spatial", rest={word: 16}))) for word in ("pooled", "taylor")]
    found, _ = sites.steps(plans[0], "transformer", lambda step, block: False)
    assert [each.pool for each in found[1].variant] == [16]
    with pytest.raises(
        PlanMismatchError, match=r"attn1: there is no kernel for GPUs that .* first order; write pooled"
    ):
        sites.steps(plans[1], "transformer", lambda step, block: False)


def test_a_site_without_any_rest_has_no_means_in_its_graph(wan: nn.Module, structure: str) -> None:
    rules = (
        rule("blocks.0.attn1", "1-2", sparse("spatial")),
        rule("blocks.1.attn1", "1", sparse("skip", rest="pooled")),
    )
    session = Session(plan=plan_of(structure, *rules), check_passes=True)
    with interpreted():
        call(compiled(wan, session=session), wan_inputs(), TIMES[1])
    (program,) = session.programs
    assert program.bound is not None
    step = program.bound.steps[1]
    assert [each.pool for each in step.variant.sparse] == [0, 64]
    assert set(step.lists) == {
        *list_names("blocks.0.attn1"),
        *list_names("blocks.1.attn1"),
        rest_name("blocks.1.attn1"),
    }


def test_it_goes_with_a_dtype(wan: nn.Module, structure: str) -> None:
    plan = plan_of(structure, rule("step", "0-5", Dense(dtype="bfloat16", simplify=True)), *RULES)
    session, inputs = Session(plan=plan, check_passes=True), wan_inputs()
    with interpreted():
        for step, found, arguments in steps_of(session, compiled(wan, session=session), inputs):
            expected = emulated(session.programs[0], plan, step, arguments, FRAMES)
            assert (found - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            [rule("blocks.0.attn1", "1", sparse("spatial", rest="mean"))],
            r"rule 0 \(blocks\.0\.attn1\): rest 'mean' is unknown; write pooled, taylor or linear, or \{pooled: 16\}",
        ),
        (
            [rule("blocks.0.attn1", "1", sparse("spatial", rest={"pooled": 24}))],
            r"rule 0 \(blocks\.0\.attn1\): rest \{'pooled': 24\} is unknown; .* a power of two",
        ),
        (
            [rule("blocks.0.attn1", "1", sparse("spatial", rest={"pooled": 128}))],
            r"blocks\.0\.attn1: groups of 128 tokens do not divide blocks of 64 keys; write \{pooled: 64\} or less",
        ),
        (
            [
                rule("blocks.0.attn1", "1", sparse("spatial", rest="pooled"), "0"),
                rule("blocks.0.attn1", "1", sparse("spatial", rest={"pooled": 16}), "1"),
            ],
            r"blocks\.0\.attn1: in one step its heads have rests in groups of one size, not of 16 and 64",
        ),
        (
            [rule("blocks.0.attn2", "1", sparse("skip", rest="pooled"))],
            r"rule 0 \(blocks\.0\.attn2\): blocks\.0\.attn2 is no self-attention .*; a rest is for that only",
        ),
        (
            [rule("blocks.0.attn1", "1", sparse("union", of=[{"pattern": "sink", "rest": "pooled"}]))],
            r"rule 0 \(blocks\.0\.attn1\): pattern .*rest: Extra inputs are not permitted; sink has ",
        ),
    ],
)
def test_rests_that_do_not_fit_are_named(wan: nn.Module, structure: str, bad: list[Rule], message: str) -> None:
    with interpreted(), pytest.raises(PlanMismatchError, match=message):
        call(compiled(wan, plan=plan_of(structure, *bad)), wan_inputs(), TIMES[0])


@pytest.mark.parametrize("rest", ["pooled", {"pooled": 16}])
def test_a_decision_is_written_as_it_is_read(rest: Any) -> None:
    data = {"sparse": {"pattern": "temporal", "rows": 1, "columns": 0, "rest": rest}}
    decision = decision_from_data(data)
    assert isinstance(decision, Sparse) and decision_to_data(decision) == data
    choice = SparseChoice.from_data(decision.settings)
    assert choice == SparseChoice(Temporal(rows=1), Pooled(None if rest == "pooled" else 16))
    assert pattern_text(choice.to_data()) == decision.pattern
    plain = decision_from_data({"sparse": {"pattern": "temporal", "rows": 1, "columns": 0}})
    assert isinstance(plain, Sparse) and plain != decision and SparseChoice.from_data(plain.settings).rest is None


@pytest.mark.parametrize(
    "rest", [16, True, {"pooled": 2}, {"pooled": True}, {"pooled": 16, "of": 2}, ["pooled"], "all"]
)
def test_other_rests_are_told(rest: Any) -> None:
    with pytest.raises(ValueError, match=r"is unknown; write pooled, taylor or linear, or \{pooled: 16\}"):
        SparseChoice.from_data({"pattern": "skip", "rest": rest})
