"""Exact rewrites: rotary embeddings in every form, hyperbolic tangents, what is left alone, what a plan does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx

from ditopt.backend import Session
from ditopt.decisions import Dense, decision_from_data, decision_to_data
from ditopt.errors import AuditError
from ditopt.forms import SIMPLIFIED_SPEED, in_dtype, simplified
from ditopt.passes._infra import GraphIndex, PassManager, StepPlan
from ditopt.passes.audit import audit
from ditopt.passes.rotary import rotary, rotation_of
from ditopt.passes.sigmoid import sigmoid, tangent_plus_one
from ditopt.passes.simplify import REWRITES, simplifiable, simplify
from ditopt.passes.verify import verify
from ditopt.profiler import timing
from ditopt.quality import Quality, relative_l2
from ditopt.runtime.program import Program
from ditopt.target import Target
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


def written_out(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Every channel of a pair with table entries of its own: the tables are there as they are needed."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    out = torch.empty_like(x)
    out[..., 0::2] = even * cos[..., 0::2] - odd * sin[..., 0::2]
    out[..., 1::2] = odd * cos[..., 1::2] + even * sin[..., 1::2]
    return out


def written_across(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The sine of the other channel of the pair: the table put together here looks like a rotation itself."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    out = torch.empty_like(x)
    out[..., 0::2] = even * cos[..., 0::2] - odd * sin[..., 1::2]
    out[..., 1::2] = odd * cos[..., 1::2] + even * sin[..., 0::2]
    return out


def twice(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A rotation of what a rotation gave."""
    return strided(strided(x, cos, sin), sin, cos)


def permuted(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads before tokens, and a view that needs the result of the stack in memory order."""
    turned, c, s = (part.transpose(1, 2) for part in (x, cos, sin))
    return stacked_at_once(turned, c, s).view(-1, x.shape[1], x.shape[3])


def two_widths(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads of two widths and of two dtypes, whose tables of signs are not the same."""
    narrow, single = x[..., :4] * 2, x.float()
    parts = [stacked(each, cos[..., : each.shape[-1]].to(each), sin[..., : each.shape[-1]].to(each)) for each in
             (x, narrow, single)]  # fmt: skip
    return torch.cat([part.double() for part in parts], -1)


def captured_graph(function: Callable[..., Tensor], *arguments: Tensor) -> fx.GraphModule:
    """The graph that passes get of a function, whose inputs are ``arguments`` in order."""
    torch._dynamo.reset()
    session = Session()
    with interpreted(), torch.no_grad():
        compiled(function, session=session)(*arguments)
    (program,) = session.programs
    return program.variants.trace.gm


def rewritten(gm: fx.GraphModule) -> fx.GraphModule:
    manager = PassManager([simplify], verify)
    new = manager.run(gm, SIMPLE, INDEX)
    assert bool(simplifiable(gm)) is not bool(manager.reasons), "what does not apply is told"
    return new


def targets(gm: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]


def rotation_inputs(heads: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 10, heads, 8, generator=generator, dtype=torch.float64)
    cos, sin = torch.randn(2, 1, 10, 1, 8, generator=generator, dtype=torch.float64)
    return x, cos, sin


@pytest.mark.parametrize(
    "rotate", [strided, stacked, stacked_at_once, written_out, written_across, twice, permuted, two_widths]
)
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
    even, odd = x[..., 0::2], x[..., 1::2]
    out = torch.zeros(2, 10, 3, 12, dtype=x.dtype)
    out[..., 0:8:2] = even * cos[..., 0::2] - odd * sin[..., 0::2]
    out[..., 1:8:2] = even * sin[..., 0::2] + odd * cos[..., 0::2]
    return out


def one_sided(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Nothing of the odd channels reaches the even ones, infinite ones included."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even, odd + even * sin[..., ::2]), -1).flatten(-2)


def masked(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A table of truth values has no negative."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    table = cos[..., ::2] > 0
    return torch.stack((even * table - odd * table, even * table + odd * table), -1).flatten(-2)


def two_shapes(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Tables that cannot stand side by side."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[0, 0, 0, ::2], sin[..., ::2]
    return torch.stack((even * c - odd * c, even * s + odd * s), -1).flatten(-2)


def bent(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Not linear in the channels."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * even - odd, even * odd), -1).flatten(-2)


@pytest.mark.parametrize("other", [halves, doubled, of_two, partly, bent, one_sided, masked, two_shapes])
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
    for missing, finds in REWRITES:
        if any(finds(node) is not None for node in trace.gm.graph.nodes):
            rest = [rewrite for rewrite, _ in REWRITES if rewrite is not missing]
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
    nothing = simplified(problem, {"full": 1.0})
    assert not nothing.simplify and nothing.simplify_reason.startswith("nothing in the graph to simplify")
    cut = simplified(replace(problem, seconds_predicted=None), fast)
    assert not cut.simplify and cut.simplify_reason.startswith("graph breaks cut the network")


def test_every_form_is_timed(captured: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepared(program: Program, plan: StepPlan, arguments: object) -> timing.Timed:
        return lambda: (0.5 if plan.dtype else 1.0) - 0.1 * plan.simplify

    monkeypatch.setattr(timing, "prepared", prepared)
    monkeypatch.setattr(timing, "_has_faster_products", lambda program, dtype: True)
    forms = {"full": 1.0, "simplified": 0.9, "bfloat16": 0.5, "simplified bfloat16": 0.4}
    assert timing.measure_seconds(captured.program, (), (), ("bfloat16",)) == {"predicted": 1.0, **forms}
    assert set(timing.measure_seconds(captured.program, (), (), simplify=False)) == {"full", "predicted"}


def test_a_plan_file_says_it_in_one_word() -> None:
    simple = Dense(dtype="bfloat16", simplify=True)
    assert decision_to_data(simple) == {"dense": {"dtype": "bfloat16", "simplify": True}}
    assert decision_from_data({"dense": {"simplify": True}}) == Dense(simplify=True)
    assert decision_to_data(Dense(simplify=False)) == "dense" and not Dense(simplify=True).is_plain


@pytest.mark.parametrize(("narrow", "taken"), [(0.4, True), (0.5, False)])
@pytest.mark.parametrize("simple", [0.9, 1.0])
def test_steps_in_a_dtype_are_simplified_where_that_is_faster_in_it(simple: float, narrow: float, taken: bool) -> None:
    seconds = {"full": 1.0, "simplified": simple, "bfloat16": 0.5, "simplified bfloat16": narrow}
    flawless = Quality(90.0, 90.0, 0.0, (90.0,))
    problem = simplified(random_problem(0, 6), seconds)
    found = in_dtype(problem, seconds, "bfloat16", Target(min_psnr=42.0), lambda rules: flawless)
    assert (found.dtype, found.simplify) == ("bfloat16", taken) and found.seconds_full == pytest.approx(narrow)
    told = f"a step takes {narrow:g} s simplified bfloat16, 0.5 s bfloat16"
    assert found.simplify_reason == ("slower: " if taken else "hardly faster: ") + told


def test_a_tangent_within_a_tangent() -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))

    def nested(x: Tensor) -> Tensor:
        return torch.tanh(torch.tanh(x) + 1) + 1

    new = rewritten(captured_graph(nested, x))
    assert not simplifiable(new) and targets(new).count("aten.sigmoid.default") == 2
    torch.testing.assert_close(new(x)[0], nested(x))


def test_a_rotation_in_16_bits_follows(captured: Captured) -> None:
    """The cast puts views before its casts, which hold for the layout of what was rewritten."""
    plan = StepPlan(dtype="bfloat16", simplify=True)
    outputs, _ = captured.run(plan)
    plain, _ = captured.run(StepPlan(dtype="bfloat16"))
    for ours, theirs in zip(outputs, plain, strict=True):
        assert relative_l2(ours, theirs) < 2e-2


def test_a_form_that_does_not_compile_is_left_out_with_a_reason(
    captured: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepared(program: Program, plan: StepPlan, arguments: object) -> timing.Timed:
        if plan.simplify:
            raise AuditError("the step is to be simplified, but 1 nodes are as they were")
        return lambda: 1.0

    monkeypatch.setattr(timing, "prepared", prepared)
    monkeypatch.setattr(captured.program.variants, "reasons", [])
    assert timing.measure_seconds(captured.program, (), ()) == {"full": 1.0, "predicted": 1.0}
    assert captured.program.variants.reasons[0].startswith("simplified steps were not tried: the step is to be")
