"""The program: a captured network under a plan. Picks the variant of the current step and moves state slots."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditopt.errors import DitoptError, PlanMismatchError, StateError
from ditopt.passes._infra import StepPlan
from ditopt.passes.combine import factors_name, slot_name
from ditopt.passes.second_order import SECOND_ORDER
from ditopt.plan import Plan
from ditopt.runtime.clock import Schedule, ScheduleCache, StepClock, read_timestep
from ditopt.runtime.generations import Generations
from ditopt.runtime.kept import KeptRead, kept_inputs
from ditopt.runtime.moment import Moment, Place, announce, take
from ditopt.runtime.prologue import Coming, Prologues
from ditopt.runtime.schedule import BoundPlan, BoundPrediction, BoundSecondOrder, adapted_factors, bind
from ditopt.runtime.slots import StreamState
from ditopt.runtime.sparse import AttentionSites, FindGeometry, not_looked_for, places_of
from ditopt.runtime.stamps import Ingredients
from ditopt.runtime.streams import (
    StreamTable,
    current_context_name,
    current_generation,
    this_thread,
    watch_contexts,
)
from ditopt.runtime.variants import Variant, VariantCache
from ditopt.sites import STEP

log = logging.getLogger("ditopt")

Observer = Callable[["Observation"], None]
Compute = Callable[[list[Any]], Sequence[Any]]
Interceptor = Callable[[list[Any], Compute], Sequence[Any]]
"""Stands before a network while it is measured: given a call's arguments and the program, it answers the call."""
MISMATCH = ("error", "dense", "retarget")
FACTORS = 256
"""So many tensors of factors are kept for later steps."""
WAYS_OUT = (
    're-target the plan (options={"on_mismatch": "retarget"}) or run such calls dense '
    '(options={"on_mismatch": "dense"})'
)


@dataclass(frozen=True)
class Observation:
    """One call of a network while it is profiled: its inputs by position, outputs and stream boundaries."""

    arguments: Sequence[Any]
    outputs: Sequence[Any]
    boundaries: Sequence[Tensor]


def copied(outputs: Sequence[Any]) -> tuple[Any, ...]:
    """A call's outputs to keep and play back: the caller may write into what it was given."""
    return tuple(out.clone() if isinstance(out, Tensor) else out for out in outputs)


@dataclass(frozen=True)
class InputPositions:
    """Where the arguments that matter stand among a graph's inputs (None: not there).

    ``own`` are what the module itself has beside parameters and buffers.
    """

    timestep: int | None
    latents: int | None
    identity: int | None
    own: tuple[int, ...] = ()


@dataclass
class Statistics:
    """What a program has counted since it was made."""

    calls: int = 0
    predicted_calls: int = 0
    cold_calls: int = 0
    unplanned_calls: int = 0
    peak_slot_bytes: int = 0
    generations: int = 0


@dataclass
class Program:
    """What Dynamo calls for one captured graph: boxed inputs in, outputs out.

    Without a plan it runs the dense graph. State belongs to one guidance branch of one generation, so that concurrent,
    interleaved and aborted generations never meet. A stream is told by the conditioning object, the tensor that
    timesteps are views of, a weight, the thread, and the name of diffusers' ``cache_context`` that this is in
    (``watch_contexts`` says when names are seen); generations that share all of that are told by their latents
    (``Generations``). A plan whose branches only names tell apart (``Inputs.contexts``) refuses calls in none.

    Where graph breaks cut the network, the program that the plan names as the clock finds stream and step;
    those of the other graphs follow it, and keep their features in its streams.

    ``stored`` is the file of a plan that nobody named: the log says once that it does not fit a call.
    ``find_geometry`` says how tokens lie where a plan with sparse attention does not.
    """

    variants: VariantCache
    positions: InputPositions
    network: str = "transformer"
    on_mismatch: str = "error"
    bound: BoundPlan | None = None
    plan: Plan | None = None
    error: DitoptError | None = None
    observer: Observer | None = None
    interceptor: Interceptor | None = None
    on_generation: Callable[[], None] | None = None
    stored: Path | None = None
    find_geometry: FindGeometry = not_looked_for
    statistics: Statistics = field(default_factory=Statistics)

    def __post_init__(self) -> None:
        watch_contexts()
        self._streams: StreamTable[Generations] = StreamTable(self._new_stream)
        self._states: weakref.WeakSet[StreamState] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._schedules = ScheduleCache()
        self._weights = sorted(self.variants.trace.state_names.values())
        self._made_of = Ingredients(self.variants.trace.placeholders, (*self._weights, *self.positions.own))
        self._factors: dict[tuple[float, ...], Tensor] = {}
        self._prologues = Prologues(Coming(()))
        self._clock: str | None = None
        self._leads = False
        self._told = self._told_dense = False

    def bind(self, plan: Plan | None) -> None:
        """Run by ``plan`` from now on (None: dense); all state is dropped.

        Raises:
            PlanMismatchError: the plan does not fit this network.
        """
        self._streams.clear()
        self._factors.clear()
        self.statistics.peak_slot_bytes = 0
        self.error = None
        self.plan, self.bound = plan, None
        self._clock, self._leads = None, False
        self._prologues = Prologues(Coming(() if plan is None else plan.sampler.timesteps.get(self.network, ())))
        if plan is None or not plan.rules:
            return
        breaks = plan.breaks.get(self.network)
        if breaks is not None:
            self._clock = breaks.clock
            self._leads = self.positions.timestep is not None and breaks.clock == self.variants.trace.structure
            if not self._leads:
                self.bound = self.resolve(plan)
                return
        if self.positions.timestep is None:
            names = ", ".join(self.variants.trace.arguments)
            raise PlanMismatchError(
                f"plan tells steps by the argument {plan.inputs.timestep!r}, but the captured graph's tensor "
                "arguments are "
                f"{names}; pass the timestep as a tensor under that name"
            )
        if plan.inputs.identity is not None and self.positions.identity is None:
            names = ", ".join(self.variants.trace.arguments)
            raise PlanMismatchError(
                f"plan tells generations apart by the argument {plan.inputs.identity!r}, but the captured "
                "graph's tensor "
                f"arguments are {names}; without it guidance branches would share their state"
            )
        self.bound = self.resolve(plan)
        self.variants.reasons += [note for note in self.bound.notes if note not in self.variants.reasons]

    def resolve(self, plan: Plan) -> BoundPlan:
        """What a plan's rules come to in this graph; nothing is changed.

        Raises:
            PlanMismatchError: the plan does not fit this network.
        """
        ranges, partial = self.variants.trace.ranges(), self.network in plan.breaks
        sites = AttentionSites(places_of(self.variants.trace), self.find_geometry, self.on_mismatch == "retarget")
        components = {} if partial else self.variants.components
        return bind(plan, self.network, ranges, partial=partial, attention=sites, components=components)

    def compile(self) -> None:
        """Compile every variant that the plan needs."""
        for plan in self.bound.variants if self.bound else (StepPlan(),):
            self.variants.get(plan)

    def computed_ahead(self, variant: Variant, arguments: Sequence[Any]) -> dict[str, Tensor]:
        """What a variant reads of its prologues, for a call with ``arguments`` that belongs to no generation."""
        if not variant.prologues:
            return {}
        assert self.positions.timestep is not None
        value = read_timestep(arguments[self.positions.timestep])
        return Prologues(Coming(())).inputs(variant.prologues, arguments, {}, value)

    def __call__(self, arguments: list[Any]) -> Sequence[Any]:
        """Run one call: ``arguments`` are the captured graph's inputs in order.

        Raises:
            PlanMismatchError: the plan does not fit the model, the call's timestep or its geometry.
        """
        if self.error is not None:
            raise self.error
        self.statistics.calls += 1
        if self.interceptor is not None:
            return self.interceptor(arguments, self._answer)
        return self._answer(arguments)

    def _answer(self, arguments: list[Any]) -> Sequence[Any]:
        if self.observer is not None:
            return self._observe(arguments, self.observer)
        if self.bound is None:
            return self._run(self.variants.get(StepPlan()), arguments, {})[0]
        if self._clock is not None and not self._leads:
            return self._follow(arguments, self.bound)
        if self.plan is not None and self.plan.is_exact and self.bound.full.hoist:
            return self._exact(arguments, self.bound)
        return self._step(arguments, self.bound)

    def _new_stream(self) -> Generations:
        return Generations(self._new_generation)

    def _new_generation(self) -> StreamState:
        assert self.plan is not None
        state = StreamState(StepClock(self.plan.sampler.timesteps[self.network]))
        with self._lock:
            self.statistics.generations += 1
            self._states.add(state)
        return state

    def _stream(self, arguments: Sequence[Any], name: str | None, schedule: Schedule | None) -> Generations:
        """The stream that a call in the context ``name`` belongs to, by all that tells it."""
        identity = arguments[self.positions.identity] if self.positions.identity is not None else None
        weight = arguments[self._weights[0]] if self._weights else None  # models of one class may share this program
        told = current_generation(), this_thread(), weight, None if schedule is None else schedule.storage
        return self._streams.get(threading.get_ident(), self.network, identity, name, *told)

    def _exact(self, arguments: list[Any], bound: BoundPlan) -> Sequence[Any]:
        """Run any call, of whatever schedule and geometry, with what can be computed ahead of it."""
        assert self.positions.timestep is not None
        timestep = arguments[self.positions.timestep]
        try:
            value = read_timestep(timestep, self._schedules)
        except PlanMismatchError as error:
            return self._unplanned(arguments, str(error))
        stream = self._stream(arguments, current_context_name(), self._schedules.of(timestep))
        state = stream.newest or stream.of(None, lambda _: False)
        if bound.begins_again(state.first_value, state.last_value, value):
            state.reset()
            state.first_value = value
        state.last_value = value
        self._share(state, arguments)
        variant, hoisted = self._ahead(bound.full, arguments, state)
        return self._run(variant, arguments, hoisted)[0]

    def _ahead(self, does: StepPlan, arguments: Sequence[Any], state: StreamState) -> tuple[Variant, dict[str, Tensor]]:
        """The variant of a call, and what it reads of what is computed ahead."""
        assert state.last_value is not None
        return self._prologues.ahead(self.variants, does, arguments, state.hoisted, state.last_value)

    def _share(self, state: StreamState, arguments: Sequence[Any]) -> None:
        """Let a stream that begins a generation share with others that begin it with the same latents."""
        if state.begun:
            state.begun = False
            self._prologues.begin(None if self.positions.latents is None else arguments[self.positions.latents])
        else:
            self._prologues.goes_on()

    def _step(self, arguments: list[Any], bound: BoundPlan) -> Sequence[Any]:
        state, place = self._place(arguments, bound)
        if self._leads and self._clock is not None:
            announce(Moment(self._clock, weakref.ref(self), weakref.ref(state), place))
        if isinstance(place, str):
            return self._unplanned(arguments, place)
        return self._run_step(arguments, bound, state, *place, self)

    def _follow(self, arguments: list[Any], bound: BoundPlan) -> Sequence[Any]:
        """Run the graph in the step that the leading graph of the same forward found."""
        if not bound.full.recorded:  # no rule is for a site of this graph
            return self._run(self.variants.get(StepPlan()), arguments, {})[0]
        assert self._clock is not None
        moment = take(self._clock, id(self))
        leader, state = (moment.leader(), moment.state()) if moment is not None else (None, None)
        if moment is None or leader is None or state is None:
            return self._unplanned(
                arguments,
                "a graph behind a graph break ran without the one before it that tells the step; call the whole model, "
                'compiled under one plan, or run such calls dense (options={"on_mismatch": "dense"})',
            )
        if isinstance(moment.place, str):
            return self._unplanned(arguments, moment.place)
        return self._run_step(arguments, bound, state, *moment.place, leader)

    def _place(self, arguments: list[Any], bound: BoundPlan) -> tuple[StreamState, Place]:
        """The stream of a call with its planned step and sigma, or why it has none."""
        assert self.positions.timestep is not None and self.plan is not None
        timestep, name = arguments[self.positions.timestep], current_context_name()
        value, schedule = read_timestep(timestep, self._schedules), self._schedules.of(timestep)
        stream = self._stream(arguments, name, schedule)
        latents = None if self.positions.latents is None else arguments[self.positions.latents]
        state = self._of_stream(stream, bound, latents, value, schedule)
        if name is None and self.plan.inputs.contexts and state.last_value is not None:  # a lone call shares nothing
            return state, (
                f"plan tells guidance branches apart by the contexts {', '.join(self.plan.inputs.contexts)}, and this "
                "call is in none: call each branch inside model.cache_context(name)"
            )
        other = self._other_geometry(arguments, self.plan)
        if other is not None:
            return state, f"{other}. Generate at this size, {WAYS_OUT}"
        place = self._locate(state, bound, value)
        if state.clock.expected is None:
            stream.end(state)
        self._share(state, arguments)
        if isinstance(place, str):
            sampler = self.plan.sampler
            return state, (
                f"{place}; the plan is for {len(sampler.timesteps[self.network])} steps of {sampler.class_name}. "
                f"Generate with these, {WAYS_OUT}"
            )
        return state, place

    def _of_stream(
        self, stream: Generations, bound: BoundPlan, latents: Tensor | None, value: float, schedule: Schedule | None
    ) -> StreamState:
        """The generation that a call belongs to; a new one where none waits for it."""
        newest = stream.newest
        if newest is not None and self.on_mismatch != "retarget" and not newest.clock.knows(value):
            return newest
        return stream.of(latents, lambda state: self._waits(state, bound, value, schedule))

    def _waits(self, state: StreamState, bound: BoundPlan, value: float, schedule: Schedule | None) -> bool:
        """Whether a generation may go on with a call at timestep ``value``: a hole in its history is as good as none.

        Re-targeted, what comes next is told by the loop's own ``schedule``. Where that is not seen, values that are
        not planned follow each other, and planned ones, as long as time goes on.
        """
        last, clock = state.last_value, state.clock
        if last is None or clock.expects(value) or self.on_mismatch != "retarget":
            return last is not None and clock.expects(value)
        if schedule is not None:
            return schedule.follows(last, value)
        return value != last and not bound.begins_anew(last, value) and not (clock.knows(last) and clock.knows(value))

    def _other_geometry(self, arguments: Sequence[Any], plan: Plan) -> str | None:
        """How the call's latents differ in shape from the plan's, if they do; the batch (dimension 0) may."""
        planned = plan.geometry.get(self.network)
        if not planned or self.positions.latents is None or self.on_mismatch == "retarget":
            return None
        shape = tuple(map(int, arguments[self.positions.latents].shape))
        if len(shape) == len(planned) and shape[1:] == planned[1:]:
            return None
        return (
            f"latents have shape {list(shape)}, the plan was made for {list(planned)} (the first dimension, the batch, "
            "may differ)"
        )

    def _run_step(
        self, arguments: list[Any], bound: BoundPlan, state: StreamState, number: int, time: float, owner: Program
    ) -> Sequence[Any]:
        """Run step ``number`` of the plan at sigma ``time``; ``state``, which keeps its features, is ``owner``'s.

        With a call that fails its generation ends: whoever catches that may begin another anywhere.
        """
        if bound.refused is not None:
            raise PlanMismatchError(bound.refused)
        try:
            return self._planned(arguments, bound, state, number, time, owner)
        except BaseException:
            state.end()
            raise

    def _planned(
        self, arguments: list[Any], bound: BoundPlan, state: StreamState, number: int, time: float, owner: Program
    ) -> Sequence[Any]:
        step = bound.steps[number]
        if state.held_bytes and not state.made_of(id(self), self._made_of, arguments):
            state.forget()
        in_turn = state.enter(number)
        added = self._added_inputs(step.predictions, state, bound, number, time)
        kept = kept_inputs(number, step.reads, state, bound.times, any_time=self.on_mismatch == "retarget")
        if isinstance(kept, KeptRead):
            self._tell_dense(number, kept)
        added = None if added is None or isinstance(kept, KeptRead) else {**added, **kept}
        does = bound.full if added is None else step.variant
        if added is None and state.whole and self._clock is None and self.on_mismatch != "retarget":
            raise StateError(
                f"step {number} of the plan reads a slot that is not held, though all steps before it ran: a defect "
                "of ditopt"
            )
        if added is None:
            self.statistics.cold_calls += 1
        elif step.predictions:
            self.statistics.predicted_calls += 1
        if added is not None and step.second_order is not None:
            read = self._second_order_inputs(step.second_order, state, bound, number, time) if in_turn else None
            does, added = (replace(does, second_order=False), added) if read is None else (does, {**added, **read})
        variant, hoisted = self._ahead(does, arguments, state)
        outputs, features = self._run(variant, arguments, {**step.lists, **(added or {}), **hoisted})
        for site, tensors in features.items():
            state.store(site, number, time, tensors)
        owner._note_peak()
        if self.on_mismatch == "retarget" or added is None:  # who will read what is not known any more
            state.retain_newest(bound.depth, bound.full.recorded)
            state.retain_newest(1, bound.kept)
        else:
            own = {*bound.full.recorded, *bound.kept}
            state.retain(lambda site, source: site not in own or (site, source) in step.live)
        state.note(id(self), self._made_of, arguments)
        return outputs

    def _tell_dense(self, number: int, missing: KeptRead) -> None:
        """Say, once, that a step runs dense as what its heads read was not kept."""
        if self._told_dense:
            return
        self._told_dense = True
        log.warning(
            "step %d of the plan runs dense, as do others like it: its heads read the %s of step %d, which was not the "
            "last in this generation to keep any. Generations that begin at a later step, or pass steps over, are "
            "right but slower so (Statistics.cold_calls counts such calls)",
            *(number, missing.slot, missing.source),
        )

    def _note_peak(self) -> None:
        with self._lock:
            held = sum(state.held_bytes for state in self._states)
            self.statistics.peak_slot_bytes = max(self.statistics.peak_slot_bytes, held)

    def _locate(self, state: StreamState, bound: BoundPlan, value: float) -> Place:
        """The planned step of a call and its sigma, or why it is none.

        Re-targeted, a value that is not planned is the nearest planned step, at its own sigma.
        """
        tick = state.clock.tick(value)
        state.last_value = value
        if tick.fresh and self.on_generation is not None:
            self.on_generation()
        if tick.step is not None:
            return tick.step, bound.times[tick.step]
        if self.on_mismatch != "retarget":
            return tick.reason
        self.statistics.unplanned_calls += 1
        return bound.position(value)

    def _added_inputs(
        self, predictions: tuple[BoundPrediction, ...], state: StreamState, bound: BoundPlan, step: int, time: float
    ) -> dict[str, Tensor] | None:
        """Slots and coefficients for a step's predictions; None if this stream lacks the history for one."""
        added: dict[str, Tensor] = {}
        for found in predictions:
            held = state.newest(found.site, found.decision.history)
            factors: tuple[float, ...] | None = found.factors
            planned = [(source, bound.times[source]) for source in found.sources]
            if time != bound.times[step] or planned != [(each.step, each.time) for each in held]:
                refit = self.on_mismatch == "retarget"
                factors = adapted_factors(found.decision, time, [h.time for h in held], bound.times, refit=refit)
            if factors is None:
                return None
            for age in range(found.decision.history):
                for stream, tensor in enumerate(held[min(age, len(held) - 1)].tensors):
                    added[slot_name(found.site, age, stream)] = tensor
            added[factors_name(found.site)] = self._factors_tensor(factors, held[0].tensors[0])
        return added

    def _second_order_inputs(
        self, combined: BoundSecondOrder, state: StreamState, bound: BoundPlan, step: int, time: float
    ) -> dict[str, Tensor] | None:
        """Slots and factors of a computed step; None at other sigmas than planned, or where the one before is not held.

        How far the sampler goes on a step at another sigma is not known, nor where it passes planned steps over.
        """
        planned = (combined.source, bound.times[combined.source])
        if time != bound.times[step] or planned not in [(each.step, each.time) for each in state.newest(STEP)]:
            return None
        held = state.read(STEP, combined.source)
        slots = {slot_name(STEP, 0, stream): tensor for stream, tensor in enumerate(held.tensors)}
        return {**slots, factors_name(SECOND_ORDER): self._factors_tensor(combined.factors, held.tensors[0])}

    def _factors_tensor(self, factors: tuple[float, ...], like: Tensor) -> Tensor:
        found = self._factors.get(factors)
        if found is None or found.device != like.device:
            if len(self._factors) >= FACTORS:  # schedules that nobody planned have factors of their own
                self._factors.clear()
            found = self._factors[factors] = torch.tensor(factors, dtype=torch.float32).to(like.device)
        return found

    def _run(
        self, variant: Variant, arguments: Sequence[Any], added: dict[str, Tensor]
    ) -> tuple[Sequence[Any], dict[str, tuple[Tensor, ...]]]:
        values = [arguments[i] if isinstance(i, int) else added[i] for i in variant.inputs]
        results = variant.run(values)
        outputs = list(results[: variant.user_outputs])
        features: dict[str, tuple[Tensor, ...]] = {}
        at = variant.user_outputs
        for site, count in variant.recorded:
            features[site] = tuple(results[at : at + count])
            at += count
        for site, tensors in features.items():  # the caller may write into what it was given
            features[site] = tuple(t.clone() if any(_shares_memory(t, out) for out in outputs) else t for t in tensors)
        return outputs, features

    def _observe(self, arguments: list[Any], observer: Observer) -> Sequence[Any]:
        variant = self.variants.get(StepPlan(boundaries=bool(self.variants.trace.boundaries)))
        values = [arguments[i] for i in variant.inputs if isinstance(i, int)]
        results = variant.run(values)
        outputs = list(results[: variant.user_outputs])
        observer(Observation(arguments, outputs, results[variant.user_outputs :]))
        return outputs

    def _unplanned(self, arguments: list[Any], complaint: str) -> Sequence[Any]:
        if self.on_mismatch == "error":
            raise PlanMismatchError(complaint)
        if self.stored is not None and not self._told:
            self._told = True
            log.warning("the plan stored in %s is not for this call, which runs dense: %s", self.stored, complaint)
        self.statistics.unplanned_calls += 1
        return self._run(self.variants.get(StepPlan()), arguments, {})[0]


def _shares_memory(left: Any, right: Any) -> bool:
    return (
        isinstance(left, Tensor)
        and isinstance(right, Tensor)
        and left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
    )
