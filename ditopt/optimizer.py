"""The flow behind ``optimize()``: probe, capture, profile, search, verify, and the table at the end."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditopt.adapters import Adapter, DiffusersAdapter, adapt
from ditopt.console import Reporter
from ditopt.errors import InputError
from ditopt.exact import CUT, Hoisted, Hoisting, ahead_mib
from ditopt.finish import looks
from ditopt.guidance import watch_guidance
from ditopt.measure import Evaluator
from ditopt.outcome import (
    Found,
    Result,
    Row,
    check_writable,
    closing_table,
    exact_plan,
    finished_plan,
    write_outcome,
    write_side,
)
from ditopt.plan import Plan, Rule
from ditopt.prepare import CannotDecideError, Preparation, Prepared, as_it_was, seeded
from ditopt.profiler.checkpoint import Checkpoints
from ditopt.profiler.observe import Pair, captured_once
from ditopt.profiler.take import TABLES, add_sparse_tables, take_profile
from ditopt.recipes import find_recipe
from ditopt.runtime.graphs import Graphs
from ditopt.target import Target
from ditopt.techniques import Techniques
from ditopt.verify import VerifiedSearch, affordable_trials

Pairs = Sequence[Pair]


@dataclass
class Optimizer:
    """One run of the flow for one model."""

    model: Any
    prompts: Sequence[str]
    target: Target
    rollout: Any = None
    plan_path: str | Path | None = None
    pipe_kwargs: Mapping[str, Any] | None = None
    seed: int = 0
    techniques: Sequence[str] | None = None
    max_variants: int = 8
    budget: int | None = None
    on_mismatch: str = "error"
    resume: bool = True
    quiet: bool = False
    recipe: str | None = None
    max_state_bytes: int | None = None

    def __post_init__(self) -> None:
        self.reporter = Reporter(self.quiet)
        self.timings: dict[str, float] = {}
        self.reasons: list[str] = []
        if self.max_state_bytes is not None and self.max_state_bytes < 0:
            raise InputError(f"max_state_bytes={self.max_state_bytes}: give the most bytes that slots may take")
        self.chosen = Techniques.choose(self.techniques, self.recipe)
        self.adapter: Adapter = adapt(self.model, self.rollout, self.pipe_kwargs)
        check_writable(None if self.plan_path is None else Path(self.plan_path))

    def run(self) -> Result:
        """Run the flow; the model's networks are left compiled, under the plan that was found or dense.

        An exception (Ctrl-C included) gives the model back as it was; checkpoints are kept.
        """
        pairs = seeded(self.prompts, self.seed)
        half = len(pairs) // 2
        with as_it_was(self.adapter):
            return self._run(pairs[:half], pairs[half:])

    def _run(self, profiled: list[Pair], held_out: list[Pair]) -> Result:
        self.reporter.say(
            f"ditopt: {len(profiled)} prompts to profile, {len(held_out)} held out to verify; target "
            f"{self.target.to_data()}"
        )
        prepare = Preparation(
            self.adapter,
            self.reporter,
            self.reasons,
            self._timed,
            self.pipe_kwargs,
            self.chosen.ranges,
            self.target.to_data(),
        )
        try:
            prepared = prepare(profiled[0])
        except CannotDecideError as error:
            return self._stay_dense(str(error))
        evaluator, calls = prepared.evaluator, prepared.calls
        evaluator.max_state_bytes = self.max_state_bytes
        if self.target.exact:
            return self._exactly(prepared, held_out)
        facts = {"ranges": self.chosen.ranges, "pairs": [*profiled, *held_out], "tables": TABLES}
        checkpoints = prepared.checkpoints(facts, self.pipe_kwargs, self.resume)
        if min(len(part.timesteps) for part in calls.values()) < 2:
            return self._stay_dense(
                "a network runs for one step only, so there is no earlier one to predict from",
                template=evaluator.template,
            )
        with self._timed("profile"):
            profile = take_profile(prepared, self.chosen, checkpoints, profiled, self.reporter)
            if self.chosen.sparse:
                profile = add_sparse_tables(prepared, profile, checkpoints, profiled, self.reporter, self.reasons)
        with (
            self._timed("held-out references"),
            self.reporter.stage("dense runs of held-out prompts", len(held_out)) as stage,
        ):
            dense_seconds = []
            for index, pair in enumerate(held_out):
                with captured_once(evaluator, pair):
                    seconds = self._reference(evaluator, checkpoints, f"held_out{index}", pair)
                if seconds is not None:
                    dense_seconds.append(seconds)
                stage.advance()
        search = VerifiedSearch(
            evaluator,
            profile,
            self.target,
            profiled,
            held_out,
            self.reporter,
            self.budget or affordable_trials(profile),
            self.max_variants,
            self.chosen.predictors,
            self.chosen.dtypes,
            self.chosen.second_order,
            self.chosen.sparse,
            self.reasons,
            statistics.median(dense_seconds or [0.0]),
            all_computed=self.chosen.all_computed,
            hoist=self.chosen.hoist,
            recipe=find_recipe(self.recipe),
        )
        with self._timed("search and verify"):
            found = search()
        if found is None:
            evaluator.bind(())
            return self._stay_dense("no plan met the target on the held-out prompts", template=evaluator.template)
        if found.seconds is None:
            with self._timed("final timing"):
                found = search.timed(found)
        return self._finish(search, found, prepared.graphs, prepared.eager_seconds)

    def _exactly(self, prepared: Prepared, held_out: list[Pair]) -> Result:
        """Compute ahead of the steps what is the same in many, if generations are faster so; nothing else is tried."""
        evaluator, template = prepared.evaluator, prepared.evaluator.template
        if prepared.whole:
            with self._timed("hoisting"):
                found = Hoisting(evaluator, held_out, self.reporter)()
        else:
            found = Hoisted((), reason=CUT)
        evaluator.bind(())
        rows: list[Row] = []
        if found.seconds is not None:
            ours, dense = found.seconds
            rows = self._dense_rows(evaluator, prepared.eager_seconds, dense)
            rows.append(Row("ditopt, exact", ours, dense / ours, None, None, rows[0].evaluations))
        self._note_reasons(evaluator)
        if found.reason is not None:
            self.reporter.table(closing_table(rows))
            return self._stay_dense(f"nothing is computed ahead of the steps: {found.reason}", rows, template)
        plan = exact_plan(template, found, rows, len(held_out))
        result = Result(plan, rows, self.reasons, None, self.timings)
        path = Path(self.plan_path) if self.plan_path is not None else None
        told = {"held_out": [prompt for prompt, _ in held_out]}
        path = write_outcome(path, plan, None, None, result, told, {"hoisted": found.work})
        return self._handed_over(evaluator, plan, path, result, None)

    def _handed_over(
        self, evaluator: Evaluator, plan: Plan, path: Path, result: Result, watch: Callable[[], None] | None
    ) -> Result:
        """Leave the networks running by a plan that was written, and end with the table."""
        self.reporter.say(f"plan: {path}  (explained by `ditopt explain {path}`)")
        for session in evaluator.sessions.values():
            session.settle(self.on_mismatch, watch)
            session.bind(plan)
        self.reporter.table(closing_table(result.rows))
        return result

    def _dense_rows(self, evaluator: Evaluator, eager_seconds: float, seconds: float) -> list[Row]:
        """The lines of the dense model in the closing table."""
        evaluations = self._evaluations(evaluator, ())
        return [
            Row("dense, eager (first run)", eager_seconds, seconds / eager_seconds, None, None, evaluations),
            Row("dense, compiled", seconds, 1.0, None, None, evaluations),
        ]

    def _note_reasons(self, evaluator: Evaluator) -> None:
        """Keep what did not apply in any graph."""
        for session in evaluator.sessions.values():
            for program in session.programs:
                self.reasons += [*program.variants.trace.notes, *program.variants.reasons]

    @staticmethod
    def _reference(evaluator: Evaluator, checkpoints: Checkpoints, name: str, pair: tuple[str, int]) -> float | None:
        """Take the dense sample of a held-out prompt; the seconds it took, None where its checkpoint was there."""
        kept = checkpoints.load(name, ["sample"])
        if kept is not None:
            evaluator.references[pair] = kept["sample"]
            return None
        began = time.perf_counter()
        evaluator.dense([pair])
        seconds = time.perf_counter() - began
        checkpoints.save(name, {"sample": evaluator.references[pair]})
        return seconds

    def _finish(
        self, search: VerifiedSearch, found: Found, graphs: Mapping[str, Graphs], eager_seconds: float
    ) -> Result:
        """Compare the contenders, refuse a plan that is no faster, write what was found."""
        assert found.seconds is not None
        evaluator, profiled, held_out = search.evaluator, search.profiled, search.held_out
        plan_seconds, dense_seconds = found.seconds
        rows = [
            *self._dense_rows(evaluator, eager_seconds, dense_seconds),
            Row(
                "ditopt",
                plan_seconds,
                dense_seconds / plan_seconds,
                found.quality.psnr,
                found.quality.worst_psnr,
                self._evaluations(evaluator, found.rules),
            ),
        ]
        rows += search.fewer_steps(found)
        if plan_seconds >= dense_seconds:
            evaluator.bind(())
            self.reporter.table(closing_table(rows))
            return self._stay_dense(
                f"the plan took {plan_seconds:.2f} s a generation, dense {dense_seconds:.2f} s",
                rows,
                evaluator.template,
            )
        plan = finished_plan(evaluator.template, found, rows, graphs, len(held_out), search.state_bytes)
        predicted = {**plan.predicted, "state_mib": round(evaluator.state_bytes(found.rules) / 2**20, 3)}
        plan = plan.model_copy(update={"recipe": self.recipe, "predicted": predicted})
        self._note_reasons(evaluator)  # what did not apply is told, not dropped
        further: Mapping[str, Any] = {}
        path = Path(self.plan_path) if self.plan_path is not None else None
        if path is not None:
            with self._timed("samples and work"):
                whole = all(each.whole for each in graphs.values())
                further, told = looks(path, evaluator, found.rules, held_out[0], search.rival_sample, whole)
            self.reasons += told
        if search.ahead:
            further = {**further, "hoisted": search.ahead}
            plan = plan.model_copy(update={"measured": {**plan.measured, "ahead_mib": ahead_mib(search.ahead)}})
        result = Result(plan, rows, self.reasons, found.quality, self.timings)
        prompts = {"profiled": [prompt for prompt, _ in profiled], "held_out": [prompt for prompt, _ in held_out]}
        path = write_outcome(path, plan, search.profile, found, result, prompts, further)
        watch = watch_guidance(self.model, plan) if isinstance(self.adapter, DiffusersAdapter) else None
        return self._handed_over(evaluator, plan, path, result, watch)

    def _evaluations(self, evaluator: Evaluator, rules: Sequence[Rule]) -> int:
        plan = evaluator.template.model_copy(update={"rules": tuple(rules)})
        return sum(len(plan.kept_steps(name)) for name in evaluator.sessions)

    def _stay_dense(self, reason: str, rows: Sequence[Row] = (), template: Plan | None = None) -> Result:
        """Nothing beats the dense compiled model: say so and leave that; the plan file gets no rules."""
        self.reasons.append(reason)
        if template is not None and self.plan_path is not None:
            said = {"measured": {"dense": reason}, "recipe": self.recipe}
            template.model_copy(update=said).save(self.plan_path)
            write_side(Path(self.plan_path), {"reasons": self.reasons, "table": rows, "timings": self.timings})
        self.reporter.say(f"the dense compiled model stays: {reason}")
        return Result(None, list(rows), self.reasons, None, self.timings)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.timings[name] = round(time.perf_counter() - began, 2)
