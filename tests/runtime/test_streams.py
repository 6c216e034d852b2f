"""Streams and clocks in real sampling loops: guidance, two networks, interleaving, threads, diffusers contexts."""

from __future__ import annotations

import gc
import inspect
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import diffusers as untyped_diffusers
import pytest
import torch
from torch import Tensor, nn

from ditopt._torch import compile_counts
from ditopt.errors import InputError
from ditopt.runtime.clock import StepClock, read_timestep
from ditopt.runtime.streams import Stream, StreamTable, current_context_name, watch_contexts
from tests.tiny import tiny_wan

diffusers: Any = untyped_diffusers

# diffusers hands numpy arrays of tensors around in an old way
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")

STEPS = 6
Call = tuple[int | None, bool]


def flow(steps: int = STEPS) -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    return scheduler


def heun(steps: int = STEPS) -> Any:
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    return scheduler


def unipc(steps: int = STEPS) -> Any:
    scheduler = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    scheduler.set_timesteps(steps)
    return scheduler


@dataclass
class FakeNetwork:
    """Does what a compiled program does with step identity, and writes down (conditioning label, step, fresh)."""

    timesteps: list[float]
    name: str = "transformer"
    table: StreamTable[StepClock] = field(init=False)
    log: list[tuple[str, int | None, bool]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.table = StreamTable(lambda: StepClock(self.timesteps))

    def __call__(self, latents: Tensor, timestep: Tensor, conditioning: Tensor | None, label: str = "") -> Tensor:
        clock = self.table.get(threading.get_ident(), self.name, conditioning, None)
        tick = clock.tick(read_timestep(timestep))
        self.log.append((label, tick.step, tick.fresh))
        return 0.1 * latents

    def calls(self, label: str) -> list[Call]:
        return [(step, fresh) for which, step, fresh in self.log if which == label]


def planned(first: int, stop: int) -> list[Call]:
    """The calls of a generation that runs steps ``first`` to before ``stop``."""
    return [(step, step == first) for step in range(first, stop)]


def loop(
    scheduler: Any, evaluate: Callable[[int, Tensor, Tensor], Tensor], start: int = 0, stop: int | None = None
) -> Iterator[None]:
    """A pipeline's denoising loop that pauses after every step."""
    latents = torch.ones(2, 4, 4)
    if start and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    for index, t in list(enumerate(scheduler.timesteps))[start:stop]:
        prediction = evaluate(index, latents, t.expand(2))
        latents = scheduler.step(prediction, t, latents, return_dict=False)[0]
        yield


def run(*arguments: Any, **options: Any) -> None:
    for _ in loop(*arguments, **options):
        pass


def separate(
    network: FakeNetwork, cond: Tensor, uncond: Tensor, interval: range | None = None
) -> Callable[[int, Tensor, Tensor], Tensor]:
    """Guidance by two calls; the second one only in the evaluations of ``interval``."""

    def evaluate(index: int, latents: Tensor, timestep: Tensor) -> Tensor:
        prediction = network(latents, timestep, cond, "cond")
        if interval is not None and index not in interval:
            return prediction
        empty = network(latents, timestep, uncond, "uncond")
        return empty + 4.0 * (prediction - empty)

    return evaluate


def single(network: FakeNetwork, cond: Tensor | None, label: str = "cond") -> Callable[[int, Tensor, Tensor], Tensor]:
    return lambda index, latents, timestep: network(latents, timestep, cond, label)


@pytest.mark.parametrize("make", [flow, heun, unipc])
class TestOneNetwork:
    def test_batched_guidance(self, make: Callable[[], Any]) -> None:
        network = FakeNetwork(make().timesteps.tolist())

        def batched(index: int, latents: Tensor, timestep: Tensor) -> Tensor:
            doubled = network(torch.cat([latents, latents]), timestep[:1].expand(4), both, "both")
            empty, prediction = doubled.chunk(2)
            return empty + 4.0 * (prediction - empty)

        total = len(network.timesteps)
        for _ in range(2):
            both = torch.cat([torch.zeros(2, 3), torch.ones(2, 3)])
            run(make(), batched)
        assert network.calls("both") == planned(0, total) * 2

    def test_separate_calls(self, make: Callable[[], Any]) -> None:
        network = FakeNetwork(make().timesteps.tolist())
        total = len(network.timesteps)
        for _ in range(2):
            run(make(), separate(network, torch.ones(2, 3), torch.zeros(2, 3)))
        assert network.calls("cond") == network.calls("uncond") == planned(0, total) * 2

    def test_guidance_interval(self, make: Callable[[], Any]) -> None:
        network = FakeNetwork(make().timesteps.tolist())
        total, cond, uncond = len(network.timesteps), torch.ones(2, 3), torch.zeros(2, 3)
        for _ in range(2):  # the same embeddings again
            run(make(), separate(network, cond, uncond, range(2, 5)))
        assert network.calls("cond") == planned(0, total) * 2
        assert network.calls("uncond") == planned(2, 5) * 2

    @pytest.mark.parametrize("stop", [1, 3])
    @pytest.mark.parametrize("same", [True, False])
    def test_aborted_then_another(self, make: Callable[[], Any], stop: int, same: bool) -> None:
        network = FakeNetwork(make().timesteps.tolist())
        total, cond, uncond = len(network.timesteps), torch.ones(2, 3), torch.zeros(2, 3)
        run(make(), separate(network, cond, uncond), stop=stop)
        if not same:
            cond, uncond = torch.ones(2, 3), torch.zeros(2, 3)
        run(make(), separate(network, cond, uncond))
        assert network.calls("cond") == network.calls("uncond") == planned(0, stop) + planned(0, total)

    def test_image_to_image(self, make: Callable[[], Any]) -> None:
        network = FakeNetwork(make().timesteps.tolist())
        total, cond, uncond = len(network.timesteps), torch.ones(2, 3), torch.zeros(2, 3)
        for _ in range(2):
            run(make(), separate(network, cond, uncond), start=2)
        assert network.calls("cond") == network.calls("uncond") == planned(2, total) * 2

    def test_interleaved_generations(self, make: Callable[[], Any]) -> None:
        network = FakeNetwork(make().timesteps.tolist())
        total = len(network.timesteps)
        first = loop(make(), single(network, torch.ones(2, 3), "a"))
        second = loop(make(), single(network, torch.ones(2, 3), "b"))
        next(first)
        next(first)
        for _ in second:
            next(first, None)
        for _ in first:
            pass
        assert network.calls("a") == network.calls("b") == planned(0, total)

    def test_without_conditioning(self, make: Callable[[], Any]) -> None:
        network = FakeNetwork(make().timesteps.tolist())
        total = len(network.timesteps)
        run(make(), single(network, None), stop=2)
        run(make(), single(network, None))
        run(make(), single(network, None))
        assert network.calls("cond") == planned(0, 2) + planned(0, total) * 2

    def test_two_threads_at_once(self, make: Callable[[], Any]) -> None:
        network = FakeNetwork(make().timesteps.tolist())
        total, shared, barrier = len(network.timesteps), torch.ones(2, 3), threading.Barrier(2)

        def work(label: str, conditioning: Tensor | None) -> None:
            for _ in loop(make(), single(network, conditioning, label)):
                barrier.wait(5)

        for conditioning in (shared, None):
            network.log.clear()
            threads = [threading.Thread(target=work, args=(label, conditioning)) for label in "ab"]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert network.calls("a") == network.calls("b") == planned(0, total)


def test_changed_step_count_then_the_planned_one_again() -> None:
    network = FakeNetwork(flow().timesteps.tolist())
    cond = torch.ones(2, 3)
    run(flow(5), single(network, cond))
    unknown = (None, False)  # any number of flow-matching steps begins and ends at the same two values
    assert network.calls("cond") == [(0, True), unknown, unknown, unknown, (STEPS - 1, False)]
    network.log.clear()
    run(flow(), single(network, cond))
    assert network.calls("cond") == planned(0, STEPS)


@pytest.mark.parametrize("stop", [None, 2, 5])
def test_two_networks_by_boundary(stop: int | None) -> None:
    """As Wan2.2: one conditioning tensor for both networks, the noisier timesteps for the first."""
    values = flow(8).timesteps.tolist()
    boundary = 0.875 * 1000
    high = FakeNetwork([value for value in values if value >= boundary])
    low = FakeNetwork([value for value in values if value < boundary], "transformer_2")

    cond, uncond = torch.ones(2, 3), torch.zeros(2, 3)

    def evaluate(index: int, latents: Tensor, timestep: Tensor) -> Tensor:
        network = high if float(timestep[0]) >= boundary else low
        return separate(network, cond, uncond)(index, latents, timestep)

    run(flow(8), evaluate, stop=stop)
    run(flow(8), evaluate)
    split, stop = len(high.timesteps), 8 if stop is None else stop
    assert 0 < split < 8
    for label in ("cond", "uncond"):
        assert high.calls(label) == planned(0, min(stop, split)) + planned(0, split)
        assert low.calls(label) == planned(0, max(stop - split, 0)) + planned(0, 8 - split)


class TestStreamTable:
    def test_dies_with_its_tensor(self) -> None:
        class State:
            pass

        table: StreamTable[State] = StreamTable(State)
        tensor = torch.ones(3)
        state = weakref.ref(table.get(1, "n", tensor, None))
        assert table.get(1, "n", tensor, None) is state()
        del tensor
        assert state() is None
        assert (table.counts.created, table.counts.live, table.counts.died) == (1, 0, 1)

    def test_reused_id_is_a_new_stream(self) -> None:
        table: StreamTable[list[int]] = StreamTable(list)
        ids = set()
        for index in range(100):
            tensor = torch.ones(3)
            ids.add(id(tensor))
            state = table.get(1, "n", tensor, None)
            assert state == []
            state.append(index)
            del tensor, state
        assert len(ids) < 100
        assert (table.counts.created, table.counts.died) == (100, 100)

    def test_death_while_another_thread_has_the_lock(self) -> None:
        table: StreamTable[list[int]] = StreamTable(list)
        reused = 0
        for _ in range(50):
            tensor = torch.ones(3)
            table.get(1, "n", tensor, None).append(1)
            address = id(tensor)
            with table._lock:
                del tensor
            others: list[torch.Tensor] = []  # the freed address comes back within a few allocations
            while id(tensor := torch.ones(3)) != address and len(others) < 500:
                others.append(tensor)
            reused += id(tensor) == address
            assert table.get(1, "n", tensor, None) == []
            assert not table._dead and len(table._owned) == 1
        assert reused > 0

    def test_tensor_that_lives_on_in_c_plus_plus_is_the_same_stream(self) -> None:
        table: StreamTable[list[int]] = StreamTable(list)
        tensor = torch.ones(4)
        view = tensor[1:]
        state = table.get(1, "n", tensor, None)
        del tensor
        gc.collect()
        assert view._base is not None and table.get(1, "n", view._base, None) is state
        del view
        assert table.counts.live == 0

    def test_cycles_collected_in_the_middle_of_lookups(self) -> None:
        table: StreamTable[list[int]] = StreamTable(list)
        for _ in range(300):
            holder: list[Any] = [torch.ones(2)]
            holder.append(holder)
            assert table.get(1, "n", holder[0], None) == []
        del holder
        gc.collect()
        assert table.counts.live == 0

    def test_everything_in_the_key_counts(self) -> None:
        table: StreamTable[object] = StreamTable(object)
        tensor, other = torch.ones(3), torch.ones(3)
        states = {
            id(table.get(thread, network, identity, name))
            for thread in (1, 2)
            for network in ("transformer", "transformer_2")
            for identity in (tensor, other, None)
            for name in (None, "cond", "uncond")
        }
        assert len(states) == table.counts.live == 36

    def test_limit_of_streams_without_identity(self) -> None:
        table: StreamTable[object] = StreamTable(object, limit=3)
        kept, states = torch.ones(1), [table.get(thread, "n", None, None) for thread in range(3)]
        owned = table.get(0, "n", kept, None)
        assert table.get(0, "n", None, None) is states[0]  # used again, so 1 is the oldest
        table.get(3, "n", None, None)
        assert table.get(0, "n", None, None) is states[0]
        assert table.get(1, "n", None, None) is not states[1]
        assert table.counts.evicted == 2
        assert table.get(0, "n", kept, None) is owned
        with pytest.raises(InputError, match="limit=0"):
            StreamTable(object, limit=0)

    def test_branch_names(self) -> None:
        table: StreamTable[object] = StreamTable(object)
        first, second, third = torch.ones(1), torch.ones(1), torch.ones(1)
        table.get(1, "n", first, None)
        table.get(1, "n", second, None)
        table.get(2, "n", first, None)
        table.get(1, "m", first, None)
        table.get(1, "n", first, "cond")
        names = [Stream(1, "n", "branch0"), Stream(1, "n", "branch1"), Stream(2, "n", "branch0")]
        assert table.live() == (*names, Stream(1, "m", "branch0"), Stream(1, "n", "cond"))
        del first
        table.get(1, "n", third, None)
        assert table.live() == (Stream(1, "n", "branch1"), Stream(1, "n", "branch0"))

    def test_clear(self) -> None:
        table: StreamTable[object] = StreamTable(object)
        tensor = torch.ones(1)
        before = [table.get(1, "n", identity, None) for identity in (tensor, None)]
        table.clear()
        assert (table.live(), table.counts.live, table.counts.died) == ((), 0, 0)
        after = [table.get(1, "n", identity, None) for identity in (tensor, None)]
        assert before[0] is not after[0] and before[1] is not after[1]
        del tensor
        assert (table.counts.live, table.counts.died) == (1, 1)

    def test_table_dies_before_its_tensors(self) -> None:
        table: StreamTable[object] = StreamTable(object)
        tensor = torch.ones(1)
        table.get(1, "n", tensor, None)
        gone = weakref.ref(table)
        del table
        assert gone() is None

    def test_identity_that_cannot_be_weak(self) -> None:
        table: StreamTable[object] = StreamTable(object)
        with pytest.raises(InputError, match="type list"):
            table.get(1, "n", [torch.ones(1)], None)
        assert table.counts.created == 0

    def test_many_threads(self) -> None:
        table: StreamTable[StepClock] = StreamTable(lambda: StepClock(range(20, 0, -1)))
        shared, wrong = torch.ones(1), []

        def work(thread: int) -> None:
            for _ in range(20):
                own = torch.ones(1)
                for step in range(20):
                    for identity in (shared, own, None):
                        tick = table.get(thread, "n", identity, None).tick(20 - step)
                        if tick.step != step or tick.fresh != (step == 0):
                            wrong.append((thread, step, tick))

        threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        assert wrong == []
        assert table.counts.created == 8 * (20 + 1 + 1)
        assert table.counts.live == 16

    def test_lookup_is_cheap(self) -> None:
        table: StreamTable[object] = StreamTable(object)
        tensors = [torch.ones(1) for _ in range(50)]
        for tensor in tensors:
            table.get(1, "n", tensor, "cond")

        def seconds() -> float:
            start = time.thread_time()
            for tensor in tensors:
                for _ in range(20):
                    table.get(1, "n", tensor, "cond")
            return time.thread_time() - start

        assert min(seconds() for _ in range(5)) / 1000 < 5e-6


def watched_wan() -> Any:
    model = tiny_wan()
    assert watch_contexts()  # diffusers may have loaded the model just now
    return model


@dataclass
class WanLoop:
    """A real tiny Wan in the loop of WanPipeline; a forward hook plays the compiled program."""

    model: Any
    use_identity: bool = True
    log: list[tuple[str | None, int | None, bool]] = field(default_factory=list)

    def __post_init__(self) -> None:
        values = flow(3).timesteps.tolist()
        self.table: StreamTable[StepClock] = StreamTable(lambda: StepClock(values))
        self.handle = self.model.register_forward_pre_hook(self.tick, with_kwargs=True)

    def tick(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        name = current_context_name()
        identity = kwargs["encoder_hidden_states"] if self.use_identity else None
        tick = self.table.get(threading.get_ident(), "transformer", identity, name).tick(
            read_timestep(kwargs["timestep"])
        )
        self.log.append((name, tick.step, tick.fresh))

    def generate(self, step_done: Callable[[], Any] = lambda: None) -> None:
        scheduler, latents, cond, uncond = (
            flow(3),
            torch.ones(1, 4, 1, 4, 4),
            torch.ones(1, 3, 16),
            torch.zeros(1, 3, 16),
        )
        with torch.no_grad():
            for index, t in enumerate(scheduler.timesteps):
                outputs = []
                for name, text in (("cond", cond), ("uncond", uncond)):
                    with self.model.cache_context(name, step_index=index):
                        step_done()
                        outputs += self.model(
                            hidden_states=latents, timestep=t.expand(1), encoder_hidden_states=text, return_dict=False
                        )
                latents = scheduler.step(2 * outputs[0] - outputs[1], t, latents, return_dict=False)[0]


class TestCacheContext:
    @pytest.mark.parametrize("use_identity", [True, False])
    def test_names_of_a_real_wan(self, use_identity: bool) -> None:
        wan = WanLoop(watched_wan(), use_identity)
        wan.generate()
        wan.generate()
        expected = [(name, step, step == 0) for step in range(3) for name in ("cond", "uncond")]
        assert wan.log == expected * 2
        assert current_context_name() is None

    def test_the_innermost_context_counts(self) -> None:
        one, two = watched_wan(), watched_wan()
        with one.cache_context("cond"):
            with two.cache_context("control"):
                assert current_context_name() == "control"
            assert current_context_name() == "cond"
            with pytest.raises(ZeroDivisionError), one.cache_context("uncond"):
                raise ZeroDivisionError
            assert current_context_name() == "cond"
        assert current_context_name() is None

    def test_names_belong_to_threads(self) -> None:
        model, barrier = watched_wan(), threading.Barrier(2)
        wan = WanLoop(model, use_identity=False)
        with model.cache_context("cond"):
            seen: list[str | None] = []
            other = threading.Thread(target=lambda: seen.append(current_context_name()))
            other.start()
            other.join()
            assert seen == [None] and current_context_name() == "cond"

        def late() -> None:
            barrier.wait(5)
            wan.generate()

        offset = threading.Thread(target=late)
        offset.start()
        steps = iter(range(100))
        wan.generate(lambda: barrier.wait(5) if next(steps) == 1 else None)
        offset.join()
        calls = [(name, step, step == 0) for step in range(3) for name in ("cond", "uncond")]
        assert sorted(wan.log, key=repr) == sorted(calls * 2, key=repr)

    def test_it_wraps_once_and_keeps_the_signature(self) -> None:
        method = diffusers.CacheMixin.cache_context
        assert watch_contexts() and watch_contexts()
        assert diffusers.CacheMixin.cache_context is method
        assert list(inspect.signature(method).parameters)[:2] == ["self", "name"]

    def test_diffusers_own_caches_hear_the_names(self) -> None:
        model = watched_wan()
        model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.0))
        wan = WanLoop(model)  # that cache raises where no context is set
        wan.generate()
        assert [name for name, _, _ in wan.log] == ["cond", "uncond"] * 3

    def test_diffusers_is_not_imported_for_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class CacheMixin:
            @contextmanager
            def cache_context(self, name: str) -> Iterator[str]:
                yield name.upper()

        models = ModuleType("diffusers.models.cache_utils")
        monkeypatch.delitem(sys.modules, models.__name__)
        assert not watch_contexts() and models.__name__ not in sys.modules
        monkeypatch.setitem(sys.modules, models.__name__, models)
        assert not watch_contexts(), "diffusers is being loaded"
        vars(models)["CacheMixin"] = CacheMixin
        assert watch_contexts()
        with CacheMixin().cache_context("cond") as value:
            assert (current_context_name(), value) == ("cond", "COND")


def test_torch_compile_hands_over_the_same_objects() -> None:
    """Dynamo gives its backend the very tensor objects of the caller, and the names are readable from there."""
    model = watched_wan()
    seen: list[tuple[str | None, set[int]]] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        def call(*arguments: Tensor) -> Any:
            seen.append((current_context_name(), {id(argument) for argument in arguments}))
            return graph(*arguments)

        return call

    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    x, e, timesteps = torch.ones(1, 4, 1, 4, 4), torch.ones(1, 3, 16), flow(3).timesteps
    cache = [t.expand(1) for t in timesteps]
    before = compile_counts()
    with torch.no_grad():
        for timestep in cache:
            for name in ("cond", "uncond"):
                with compiled.cache_context(name):
                    compiled(x, timestep, e, return_dict=False)
                assert seen[-1][0] == name and {id(timestep), id(e)} <= seen[-1][1]
    assert len(seen) == 6
    assert compile_counts().graphs - before.graphs == 1 and compile_counts().breaks == before.breaks
    torch.compiler.reset()
