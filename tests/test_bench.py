"""``ditopt bench`` end to end, on a small random pipeline that is loaded from its directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from torch import Tensor, nn
from typer.testing import CliRunner

from ditopt import bench
from ditopt.backend import Session
from ditopt.bench import (
    BenchPlan,
    Contender,
    compiled_calls,
    flow_solver,
    installed,
    run_bench,
    run_benches,
    settings_of,
)
from ditopt.cli import app
from ditopt.console import Reporter
from ditopt.contenders import Sample
from ditopt.contest import CAST, DENSE, Contest, Entry
from ditopt.decisions import Dense, Forecast, Reuse
from ditopt.errors import InputError, PlanMismatchError
from ditopt.passes._infra import StepPlan
from ditopt.plan import DevicePrint, Inputs, ModelPrint, Plan, Rule, SamplerPrint
from ditopt.quality import relative_l2, ssim
from ditopt.report.measured import BenchResult
from examples.tiny_video.pipeline import TinyVideoPipeline
from examples.tiny_video.text import build_text_encoder, build_tokenizer
from tests.trace.models import interpreted

# Diffusers' DPM-Solver++ hands a tensor to numpy in a way that numpy 2 frowns upon.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

STEPS = 6
SIZE = 32
PREDICTED = (2, 4)
MANY = (
    Rule(sites="step", steps=tuple(range(STEPS)), do=Dense(dtype="bfloat16")),
    Rule(sites="step", steps=(1, 2, 4, 5), do=Reuse()),
)
SMALL = {"height": SIZE, "width": SIZE}
PROMPTS = ["a red circle moving left over sand", "a blue square spinning over tiles"]


@pytest.fixture(scope="module")
def pipe() -> TinyVideoPipeline:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=15, out_channels=12,
        text_dim=16, freq_dim=32, ffn_dim=64, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    encoder = build_text_encoder(len(tokenizer), width=16)
    pipe = TinyVideoPipeline(tokenizer, encoder.eval(), transformer.eval(), FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def schedule(steps: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    return tuple(scheduler.timesteps.tolist()), tuple(scheduler.sigmas[:-1].tolist())


@pytest.fixture(scope="module")
def plan(pipe: TinyVideoPipeline) -> Plan:
    """Written by hand, for the pipeline's transformer at 6 steps without guidance."""
    session = Session()
    (call,) = compiled_calls({"transformer": pipe.transformer}, {"transformer": session}).values()
    with installed({"transformer": pipe.transformer}, {"transformer": call}), torch.no_grad():
        pipe(PROMPTS[0], num_inference_steps=1, guidance_scale=1.0, height=SIZE, width=SIZE)
    timesteps, sigmas = schedule(STEPS)
    return Plan(
        model=ModelPrint(
            class_name="WanTransformer3DModel", structure=session.programs[0].variants.trace.structure, blocks=2
        ),
        sampler=SamplerPrint(
            class_name="FlowMatchEulerDiscreteScheduler",
            steps=STEPS,
            guidance=1.0,
            timesteps={"transformer": timesteps},
            sigmas={"transformer": sigmas},
        ),
        geometry={"transformer": (1, 15, 6, SIZE // 2, SIZE // 2)},
        device=DevicePrint(device="test", torch=torch.__version__, dtype="float32"),
        inputs=Inputs(identity="encoder_hidden_states"),
        target={"min_psnr": 20.0},
        rules=(Rule(sites="step", steps=PREDICTED, do=Forecast(order=1)),),
    )


@pytest.fixture(scope="module")
def desk(pipe: TinyVideoPipeline, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    pipe.save_pretrained(folder / "model")
    plan.save(folder / "plan.yaml")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    return folder


@pytest.fixture(scope="module")
def figures(desk: Path) -> dict[str, Any]:
    """What the command wrote; everything below reads this one run."""
    words = ["bench", str(desk / "model"), "--plan", str(desk / "plan.yaml"), "--prompts", str(desk / "prompts.txt")]
    words += ["--json", str(desk / "bench.json"), "--set", f"height={SIZE}", "--set", f"width={SIZE}"]
    done = CliRunner().invoke(app, [*words, "--sheet", str(desk / "sheet.png")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "running the pipeline's own code" in done.output
    assert "UniPC" in done.output and "optimised" in done.output
    found: dict[str, Any] = json.loads((desk / "bench.json").read_text())
    return found


def test_the_json_has_what_the_issue_lists(figures: dict[str, Any]) -> None:
    wanted = """dense_eager_s dense_inductor_s optimized_s speedup_vs_inductor psnr_db rel_l2 ssim fewer_steps unipc
        dpmpp converged attribute_score graph_breaks recompiles variants compile_s first_generation_s peak_rss_mb plan
        versions worst_psnr_db slot_bytes per_prompt prompts"""
    assert set(wanted.split()) <= set(figures)
    for name in ("fewer_steps", "unipc", "dpmpp"):
        assert {"steps", "seconds", "psnr_db"} <= set(figures[name])
        assert figures[name]["reason"] is None
    assert set(figures["attribute_score"]) == {"dense", "optimized", "prompts"}
    assert {"dense_db", "optimized_db", "gain_stderr_db"} <= set(figures["converged"])
    assert figures["converged"]["steps"] == 4 * STEPS


def test_every_median_is_over_at_least_five_generations(figures: dict[str, Any]) -> None:
    names = {"dense_eager", "dense_inductor", "optimized", "fewer_steps", "unipc", "dpmpp"}
    assert set(figures["seconds"]) == names
    assert min(len(values) for values in figures["seconds"].values()) >= 5
    ratio = figures["dense_inductor_s"] / figures["optimized_s"]
    assert figures["speedup_vs_inductor"] == pytest.approx(ratio)


def test_nothing_is_compiled_after_the_warm_up(figures: dict[str, Any]) -> None:
    assert figures["graph_breaks"] == 0
    assert figures["recompiles"] == 0
    assert figures["variants"] == 2  # computed and forecast
    assert figures["first_generation_s"] > figures["optimized_s"]


def test_quality_is_paired_with_the_dense_run(figures: dict[str, Any]) -> None:
    values = [row["psnr_db"] for row in figures["per_prompt"]]
    assert [row["prompt"] for row in figures["per_prompt"]] == PROMPTS
    assert figures["psnr_db"] == pytest.approx(sum(values) / 2)
    assert figures["worst_psnr_db"] == min(values)
    assert 10 < figures["psnr_db"] < 119 and 0 < figures["ssim"] < 1  # near, and not the same thing
    assert figures["kept"] == STEPS - len(PREDICTED)
    assert 1 <= figures["fewer_steps"]["steps"] <= STEPS
    assert figures["slot_bytes"] > 0


def test_the_sheet_is_a_picture(figures: dict[str, Any], desk: Path) -> None:
    assert (desk / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_the_pipeline_is_left_as_it_was(pipe: TinyVideoPipeline) -> None:
    assert pipe.transformer._compiled_call_impl is None
    calls = compiled_calls({"transformer": pipe.transformer}, {})
    assert pipe.transformer._compiled_call_impl is None and calls["transformer"] is not None
    with installed({"transformer": pipe.transformer}, calls):
        assert pipe.transformer._compiled_call_impl is calls["transformer"]
    assert pipe.transformer._compiled_call_impl is None


def test_a_plan_for_another_scheduler_or_model_is_refused(pipe: TinyVideoPipeline, plan: Plan) -> None:
    sampler = plan.sampler.model_copy(update={"class_name": "EulerDiscreteScheduler"})
    with pytest.raises(PlanMismatchError, match="EulerDiscreteScheduler, the pipeline samples with FlowMatchEuler"):
        run_bench(pipe, plan.model_copy(update={"sampler": sampler}), PROMPTS)
    model = plan.model.model_copy(update={"structure": "sha256:0"})
    with pytest.raises(PlanMismatchError, match="this model has structure"):
        run_bench(pipe, plan.model_copy(update={"model": model}), PROMPTS, settings=SMALL)
    with pytest.raises(PlanMismatchError, match="the plan is for 6 steps"):
        run_bench(pipe, plan, PROMPTS, settings={**SMALL, "num_inference_steps": 7})
    assert pipe.transformer._compiled_call_impl is None


def test_a_plan_for_another_size_is_refused_or_fitted_to_this_one(
    pipe: TinyVideoPipeline, desk: Path, plan: Plan
) -> None:
    other = {"height": SIZE + 16, "width": SIZE}
    with pytest.raises(PlanMismatchError, match="the plan was made for"):
        run_bench(pipe, plan, PROMPTS[:1], settings=other)
    words = ["bench", str(desk / "model"), "--plan", str(desk / "plan.yaml"), "--prompts", str(desk / "prompts.txt")]
    words += ["--json", str(desk / "fitted.json"), "--limit", "1", "--retarget"]
    words += [word for name, value in other.items() for word in ("--set", f"{name}={value}")]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads((desk / "fitted.json").read_text())
    assert found["variants"] == 2 and found["recompiles"] == 0
    assert 10 < found["psnr_db"] < 119  # it predicts, beside the dense run of this size
    assert found["settings"]["height"] == SIZE + 16
    assert any("re-targeted" in note for note in found["notes"])


@pytest.fixture(scope="module")
def shared(pipe: TinyVideoPipeline, plan: Plan) -> tuple[Contest, list[BenchResult]]:
    """Two plans in one run, the second in bfloat16, scored on a prompt more than is timed."""
    kept: list[Contest] = []

    class Watched(Contest):
        def run(self, score_prompts: Sequence[str]) -> None:
            kept.append(self)
            super().run(score_prompts)

    both = [BenchPlan(plan, "one"), BenchPlan(plan.model_copy(update={"rules": MANY}), "two")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "Contest", Watched)
        found = run_benches(pipe, both, PROMPTS, settings=SMALL, score_prompts=[*PROMPTS, PROMPTS[0]])
    return kept[0], found


def test_plans_of_one_run_share_what_they_can(shared: tuple[Contest, list[BenchResult]]) -> None:
    contest, (one, two) = shared
    assert [one.plan["path"], two.plan["path"]] == ["one", "two"]
    assert one.kept == STEPS - len(PREDICTED) and two.kept == 2
    for name in ("dense_eager", "dense_inductor"):
        assert one.seconds[name] == two.seconds[name]
    assert one.seconds["optimized"] != two.seconds["optimized"]
    assert one.psnr_db != two.psnr_db
    assert one.converged["dense_db"] == two.converged["dense_db"]
    assert one.converged["optimized_db"] != two.converged["optimized_db"]
    rivals = {
        (name, found.steps, ending)
        for result in (one, two)
        for ending in ("", "_cast")
        for name in ("fewer_steps", "unipc", "dpmpp")
        if (found := getattr(result, name + ending)) is not None
    }
    told = [any("profit from graphs that the plans before it" in note for note in each.notes) for each in (one, two)]
    assert told == [False, True], "the second plan compiles less: said with its figures"
    assert len(contest.seconds) == 5 + len(rivals), "a step count that both ask for in one dtype is run once"
    for result in (one, two):
        assert result.speedup_vs_inductor == pytest.approx(result.dense_inductor_s / result.optimized_s)
        assert result.graph_breaks == 0 and result.recompiles == 0


def test_a_plan_with_a_dtype_has_rivals_as_the_model_is_and_in_it(
    shared: tuple[Contest, list[BenchResult]],
) -> None:
    contest, (one, two) = shared
    assert one.dense_cast is None and one.fewer_steps_cast is None and one.unipc_cast is None
    assert two.dense_cast is not None and two.fewer_steps_cast is not None
    assert two.unipc_cast is not None and two.dpmpp_cast is not None
    assert two.dense_cast.steps == STEPS and two.dense_cast.psnr_db is not None
    assert two.psnr_db < two.dense_cast.psnr_db < 119, "near the dense model, and not it"
    first, second = contest.entries
    assert first.endings == {"": DENSE} and second.endings == {"": DENSE, "_cast": second.roles[CAST]}
    assert "bfloat16" in second.roles["unipc_cast"] and "bfloat16" not in second.roles["unipc"]
    plain, rival = contest.contenders[second.roles["fewer_steps"]], contest.contenders[second.roles["fewer_steps_cast"]]
    assert plain.calls is contest.contenders[DENSE].calls
    assert plain.settings == {"num_inference_steps": two.fewer_steps.steps}
    assert rival.settings == {"num_inference_steps": two.fewer_steps_cast.steps}
    for role in ("fewer_steps_cast", "unipc_cast", "dpmpp_cast"):
        assert contest.contenders[second.roles[role]].calls is contest.contenders[second.roles[CAST]].calls
    same = [Contender(each.adapter, each.calls, None, rival.settings) for each in (plain, rival)]
    apart = relative_l2(*(each.generate(PROMPTS[0], 1000)[0] for each in same))
    assert 0 < apart < 0.02, "the same steps, in another dtype"


def test_rivals_have_the_steps_that_the_plan_takes_in_their_dtype(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter: Any = SimpleNamespace(steps=30)
    contest = Contest(adapter, ("a",), 5, 0, 2, Reporter(quiet=True))
    entry = Entry(plan, {}, {DENSE: DENSE, CAST: "cast", "optimized": "plan"})
    contest.entries.append(entry)

    def timed(name: str, index: int, num_inference_steps: int = 30) -> Sample:
        """A second beside the network's; the plan takes 3.05 s."""
        seconds = {DENSE: 0.2, "cast": 0.1}.get(name)
        return torch.zeros(1), 3.05 if seconds is None else 1.0 + seconds * num_inference_steps

    monkeypatch.setattr(contest, "_timed", timed)
    contest._choose_steps()
    assert entry.steps == {"": 11, "_cast": 21}
    assert contest.rival_steps(entry, "") == {"fewer_steps": 11, "unipc": 21, "dpmpp": 21}
    assert contest.rival_steps(entry, "_cast") == {"fewer_steps": 21, "unipc": 41, "dpmpp": 41}


def test_the_score_is_over_its_own_prompts(shared: tuple[Contest, list[BenchResult]], pipe: TinyVideoPipeline) -> None:
    contest, (one, two) = shared
    assert one.attribute_score is not None and two.attribute_score is not None
    assert one.attribute_score["prompts"] == 3 and one.prompts == 2
    assert one.attribute_score["dense"] == two.attribute_score["dense"]
    clips = [part[DENSE] for part in contest.made] + [contest.contenders[DENSE].generate(PROMPTS[0], 1002)[0]]
    expected = pipe.attribute_score(torch.cat(clips).numpy(), [*PROMPTS, PROMPTS[0]])
    assert one.attribute_score["dense"] == pytest.approx(expected)


def test_a_variant_that_is_compiled_late_counts_as_a_recompile(shared: tuple[Contest, list[BenchResult]]) -> None:
    contest, _ = shared
    entry, other = contest.entries
    with interpreted():
        entry.programs[0].variants.get(StepPlan((), ("blocks.1",)))
    assert contest.recompiled(entry) == (0, 1)
    assert contest.recompiled(other) == (0, 0)


def test_plans_that_do_not_go_together_are_refused(pipe: TinyVideoPipeline, plan: Plan) -> None:
    sampler = plan.sampler.model_copy(update={"guidance": 4.0})
    guided = plan.model_copy(update={"sampler": sampler})
    with pytest.raises(InputError, match=r"plans a\.yaml and b\.yaml call the pipeline differently"):
        run_benches(pipe, [BenchPlan(plan, "a.yaml"), BenchPlan(guided, "b.yaml")], PROMPTS)
    with pytest.raises(InputError, match="no plans"):
        run_benches(pipe, [], PROMPTS)


def test_too_little_to_measure_is_refused(pipe: TinyVideoPipeline, plan: Plan) -> None:
    with pytest.raises(InputError, match="no prompts"):
        run_bench(pipe, plan, [])
    with pytest.raises(InputError, match="at least 5"):
        run_bench(pipe, plan, PROMPTS, repeats=4)


def test_settings_come_from_the_plan_and_can_be_changed(plan: Plan) -> None:
    accepted = dict.fromkeys(["num_inference_steps", "guidance_scale", "height"])
    assert settings_of(plan, {}, accepted) == {"num_inference_steps": 6, "guidance_scale": 1.0}
    assert settings_of(plan, {"guidance_scale": 4.0}, accepted)["guidance_scale"] == 4.0
    assert settings_of(plan, {}, {}) == {}
    heun = plan.model_copy(update={"sampler": plan.sampler.model_copy(update={"steps": 11})})
    assert settings_of(heun, {}, accepted, order=2)["num_inference_steps"] == 6


@pytest.mark.parametrize(("name", "kind"), [("unipc", UniPCMultistepScheduler), ("dpmpp", DPMSolverMultistepScheduler)])
def test_solvers_take_the_flow_form_of_a_flow_matching_scheduler(name: str, kind: Any) -> None:
    solver = flow_solver(name, FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert type(solver) is kind
    assert solver.config.prediction_type == "flow_prediction" and solver.config.flow_shift == 3.0
    solver.set_timesteps(8)
    assert solver.timesteps.dtype == torch.float32
    torch.testing.assert_close(solver.timesteps, solver.sigmas[:8] * 1000, rtol=0, atol=1e-4)
    other = flow_solver(name, DDIMScheduler(prediction_type="v_prediction"))
    assert other.config.prediction_type == "v_prediction" and not other.config.use_flow_sigmas


@pytest.mark.parametrize("name", ["unipc", "dpmpp"])
def test_solvers_integrate_a_flow(name: str) -> None:
    # dx/dsigma = -x (from 1 to 0) multiplies x by e; the exact timesteps must not break a solver's bookkeeping.
    solver = flow_solver(name, FlowMatchEulerDiscreteScheduler(shift=1.0))
    solver.set_timesteps(32)
    x = torch.ones(1, 4, dtype=torch.float64)
    for t in solver.timesteps:
        x = solver.step(-x, t, x, return_dict=False)[0]
    torch.testing.assert_close(x, torch.full_like(x, torch.e), rtol=0.02, atol=0)


def test_ssim_against_its_definition() -> None:
    torch.manual_seed(0)
    picture = torch.rand(2, 7, 7, 1)
    other = (picture + 0.1 * torch.randn_like(picture)).clamp(0, 1)

    def naive(x: Tensor, y: Tensor) -> float:  # one window: population means, sample covariances
        x, y = x.flatten().double(), y.flatten().double()
        covariance = torch.cov(torch.stack([x, y]))
        above = (2 * x.mean() * y.mean() + 1e-4) * (2 * covariance[0, 1] + 9e-4)
        below = (x.mean() ** 2 + y.mean() ** 2 + 1e-4) * (covariance[0, 0] + covariance[1, 1] + 9e-4)
        return float(above / below)

    expected = sum(naive(a, b) for a, b in zip(other, picture, strict=True)) / 2
    assert ssim(other, picture) == pytest.approx(expected)
    assert ssim(picture, picture) == pytest.approx(1.0)


def test_a_call_is_put_back_after_an_error() -> None:
    network = nn.Linear(2, 2)
    calls = compiled_calls({"n": network}, {})
    with pytest.raises(RuntimeError, match="on purpose"), installed({"n": network}, calls):
        raise RuntimeError("on purpose")
    assert network._compiled_call_impl is None
