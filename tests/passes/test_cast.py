"""Products in 16 bits: which ones, what between them stays, what such a plan computes; models in 16 bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ditopt.decisions import Dense, Forecast
from ditopt.errors import AuditError, PlanMismatchError
from ditopt.kernels.ops import ATTENTION
from ditopt.passes._infra import PassManager, StepPlan
from ditopt.passes.audit import audit
from ditopt.passes.cast import MIN_ROWS, PRODUCTS, VIEWS, cast, castable
from ditopt.passes.verify import verify
from ditopt.plan import DevicePrint, Inputs, ModelPrint, Plan, Rule, SamplerPrint
from ditopt.profiler import timing
from ditopt.quality import relative_l2
from ditopt.runtime.program import Compute, Program
from ditopt.sites import STEP
from tests.tiny import TinyDiT, compiled_tiny, euler, make_model, narrow_products_are_faster, prompt_features

STEPS = 6
BFLOAT16 = Dense(dtype="bfloat16")
NARROW = StepPlan((), (STEP,), dtype="bfloat16")
TIMES = tuple(1000 * sigma for sigma in torch.linspace(1, 0, STEPS + 1).tolist()[:-1])


def generate(model: TinyDiT, tokens: int = MIN_ROWS) -> Tensor:
    with torch.no_grad():
        return euler(model, "a", 0, STEPS, tokens)


def generate_narrow(model: TinyDiT, dtype: torch.dtype) -> Tensor:
    """As pipelines in 16 bits do: noise, text and timesteps in ``dtype``."""
    x = torch.randn(1, 64, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    text = prompt_features("a").to(dtype)
    with torch.no_grad():
        for now, then in pairwise((*TIMES, 0.0)):
            x = x + (then - now) / 1000 * model(x, torch.tensor([now], dtype=dtype), text)
    return x


class Masked(nn.Module):
    """Attention under a mask with one row of float32's least value throughout; angles from an outer product."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(32, 32), nn.Linear(32, 4)
        self.frequencies = nn.Parameter(torch.rand(64) * 100)

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        angles = self.frequencies[:, None] @ (1 + timestep / 1000 + torch.arange(32))[None]
        mask = torch.zeros(64, 64).index_fill(0, torch.tensor([3]), torch.finfo(torch.float32).min)
        x = self.inner(hidden_states.repeat(1, 1, 8)) + angles.sin() + encoder_hidden_states[:, None]
        q = x.view(1, 64, 2, 16).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, q, q, attn_mask=mask).transpose(1, 2).reshape(1, 64, 32)
        out: Tensor = self.outer(mixed)
        return out


class Unfused(nn.Module):
    """Attention by products, its scale in ``alpha`` and an addend of no weight, as diffusers' fallback has it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        x = self.inner(hidden_states.repeat(1, 1, 8)) + encoder_hidden_states[:, None] + timestep / 1000
        scores = torch.baddbmm(torch.full((1, 64, 64), 1e6), x, x.transpose(1, 2), beta=0, alpha=0.05)
        out: Tensor = self.outer(scores.softmax(-1) @ x)
        return out


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    with compiled_tiny(make_model(), generate) as (_, found):
        yield found


def plan(program: Program, *rules: Rule) -> Plan:
    sigmas = tuple(time / 1000 for time in TIMES)
    trace = program.variants.trace
    return Plan(
        model=ModelPrint(class_name="TinyDiT", structure=trace.structure, blocks=len(trace.blocks)),
        sampler=SamplerPrint(
            class_name="euler", steps=STEPS, timesteps={"transformer": TIMES}, sigmas={"transformer": sigmas}
        ),
        device=DevicePrint(device="cpu", torch=torch.__version__, dtype="float32"),
        inputs=Inputs(
            timestep="timestep",
            latents="hidden_states",
            identity="encoder_hidden_states",
            forward=("hidden_states", "timestep", "encoder_hidden_states"),
        ),
        rules=rules,
    )


def test_products_of_many_rows_are_cast_and_the_timesteps_are_not(program: Program) -> None:
    before = program.variants.trace.gm
    gm = PassManager([cast], verify).run(before, NARROW, program.variants.index)
    products = [node for node in gm.graph.nodes if node.target in (*PRODUCTS, ATTENTION)]
    narrow = [node for node in products if node.meta["val"].dtype == torch.bfloat16]
    assert len(narrow) == len(castable(before)) > 0
    assert sum(node.target is ATTENTION for node in narrow) == 4
    left = sorted(node.meta["val"].shape[-2] for node in products if node not in narrow)
    assert left == [1] * 5 + [64] * 2, "the timestep's products, the embedding of four channels and the last projection"
    (last,) = [node for node in products if node.meta["val"].shape[-2:] == (64, 4)]
    assert last not in narrow, "its rounding would be in the output as it is"
    others = {
        str(node.target)
        for node in gm.graph.nodes
        if node not in products
        and isinstance(node.meta.get("val"), Tensor)
        and node.meta["val"].dtype == torch.bfloat16
    }
    assert others <= {"prims.convert_element_type.default", *map(str, VIEWS)}, "what lies between products is as it was"


def test_a_weight_is_cast_once_and_before_it_is_transposed(program: Program) -> None:
    gm = PassManager([cast], verify).run(program.variants.trace.gm, NARROW, program.variants.index)
    casts = [node.args[0] for node in gm.graph.nodes if "convert_element_type" in str(node.target)]
    assert len(set(casts)) == len(casts)
    weights = [node for node in casts if node.op == "placeholder" and node.meta["val"].ndim == 2]
    assert len(weights) >= 16, "four weights in each of the four blocks"


def test_a_graph_that_was_not_cast_fails_the_audit(program: Program) -> None:
    with pytest.raises(AuditError, match=r"products are to run in bfloat16, but \d+ do not"):
        audit(program.variants.trace.gm, StepPlan(dtype="bfloat16"), program.variants.index, {})


def test_a_plan_in_bfloat16_is_near_the_dense_model_and_is_not_it() -> None:
    with compiled_tiny(make_model(), generate) as (model, program):
        dense = generate(model)
        program.bind(plan(program, Rule(sites=STEP, steps=tuple(range(STEPS)), do=BFLOAT16)))
        cast_run = generate(model)
        assert 1e-5 < relative_l2(cast_run, dense) < 2e-2
        assert {found.dtype for found in program.variants.compiled} == {None, "bfloat16"}
        forecast = Rule(sites=STEP, steps=(3, 5), do=Forecast())
        both = plan(program, Rule(sites=STEP, steps=tuple(range(STEPS)), do=BFLOAT16), forecast)
        assert both.kept_steps() == (0, 1, 2, 4)
        program.bind(both)
        assert relative_l2(generate(model), dense) < 0.2
        assert program.statistics.predicted_calls == 2
        kinds = {(bool(found.predicted), found.dtype) for found in program.bound.variants}  # type: ignore[union-attr]
        assert kinds == {(False, "bfloat16"), (True, None)}


def test_a_dtype_is_for_whole_steps(program: Program) -> None:
    with pytest.raises(PlanMismatchError, match=r"plan computes blocks\.1 with dtype, which .* write sites: step"):
        program.bind(plan(program, Rule(sites="blocks.1", steps=(1,), do=BFLOAT16)))


def dense_and_cast(model: nn.Module) -> tuple[Tensor, Tensor, fx.GraphModule]:
    """The output of one call, that of the compiled cast graph, and the captured graph."""
    with compiled_tiny(model.eval(), generate) as (compiled, program):  # type: ignore[arg-type]
        taken: list[list[Any]] = []

        def keep(arguments: list[Any], compute: Compute) -> Sequence[Any]:
            taken.append(list(arguments))
            return compute(arguments)

        program.interceptor = keep
        generate(compiled)
        program.interceptor = None
        results = []
        for dtype in (None, "bfloat16"):
            variant = program.variants.get(StepPlan(dtype=dtype))
            with torch.no_grad():
                results.append(variant.run([taken[0][i] for i in variant.inputs if isinstance(i, int)])[0])
        return results[0], results[1], program.variants.trace.gm


def test_masks_stay_finite_and_outer_products_as_they_are() -> None:
    dense, narrow, _ = dense_and_cast(Masked())
    assert narrow.isfinite().all()
    assert 1e-5 < relative_l2(narrow, dense) < 1e-2, "angles of up to 4,000 in bfloat16 would be noise"


def test_a_dtype_that_does_not_run_here_has_no_time(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepared(program: Program, plan: StepPlan, arguments: object) -> timing.Timed:
        if plan.dtype:
            raise RuntimeError("no such type on this device")
        return lambda: 1.0

    monkeypatch.setattr(timing, "prepared", prepared)
    narrow_products_are_faster(monkeypatch)
    monkeypatch.setattr(program.variants, "reasons", [])
    assert timing.measure_seconds(program, (), (), ("bfloat16",)) == {"full": 1.0, "predicted": 1.0}
    assert program.variants.reasons == ["bfloat16 steps were not tried: no such type on this device"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_dtype_whose_products_are_slower_is_not_compiled(
    fails: bool, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def product_seconds(left: Tensor, right: Tensor, dtype: torch.dtype) -> float:
        assert left.shape == (64, 32) and right.shape == (32, 96), "the largest: queries, keys and values at once"
        if fails and dtype == torch.bfloat16:
            raise RuntimeError("no such product")
        return 0.001 if dtype == torch.float32 else 0.002

    monkeypatch.setattr(timing, "prepared", lambda program, plan, arguments: lambda: 0.5 if plan.dtype else 1.0)
    monkeypatch.setattr(timing, "product_seconds", product_seconds)
    monkeypatch.setattr(program.variants, "reasons", [])
    assert "bfloat16" not in timing.measure_seconds(program, (), (), ("bfloat16",))
    why = "no such product" if fails else "the largest product takes 2 ms in it, 1 ms as it is"
    assert program.variants.reasons == [f"bfloat16 was not tried: {why}"]


def test_a_product_is_timed_in_a_dtype() -> None:
    assert 0 < timing.product_seconds(torch.empty(4, 8), torch.empty(8, 2), torch.float32) < 1


def test_variants_are_timed_in_turn_and_medians_count() -> None:
    ran: list[str] = []

    def timed(name: str, seconds: list[float]) -> timing.Timed:
        def once() -> float:
            ran.append(name)
            return seconds[ran.count(name) - 1]

        return once

    slow = [9.0] * 4 + [1.0] * 5
    found = timing.time_in_turn({"a": timed("a", slow), "b": timed("b", [2.0] * 9)})
    assert found == {"a": 1.0, "b": 2.0} and ran == ["a", "b"] * 9


def test_factors_of_a_product_are_kept() -> None:
    dense, narrow, gm = dense_and_cast(Unfused())
    assert any(node.target is torch.ops.aten.baddbmm.default and node.kwargs for node in castable(gm))
    assert 1e-5 < relative_l2(narrow, dense) < 2e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_16_bits_runs_under_a_plan_and_has_nothing_to_cast(dtype: torch.dtype) -> None:
    def run(model: TinyDiT) -> Tensor:
        return generate_narrow(model, dtype)

    with compiled_tiny(make_model().to(dtype), run) as (model, program):
        dense = run(model)
        assert not castable(program.variants.trace.gm)
        program.bind(plan(program, Rule(sites=STEP, steps=(3, 5), do=Forecast())))
        sample = run(model)
        assert sample.dtype == dtype and program.statistics.predicted_calls == 2
        assert 0 < relative_l2(sample, dense) < 0.2
