"""Exact rewrites: rotary embeddings in every form, hyperbolic tangents, what is left alone, what a plan does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from ditopt.backend import Session
from ditopt.decisions import Dense, decision_from_data, decision_to_data
from ditopt.errors import AuditError
from ditopt.forms import SIMPLIFIED_SPEED, simplified
from ditopt.passes._infra import GraphIndex, PassManager, StepPlan
from ditopt.passes.audit import audit
from ditopt.passes.rotary import rotary, rotation_of
from ditopt.passes.sigmoid import sigmoid, tangent_plus_one
from ditopt.passes.simplify import REWRITES, simplifiable
from ditopt.passes.verify import verify
from ditopt.profiler import timing
from ditopt.runtime.program import Program
from ditopt.runtime.variants import PASSES
from tests.search.problems import random_problem
from tests.trace.models import CASES, Captured, capture, compiled, interpreted

SIMPLE = StepPlan(simplify=True)
INDEX = GraphIndex((), {}, None)
Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]


def strided(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Wan's: pairs are taken apart by ``unbind``, and written every second channel."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    out = torch.empty_like(x)
    out[..., 0::2] = even * cos[..., 0::2] - odd * sin[..., 1::2]
    out[..., 1::2] = even * sin[..., 1::2] + odd * cos[..., 0::2]
    return out


def stacked(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Flux's: the pairs turned by a quarter are stacked, and weighed with tables as wide as the head."""
    even, odd = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return x * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin


def stacked_at_once(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """GPT-J's: slices with a stride, tables of half the width, the table before the channel."""
    even, odd = x[..., ::2], x[..., 1::2]
    c, s = cos[..., ::2], sin[..., ::2]
    return torch.stack((c * even - s * odd, s * even + c * odd), dim=-1).flatten(-2)


def captured_graph(function: Callable[..., Tensor], *arguments: Tensor) -> fx.GraphModule:
    """The graph that passes get of a function, whose inputs are ``arguments`` in order."""
    torch._dynamo.reset()
    session = Session()
    with interpreted(), torch.no_grad():
        compiled(function, session=session)(*arguments)
    (program,) = session.programs
    return program.variants.trace.gm


def rewritten(gm: fx.GraphModule) -> fx.GraphModule:
    return PassManager([rewrite for rewrite, _ in REWRITES], verify).run(gm, SIMPLE, INDEX)


def targets(gm: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]


def rotation_inputs(heads: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 10, heads, 8, generator=generator, dtype=torch.float64)
    cos, sin = torch.randn(2, 1, 10, 1, 8, generator=generator, dtype=torch.float64)
    return x, cos, sin


@pytest.mark.parametrize("rotate", [strided, stacked, stacked_at_once])
def test_a_rotation_is_found_in_every_form_and_gives_the_same_numbers(rotate: Rotate) -> None:
    inputs = rotation_inputs()
    gm = captured_graph(rotate, *inputs)
    assert any(rotation_of(node) for node in gm.graph.nodes)
    new = rewritten(gm)
    assert not simplifiable(new)
    assert "prims.rev.default" in targets(new) and "aten.slice_scatter.default" not in targets(new)
    torch.testing.assert_close(new(*inputs)[0], rotate(*inputs), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("rotate", "tables"), [(strided, 2), (stacked, 1)])
def test_tables_are_made_once_for_all_tensors(rotate: Rotate, tables: int) -> None:
    x, cos, sin = rotation_inputs()

    def two(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate(x, cos, sin) + rotate(x + 1, cos, sin)

    new = rewritten(captured_graph(two, x, cos, sin))
    assert targets(new).count("prims.rev.default") == 2
    assert targets(new).count("aten.cat.default") == tables
    torch.testing.assert_close(new(x, cos, sin)[0], two(x, cos, sin), rtol=1e-14, atol=1e-14)


def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """LLaMA's: the halves of a head are turned; nothing is interleaved."""
    one, two = x.chunk(2, -1)
    return x * cos + torch.cat((-two, one), -1) * sin


def doubled(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A table whose values stand twice side by side turns nothing."""
    return x + torch.stack((cos[..., ::2], cos[..., ::2]), -1).flatten(-2)


def of_two(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channels of two tensors put together are no rotation of one."""
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., 0::2] - x.flip(1)[..., 1::2]
    out[..., 1::2] = x[..., 1::2] + x[..., 0::2]
    return out


def partly(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Written into a part of the channels only."""
    out = torch.zeros_like(x)
    out[..., 0:4:2] = x[..., 0:4:2]
    out[..., 1:4:2] = x[..., 1:4:2]
    return out


def bent(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Not linear in the channels."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * even - odd, even * odd), -1).flatten(-2)


@pytest.mark.parametrize("other", [halves, doubled, of_two, partly, bent])
def test_what_is_no_rotation_of_pairs_stays(other: Rotate) -> None:
    gm = captured_graph(other, *rotation_inputs())
    assert not simplifiable(gm)
    assert targets(rewritten(gm)) == targets(gm)


@pytest.mark.parametrize("one", [1, 1.0])
def test_a_tangent_plus_one_is_a_sigmoid_and_nearer_to_the_truth_where_it_cancels(one: float) -> None:
    x = torch.linspace(-12, 12, 4001)
    new = rewritten(captured_graph(lambda x: torch.tanh(x) + one, x))
    assert "aten.sigmoid.default" in targets(new) and "aten.tanh.default" not in targets(new)
    exact = 2 / (1 + torch.exp(-2 * x.double()))
    ours = (new(x)[0].double() - exact).abs() / exact
    theirs = ((torch.tanh(x) + one).double() - exact).abs() / exact
    assert ours.max() < 4e-6 < theirs.max()


@pytest.mark.parametrize(
    "other",
    [lambda x: torch.tanh(x) + 2, lambda x: torch.tanh(x), lambda x: (t := torch.tanh(x)) * (t + 1)],
    ids=["plus two", "alone", "read twice"],
)
def test_other_tangents_stay(other: Callable[[Tensor], Tensor]) -> None:
    gm = captured_graph(other, torch.randn(8))
    assert not any(tangent_plus_one(node) for node in gm.graph.nodes)
    assert "aten.tanh.default" in targets(rewritten(gm))


def test_a_step_that_is_not_to_be_simplified_is_not() -> None:
    gm = captured_graph(strided, *rotation_inputs())
    assert not rotary(gm, StepPlan(), INDEX).modified and not sigmoid(gm, StepPlan(), INDEX).modified
    assert simplifiable(gm)


@pytest.fixture(scope="module", params=["Wan", "Flux", "LTX", "CogVideoX", "HunyuanVideo"])
def captured(request: pytest.FixtureRequest) -> Captured:
    return capture(*CASES[request.param].make())


def test_real_models_give_the_same_numbers(captured: Captured) -> None:
    trace = captured.program.variants.trace
    assert simplifiable(trace.gm)
    outputs, _ = captured.run(SIMPLE)
    for ours, theirs in zip(outputs, captured.outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)


def test_a_graph_that_was_left_as_it_was_fails_the_audit(captured: Captured) -> None:
    trace, index = captured.program.variants.trace, captured.program.variants.index
    with pytest.raises(AuditError, match=r"the step is to be simplified, but \d+ nodes are as they were, e\.g\. \w+"):
        audit(trace.gm, SIMPLE, index, {})
    for missing, _ in REWRITES:
        rest = [each for each in PASSES if each is not missing]
        left = [node for node in trace.gm.graph.nodes if dict(REWRITES)[missing](node) is not None]
        if left:
            with pytest.raises(AuditError, match="as they were"):
                audit(PassManager(rest).run(trace.gm, SIMPLE, index), SIMPLE, index, {})


def test_simplified_steps_are_taken_where_they_are_faster() -> None:
    problem = random_problem(0, 6)
    fast = {"full": 1.0, "simplified": 0.9}
    found = simplified(problem, fast)
    assert found.simplify and found.seconds_full == pytest.approx(0.9)
    assert found.simplify_reason == "slower: a step takes 0.9 s simplified, 1 s as the model has it"
    slow = simplified(problem, {"full": 1.0, "simplified": SIMPLIFIED_SPEED})
    assert not slow.simplify and slow.seconds_full == problem.seconds_full
    assert slow.simplify_reason.startswith("hardly faster: a step takes 0.98 s")
    assert simplified(problem, {"full": 1.0}) is problem, "nothing was there to simplify"


@pytest.mark.parametrize(("simple", "name"), [(0.9, "simplified bfloat16"), (1.0, "bfloat16")])
def test_dtypes_are_timed_in_the_faster_form(
    captured: Captured, monkeypatch: pytest.MonkeyPatch, simple: float, name: str
) -> None:
    def prepared(program: Program, plan: StepPlan, arguments: object) -> timing.Timed:
        return lambda: 0.5 if plan.dtype else simple if plan.simplify else 1.0

    monkeypatch.setattr(timing, "prepared", prepared)
    monkeypatch.setattr("ditopt.profiler.timing.castable", lambda gm: [None])
    found = timing.measure_seconds(captured.program, (), (), ("bfloat16",))
    assert found == {"full": 1.0, "predicted": 1.0, "simplified": simple, name: 0.5}
    assert "simplified" not in timing.measure_seconds(captured.program, (), (), (), simplify=False)


def test_a_plan_file_says_it_in_one_word() -> None:
    simple = Dense(dtype="bfloat16", simplify=True)
    assert decision_to_data(simple) == {"dense": {"dtype": "bfloat16", "simplify": True}}
    assert decision_from_data({"dense": {"simplify": True}}) == Dense(simplify=True)
    assert decision_to_data(Dense(simplify=False)) == "dense" and not Dense(simplify=True).is_plain
