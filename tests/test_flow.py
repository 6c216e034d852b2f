"""The flow's table: what is run, what is kept, and that no missed goal is hidden. No model is run here."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import flow
from benchmarks.flow import Part, Settings
from benchmarks.goals import GOALS, Goal, checks
from ditopt.plan import Plan

NAMES = ["unguided-42", "unguided-36", "guided-42", "guided-36"]


def figures_of(goal: Goal) -> dict[str, Any]:
    """A benchmark's figures that meet every bound, each by a little."""
    quality = goal.psnr_db + 0.1
    return {
        "psnr_db": quality,
        "speedup_vs_inductor": goal.speedup + 0.01,
        "fewer_steps": {"psnr_db": quality - 6.1},
        "unipc": {"psnr_db": quality - 3.1},
        "dpmpp": {"psnr_db": quality - 3.1},
        "converged": {"optimized_db": 36.0, "dense_db": 36.0, "gain_stderr_db": 1.0},
        "attribute_score": {"dense": 0.9, "optimized": 0.89, "prompts": 64},
        "graph_breaks": 0,
        "recompiles": 0,
        "variants": 8,
        "versions": {"torch": "2"},
    }


class Bench:
    """Stands in for the search and the benchmark: writes files, remembers what it was asked for."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder, self.model = folder, folder / "model"
        self.model.mkdir()
        (self.model / "weights.safetensors").write_bytes(b"1")
        (self.model / "calibration_prompts.txt").write_text("a\n")
        (self.model / "prompts.txt").write_text("b\n")
        self.found = Plan.load(root / "docs/results/unguided-4.5x.plan.yaml")
        self.plans = dict.fromkeys(NAMES, self.found)
        self.figures = {goal.name: figures_of(goal) for goal in GOALS}
        self.asked: list[str] = []
        self.broken: str | None = None
        self.interrupted = False

    def optimize(self, part: Part) -> None:
        self.asked.append(f"optimize {part.goal.name}")
        if part.goal.name == self.broken:
            raise subprocess.CalledProcessError(2, "ditopt optimize")
        self.plans[part.goal.name].save(part.plan)

    def bench(self, parts: Sequence[Part]) -> None:
        self.asked.append(f"bench {' '.join(part.goal.name for part in parts)}")
        if self.interrupted:
            raise KeyboardInterrupt
        for part in parts:
            part.figures.write_text(json.dumps(self.figures[part.goal.name]))

    def run(self, *words: object) -> int:
        """The exit status of the flow."""
        self.asked.clear()
        told = ["--model", self.model, "--out", self.folder / "out", "--json", self.folder / "results" / "flow.json"]
        return flow.main([str(word) for word in (*told, *words)])

    @property
    def table(self) -> dict[str, Any]:
        """What was written, by part."""
        return {part["name"]: part for part in json.loads((self.folder / "results" / "flow.json").read_text())["parts"]}

    @property
    def markdown(self) -> str:
        return (self.folder / "results" / "flow.md").read_text()


@pytest.fixture
def desk(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    desk = Bench(root, tmp_path)
    (tmp_path / "code" / "ditopt" / "search").mkdir(parents=True)
    (tmp_path / "code" / "ditopt" / "search" / "solve.py").write_text("1")
    (tmp_path / "code" / "passes").mkdir()
    monkeypatch.setattr(flow, "ROOT", tmp_path / "code")
    monkeypatch.setattr(flow, "optimize", desk.optimize)
    monkeypatch.setattr(flow, "bench", desk.bench)
    monkeypatch.setattr(flow, "report", lambda part: None)
    return desk


def test_the_goals_are_those_of_the_issue() -> None:
    told = {goal.name: (goal.guidance, goal.psnr_db, goal.speedup) for goal in GOALS}
    assert told == {
        "unguided-42": (1.0, 42.0, 3.0),
        "unguided-36": (1.0, 36.0, 4.5),
        "guided-42": (4.0, 42.0, 2.0),
        "guided-36": (4.0, 36.0, 2.6),
    }


def test_a_plan_is_asked_for_speed_and_quality(desk: Bench) -> None:
    told = [Part(goal, Settings(desk.model, desk.folder / "out", 2, 4)).words for goal in GOALS]
    assert told[0] == ("--target-speedup", 3.2, "--min-psnr", 43.0, "--guidance", 1.0)
    assert told[3] == ("--target-speedup", 2.75, "--min-psnr", 38.0, "--guidance", 4.0)
    for goal in GOALS:
        assert goal.asked > goal.speedup and goal.asked_db >= goal.psnr_db


def test_all_met_is_success_and_parts_of_one_guidance_share_a_benchmark(
    desk: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    assert desk.run() == 0
    assert desk.asked == [
        "optimize unguided-42", "optimize unguided-36", "bench unguided-42 unguided-36",
        "optimize guided-42", "optimize guided-36", "bench guided-42 guided-36",
    ]  # fmt: skip
    assert [part["status"] for part in desk.table.values()] == ["met"] * 4
    assert desk.markdown.count("| yes |") == 4 * 10 and "NO" not in desk.markdown
    assert "[1/6] optimize unguided-42" in capsys.readouterr().out


def test_every_task_is_announced_with_an_eta(desk: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    desk.run()
    told = [line for line in capsys.readouterr().out.splitlines() if "ETA" in line]
    assert len(told) == 6


SPOILS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "× Inductor": lambda f: f.update(speedup_vs_inductor=2.9),
    "PSNR dB": lambda f: f.update(psnr_db=41.9),
    "dB above fewer_steps": lambda f: f["fewer_steps"].update(psnr_db=37.0),
    "dB above unipc": lambda f: f["unipc"].update(psnr_db=None),
    "dB above dpmpp": lambda f: f["dpmpp"].update(psnr_db=40.0),
    "dB nearer to converged": lambda f: f["converged"].update(optimized_db=35.99),
    "attribute score kept": lambda f: f["attribute_score"].update(optimized=0.889),
    "graph breaks": lambda f: f.update(graph_breaks=1),
    "recompiles": lambda f: f.update(recompiles=1),
    "variants": lambda f: f.update(variants=9),
}


@pytest.mark.parametrize("name", SPOILS)
def test_a_missed_bound_is_shown_and_fails(name: str, desk: Bench) -> None:
    SPOILS[name](desk.figures["unguided-42"])
    assert desk.run() == 1
    part = desk.table["unguided-42"]
    assert part["status"] == "missed"
    assert name in [check["name"] for check in part["checks"] if not check["met"]]
    assert "| unguided-42 | **missed** |" in desk.markdown and "| NO |" in desk.markdown
    assert desk.table["unguided-36"]["status"] == "met"


def test_what_was_not_measured_is_missed() -> None:
    figures = copy.deepcopy(figures_of(GOALS[0]))
    figures["attribute_score"] = None
    assert [check.name for check in checks(GOALS[0], figures) if not check.met] == ["attribute score kept"]
    assert not any(check.met for check in checks(GOALS[0], None))


def test_rivals_in_the_dtype_of_the_plan_are_held_to_the_same_margins(desk: Bench) -> None:
    figures = desk.figures["guided-42"]
    figures |= {"dense_cast": {"psnr_db": 50.0}, "fewer_steps_cast": {"psnr_db": 37.1}, "unipc_cast": {"psnr_db": 30.0}}
    assert desk.run() == 1
    assert desk.table["guided-42"]["status"] == "missed"
    assert "| guided-42 | dB above fewer_steps in the plan's dtype | 5 | ≥ 6 | NO |" in desk.markdown
    assert "| guided-42 | dB above unipc in the plan's dtype | 12.1 | ≥ 3 | yes |" in desk.markdown
    assert "| guided-42 | dB above dpmpp in the plan's dtype | not measured | ≥ 3 | NO |" in desk.markdown


def test_no_noise_excuses_a_loss_against_converged_runs() -> None:
    figures = figures_of(GOALS[0])
    for stderr, loss, met in ((0.1, 0.0, True), (0.1, -0.2, True), (0.1, 0.01, False), (9.0, 0.01, False)):
        figures["converged"] = {"optimized_db": 36 - loss, "dense_db": 36.0, "gain_stderr_db": stderr}
        found = next(check for check in checks(GOALS[0], figures) if check.name == "dB nearer to converged")
        assert found.met == met and found.bound == 0


def test_one_part_can_be_run_alone(desk: Bench) -> None:
    assert desk.run("--only", "guided-36") == 0
    assert desk.asked == ["optimize guided-36", "bench guided-36"]
    assert {name: part["status"] for name, part in desk.table.items()} == {
        **dict.fromkeys(NAMES, "not run"),
        "guided-36": "met",
    }


def test_a_missed_part_is_not_hidden_by_running_another(desk: Bench) -> None:
    desk.figures["unguided-36"]["recompiles"] = 3
    assert desk.run("--only", "unguided-36") == 1
    assert desk.run("--only", "guided-36") == 1
    assert desk.asked == ["optimize guided-36", "bench guided-36"]
    assert desk.table["unguided-36"]["status"] == "missed" and desk.table["guided-36"]["status"] == "met"


def test_what_is_finished_is_kept_until_its_inputs_change(desk: Bench) -> None:
    assert desk.run() == 0 and desk.asked
    assert desk.run() == 0 and desk.asked == []
    assert desk.run("--limit", "3") == 0
    assert desk.asked == ["bench unguided-42 unguided-36", "bench guided-42 guided-36"]
    (desk.model / "weights.safetensors").write_bytes(b"2")
    assert desk.run("--limit", "3", "--only", "unguided-42") == 0
    assert desk.asked == ["optimize unguided-42", "bench unguided-42"]
    assert desk.table["guided-42"]["status"] == "not run", "figures of other weights are no figures"


def edit_source(desk: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    (desk.folder / "code" / "ditopt" / "search" / "solve.py").write_text("2")


def add_source(desk: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    (desk.folder / "code" / "passes" / "new.py").write_text("")


def change_library(desk: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {**flow.surroundings(), "torch": "0"}
    monkeypatch.setattr(flow, "surroundings", lambda: found)


def change_processor(desk: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {**flow.surroundings(), "cpu": "another"}
    monkeypatch.setattr(flow, "surroundings", lambda: found)


@pytest.mark.parametrize("change", [edit_source, add_source, change_library, change_processor])
def test_what_other_code_or_another_machine_made_is_not_current(
    change: Callable[[Bench, pytest.MonkeyPatch], None], desk: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert desk.run() == 0
    change(desk, monkeypatch)
    assert desk.run("--only", "unguided-42") == 0
    assert desk.asked == ["optimize unguided-42", "bench unguided-42"]
    assert [desk.table[name]["status"] for name in NAMES] == ["met", "not run", "not run", "not run"]
    assert desk.table["guided-42"]["figures"] is None


def test_a_source_edited_during_the_search_makes_its_plan_stale(desk: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def optimize(part: Part) -> None:
        desk.optimize(part)
        edit_source(desk, monkeypatch)

    monkeypatch.setattr(flow, "optimize", optimize)
    assert desk.run("--only", "unguided-42") == 1
    assert desk.table["unguided-42"]["status"] == "not run"


def test_the_digest_is_of_every_source_of_this_repository(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert root == flow.ROOT and all(any((root / folder).rglob("*.py")) for folder in flow.SOURCES)
    seen: list[Path] = []

    def recorded(files: Iterable[Path], below: Path) -> str:
        seen.extend(files)
        return ""

    monkeypatch.setattr(flow, "digest", recorded)
    flow.source_digest()
    assert {path.suffix for path in seen} >= {".py", ".cpp"} and root / "ditopt/verify.py" in seen
    assert set(flow.surroundings()) == {"torch", "diffusers", "cpu"}


def test_an_interrupted_run_goes_on(desk: Bench) -> None:
    desk.interrupted = True
    assert desk.run("--only", "unguided-42") == 130
    desk.interrupted = False
    assert desk.run("--only", "unguided-42") == 0
    assert desk.asked == ["bench unguided-42"]


def test_a_search_without_a_plan_is_a_missed_goal_and_is_not_measured(desk: Bench) -> None:
    desk.plans["unguided-42"] = desk.found.model_copy(update={"rules": (), "measured": {"dense": "nothing was faster"}})
    assert desk.run() == 1
    assert desk.asked[2] == "bench unguided-36"
    assert desk.table["unguided-42"]["status"] == "missed"
    assert "| unguided-42 | **missed: stays dense: nothing was faster** |" in desk.markdown
    assert "| unguided-42 | × Inductor | not measured | ≥ 3 | NO |" in desk.markdown


def test_a_part_that_fails_leaves_the_others(desk: Bench) -> None:
    desk.broken = "unguided-42"
    assert desk.run() == 1
    assert desk.table["unguided-42"]["status"] == "failed"
    assert "ditopt optimize" in desk.table["unguided-42"]["reason"]
    assert [desk.table[name]["status"] for name in NAMES[1:]] == ["met"] * 3


def test_the_benchmark_gets_what_the_command_line_says(desk: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    import ditopt.bench
    import ditopt.cli_inputs

    class Result:
        def save(self, path: Path) -> None:
            path.write_text("figures")

    given: dict[str, Any] = {}

    def run_benches(pipe: object, plans: Sequence[Any], prompts: Sequence[str], **settings: Any) -> list[Result]:
        given.update(pipe=pipe, plans=[each.source for each in plans], prompts=prompts, **settings)
        return [Result() for _ in plans]

    monkeypatch.setattr(ditopt.bench, "run_benches", run_benches)
    monkeypatch.setattr(ditopt.cli_inputs, "load_pipeline", lambda model, *rest: f"pipeline of {model}")
    (desk.model / "prompts.txt").write_text("a\nb\nc\nd\n")
    parts = [Part(goal, flow.Settings(desk.model, desk.folder, 2, 3)) for goal in GOALS[2:]]
    for part in parts:
        part.folder.mkdir()
        desk.found.save(part.plan)
    flow.bench_here(parts)
    assert given["pipe"] == f"pipeline of {desk.model}"
    assert given["plans"] == [str(part.plan) for part in parts]
    assert (given["prompts"], given["score_prompts"]) == (["a", "b"], ["a", "b", "c"])
    assert given["settings"] == {"guidance_scale": 4.0}
    assert [part.figures.read_text() for part in parts] == ["figures"] * 2


def test_a_benchmark_that_dies_is_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="the benchmark ended with 1"):
        flow.bench([Part(GOALS[0], flow.Settings(tmp_path / "nowhere", tmp_path, 1, 1))])
    assert "no such file" in capfd.readouterr().err
