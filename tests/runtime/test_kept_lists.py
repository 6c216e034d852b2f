"""Plans whose lists serve several steps, against eager models under masks that one step finds and others read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditopt._torch import compile_counts
from ditopt.backend import Session
from ditopt.decisions import Dense, HeadDecision, Reuse, Sparse
from ditopt.kernels.block_sparse_attention.lists import blocks, kernel_blocks
from ditopt.kernels.patterns.choice import SparseChoice
from ditopt.kernels.patterns.registry import pattern_from_data
from ditopt.passes.kept import LISTS, slot_of
from ditopt.plan import Plan
from ditopt.profiler.interpret import Edit
from ditopt.runtime.program import Program
from ditopt.sites import STEP
from tests.kernels.test_draft_lists import literal
from tests.literal_kept import LiteralPlan
from tests.runtime.test_draft import always
from tests.runtime.test_sparse import (
    FRAMES,
    TIMES,
    _fresh,
    call,
    plan_of,
    rule,
    sparse,
    structure,
    wan,
    wan_inputs,
)
from tests.trace.models import compiled, interpreted

__all__ = ["_fresh", "structure", "wan"]  # fixtures

BLOCK = 64
FIRST, SECOND = "blocks.0.attn1", "blocks.1.attn1"


class Literal(LiteralPlan):
    """One generation under a plan: of every head the blocks that it found last, and how many steps it has had them."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.runs: dict[tuple[str, int], tuple[HeadDecision, int, Tensor]] = {}
        self.stale = 0

    def again(self) -> None:
        """The next call is of the same step once more: heads have what they found, or find it anew."""
        self.runs = {head: (do, count - 1, kept) for head, (do, count, kept) in self.runs.items()}

    def edit(self, site: str, decided: tuple[HeadDecision, ...]) -> Edit:
        def edit(given: tuple[Any, ...], value: Tensor) -> Tensor:
            query, key, values = given[:3]
            out = value.clone()
            for head, do in enumerate(decided):
                kept = self._kept(site, head, do, query[:, head], key[:, head], values[:, head])
                if isinstance(do, Sparse):
                    mask = kept.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)
                    scores = query[:, head] @ key[:, head].transpose(1, 2) * query.shape[-1] ** -0.5
                    shares = scores.masked_fill(~mask, -math.inf).softmax(-1)
                    out[:, head] = shares.nan_to_num(0.0) @ values[:, head]
            return out

        return edit

    def _kept(self, site: str, head: int, do: HeadDecision, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``[B, Qb, Kb]``: what a head attends to, by what it attended to before."""
        before, count, kept = self.runs.get((site, head), (None, 0, torch.empty(0)))
        count = count + 1 if do == before else 0
        settings: dict[str, Any] = do.settings if isinstance(do, Sparse) else {"pattern": "dense"}
        if settings["pattern"] == "draft":
            now = found(settings, query, key, value)
            if count % settings.get("refresh", 1) == 0:
                kept = now
            self.stale += not torch.equal(kept, now)
        else:
            kept = torch.from_numpy(pattern_from_data(settings).block_map(FRAMES, BLOCK, BLOCK))[None]
        self.runs[site, head] = do, count, kept
        return kept


def found(settings: Mapping[str, Any], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``[B, Qb, Kb]``: what a head would find for itself."""
    sizes = kernel_blocks(FRAMES.tokens, FRAMES.tokens)
    assert sizes == (BLOCK, BLOCK)
    count = blocks(FRAMES.tokens, BLOCK)
    keep = [math.ceil(settings.get("keep", settings.get("most", 0.5)) * count - 1e-9)]
    limits = keep, [settings.get("mass", math.inf)], query.shape[-1] ** -0.5
    by = [settings.get("by", "means")]
    each = (
        literal(q[None, None], k[None, None], always(FRAMES, sizes)[None, None], sizes, *limits, v[None, None], by)
        for q, k, v in zip(query, key, value, strict=True)
    )
    return torch.tensor([*each]).view(len(query), count, count)


def drifting(seed: int = 1, batch: int = 1) -> list[dict[str, Any]]:
    """The inputs of every step of a generation, whose latents move from step to step."""
    inputs = wan_inputs(batch=batch)
    drawing = torch.Generator().manual_seed(seed)
    text = torch.randn(inputs["encoder_hidden_states"].shape, generator=drawing)
    latents = [torch.randn(inputs["hidden_states"].shape, generator=drawing) for _ in range(len(TIMES) + 1)]
    moved = [latents[0] + 0.5 * each for each in latents[1:]]
    return [{**inputs, "hidden_states": each, "encoder_hidden_states": text} for each in moved]


class Run:
    """A compiled model under a plan, whose calls tell what the graph was given."""

    def __init__(self, model: nn.Module, plan: Plan | Path, **options: Any) -> None:
        self.session = Session.from_options({"plan": plan, "check_passes": True, **options})
        self.forward = compiled(model, session=self.session)
        self.taken: list[Any] = []

    @property
    def program(self) -> Program:
        (found,) = self.session.programs
        return found

    def begin(self, batch: int = 1) -> None:
        """Compile, in a generation that is thrown away."""
        call(self.forward, drifting(9, batch)[0], TIMES[0])
        self.program.bind(self.program.plan)
        self.program.statistics.cold_calls = 0

        def intercept(arguments: list[Any], compute: Any) -> Any:
            self.taken = list(arguments)
            return compute(arguments)

        self.program.interceptor = intercept

    def __call__(self, inputs: dict[str, Any], time: float) -> Tensor:
        return call(self.forward, inputs, time)

    def held(self) -> int:
        """Bytes of all slots."""
        return sum(state.held_bytes for state in self.program._states)


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


RULES = (
    rule(FIRST, "1-5", sparse("draft", keep=0.25, by="mass", refresh=2), "0"),
    rule(FIRST, "1-5", sparse("draft", keep=0.2, refresh=3), "1"),
    rule(SECOND, "1-3", sparse("draft", mass=0.5, by="error", refresh=4), "0"),
    rule(SECOND, "4-5", sparse("draft", keep=0.4, by="error", refresh=4), "0"),
    rule(SECOND, "2-5", sparse("temporal", rows=1, columns=2), "1"),
)
"""Heads of a site find in different steps, beside static ones; in step 4 one has another decision."""


def test_lists_are_found_in_every_nth_step_and_read_in_between(wan: nn.Module, structure: str) -> None:
    plan = plan_of(structure, *RULES)
    with interpreted():
        run, expected = Run(wan, plan), Literal(plan)
        run.begin(batch=2)
        for step, inputs in enumerate(drifting(batch=2)):
            result = run(inputs, TIMES[step])
            same(result, expected(run.program, step, run.taken))
    assert expected.stale >= 4, "lists that are read are not those that would be found"
    bound = run.program.bound
    assert bound is not None and run.program.statistics.cold_calls == 0
    told = [[(each.draft, *each.keeps, *each.reads) for each in step.variant.sparse] for step in bound.steps]
    kept, read, both = (True, LISTS), (False, LISTS), (True, LISTS, LISTS)
    assert told == [[], [kept, kept], [read, read], [both, read], [both, kept], [both, read]]
    by = [step.variant.sparse[0].by for step in bound.steps[1:] if step.variant.sparse[0].draft]
    assert by == [("means", "mass"), ("mass",), ("means",), ("mass",)], "what no head finds by is not computed"
    assert [[read.source for read in step.reads] for step in bound.steps] == [[], [], [1, 1], [1, 1], [3], [4, 4]]
    assert run.held() == 0, "what nobody reads any more is freed"


def test_a_plan_file_compiles_once(wan: nn.Module, structure: str, tmp_path: Path) -> None:
    plan = plan_of(structure, rule("blocks.*.attn1", "1-5", sparse("draft", keep=0.25, by="error", refresh=3)))
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
    own = 2 * 2 * 16 * (16 + 1) * 4  # of two sites with two heads: sixteen lists of sixteen blocks, and their lengths
    assert held == [0, own, own, 0, own, 0], "step 3 is the last that reads what step 1 found"
    assert expected.stale > 0


def test_predicted_steps_and_sites_neither_count_nor_end_a_run(wan: nn.Module, structure: str) -> None:
    """Of a step that is not computed at all, and of a block that is not."""
    draft = sparse("draft", keep=0.25, refresh=2)
    rules = (rule("blocks.*.attn1", "1-5", draft), rule(STEP, "2", Reuse()), rule("blocks.1", "4", Reuse()))
    plan = plan_of(structure, *rules)
    with interpreted():
        run, expected = Run(wan, plan), Literal(plan)
        run.begin()
        for step, inputs in enumerate(drifting()):
            result = run(inputs, TIMES[step])
            if step != 2:
                skipped = (SECOND,) if step == 4 else ()
                should = expected(run.program, step, run.taken, skipped)
                if step != 4:
                    same(result, should)
    bound = run.program.bound
    assert bound is not None and run.program.statistics.cold_calls == 0
    sources = [{read.slot: read.source for read in step.reads} for step in bound.steps]
    one, other = (slot_of(LISTS, site) for site in (FIRST, SECOND))
    assert sources == [{}, {}, {}, {one: 1, other: 1}, {}, {one: 4}], "the second has been computed once less"


def test_a_dense_step_ends_a_run(wan: nn.Module, structure: str) -> None:
    draft = sparse("draft", keep=0.25, refresh=4)
    plan = plan_of(structure, rule(FIRST, "0-5", draft), rule(FIRST, "2", Dense()), rule(FIRST, "4", Dense(), "1"))
    with interpreted():
        run, expected = Run(wan, plan), Literal(plan)
        run.begin()
        for step, inputs in enumerate(drifting()):
            same(run(inputs, TIMES[step]), expected(run.program, step, run.taken))
    bound = run.program.bound
    assert bound is not None
    assert [[read.source for read in step.reads] for step in bound.steps] == [[], [0], [], [], [3], [3]]


def test_with_rests_orders_and_drafts_found_in_every_step(wan: nn.Module, structure: str) -> None:
    """What is kept is of blocks in a head's own order; beside it a head that finds anew in every step."""
    settings: tuple[dict[str, Any], ...] = (
        {"keep": 0.25, "order": "tiles", "rest": {"pooled": 16}},
        {"keep": 0.125, "by": "mass"},
    )

    def run_with(refresh: int | None, steps: int) -> list[Tensor]:
        more = {} if refresh is None else {"refresh": refresh}
        rules = [rule(FIRST, "1-5", sparse("draft", **settings[0], **more), "0")]
        rules.append(rule(FIRST, "1-5", sparse("draft", **settings[1]), "1"))
        run = Run(wan, plan_of(structure, *rules))
        run.begin()
        inputs = drifting()
        return [run(inputs[min(step, steps)], TIMES[min(step, steps)]) for step in range(len(TIMES))]

    with interpreted():
        anew = run_with(None, 5)
        torch._dynamo.reset()
        kept = run_with(2, 5)
        equal = [bool(torch.allclose(one, other, rtol=1e-4, atol=1e-5)) for one, other in zip(anew, kept, strict=True)]
    assert equal == [True, True, False, True, False, True]


def test_branches_and_interleaved_generations_have_slots_of_their_own(wan: nn.Module, structure: str) -> None:
    plan = plan_of(structure, rule("blocks.*.attn1", "1-5", sparse("draft", keep=0.2, refresh=2)))
    with interpreted():
        run = Run(wan, plan)
        run.begin()
        inputs, literals = [drifting(seed) for seed in (1, 2)], [Literal(plan), Literal(plan)]
        order = [(0, 0), (0, 1), (1, 0), (0, 2), (1, 1), (1, 2), (0, 3), (1, 3)]
        for which, step in order:
            result = run(inputs[which][step], TIMES[step])
            same(result, literals[which](run.program, step, run.taken))
    assert run.program.statistics.cold_calls == 0 and min(each.stale for each in literals) > 0


def test_what_has_not_been_found_is_not_read(wan: nn.Module, structure: str) -> None:
    """A generation that starts within a run, or leaves out a step, is dense up to the next step that finds."""
    plan = plan_of(structure, rule(FIRST, "0-5", sparse("draft", keep=0.2, refresh=3)))
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
        again = drifting(2)
        run(again[0], TIMES[0])
        same(run(again[2], TIMES[2]), call(wan, again[2], TIMES[2]))
        assert run.program.statistics.cold_calls == 3
    bound = run.program.bound
    assert bound is not None and bound.full in bound.variants and not bound.full.sparse


def test_other_schedules_read_what_the_nearest_planned_step_found(wan: nn.Module, structure: str) -> None:
    plan = plan_of(structure, rule(FIRST, "0-5", sparse("draft", keep=0.2, refresh=3)))
    with interpreted():
        run, expected = Run(wan, plan, on_mismatch="retarget"), Literal(plan)
        run.begin()
        inputs = drifting()
        for step in (0, 1, 2, 3):
            result = run(inputs[step], TIMES[step] - 30)
            same(result, expected(run.program, step, run.taken))
        assert run.program.statistics.cold_calls == 0 and run.held() > 0
        same(run(inputs[5], TIMES[5]), expected(run.program, 5, run.taken))
        run(inputs[0], TIMES[0])
        same(run(inputs[4], TIMES[4]), call(wan, inputs[4], TIMES[4]))
        assert run.program.statistics.cold_calls == 1, "what step 3 finds was not there"


def test_a_step_that_runs_twice_reads_what_it_read_before(wan: nn.Module, structure: str) -> None:
    """More calls than the plan has steps; of a site's heads one finds in every second, one in every third."""
    heads = [sparse("draft", keep=keep, refresh=every) for keep, every in ((0.2, 2), (0.3, 3))]
    plan = plan_of(structure, *(rule("blocks.*.attn1", "0-5", do, str(head)) for head, do in enumerate(heads)))
    with interpreted():
        run, expected = Run(wan, plan, on_mismatch="retarget"), Literal(plan)
        run.begin()
        for step, (one, other) in enumerate(zip(drifting(3), drifting(4), strict=True)):
            same(run(one, TIMES[step] + 9), expected(run.program, step, run.taken))
            expected.again()
            again = {**other, "encoder_hidden_states": one["encoder_hidden_states"]}
            same(run(again, TIMES[step] - 9), expected(run.program, step, run.taken))
    bound = run.program.bound
    assert bound is not None and run.program.statistics.cold_calls == 0 and expected.stale > 0
    both = [next((each.keeps, each.reads) for each in step.variant.sparse) for step in bound.steps]
    assert both.count(((LISTS,), (LISTS,))) == 3, "steps in which one head finds and one reads"


def test_that_steps_run_dense_is_told_once(wan: nn.Module, structure: str, caplog: pytest.LogCaptureFixture) -> None:
    plan = plan_of(structure, rule("blocks.*.attn1", "0-5", sparse("draft", keep=0.2, refresh=3)))
    with interpreted():
        run = Run(wan, plan)
        run.begin()
        for step, inputs in enumerate(drifting()):
            run(inputs, TIMES[step])
        assert run.program.statistics.cold_calls == 0
        for seed in (2, 3):
            for step, inputs in enumerate(drifting(seed)[1:3], 1):
                same(run(inputs, TIMES[step]), call(wan, inputs, TIMES[step]))
    told = "step 1 of the plan runs dense, as do others like it: its heads read the lists blocks.0.attn1 of step 0, "
    messages = [each.getMessage() for each in caplog.records if each.name == "ditopt"]
    assert [each.startswith(told) for each in messages] == [True] and run.program.statistics.cold_calls == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "spatial", "refresh": 2}, r"refresh 2: spatial finds no blocks; only a draft's are kept"),
        ({"pattern": "draft", "keep": 0.5, "refresh": 1}, r"refresh 1: write 2 or more"),
        ({"pattern": "draft", "keep": 0.5, "refresh": True}, r"refresh True: write 2 or more"),
        ({"pattern": "draft", "keep": 0.5, "refresh": "often"}, r"refresh 'often': write 2 or more"),
        ({"pattern": "draft", "keep": 0.5, "refresh": 2, "order": "clusters"}, r"refresh 2: clusters are found in eve"),
    ],
)
def test_what_cannot_be_kept_is_told(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseChoice.from_data(settings)


def test_what_is_kept_is_said_as_it_was_written() -> None:
    written = {"pattern": "draft", "keep": 0.25, "rest": "pooled", "order": "tiles", "refresh": 4}
    assert SparseChoice.from_data(written).refresh == 4
    assert SparseChoice.from_data(written).to_data() == written
