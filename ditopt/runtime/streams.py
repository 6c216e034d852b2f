"""Which stream a call belongs to: one guidance branch of one prompt, schedule and network in one thread.

A stream is told by objects, and lives no longer than any of them: the conditioning tensor, the tensor that timesteps
are views of, a weight of the network, the thread, and what a caller says with ``Generation``.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ditopt.errors import InputError

S = TypeVar("S")
_Key = tuple[int, str, str | None, tuple[int, ...]]
_Refs = tuple[weakref.ref[object], ...]


@dataclass(frozen=True, slots=True)
class Stream:
    """A stream as reports name it.

    Attributes:
        thread: ``threading.get_ident()`` of its calls.
        network: for example ``transformer`` or ``transformer_2``.
        branch: the context name if there is one, else ``branch0``, ``branch1``, ...: the smallest number that no living
            unnamed stream of the same thread and network has. It is for people: two generations that live at the same
            time may both have a ``cond``, and numbers shift while the tensors of an earlier generation are alive.
    """

    thread: int
    network: str
    branch: str


@dataclass(frozen=True, slots=True)
class StreamCounts:
    """How many streams there are and what became of the others."""

    created: int
    live: int
    died: int
    evicted: int


class _Entry(Generic[S]):
    __slots__ = ("number", "refs", "state", "stream")

    def __init__(self, stream: Stream, number: int | None, refs: _Refs, state: S) -> None:
        self.stream = stream
        self.number = number
        self.refs = refs
        self.state = state

    def is_of(self, owners: tuple[object, ...]) -> bool:
        return all(ref() is owner for ref, owner in zip(self.refs, owners, strict=True))


class StreamTable(Generic[S]):
    """The state of every living stream, found by the *identity* of the conditioning object.

    A pipeline passes one and the same conditioning tensor at every step of a branch, and another one for another
    branch, prompt or generation. The table holds it weakly: with the tensor its state goes, and a new tensor at the
    same address is a new stream. Where branches share one object, their names tell them apart. Streams without such an
    object are told apart by thread, network and name alone, so that two unnamed ones in one thread share a state; a
    bounded number of them is held, least recently used out first.
    Thread-safe; a lookup takes about a microsecond.

    Args:
        factory: makes the state of a new stream; runs under the table's lock, so that it must not use the table. The
            state must not hold the conditioning object, which would then never die.
        limit: how many streams without conditioning object are held.
    """

    def __init__(self, factory: Callable[[], S], *, limit: int = 16) -> None:
        if limit < 1:
            raise InputError(f"limit={limit}: a stream table has to hold at least one stream; the default is 16")
        self._factory = factory
        self._limit = limit
        self._lock = threading.Lock()
        self._dead: deque[tuple[_Key, weakref.ref[object]]] = deque()
        self._owned: dict[_Key, _Entry[S]] = {}
        self._loose: OrderedDict[_Key, _Entry[S]] = OrderedDict()
        self._created = 0
        self._evicted = 0
        self._cleared = 0

    def get(self, thread: int, network: str, identity: object | None, name: str | None, *owners: object | None) -> S:
        """The state of the stream, made if it is new.

        Args:
            thread: ``threading.get_ident()`` of the caller.
            network: which network is called.
            identity: the conditioning object that all calls of the stream share; None if there is none.
            name: the context name, if one is set.
            owners: further objects that all calls of the stream share, always as many; None where there is none.

        Raises:
            InputError: ``identity`` is of a type that cannot be referenced weakly (a number, a list).
        """
        told = (identity, *owners)
        key = (thread, network, name, tuple(0 if each is None else id(each) for each in told))
        alive = tuple(each for each in told if each is not None)
        with self._lock:
            state = self._find(key, alive, identity is None)
        if self._dead:
            self._bury()
        return state

    def _find(self, key: _Key, alive: tuple[object, ...], loose: bool) -> S:
        entry = (self._loose if loose else self._owned).get(key)
        if entry is None or not entry.is_of(alive):
            return self._create(key, alive, loose)
        if loose:
            self._loose.move_to_end(key)
        return entry.state

    def _create(self, key: _Key, alive: tuple[object, ...], loose: bool) -> S:
        refs = self._watch(key, alive)
        thread, network, name, _ = key
        number = None if name is not None else self._free_number(thread, network)
        stream = Stream(thread, network, name if name is not None else f"branch{number}")
        (self._loose if loose else self._owned)[key] = entry = _Entry(stream, number, refs, self._factory())
        self._created += 1
        if loose and len(self._loose) > self._limit:
            self._loose.popitem(last=False)
            self._evicted += 1
        return entry.state

    def _watch(self, key: _Key, alive: tuple[object, ...]) -> _Refs:
        gone = functools.partial(_forget, weakref.ref(self), key)
        try:
            return tuple(weakref.ref(each, gone) for each in alive)
        except TypeError:
            raise InputError(
                f"conditioning of type {type(alive[0]).__name__} cannot tell generations apart; name an argument of "
                "the forward that is a tensor in the plan's inputs.identity, or none"
            ) from None

    def _free_number(self, thread: int, network: str) -> int:
        taken = {
            entry.number
            for entry in (*self._owned.values(), *self._loose.values())
            if entry.stream.thread == thread and entry.stream.network == network
        }
        return next(number for number in range(len(taken) + 1) if number not in taken)

    def live(self) -> tuple[Stream, ...]:
        """The living streams, oldest first among those with and then among those without conditioning object."""
        with self._exclusive():
            return tuple(entry.stream for entry in (*self._owned.values(), *self._loose.values()))

    @property
    def counts(self) -> StreamCounts:
        """Streams created, living, gone with their conditioning object, and evicted by the limit."""
        with self._exclusive():
            live = len(self._owned) + len(self._loose)
            died = self._created - self._cleared - self._evicted - live
            return StreamCounts(self._created, live, died, self._evicted)

    def clear(self) -> None:
        """Forget all streams and free their states; the next calls make new ones."""
        with self._exclusive():
            self._cleared += len(self._owned) + len(self._loose)
            self._owned.clear()
            self._loose.clear()

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        self._bury()
        with self._lock:
            yield
        self._bury()

    def _died(self, key: _Key, ref: weakref.ref[object]) -> None:
        # The collector calls this at any time in any thread, also inside get(). It must not wait for the lock (two
        # tables could wait for each other); if the lock is taken, its holder buries on letting go.
        self._dead.append((key, ref))
        self._bury()

    def _bury(self) -> None:
        while self._dead and self._lock.acquire(blocking=False):
            entry = None
            try:
                key, ref = self._dead.popleft()
                for table in (self._owned, self._loose):
                    entry = table.get(key)
                    if entry is not None and any(each is ref for each in entry.refs):
                        del table[key]
            except IndexError:
                pass  # another thread was faster
            finally:
                self._lock.release()


def _forget(table_ref: weakref.ref[StreamTable[Any]], key: _Key, ref: weakref.ref[object]) -> None:
    table = table_ref()
    if table is not None:
        table._died(key, ref)


class _Thread(threading.local):
    """An object of each thread's own, which goes with it; another thread may be given the number of one that ended."""

    def __init__(self) -> None:
        self.token = _Token()


class _Token:
    __slots__ = ("__weakref__",)


_thread = _Thread()


def this_thread() -> object:
    """An object that stands for the calling thread, and ends with it."""
    return _thread.token


_generation: ContextVar[Generation | None] = ContextVar("ditopt_generation", default=None)


class Generation:
    """Says that calls of networks belong to one generation, where nothing else does; what it kept goes with it.

    A loop that makes its timesteps anew for each call, with one conditioning tensor for several generations in one
    thread, may give a generation up and begin the next exactly where that one would have gone on: no call tells then.

    >>> one, other = Generation(), Generation()
    >>> with one:  # calls of the one; with other: calls of the other, in any order
    ...     pass
    """

    def __init__(self) -> None:
        self._outer: list[Token[Generation | None]] = []

    def __enter__(self) -> Generation:
        self._outer.append(_generation.set(self))
        return self

    def __exit__(self, *_: object) -> None:
        _generation.reset(self._outer.pop())


def current_generation() -> Generation | None:
    """The innermost ``Generation`` that is entered; None outside of any."""
    return _generation.get()


class _OpenContext(threading.local):
    """The name of the innermost ``cache_context`` that is open in this thread."""

    name: str | None = None


_open = _OpenContext()
_WATCHED = "_ditopt_watches"


def watch_contexts() -> bool:
    """Make the names readable that diffusers' models are called under; False while diffusers has loaded no model.

    ``model.cache_context(name)`` tells its name to caching hooks only and keeps it nowhere, so the method that all
    models of diffusers share is wrapped, once in a process; diffusers itself is not imported for it, and no module is
    changed. Importing this module does it, and so do adapters and programs when they are made. What was entered before
    has no name: at worst (the backend was imported before diffusers) that is one call of a process, the one that is
    captured; its branch then has a shorter history in that generation and computes where it lacks one.
    """
    mixin: Any = getattr(sys.modules.get("diffusers.models.cache_utils"), "CacheMixin", None)
    if not hasattr(mixin, "cache_context"):
        return False
    if not hasattr(mixin.cache_context, _WATCHED):
        mixin.cache_context = _noting(mixin.cache_context)
    return True


def _noting(cache_context: Callable[..., Any]) -> Callable[..., Any]:
    """``cache_context`` that notes its name for the thread while it is open."""

    @functools.wraps(cache_context)
    @contextmanager
    def noting(self: object, name: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
        outer, _open.name = _open.name, name
        try:
            with cache_context(self, name, *args, **kwargs) as value:
                yield value
        finally:
            _open.name = outer

    setattr(noting, _WATCHED, True)
    return noting


def current_context_name() -> str | None:
    """The name of the ``cache_context`` in which this thread calls a network; None outside of any.

    The innermost open one counts, whichever module it was opened on: a loop opens one around a call, and calls to
    another network within it (a control network) belong to the same branch. See ``watch_contexts`` for which are seen.
    """
    return _open.name


watch_contexts()  # `torch.compile(model, backend="ditopt")` imports this: later than the model, before its first call
