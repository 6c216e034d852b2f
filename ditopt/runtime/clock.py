"""Which step of the schedule a call is: from the timestep's value and the order of calls, never from call parity."""

from __future__ import annotations

import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ditopt.errors import PlanError, PlanMismatchError

NEXT = "next step"
START = "first step of a generation"

# A value rounded to p significand bits is less than 2**-p from the exact one (relative to the larger), while two
# different p-bit numbers are at least 2**-p apart: `<` accepts every rounding and mixes up no two rounded values.
_SIGNIFICAND_BITS = (8, 11)  # bfloat16, float16


@dataclass(frozen=True, slots=True)
class Tick:
    """What one call is.

    Attributes:
        step: index into the schedule; None if the value is not in it (the call has to run dense).
        fresh: the first planned step of a generation: whatever the stream remembers is stale.
        reason: why, for people; names the value and the nearest known one where ``step`` is None.
        skipped: planned steps between the previous one of this stream and this one that were not called. Above zero
            the remembered features have a hole (a guidance interval, a subset of the steps, or, undetectably, another
            generation that starts later in the schedule): do not predict from them.
    """

    step: int | None
    fresh: bool
    reason: str
    skipped: int = 0


class StepClock:
    """The cursor of one stream (one guidance branch of one generation in one network) in its network's schedule.

    A value is looked for, in this order, at the expected next step, at the nearest later step (a jump), and anywhere
    (a new generation, which may start in the middle as image-to-image does). Hence a value that is both the expected
    one and the first of the schedule continues the generation (``[t0, t0, t1]``), until the schedule is used up; then
    it starts a new one (also with a schedule of one step). A new generation that starts in the middle at a repeated
    value (Heun's ``[t0, t1, t1, t2, t2]``) starts at the last of the repeats, where Heun's own steps start.

    Args:
        timesteps: values of the network's evaluations for one branch in call order, in the unit that the network gets
            (0..1000 or 0..1, int or float, falling or rising).
        tolerance: largest difference, in units of the largest value, at which two values are the same. A value
            that bfloat16 or float16 can hold exactly is, beyond that, taken for a rounding of a planned value.

    Raises:
        PlanError: no timesteps, or one that is not finite.
    """

    __slots__ = ("_absolute", "_direction", "_expected", "_last", "timesteps")

    def __init__(self, timesteps: Sequence[float], *, tolerance: float = 1e-5) -> None:
        self.timesteps = tuple(float(value) for value in timesteps)
        if not self.timesteps:
            raise PlanError("a schedule has no timesteps; a plan needs at least one per network")
        for index, value in enumerate(self.timesteps):
            if not math.isfinite(value):
                raise PlanError(f"timestep {index} of a schedule is {value}; all have to be finite")
        self._absolute = tolerance * max(abs(value) for value in self.timesteps)
        self._direction = 1.0 if self.timesteps[-1] > self.timesteps[0] else -1.0
        self.reset()

    def reset(self) -> None:
        """Forget the generation: the next planned value is fresh."""
        self._expected: int | None = None
        self._last: float | None = None

    @property
    def expected(self) -> int | None:
        """The step that should come next; None before a generation's first and after the schedule's last step."""
        return self._expected

    def expects(self, value: float) -> bool:
        """Whether ``value`` is that of the step that should come next."""
        return self._expected is not None and self._same(value, self.timesteps[self._expected], _rounding(value))

    def knows(self, value: float) -> bool:
        """Whether some step has ``value``."""
        return self._find(value, range(len(self.timesteps)), _rounding(value)) is not None

    def tick(self, value: float) -> Tick:
        """Say which step a call with timestep ``value`` is, and move on."""
        last, self._last = self._last, value
        expected, known = self._expected, self.timesteps
        rounding = _rounding(value)
        if expected is not None:
            if self.expects(value):
                self._expect_after(expected)
                return Tick(expected, False, NEXT)
            later = self._find(value, range(expected + 1, len(known)), rounding)
            if later is not None:
                self._expect_after(later)
                return Tick(later, False, f"jumped from step {expected} to step {later}", later - expected)
        step = self._find(value, range(len(known)), rounding)
        if step is None:
            return self._unknown(value, last)
        if step:
            while step + 1 < len(known) and known[step + 1] == known[step]:
                step += 1
        broken = f"; the one before stopped ahead of step {expected}" if expected is not None else ""
        self._expect_after(step)
        if step == 0 and not broken:
            return Tick(0, True, START)
        where = f", which starts at step {step} of {len(known)}" if step else ""
        return Tick(step, True, f"{START}{where}{broken}")

    def _expect_after(self, step: int) -> None:
        self._expected = step + 1 if step + 1 < len(self.timesteps) else None

    def _same(self, value: float, known: float, rounding: float) -> bool:
        gap = abs(value - known)
        return gap <= self._absolute or gap < rounding * max(abs(value), abs(known))

    def _find(self, value: float, indices: Iterable[int], rounding: float) -> int | None:
        """The first index with the value itself, else the first of which the value may be a rounding."""
        rounded = None
        for index in indices:
            gap = abs(value - self.timesteps[index])
            if gap <= self._absolute:
                return index
            if rounded is None and gap < rounding * max(abs(value), abs(self.timesteps[index])):
                rounded = index
        return rounded

    def _unknown(self, value: float, last: float | None) -> Tick:
        if last is not None and (value - last) * self._direction < 0:
            self._expected = None  # time ran backwards: another generation, which must not go on with this one's state
        nearest = min(range(len(self.timesteps)), key=lambda index: abs(self.timesteps[index] - value))
        return Tick(
            None,
            False,
            f"timestep {value:.9g} is not among the {len(self.timesteps)} planned ones, nearest is "
            f"{self.timesteps[nearest]:.9g} (step {nearest}); was the plan made for another step count or scheduler?",
        )


def _rounding(value: float) -> float:
    """Relative error that ``value`` may carry, judged by how few significand bits it needs; 0 for full precision."""
    if not math.isfinite(value):
        return 0.0
    significand = abs(math.frexp(value)[0])
    for bits in _SIGNIFICAND_BITS:
        if (significand * 2.0**bits).is_integer():
            return float(2.0**-bits)
    return 0.0


@dataclass(frozen=True, eq=False)
class Schedule:
    """The tensor that a loop takes its timesteps from: its storage, which tells it from any other, and its values."""

    storage: torch.UntypedStorage
    values: tuple[float, ...]

    def follows(self, last: float, value: float) -> bool:
        """Whether ``value`` stands right behind ``last`` somewhere."""
        return (last, value) in zip(self.values, self.values[1:], strict=False)


class ScheduleCache:
    """The schedules that loops take timesteps from, with copies on the host, so that no step waits to be read.

    Pipelines iterate over ``scheduler.timesteps`` and pass views of it (``t``, ``t.expand(B)``). All those views share
    one storage, and ``storage_offset`` says which element they are. The storage is copied to the host at its first
    view: one wait per generation. A copy refers to its storage weakly, and is made anew when the tensor was written to
    (``Tensor._version``; writes through ``.data`` are not seen). Thread-safe.

    Args:
        limit: how many schedules are known; the least recently used goes first.
        max_bytes: larger storages are not schedules.
    """

    def __init__(self, limit: int = 8, max_bytes: int = 64 * 1024) -> None:
        self._limit = limit
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._copies: OrderedDict[
            tuple[str, int, torch.dtype], tuple[weakref.ref[torch.UntypedStorage], int, tuple[float, ...]]
        ] = OrderedDict()
        self.reads = 0

    def of(self, timestep: torch.Tensor) -> Schedule | None:
        """The schedule that ``timestep`` (one element, possibly expanded) is of; None if it is no view of a small one.

        Tensors made in inference mode have no version and give None on an accelerator, and so does what holds one value
        only, once or many times.
        """
        if _distinct(timestep).numel() != 1:
            return None
        storage = timestep.untyped_storage()
        size = storage.nbytes()
        if not timestep.element_size() < size <= self._max_bytes:
            return None
        whole = timestep.detach().as_strided((size // timestep.element_size(),), (1,), 0)
        if timestep.is_inference():
            values = None if timestep.device.type != "cpu" else tuple(float(value) for value in whole.tolist())
        else:
            values = self._copied(storage, timestep._version, whole)
        return None if values is None or len(set(values)) == 1 else Schedule(storage, values)

    def _copied(self, storage: torch.UntypedStorage, version: int, whole: torch.Tensor) -> tuple[float, ...]:
        key = (str(whole.device), storage.data_ptr(), whole.dtype)
        with self._lock:
            copy = self._copies.get(key)
            if copy is None or copy[0]() is not storage or copy[1] != version:
                copy = (weakref.ref(storage), version, tuple(float(value) for value in whole.tolist()))
                self._copies[key] = copy
                self.reads += 1
                if len(self._copies) > self._limit:
                    self._copies.popitem(last=False)
            self._copies.move_to_end(key)
            return copy[2]

    def value(self, timestep: torch.Tensor) -> float | None:
        """The value of ``timestep``, by the schedule that it is of; None if it is of none with a version."""
        schedule = None if timestep.is_inference() else self.of(timestep)
        return None if schedule is None else schedule.values[timestep.storage_offset()]


def read_timestep(timestep: torch.Tensor | float, schedules: ScheduleCache | None = None) -> float:
    """The one timestep value of a call, on the host.

    A tensor on the host is read. One on an accelerator is looked up in ``schedules``; where that does not know it (a
    computed timestep such as ``t / 1000``, or ``t.to(dtype)``), it is read from the device, which waits for the work
    queued before it, once a call. Expanded tensors are read at their distinct elements only.

    Args:
        timestep: ``[]``, ``[B]``, ``[B, S]``, ... of any real dtype; or a number.
        schedules: host copies of schedules; used for accelerator tensors only.

    Raises:
        PlanMismatchError: no elements, or different values in one call (one timestep per sample or token).
    """
    if not isinstance(timestep, torch.Tensor):
        return float(timestep)
    if schedules is not None and timestep.device.type != "cpu":
        value = schedules.value(timestep)
        if value is not None:
            return value
    distinct = _distinct(timestep.detach())
    if distinct.numel() == 1:
        return float(distinct.item())
    if distinct.numel() == 0:
        raise PlanMismatchError(
            f"the timestep of shape {list(timestep.shape)} has no elements; pass one value per call"
        )
    low, high = torch.stack(torch.aminmax(distinct)).tolist()
    if low != high:
        raise PlanMismatchError(
            f"the timestep of shape {list(timestep.shape)} holds different values in one call ({low:g} to {high:g}), "
            "but a plan decides for a whole call: call the network once per value, or compile it without ditopt"
        )
    return float(low)


def _distinct(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` without its expanded and unit dimensions."""
    for dim in reversed(range(tensor.dim())):
        if tensor.size(dim) == 1 or (tensor.stride(dim) == 0 and tensor.size(dim) > 1):
            tensor = tensor.select(dim, 0)
    return tensor
