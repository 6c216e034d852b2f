"""Variants: the straight-line graphs of a trace, compiled once each and kept by what they do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor, fx

import ditopt.kernels.block_sparse_attention.clusters

# These register the operators that flash and sparse put into graphs.
import ditopt.kernels.block_sparse_attention.cpu
import ditopt.kernels.block_sparse_attention.draft
import ditopt.kernels.block_sparse_attention.linear
import ditopt.kernels.flash_attention.cpu  # noqa: F401
from ditopt._torch import BoxedCallable, fake_mode_of, lower, trace_aten
from ditopt.components import components
from ditopt.passes._infra import Component, GraphIndex, PassManager, StepPlan, outputs
from ditopt.passes.audit import audit, only_needed_by
from ditopt.passes.cast import cast
from ditopt.passes.cut import bytes_of
from ditopt.passes.features import feature
from ditopt.passes.flash import flash
from ditopt.passes.hoist import PROLOGUES, hoist_with
from ditopt.passes.hoist import Prologue as Uncompiled
from ditopt.passes.kept import kept_slots
from ditopt.passes.lower_attention import lower_attention_with
from ditopt.passes.predict import predict
from ditopt.passes.prune import prune
from ditopt.passes.record import record
from ditopt.passes.second_order import second_order
from ditopt.passes.simplify import simplify
from ditopt.passes.sparse import sparse
from ditopt.passes.verify import verify
from ditopt.trace import Trace

Lower = Callable[[fx.GraphModule], BoxedCallable]
KEPT = "ditopt_user_outputs", "ditopt_inputs"
# A recorded feature starts where the block before ends, be that predicted or not: record first.
PASSES = (record, predict, second_order, sparse, prune, simplify, cast, flash)


@dataclass(frozen=True, eq=False)
class Prologue:
    """A compiled ``passes.hoist.Prologue``; ``timestep`` describes that input (fake) where it takes ``rows`` of them.

    ``nodes`` are its operations, ``bytes`` what its results take.
    """

    run: BoxedCallable
    inputs: tuple[int, ...]
    outputs: tuple[str, ...]
    clock: int | None
    rows: int
    timestep: Tensor | None
    nodes: int
    bytes: int


@dataclass(frozen=True)
class Variant:
    """One compiled graph. ``inputs`` lists positions of captured inputs and names of added ones.

    ``recorded`` gives, per recorded site and per slot that is kept, how many tensors of the outputs behind the user's
    are its; ``prologues`` what is computed ahead of it.
    """

    plan: StepPlan
    run: BoxedCallable
    inputs: tuple[int | str, ...]
    user_outputs: int
    recorded: tuple[tuple[str, int], ...]
    nodes: int
    compile_seconds: float
    prologues: tuple[Prologue, ...] = ()


@dataclass
class VariantCache:
    """Compiles the variants of one trace on demand; thread-safe. ``timestep`` is the position of that input.

    ``prologues`` are those compiled, by what they give: variants that read the same have one.
    """

    trace: Trace
    latents: int | None
    check_passes: bool = False
    compiled: dict[StepPlan, Variant] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    timestep: int | None = None
    prologues: dict[tuple[str, ...], Prologue] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def index(self) -> GraphIndex:
        """Where features are in the captured graph."""
        return replace(self.trace.graph_index(self.latents, self.timestep), components=self.components)

    @cached_property
    def components(self) -> dict[str, Component]:
        """The modules of blocks whose output a plan may predict, by site."""
        return components(self.trace)

    def graph(self, plan: StepPlan) -> fx.GraphModule:
        """The rewritten graph of a step's plan, audited, attention still opaque."""
        manager = PassManager((*PASSES, hoist_with(self._trace_call)), verify if self.check_passes else None)
        gm = manager.run(self.trace.gm, plan, self.index)
        self.reasons += [reason for reason in manager.reasons if reason not in self.reasons]
        changing = {node.name for node in self.trace.changing()}
        dead = {p.site: only_needed_by(self.trace.gm, self.index, p.site, changing) for p in plan.predicted}
        verify(gm)
        audit(gm, plan, self.index, dead, manager.reasons)
        return gm

    def recorded(self, plan: StepPlan) -> tuple[tuple[str, int], ...]:
        """The features and slots that the graph of a step's plan hands on, in order, and how many tensors each has."""
        found = tuple((site, len(feature(self.trace.gm, self.index, site).ends)) for site in plan.recorded)
        return found + kept_slots(plan)

    def get(self, plan: StepPlan) -> Variant:
        """The compiled variant for ``plan``; compiled now if it has not been.

        Raises:
            AuditError: the rewritten graph does not do what the plan says.
        """
        found = self.compiled.get(plan)
        if found is not None:
            return found
        with self._lock:
            if plan not in self.compiled:
                self.compiled[plan] = self._compile(plan)
            return self.compiled[plan]

    def _compile(self, plan: StepPlan) -> Variant:
        began = time.perf_counter()
        gm = self.graph(plan)
        inputs = tuple(gm.meta["ditopt_inputs"])
        users = int(gm.meta["ditopt_user_outputs"])
        recorded = self.recorded(plan)
        nodes = sum(node.op == "call_function" for node in gm.graph.nodes)
        prologues = tuple(self._prologue(each) for each in gm.meta[PROLOGUES])
        lowering = PassManager([lower_attention_with(self._trace_call)], verify if self.check_passes else None)
        captured = gm.meta
        gm = lowering.run(gm, plan, self.index)
        gm.meta.update({key: captured[key] for key in KEPT})
        run = lower(gm, self.trace.context)
        return Variant(plan, run, inputs, users, recorded, nodes, time.perf_counter() - began, prologues)

    def _prologue(self, part: Uncompiled) -> Prologue:
        found = self.prologues.get(part.outputs)
        if found is None:
            inputs = part.gm.graph.find_nodes(op="placeholder")
            timestep = None if part.clock is None else self.trace.placeholders[part.inputs[part.clock]].meta["val"]
            nodes = sum(node.op == "call_function" for node in part.gm.graph.nodes)
            assert len(inputs) == len(part.inputs)
            taken = sum(bytes_of(node.meta["val"]) for node in outputs(part.gm) if node is not None)
            run = lower(part.gm, self.trace.context)
            found = Prologue(run, part.inputs, part.outputs, part.clock, part.rows, timestep, nodes, taken)
            self.prologues[part.outputs] = found
        return found

    def _trace_call(self, function: Callable[..., object], values: list[Tensor]) -> fx.GraphModule:
        sample = next(node.meta["val"] for node in self.trace.placeholders if isinstance(node.meta["val"], Tensor))
        with fake_mode_of(sample) as mode:
            return trace_aten(function, values, mode)
