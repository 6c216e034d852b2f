"""Plans whose heads keep what they skip from an earlier step: against eager models under the published rules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditopt._torch import compile_counts
from ditopt.backend import Session
from ditopt.decisions import Dense, HeadDecision, Reuse, Sparse, decision_from_data, decision_to_data, pattern_text
from ditopt.errors import PlanMismatchError
from ditopt.geometry import Geometry
from ditopt.kernels.block_sparse_attention.lists import kernel_blocks
from ditopt.kernels.patterns._infra import Pattern
from ditopt.kernels.patterns.choice import SparseChoice
from ditopt.kernels.patterns.kept import FORMS, Kept
from ditopt.kernels.patterns.spatial import Spatial
from ditopt.passes.kept import LISTS, REST, slot_of
from ditopt.passes.kept_rest import forms_name, other_names
from ditopt.plan import Plan, Rule
from ditopt.plan_tensors import PlanTensors
from ditopt.profiler.interpret import Edit
from ditopt.runtime.linear import is_linear
from ditopt.runtime.program import Compute
from ditopt.runtime.state_bytes import planned_bytes, slot_bytes
from ditopt.sites import STEP
from tests.literal_kept import LITERAL, LiteralPlan, attention, dense
from tests.runtime.test_kept_lists import FIRST, SECOND, Run, drifting, same
from tests.runtime.test_linear import heads_anew, projections
from tests.runtime.test_masked import TOKENS, hunyuan, structure_of
from tests.runtime.test_sparse import (
    FRAMES,
    TIMES,
    _fresh,
    call,
    distance,
    joint,
    plan_of,
    rule,
    sparse,
    steps_of,
    structure,
    wan,
    wan_inputs,
)
from tests.trace.models import capture, compiled, interpreted

__all__ = ["_fresh", "structure", "wan"]  # fixtures

Operands = tuple[Tensor, Tensor, Tensor]


def kept(pattern: str, form: str, every: int, **settings: Any) -> Any:
    return sparse(pattern, **settings, rest={"kept": form, "refresh": every})


class Literal(LiteralPlan):
    """One generation under a plan: of every head its operands when it was last dense, and how many steps ago."""

    def __init__(self, plan: Plan, geometry: Geometry = FRAMES) -> None:
        super().__init__(plan)
        self.geometry = geometry
        self.runs: dict[tuple[str, int], tuple[HeadDecision, int, Operands | None]] = {}
        self.moved = 0.0

    def edit(self, site: str, decided: tuple[HeadDecision, ...]) -> Edit:
        def edit(given: tuple[Any, ...], value: Tensor) -> Tensor:
            out, scale = value.clone(), given[0].shape[-1] ** -0.5
            for head, do in enumerate(decided):
                now: Operands = tuple(part[:, head].double() for part in given[:3])
                before, count, earlier = self.runs.get((site, head), (None, 0, None))
                count = count + 1 if do == before else 0
                if isinstance(do, Sparse):
                    choice = SparseChoice.from_data(do.settings)
                    again = choice.kept is None or count % choice.kept.refresh == 0
                    earlier = now if again else earlier
                    assert earlier is not None
                    for sample in range(len(out)):
                        steps = [tuple(part[sample] for part in each) for each in (earlier, now)]
                        out[sample, head] = self._head(choice, steps, scale, again)
                self.runs[site, head] = do, count, earlier
            return out

        return edit

    def _head(self, choice: SparseChoice, steps: list[Any], scale: float, again: bool) -> Tensor:
        mask = mask_of(choice, self.geometry)
        alone, _ = attention(steps[1], mask, scale)
        if choice.kept is None:
            return alone.float()
        found = dense(steps[1], scale) if again else LITERAL[choice.kept.form](steps[0], steps[1], mask, scale)
        self.moved = max(self.moved, 0.0 if again else float((found - dense(steps[1], scale)).abs().max()))
        assert (found - alone).abs().max() > 1e-4, "what is skipped matters"
        return found.float()


def mask_of(choice: SparseChoice, geometry: Geometry) -> Tensor:
    """``[S, S]`` boolean: the tokens of the blocks that a choice keeps, in raster order."""
    assert isinstance(choice.pattern, Pattern)
    queries, keys = kernel_blocks(geometry.tokens, geometry.tokens)
    there = None if choice.order is None else choice.order.of_video(geometry, keys)
    blocks = torch.from_numpy(choice.pattern.block_map(geometry, queries, keys, there))
    sequence = torch.arange(geometry.tokens)
    if choice.order is not None:
        sequence = torch.from_numpy(choice.order.of_sequence(geometry, keys))
    place = sequence.argsort()
    return blocks[place // queries][:, place // keys]


RULES = (
    rule(FIRST, "1-5", kept("spatial", "merge", 2), "0"),
    rule(FIRST, "1-5", kept("temporal", "residual", 4, rows=1, columns=2), "1"),
    rule(SECOND, "1-3", kept("temporal", "ratio", 3, order="tiles"), "0"),
    rule(SECOND, "4-5", kept("skip", "merge", 3), "0"),
    rule(SECOND, "2-5", sparse("temporal", rows=1, columns=2), "1"),
)
"""Forms differ within a site, and so do the steps that keep anew; in step 4 one head has another decision."""


def test_rests_are_kept_in_every_nth_step_and_added_in_between(wan: nn.Module, structure: str) -> None:
    plan = plan_of(structure, *RULES)
    with interpreted():
        run, expected = Run(wan, plan), Literal(plan)
        run.begin(batch=2)
        for step, inputs in enumerate(drifting(batch=2)):
            result = run(inputs, TIMES[step])
            same(result, expected(run.program, step, run.taken))
    assert expected.moved > 1e-3, "what was kept is not what is skipped now"
    bound = run.program.bound
    assert bound is not None and run.program.statistics.cold_calls == 0
    told = [[(each.keeps, each.reads) for each in step.variant.sparse] for step in bound.steps]
    keeps, reads, both = ((REST,), ()), ((), (REST,)), ((REST,), (REST,))
    assert told == [[], [keeps, keeps], [reads, reads], [both, reads], [reads, keeps], [keeps, reads]]
    assert [[read.source for read in step.reads] for step in bound.steps] == [[], [], [1, 1], [1, 1], [3], [4]]
    forms = [step.lists[forms_name(SECOND)].tolist() for step in bound.steps[1:]]
    assert forms == [[3, 0], [3, 0], [3, 0], [1, 0], [1, 0]]
    counts = bound.steps[3].lists[other_names(FIRST)[1]]
    assert (counts[0, 0] > 0).all() and not counts[0, 1].any(), "a head that reads does not attend to the others"
    assert run.held() == 0, "what nobody reads any more is freed"


def test_a_plan_file_compiles_once(wan: nn.Module, structure: str, tmp_path: Path) -> None:
    plan = plan_of(structure, rule("blocks.*.attn1", "1-5", kept("spatial", "merge", 3)))
    plan.save(tmp_path / "plan.yaml")
    assert Plan.load(tmp_path / "plan.yaml").rules == plan.rules
    run, expected = Run(wan, tmp_path / "plan.yaml"), Literal(plan)
    run.begin()
    before, held = compile_counts(), []
    for step, inputs in enumerate(drifting()):
        result = run(inputs, TIMES[step])
        same(result, expected(run.program, step, run.taken))
        held.append(run.held())
    assert compile_counts() == before, "no graph break and no recompilation"
    bound = run.program.bound
    assert bound is not None and len(run.program.variants.compiled) == len(bound.variants) == 3
    assert bound.steps[1].variant == bound.steps[4].variant and bound.steps[2].variant == bound.steps[5].variant
    own = 2 * 2 * FRAMES.tokens * (12 + 1) * 4  # of two sites with two heads of twelve channels, and a number each
    assert held == [0, own, own, 0, own, 0], "step 3 is the last that reads what step 1 kept"
    assert run.program.statistics.peak_slot_bytes == own and expected.moved > 0


def test_slots_are_of_the_heads_that_keep_a_rest(wan: nn.Module, structure: str) -> None:
    """In some step of the plan: so that all steps share graphs."""
    rules = (
        rule("blocks.*.attn1", "1-5", sparse("spatial"), "0"),
        rule(FIRST, "1-5", kept("temporal", "merge", 2, rows=1, columns=2), "1"),
        rule(SECOND, "1-3", kept("spatial", "residual", 2), "0"),
        rule(SECOND, "4-5", kept("spatial", "ratio", 2), "1"),
    )
    plan = plan_of(structure, *rules)
    with interpreted():
        run, expected = Run(wan, plan), Literal(plan)
        run.begin()
        held = []
        for step, inputs in enumerate(drifting()):
            same(run(inputs, TIMES[step]), expected(run.program, step, run.taken))
            held.append(run.held())
    one = FRAMES.tokens * (12 + 1) * 4  # of a head of twelve channels, and a number each
    assert held == [heads * one for heads in (0, 3, 0, 1, 2, 0)], "one of the first site, both of the second"
    bound = run.program.bound
    assert bound is not None and run.program.statistics.cold_calls == 0
    assert [[each.resting for each in step.variant.sparse] for step in bound.steps[1:3]] == [[1, 0]] * 2
    sizes = slot_bytes(run.program.variants, bound)
    assert sizes == {slot_of(REST, FIRST): one, slot_of(REST, SECOND): 2 * one}
    assert planned_bytes(run.program.variants, bound) == run.program.statistics.peak_slot_bytes == 3 * one


def test_bytes_of_state_are_known_before_it_runs(wan: nn.Module, structure: str) -> None:
    """Of features, lists and rests together, at the step that holds most of them."""
    rules = (
        rule(STEP, "2", Reuse()),
        rule("blocks.1", "4", Reuse()),
        rule(FIRST, "0-5", sparse("draft", keep=0.2, refresh=3), "0"),
        rule(FIRST, "0-5", kept("spatial", "merge", 2), "1"),
    )
    with interpreted():
        run = Run(wan, plan_of(structure, *rules))
        run.begin()
        variants, bound = run.program.variants, run.program.bound
        assert bound is not None
        planned = planned_bytes(variants, bound)
        for step, inputs in enumerate(drifting()):
            run(inputs, TIMES[step])
    assert slot_bytes(variants, bound).keys() == {STEP, "blocks.1", slot_of(LISTS, FIRST), slot_of(REST, FIRST)}
    assert run.program.statistics.peak_slot_bytes == planned > 0 and run.held() == 0


def test_other_steps_are_as_dense_and_a_step_that_keeps_is(wan: nn.Module, structure: str) -> None:
    plan = plan_of(structure, rule("blocks.*.attn1", "0-5", kept("temporal", "residual", 2)))
    with interpreted():
        run = Run(wan, plan)
        run.begin()
        apart = []
        for step, inputs in enumerate(drifting()):
            apart.append(float((run(inputs, TIMES[step]) - call(wan, inputs, TIMES[step])).abs().max()))
    assert max(apart[::2]) < 1e-5 < 1e-4 < min(apart[1::2])


@pytest.mark.parametrize("form", FORMS)
def test_it_goes_with_a_dtype_simplified(wan: nn.Module, structure: str, form: str) -> None:
    rules = (rule(STEP, "0-5", Dense(dtype="bfloat16", simplify=True)), rule(FIRST, "1-5", kept("spatial", form, 3)))
    plan = plan_of(structure, *rules)
    with interpreted():
        run, expected = Run(wan, plan), Literal(plan)
        run.begin()
        for step, inputs in enumerate(drifting()[:4]):
            result = run(inputs, TIMES[step])
            should = expected(run.program, step, run.taken)
            assert (result - should).norm() < 1e-2 * should.norm()


def test_predicted_steps_and_sites_neither_count_nor_end_a_run(wan: nn.Module, structure: str) -> None:
    """Of a step that is not computed at all, and of a block that is not."""
    rules = (
        rule("blocks.*.attn1", "1-5", kept("spatial", "merge", 2)),
        rule(STEP, "2", Reuse()),
        rule("blocks.1", "4", Reuse()),
    )
    plan = plan_of(structure, *rules)
    with interpreted():
        run, expected = Run(wan, plan), Literal(plan)
        run.begin()
        for step, inputs in enumerate(drifting()):
            result = run(inputs, TIMES[step])
            if step != 2:
                should = expected(run.program, step, run.taken, (SECOND,) if step == 4 else ())
                if step != 4:
                    same(result, should)
    bound = run.program.bound
    assert bound is not None and run.program.statistics.cold_calls == 0
    sources = [{read.slot: read.source for read in step.reads} for step in bound.steps]
    one, other = (slot_of(REST, site) for site in (FIRST, SECOND))
    assert sources == [{}, {}, {}, {one: 1, other: 1}, {}, {one: 4}], "the second has been computed once less"


def test_beside_a_draft_with_means_in_another_order_whose_lists_are_kept(wan: nn.Module, structure: str) -> None:
    """Heads of one site: what both change is the sum of what each changes, but for what comes behind the site."""
    drafts = sparse("draft", keep=0.25, refresh=3, order="tiles", rest={"pooled": 16})
    rules = [
        rule(SECOND, "1-4", kept("temporal", "merge", 2, rows=1, columns=1), "0"),
        rule(SECOND, "1-4", drafts, "1"),
    ]
    inputs, results = drifting(), []
    with interpreted():
        for chosen in (rules, rules[:1], rules[1:], []):
            torch._dynamo.reset()
            run = Run(wan, plan_of(structure, *chosen))
            run.begin()
            results.append([run(inputs[step], TIMES[step]) for step in range(5)])
            if chosen is rules:
                bound = run.program.bound
    assert bound is not None
    kinds = [{read.slot.split()[0] for read in step.reads} for step in bound.steps[:5]]
    assert kinds == [set(), set(), {REST, LISTS}, {LISTS}, {REST}]
    for together, first, second, dense_one in [*zip(*results, strict=True)][1:]:
        apart = together - dense_one
        assert (apart - (first - dense_one) - (second - dense_one)).norm() < 0.1 * apart.norm()


class BesideLinear(Literal):
    """The same with linear rests, by the formula, in heads that have one."""

    def edit(self, site: str, decided: tuple[HeadDecision, ...]) -> Edit:
        linear = [do if is_linear(do) else Dense() for do in decided]
        keeping = super().edit(site, tuple(Dense() if is_linear(do) else do for do in decided))
        beside = {each.heads[0]: torch.from_numpy(each.packed[0, 0]).float() for each in self.plan.beside.projections}
        behind = heads_anew(linear, self.geometry, beside)
        return lambda given, value: behind(given, keeping(given, value))


@pytest.mark.parametrize("form", FORMS)
def test_beside_a_head_with_linear_attention_to_what_it_skips(wan: nn.Module, structure: str, form: str) -> None:
    """Neither has a part of the other: what is kept is without the linear attention that is added behind it."""
    linear, keeping = sparse("spatial", rest="linear"), kept("temporal", form, 2, rows=1, columns=2)
    rules = rule(SECOND, "1-5", keeping, "0"), rule(SECOND, "1-5", linear, "1")
    plan = plan_of(structure, *rules).with_beside(PlanTensors(projections=(projections(1, linear, (1,)),)))
    with interpreted():
        run, expected = Run(wan, plan), BesideLinear(plan)
        run.begin()
        for step, inputs in enumerate(drifting()[:3]):
            result = run(inputs, TIMES[step])
            same(result, expected(run.program, step, run.taken))
    bound = run.program.bound
    assert bound is not None and run.program.statistics.cold_calls == 0 and expected.moved > 1e-4
    told = [[(each.keeps, each.reads, each.linear) for each in step.variant.sparse] for step in bound.steps[:3]]
    assert told == [[], [((REST,), (), True)], [((), (REST,), True)]]


@pytest.mark.parametrize("name", ["Flux", "CogVideoX"])
def test_text_is_computed_in_every_step_of_joint_attention(name: str) -> None:
    model, inputs, geometry = joint(name)
    with interpreted():
        found = capture(model, inputs).program.variants.trace.structure
        torch._dynamo.reset()
        merged, shared = kept("temporal", "merge", 2, rows=1, columns=1), kept("skip", "ratio", 2)
        plan = plan_of(found, rule("*", "0-5", merged, "0"), rule("*", "0-5", shared, "1"), tokens=geometry)
        session, expected = Session(plan=plan, check_passes=True), Literal(plan, geometry)
        for step, result, arguments in steps_of(session, compiled(model, session=session), inputs):
            (program,) = session.programs
            same(result, expected(program, step, arguments))
        assert expected.moved > 1e-4 and program.statistics.cold_calls == 0


def test_the_models_mask_holds_in_both_calls() -> None:
    model, inputs = hunyuan()
    structure, sites = structure_of(model, inputs), "*transformer_blocks.*.attn"
    plan = plan_of(structure, rule(sites, "0-5", kept("spatial", "merge", 2)), tokens=TOKENS)
    alone = plan_of(structure, rule(sites, "0-5", sparse("spatial")), tokens=TOKENS)
    with interpreted():
        apart = {}
        for which in (plan, alone):
            torch._dynamo.reset()
            forward = compiled(model, session=Session(plan=which, check_passes=True))
            results = [call(forward, inputs, TIMES[step]) for step in (0, 0, 1)][1:]
            apart[which is plan] = [
                distance(found, call(model, inputs, TIMES[step])) for step, found in enumerate(results)
            ]
    assert apart[True][0] < 1e-5 < 1e-4 < apart[True][1] < 0.3 * apart[False][1]


class Added:
    """An attention processor under a mask that is added: some queries have the least number of every key."""

    def __init__(self, own: Any) -> None:
        self.own = own

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        hidden = torch.arange(attention_mask.shape[-1])[:, None] % 3 == 0
        added = torch.where(attention_mask & ~hidden, 0.0, torch.finfo(torch.float32).min)
        return self.own(attn, hidden_states, encoder_hidden_states, added, image_rotary_emb)


def test_queries_from_which_all_keys_are_hidden_alike_are_as_dense() -> None:
    """Their shares are equal in dense attention, however many keys a list has."""
    model, inputs = hunyuan(20)
    attention: list[Any] = [each for each in model.modules() if hasattr(each, "set_processor")]
    for each in attention:
        each.set_processor(Added(each.processor))
    structure, sites = structure_of(model, inputs), "*transformer_blocks.*.attn"
    heads = [rule(sites, "0-5", kept("spatial", form, 2), head) for form, head in (("merge", "0"), ("ratio", "1"))]
    plan = plan_of(structure, *heads, tokens=TOKENS)
    with interpreted():
        session = Session(plan=plan, check_passes=True)
        forward = compiled(model, session=session)
        apart = [distance(call(forward, inputs, TIMES[0]), call(model, inputs, TIMES[0])) for _ in range(2)]
        found = call(forward, inputs, TIMES[1])
    (program,) = session.programs
    assert program.statistics.cold_calls == 0 and apart[1] < 1e-5
    assert 1e-4 < distance(found, call(model, inputs, TIMES[1])) < 0.1


def test_branches_and_interleaved_generations_have_slots_of_their_own(wan: nn.Module, structure: str) -> None:
    plan = plan_of(structure, rule("blocks.*.attn1", "1-5", kept("spatial", "ratio", 2)))
    with interpreted():
        run = Run(wan, plan)
        run.begin()
        inputs, literals = [drifting(seed) for seed in (1, 2)], [Literal(plan), Literal(plan)]
        order = [(0, 0), (0, 1), (1, 0), (0, 2), (1, 1), (1, 2), (0, 3), (1, 3)]
        for which, step in order:
            result = run(inputs[which][step], TIMES[step])
            same(result, literals[which](run.program, step, run.taken))
    assert run.program.statistics.cold_calls == 0 and min(each.moved for each in literals) > 0


def test_what_was_not_kept_is_not_read(wan: nn.Module, structure: str) -> None:
    """A generation that starts within a run, or leaves out a step, is dense up to the next step that keeps."""
    plan = plan_of(structure, rule(FIRST, "0-5", kept("spatial", "merge", 3)))
    with interpreted():
        run = Run(wan, plan)
        run.begin()
        inputs = drifting()
        for step in (1, 2):
            same(run(inputs[step], TIMES[step]), call(wan, inputs[step], TIMES[step]))
        assert run.program.statistics.cold_calls == 2
        expected = Literal(plan)
        for step in (3, 4):
            same(run(inputs[step], TIMES[step]), expected(run.program, step, run.taken))


def test_at_another_size_what_is_skipped_is_that_of_the_blocks_there(wan: nn.Module, structure: str) -> None:
    plan = plan_of(
        structure,
        rule("blocks.*.attn1", "0-5", kept("spatial", "merge", 2)),
        geometry={"transformer": (1, 4, 4, 32, 32)},
    )
    with interpreted():
        run = Run(wan, plan, on_mismatch="retarget")
        smaller = wan_inputs(16)
        call(run.forward, smaller, TIMES[0])
        run.program.bind(plan)
        taken: list[list[Any]] = []

        def watch(arguments: list[Any], compute: Compute) -> Sequence[Any]:
            taken.append([*arguments])
            return compute(arguments)

        run.program.interceptor = watch
        of_blocks, reads = Literal(plan, Geometry(4, 8, 16)), 0
        for step in range(4):
            moved = {"hidden_states": smaller["hidden_states"] * (1 + 0.1 * step)}
            given = call(run.forward, smaller | moved, TIMES[step])
            torch.testing.assert_close(given, of_blocks(run.program, step, taken[-1]), rtol=1e-4, atol=1e-5)
            reads += bool(run.program.bound is not None and run.program.bound.steps[step].reads)
        assert reads == 2 and run.program.statistics.cold_calls == 0


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (("spatial", {"rest": {"kept": "all", "refresh": 2}}), r"rest .*: write \{kept: merge, refresh: 4\}: kept is "),
        (("spatial", {"rest": {"kept": "merge"}}), r"rest .*: write \{kept: merge, refresh: 4\}"),
        (("spatial", {"rest": {"kept": "ratio", "refresh": 1}}), r"rest .*: write \{kept: ratio, refresh: 4\}"),
        (
            ("spatial", {"rest": {"kept": "ratio", "refresh": True}}),
            r"rest .* N from 2 to 1000; there is no other setting",
        ),
        (("spatial", {"rest": {"kept": "ratio", "refresh": 2, "ramp": 1}}), r"rest .* there is no other setting"),
        (("draft", {"keep": 0.5, "rest": {"kept": "merge", "refresh": 2}}), r"rest .*: a draft skips other blocks in "),
        (("dense", {"rest": {"kept": "merge", "refresh": 2}}), r"rest .*: dense skips nothing"),
        (("skip", {"order": "clusters", "rest": {"kept": "merge", "refresh": 2}}), r"rest .*: order clusters is "),
    ],
)
def test_what_cannot_be_kept_is_told(
    wan: nn.Module, structure: str, do: tuple[str, dict[str, Any]], message: str
) -> None:
    bad: Rule = rule(FIRST, "1", sparse(do[0], **do[1]))
    with interpreted(), pytest.raises(PlanMismatchError, match=rf"rule 0 \(blocks\.0\.attn1\): {message}"):
        call(compiled(wan, plan=plan_of(structure, bad)), wan_inputs(), TIMES[0])


def test_text_has_none(wan: nn.Module, structure: str) -> None:
    bad = rule("blocks.0.attn2", "1", kept("skip", "merge", 2))
    with (
        interpreted(),
        pytest.raises(PlanMismatchError, match=r"attn2 is no self-attention .*; a rest is for that only"),
    ):
        call(compiled(wan, plan=plan_of(structure, bad)), wan_inputs(), TIMES[0])


def test_a_decision_is_written_as_it_is_read() -> None:
    data = {"sparse": {"pattern": "spatial", "frames": 0, "rest": {"kept": "merge", "refresh": 4}}}
    decision = decision_from_data(data)
    assert isinstance(decision, Sparse) and decision_to_data(decision) == data
    choice = SparseChoice.from_data(decision.settings)
    assert choice == SparseChoice(Spatial(), Kept("merge", 4)) and choice.pooled is None
    assert pattern_text(choice.to_data()) == decision.pattern
