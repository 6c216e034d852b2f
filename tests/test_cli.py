"""The commands that read plans, and what bad input gets: one line, exit code 2, no traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import ditopt.api
import ditopt.report.doctor
from ditopt.cli import app
from ditopt.cli_inputs import pipe_settings, read_prompts
from ditopt.decisions import Fit, Forecast, Reuse
from ditopt.errors import InputError, PlanError
from ditopt.kernels.block_sparse_attention.gpu import gpu_refusal, triton_missing
from ditopt.kernels.ops import int8_refusal
from ditopt.plan import DevicePrint, ModelPrint, Plan, Rule, SamplerPrint
from ditopt.report.doctor import Finding
from ditopt.techniques import ALL_TECHNIQUES

TIMES = tuple(1000.0 - 100 * step for step in range(10))


def make_plan(**changes: Any) -> Plan:
    rules = (
        Rule(sites="step", steps=(3, 5, 6), do=Forecast(order=1)),
        Rule(sites="step", steps=(8,), do=Fit(coefficients={8: (1.5, -0.5)}, sources={8: (7, 4)})),
        Rule(sites="blocks.1..3", steps=(2, 3), do=Reuse()),
    )
    plan = Plan(
        model=ModelPrint(class_name="WanTransformer3DModel", structure="sha256:00ff", blocks=5),
        sampler=SamplerPrint(
            class_name="FlowMatchEulerDiscreteScheduler",
            steps=10,
            guidance=4.0,
            timesteps={"transformer": TIMES},
            sigmas={"transformer": tuple(t / 1000 for t in TIMES)},
        ),
        geometry={"transformer": (1, 12, 6, 16, 16)},
        device=DevicePrint(device="EPYC, 2 cores", torch="2.13.0", dtype="float32"),
        target={"min_psnr": 36.0},
        predicted={"seconds": 3.25, "psnr": 37.5},
        measured={"psnr": 38.25, "speedup": 1.75, "fewer_steps": {"steps": 6, "psnr": 27.9}},
        rules=rules,
    )
    return plan.model_copy(update=changes)


SIDE = {
    "explanations": {
        "transformer": [
            {
                "step": 3,
                "site": "step",
                "chosen": "forecast1",
                "objective": 3.5,
                "rivals": [
                    {"name": "compute", "error": 0.0, "objective": 3.75, "reason": "takes 0.4 s more [than this]"},
                    {"name": "forecast2", "error": float("inf"), "objective": float("inf"), "reason": "needs 3 steps"},
                ],
            },
            {"step": 4, "site": "step", "chosen": "compute", "objective": 3.5, "rivals": []},
        ]
    },
    "reasons": ["ranges: too few blocks"],
}


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    make_plan().save(tmp_path / "plan.yaml")
    return tmp_path / "plan.yaml"


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "120"}, catch_exceptions=False)


def refused(*words: object) -> str:
    """The message of a command that must fail as the user's mistake."""
    done = run(*words)
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    return str(done.output)


def test_show_draws_sites_by_steps(plan_file: Path) -> None:
    done = run("show", plan_file)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert "transformer: 6 of 10 steps computed (0-2, 4, 7, 9)" in lines
    assert next(line for line in lines if line.startswith("step ")).split()[1] == "■■■1■11■f■"
    assert next(line for line in lines if line.startswith("blocks.1..3 ")).split()[1] == "■■=·■··■·■"
    text = done.stdout
    for expected in (
        "reused from the latest computed step", "forecast of order 1", "fitted combination", "min_psnr 36",
        "38.25", "37.5", "steps 6, psnr 27.9", "WanTransformer3DModel, 5 blocks, sha256:00ff",
        "FlowMatchEulerDiscreteScheduler, 10 steps, guidance 4", "transformer 1 × 12 × 6 × 16 × 16", "EPYC, 2 cores",
    ):  # fmt: skip
        assert expected in text
    assert "order 2" not in text, "the legend tells only what occurs"


def test_show_wraps_long_schedules(tmp_path: Path) -> None:
    times = tuple(1000.0 - step for step in range(250))
    longer = {"timesteps": {"transformer": times}, "sigmas": {"transformer": tuple(t / 1000 for t in times)}}
    sampler = make_plan().sampler.model_copy(update={**longer, "steps": 250})
    make_plan(sampler=sampler).save(tmp_path / "long.yaml")
    rows = [line.split()[1] for line in run("show", tmp_path / "long.yaml").stdout.splitlines() if line[:5] == "step "]
    assert [len(row) for row in rows] == [100, 100, 50]


def test_explain_says_why_and_why_not(plan_file: Path) -> None:
    plan_file.with_suffix(".explain.json").write_text(json.dumps(SIDE))
    brief = run("explain", plan_file)
    assert brief.exit_code == 0, brief.output
    for expected in ("step 3, step", "forecast1", "compute", "takes 0.4 s more [than this]", "ranges: too few blocks"):
        assert expected in brief.stdout
    assert "needs 3 steps" not in brief.stdout, "only the nearest rival"
    one = run("explain", plan_file, "--step", "3")
    assert "needs 3 steps" in one.stdout and "objective 3.5" in one.stdout and "step 4" not in one.stdout
    assert "step 4" in run("explain", plan_file, "--all").stdout
    assert "known are steps 3 to 4" in refused("explain", plan_file, "--step", "7")


def test_explain_without_the_side_file_says_where_it_comes_from(plan_file: Path) -> None:
    message = refused("explain", plan_file)
    assert "plan.explain.json" in message and "ditopt optimize" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "is no JSON"),
        ('{"trials": [{"psnr": 3}]}', "field trials.0.evaluations"),
        ('{"explanations": 3}', "field explanations"),
    ],
)
def test_a_broken_side_file_is_named_with_its_field(plan_file: Path, text: str, expected: str) -> None:
    plan_file.with_suffix(".explain.json").write_text(text)
    assert expected in refused("explain", plan_file)


def test_diff_exits_as_diff_does(plan_file: Path, tmp_path: Path) -> None:
    same = run("diff", plan_file, plan_file)
    assert (same.exit_code, same.output) == (0, "no difference\n")
    make_plan(rules=make_plan().rules[:2], target={"min_psnr": 42.0}).save(tmp_path / "other.yaml")
    done = run("diff", plan_file, tmp_path / "other.yaml")
    assert done.exit_code == 1
    assert "~ target.min_psnr: 36.0 -> 42.0" in done.stdout
    assert "- rule blocks.1..3 @ 2-3: reuse" in done.stdout
    assert refused("diff", plan_file, tmp_path / "none.yaml")


@pytest.mark.parametrize("command", ["show", "explain"])
def test_a_missing_or_broken_plan_is_one_line(tmp_path: Path, command: str) -> None:
    assert "no such plan file" in refused(command, tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("ditopt: 99\n")
    assert "format version 99" in refused(command, tmp_path / "bad.yaml")


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model, the start of the long work, fails the test."""

    def load(*arguments: object) -> None:
        pytest.fail("the long work began")

    monkeypatch.setattr("ditopt.cli.load_pipeline", load)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("a red circle\n\n  a blue square \n")
    return tmp_path / "prompts.txt"


@pytest.mark.usefixtures("untouched")
def test_mistakes_are_found_before_the_work_starts(plan_file: Path, prompts: Path, tmp_path: Path) -> None:
    empty, one, out = tmp_path / "empty.txt", tmp_path / "one.txt", tmp_path / "out.yaml"
    empty.write_text("\n  \n")
    one.write_text("a red circle\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    assert "no such file" in refused("optimize", tmp_path, "--prompts", tmp_path / "none.txt", "-o", out)
    assert "holds no prompts" in refused("optimize", tmp_path, "--prompts", empty, "-o", out)
    assert "UTF-8" in refused("optimize", tmp_path, "--prompts", tmp_path / "latin.txt", "-o", out)
    assert "too few" in refused("optimize", tmp_path, "--prompts", one, "-o", out)
    nowhere = tmp_path / "no" / "out"
    assert "does not exist" in refused("optimize", tmp_path, "--prompts", prompts, "-o", nowhere)
    assert "is a folder" in refused("optimize", tmp_path, "--prompts", prompts, "-o", tmp_path)
    assert "key=value" in refused("optimize", tmp_path, "--prompts", prompts, "-o", out, "--set", "height")
    bench = ("bench", tmp_path, "--prompts", prompts)
    assert "no such plan file" in refused(*bench, "--plan", tmp_path / "none.yaml", "--json", out)
    assert "does not exist" in refused(*bench, "--plan", plan_file, "--json", nowhere)
    assert "does not exist" in refused(*bench, "--plan", plan_file, "--json", out, "--sheet", nowhere)
    assert not out.exists()


def test_a_model_directory_must_be_one(prompts: Path, tmp_path: Path) -> None:
    rest = ("--prompts", prompts, "-o", tmp_path / "out.yaml")
    assert "no such directory" in refused("optimize", tmp_path / "none", *rest)
    assert "no such directory" in refused("optimize", prompts, *rest)
    assert "model_index.json: not found" in refused("optimize", tmp_path, *rest)
    (tmp_path / "model_index.json").write_text('{"_class_name": ["pipeline", "Own"]}')
    message = refused("optimize", tmp_path, *rest, "--no-trust-remote-code")
    assert "pipeline.py" in message and "--trust-remote-code" in message
    (tmp_path / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    assert "cannot be loaded as a diffusers pipeline" in refused("optimize", tmp_path, *rest)


def test_optimize_hands_everything_on(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    loaded: list[tuple[Any, ...]] = []

    def load(*given: Any) -> str:
        loaded.append(given)
        return "pipe"

    monkeypatch.setattr("ditopt.cli.load_pipeline", load)
    monkeypatch.setattr(ditopt.api, "optimize", lambda *given, **named: seen.update(named, given=given))
    out = tmp_path / "out.yaml"
    done = run(
        "optimize", "DIR", "--prompts", prompts, "-o", out, "--min-psnr", "42",
        "--target-speedup", "2.5", "--steps", "30", "--guidance", "1",
        "--set", "height=64", "--set", "negative_prompt=''", "--seed", "7", "--budget", "9", "--max-variants", "4",
        "--on-mismatch", "dense", "--no-resume", "--trust-remote-code", "--dtype", "bfloat16", "--technique", "reuse",
        "--technique", "sparse", "--recipe", "radial", "--max-state-bytes", "4096",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert seen.pop("given") == ("pipe", ["a red circle", "a blue square"])
    settings = {"num_inference_steps": 30, "guidance_scale": 1.0, "height": 64, "negative_prompt": ""}
    assert seen == {
        "quality": None, "max_rel_error": None, "min_psnr": 42.0, "target_speedup": 2.5, "plan_path": out,
        "pipe_kwargs": settings, "seed": 7, "techniques": ["reuse", "sparse"], "recipe": "radial",
        "max_variants": 4, "max_state_bytes": 4096, "budget": 9, "on_mismatch": "dense", "resume": False,
    }  # fmt: skip
    assert loaded == [("DIR", True, "bfloat16", None)]


def test_the_help_names_every_technique() -> None:
    help_text = " ".join(run("optimize", "--help").stdout.replace("│", " ").split())
    assert all(name in help_text for name in ALL_TECHNIQUES)


def test_errors_of_the_flow_are_one_line(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("optimize", "DIR", "--prompts", prompts, "-o", tmp_path / "out.yaml")
    monkeypatch.setattr("ditopt.cli.load_pipeline", lambda *given: "pipe")

    def fails_with(error: BaseException) -> None:
        def check_inputs(*given: object, **named: object) -> None:
            raise error

        monkeypatch.setattr(ditopt.api, "optimize", check_inputs)

    fails_with(PlanError("the plan [is] bad"))
    assert "ditopt: the plan [is] bad" in refused(*words)
    fails_with(ValueError("height is 33; it must be a multiple of 4"))
    assert "refuses its arguments: height is 33" in refused(*words)
    fails_with(KeyboardInterrupt())
    done = run(*words)
    assert done.exit_code == 130 and "run the same command again" in done.output


def test_an_unforeseen_error_keeps_its_traceback(plan_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(Plan, "load", broken)
    with pytest.raises(ValueError, match="a bug"):
        run("show", plan_file)


def test_doctor_reports_and_fails_where_something_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ditopt.report.doctor, "findings", lambda: iter([Finding("torch", "2.13")]))
    done = run("doctor")
    assert done.exit_code == 0 and "torch" in done.stdout
    monkeypatch.setattr(ditopt.report.doctor, "findings", lambda: iter([Finding("cache", "is not writable", True)]))
    done = run("doctor")
    assert done.exit_code == 1 and "BROKEN" in done.stdout


def test_doctor_on_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DITOPT_CACHE", str(tmp_path))
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "bad.yaml").write_text("no plan")
    found = {finding.name: finding for finding in ditopt.report.doctor.findings() if finding.name}
    assert {"torch", "device", "C++ compiler", "triton", "cache", "plans", "private interfaces"} <= set(found)
    assert found["sparse kernel"].text.startswith("present, bfloat16 ")
    assert ("with int8" in found["sparse kernel"].text) == (int8_refusal(torch.device("cpu")) is None)
    refused = gpu_refusal(torch.device("cuda"))
    assert found["GPU sparse kernel"].text.startswith("present" if refused is None else f"absent: {refused}")
    assert found["triton"].text.startswith("present" if triton_missing() is None else "absent")
    assert not found["private interfaces"].broken, found["private interfaces"]
    assert found["plans"].text.startswith("1 in")
    assert any(finding.broken and "bad.yaml" in finding.text for finding in ditopt.report.doctor.findings())


def test_settings_are_yaml() -> None:
    assert pipe_settings(None, None, ["height=64", "a=true", "b=x y", "c=1.5"]) == {
        "height": 64, "a": True, "b": "x y", "c": 1.5,
    }  # fmt: skip
    for text in ("height", "=3", "a b=3", "a=[1"):
        with pytest.raises(InputError, match="--set"):
            pipe_settings(None, None, [text])


def test_prompts_are_lines(prompts: Path) -> None:
    assert read_prompts(prompts) == ["a red circle", "a blue square"]
