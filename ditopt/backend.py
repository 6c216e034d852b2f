"""``torch.compile(model, backend="ditopt", options={"plan": path})``: capture, find sites, bind the plan.

Options: ``plan`` (a path, a ``Plan`` or None), ``network`` (which network of the plan this is, default
``transformer``), ``on_mismatch`` (``error``, ``dense`` or ``retarget``), ``session`` (internal: who watches).
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ditopt import store
from ditopt._torch import BoxedCallable, CompileContext, functionalise, graph_break_after
from ditopt.errors import DitoptError, InputError, PlanMismatchError
from ditopt.geometry import Geometry
from ditopt.plan import LATENT_NAMES, TIMESTEP_NAMES, Inputs, Plan
from ditopt.runtime.graphs import Graphs
from ditopt.runtime.program import MISMATCH, InputPositions, Program
from ditopt.runtime.variants import VariantCache
from ditopt.trace import Trace, analyse, mark_attention, name_inputs, own_inputs

log = logging.getLogger("ditopt")

OPTIONS = ("plan", "network", "on_mismatch", "session", "check_passes")


@dataclass(eq=False)  # two sessions of equal settings are not one: Dynamo asks, and would share what it compiled
class Session:
    """All graphs compiled for one model under one set of options."""

    plan: Plan | None = None
    network: str = "transformer"
    on_mismatch: str = "error"
    inputs: Inputs | None = None
    check_passes: bool = False
    lookup: bool = False
    error: DitoptError | None = None
    programs: list[Program] = field(default_factory=list)
    breaks: list[str] = field(default_factory=list)
    graphs: Graphs | None = None
    on_generation: Callable[[], None] | None = None

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> Session:
        """The session that the user's options describe; what is wrong with them is raised at the first call."""
        options = dict(options or {})
        if isinstance(options.get("session"), Session):
            found: Session = options["session"]
            return found
        session = cls(lookup="plan" not in options)
        try:
            unknown = sorted(set(options) - set(OPTIONS))
            if unknown:
                raise InputError(
                    f"options {', '.join(unknown)} are unknown to the ditopt backend; known are {', '.join(OPTIONS)}"
                )
            session.network = str(options.get("network", session.network))
            session.on_mismatch = str(options.get("on_mismatch", session.on_mismatch))
            session.check_passes = bool(options.get("check_passes", False))
            if session.on_mismatch not in MISMATCH:
                raise InputError(
                    f"option on_mismatch={session.on_mismatch!r} is unknown; use one of {', '.join(MISMATCH)}"
                )
            plan = options.get("plan")
            if isinstance(plan, str | Path):
                plan = Plan.load(plan)
            if not isinstance(plan, Plan | None):
                raise InputError(f"option plan={plan!r} should be the path of a plan file or a ditopt.Plan")
            session.plan = plan
        except DitoptError as error:
            session.error = error
        return session

    def settle(self, on_mismatch: str, on_generation: Callable[[], None] | None) -> None:
        """Treat calls that the plan is not for as ``on_mismatch`` says, and call ``on_generation`` as each begins."""
        self.on_mismatch, self.on_generation = on_mismatch, on_generation
        for program in self.programs:
            program.on_mismatch, program.on_generation = on_mismatch, on_generation

    def bind(self, plan: Plan | None) -> None:
        """Let every graph compiled so far run by ``plan``; later ones will too."""
        self.plan = plan
        for program in self.programs:
            program.bind(plan)

    def ranges(self) -> dict[str, tuple[int, int]]:
        """The block ranges that can be decided on, as (first, last) positions in the network."""
        return self.graphs.ranges() if self.graphs is not None else self.programs[0].variants.trace.ranges()

    def compile(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Turn one Dynamo graph into a program."""
        mark_attention(gm)
        found = graph_break_after(gm)
        if found is not None:
            self.breaks.append(found)
        arguments, state = name_inputs(gm)
        own = own_inputs(gm)
        index = len(self.programs)

        def on_graph(graph: fx.GraphModule, inputs: Sequence[Any], context: CompileContext) -> BoxedCallable:
            structure = Trace(index, graph, context, arguments, state).structure
            plan = self._find_plan(structure)
            follows = self._follows(structure, plan)
            positions = InputPositions(None, None, None) if follows else self._positions(graph, arguments, plan)
            trace = analyse(graph, context, index, arguments, state, positions.latents, follows=follows)
            variants = VariantCache(trace, positions.latents, self.check_passes, timestep=positions.timestep)
            program = Program(variants, replace(positions, own=own), self.network, self.on_mismatch)
            program.on_generation = self.on_generation
            program.find_geometry = functools.cache(functools.partial(_geometry_of, trace, positions.latents))
            self.programs.append(program)
            self._attach(program, trace, plan)
            return _boxed(program)

        return functionalise(gm, example_inputs, on_graph)

    def _find_plan(self, structure: str) -> Plan | None:
        """The plan given, else the one that the user's folder has for the model."""
        if self.plan is not None or not self.lookup:
            return self.plan
        try:
            return store.find_plan(structure)
        except DitoptError as error:
            self.error = error
            return None

    def _follows(self, structure: str, plan: Plan | None) -> bool:
        """Whether a graph stands behind a graph break, so that the names of its inputs are not those of the forward's.

        While a plan is being made the graphs come in the order of their first calls.
        """
        if plan is not None:
            breaks = plan.breaks.get(self.network)
            return breaks is not None and structure != breaks.clock
        return self.inputs is not None and any(each.positions.timestep is not None for each in self.programs)

    def _attach(self, program: Program, trace: Trace, plan: Plan | None) -> None:
        """Give a program its plan and compile what it needs; what does not fit is raised at the first call.

        (An exception here would reach the user wrapped in one of Dynamo's.)
        """
        try:
            if self.error is not None:
                raise self.error
            if plan is not None and self.plan is None:  # nobody named it, so it must not stand in the way
                if self.on_mismatch == "error":
                    program.on_mismatch = "dense"
                if self.network not in plan.sampler.timesteps:
                    plan = None
                else:
                    program.stored = store.plan_path(trace.structure)
            if plan is not None:
                check_model(plan, trace)
            elif self.lookup and trace.blocks:
                _say_dense(trace.structure, self.network, store.plan_dir())
            program.bind(plan)
            if plan is not None and program.stored is not None:
                _say_stored(program.stored, _figures(plan, self.network))
            program.compile()
        except DitoptError as error:
            program.error = error

    def _positions(self, graph: fx.GraphModule, arguments: dict[str, int], plan: Plan | None) -> InputPositions:
        inputs = self.inputs or (plan.inputs if plan is not None else None)
        if inputs is not None:
            probe = Trace(0, graph, CompileContext(None, None), arguments, {})
            identity = probe.find_argument(inputs.identity, inputs.forward) if inputs.identity else None
            return InputPositions(
                probe.find_argument(inputs.timestep, inputs.forward),
                probe.find_argument(inputs.latents, inputs.forward),
                identity,
            )
        nodes = graph.graph.find_nodes(op="placeholder")
        timestep = next((arguments[name] for name in TIMESTEP_NAMES if name in arguments), None)
        latents = next((arguments[name] for name in LATENT_NAMES if name in arguments), None)
        if latents is None and arguments:
            tensors = [
                p for p in arguments.values() if p < len(nodes) and isinstance(nodes[p].meta.get("val"), torch.Tensor)
            ]
            latents = max(tensors, key=lambda p: nodes[p].meta["val"].ndim, default=None)
        return InputPositions(timestep, latents, None)


def _geometry_of(trace: Trace, latents: int | None, given: Geometry | None) -> tuple[Geometry | None, str]:
    """How a graph's tokens lie, from the graph alone, or whether they do so."""
    from ditopt.profiler.find_geometry import find_geometry  # it is seldom needed

    return find_geometry(trace, latents, given=given)


@functools.cache  # a model compiled again, for another resolution say, is not told twice
def _say_dense(structure: str, network: str, folder: Path) -> None:
    log.warning(
        "no plan for this model (structure %s, network %s) in %s: compiled dense; make one with `ditopt optimize`",
        structure,
        network,
        folder,
    )


@functools.cache
def _say_stored(path: Path, figures: str) -> None:
    log.warning(
        "this model runs by the plan stored in %s, made for %s; to run dense delete the file or pass "
        'options={"plan": None}',
        path,
        figures,
    )


def _figures(plan: Plan, network: str) -> str:
    sampler, psnr = plan.sampler, plan.measured.get("psnr")
    quality = "" if psnr is None else f", measured at {psnr} dB PSNR"
    return f"{len(sampler.timesteps[network])} steps of {sampler.class_name}, guidance {sampler.guidance}{quality}"


def check_model(plan: Plan, trace: Trace) -> None:
    """Refuse a plan that was made for another model.

    Raises:
        PlanMismatchError: the hash of parameter names and shapes differs.
    """
    if plan.is_exact:  # it is right for every model
        return
    if plan.breaks and not trace.blocks:  # what lies between graph breaks belongs to no decision
        return
    if trace.structure not in plan.model.structure.split():
        raise PlanMismatchError(
            f"plan was made for {plan.model.class_name} with structure {plan.model.structure} and {plan.model.blocks} "
            f"blocks; this model has structure {trace.structure} and {len(trace.blocks)} blocks. Make a plan for it "
            "with `ditopt optimize`"
        )


def _boxed(program: Program) -> BoxedCallable:
    def run(arguments: list[Any]) -> Sequence[Any]:
        values = list(arguments)
        arguments.clear()
        return program(values)

    return run


def ditopt_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend that ``torch.compile`` calls, once per captured graph."""
    if mode not in (None, "default"):
        warnings.warn(
            f"mode={mode!r} is ignored by the ditopt backend; its options are {', '.join(OPTIONS)}", stacklevel=2
        )
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs):
        log.info(
            "ditopt compiles for inference: no gradients are recorded; call the model under torch.no_grad() to say so"
        )
    return Session.from_options(options).compile(gm, example_inputs)
