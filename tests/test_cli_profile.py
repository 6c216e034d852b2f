"""The commands about profiles: what they hand on, what they write, and what bad input gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import ditopt.api
from ditopt.cli import app
from ditopt.cli_profile import Collect, read_geometry
from ditopt.errors import InputError
from ditopt.geometry import Geometry
from ditopt.plan import Plan
from ditopt.profile import Profile
from ditopt.profile_file import fingerprint
from ditopt.techniques import COLLECTORS, LINEAR_REST
from tests.made_profiles import made_profile, toy_profile


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue square\n")
    return tmp_path / "prompts.txt"


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    toy_profile().save(tmp_path / "p.profile")
    return tmp_path / "p.profile"


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "150"}, catch_exceptions=False)


def ok(*words: object) -> str:
    done = run(*words)
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def refused(*words: object) -> str:
    done = run(*words)
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    return " ".join(done.output.split())


def test_profile_hands_everything_on(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    loaded: list[tuple[Any, ...]] = []

    def take(*given: Any, **named: Any) -> Profile:
        seen.append((given, named))
        return made_profile()

    def load(*given: Any) -> str:
        loaded.append(given)
        return "pipe"

    monkeypatch.setattr("ditopt.cli_profile.load_pipeline", load)
    monkeypatch.setattr(ditopt.api, "profile_model", take)
    out = tmp_path / "p.profile"
    told = ok(
        "profile", "DIR", "--prompts", prompts, "-o", out, "--steps", "30", "--guidance", "4", "--set", "height=64",
        "--seed", "7", "--technique", "reuse", "--technique", "ranges", "--collect", "patterns", "--collect",
        "attention", "--geometry", "6x16x16+12", "--no-resume", "--dtype", "bfloat16", "--device", "cpu",
        "--trust-remote-code",
    )  # fmt: skip
    texts = ["a red circle", "a blue square"]
    settings = {"num_inference_steps": 30, "guidance_scale": 4.0, "height": 64}
    assert seen[0] == (
        ("pipe", texts),
        {
            "pipe_kwargs": settings, "seed": 7, "techniques": ["reuse", "ranges"], "collect": ["patterns", "attention"],
            "geometry": Geometry(6, 16, 16, 12), "resume": False, "quiet": False,
        },
    )  # fmt: skip
    assert loaded == [("DIR", True, "bfloat16", "cpu")]
    assert fingerprint(Profile.load(out)) == fingerprint(made_profile()) and f"profile: {out}" in told
    ok("profile", "DIR", "--prompts", prompts, "-o", out)
    assert seen[1] == (
        ("pipe", texts),
        {
            "pipe_kwargs": {}, "seed": 0, "techniques": None, "collect": None, "geometry": None, "resume": True,
            "quiet": False,
        },
    )  # fmt: skip


def test_the_fake_is_called_as_the_real_one_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    import inspect

    accepted = inspect.signature(ditopt.api.profile_model).parameters
    assert {"pipe_kwargs", "seed", "techniques", "collect", "geometry", "resume", "quiet"} <= set(accepted)


def test_profile_refuses_before_the_long_work(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditopt.cli_profile.load_pipeline", lambda *given: pytest.fail("it began"))
    out = tmp_path / "p.profile"
    assert "no such file" in refused("profile", "DIR", "--prompts", tmp_path / "none", "-o", out)
    assert "should be frames x rows x columns" in refused(
        "profile", "DIR", "--prompts", prompts, "-o", out, "--geometry", "6x16"
    )
    assert "does not exist" in refused("profile", "DIR", "--prompts", prompts, "-o", tmp_path / "none" / "p.profile")
    assert "is a folder; give the name of a file" in refused("profile", "DIR", "--prompts", prompts, "-o", tmp_path)
    assert "'magic' is not one of" in refused("profile", "DIR", "--prompts", prompts, "-o", out, "--collect", "magic")


def test_a_geometry_is_read() -> None:
    assert read_geometry(" 6x16x8 ") == Geometry(6, 16, 8)
    assert read_geometry("1x4x4+7") == Geometry(1, 4, 4, 7)
    assert read_geometry("7+1x4x4") == Geometry(1, 4, 4, 7, text_first=True)
    for wrong in ("", "6x16", "6x16x8x2", "a", "1+2x2x2+3", "-1x2x2", "2x2x2+", "0x2x2"):
        with pytest.raises(InputError):
            read_geometry(wrong)


def test_what_can_be_collected_is_what_the_profiler_knows() -> None:
    assert tuple(each.value for each in Collect) == (*COLLECTORS, LINEAR_REST)


def test_merge_writes_one_profile(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.profile" for name in "abc"]
    for seed, path in enumerate(paths):
        made_profile(seed, prompts=seed + 1, device="H100" if seed == 2 else "EPYC").save(path)
    out = tmp_path / "all.profile"
    told = ok("merge", *paths, "-o", out)
    assert f"profile: {out}, 6 prompts from 3 profiles" in told
    assert "seconds measured on H100 are left out" in told and "reason 1" not in told
    merged = Profile.load(out)
    assert len(merged.prompts) == 6 and {"reason 0", "reason 1", "reason 2"} <= set(merged.reasons)
    ok("merge", paths[0], paths[1], "-o", paths[0])
    assert len(Profile.load(paths[0]).prompts) == 3


def test_merge_says_what_cannot_be(tmp_path: Path, toy: Path) -> None:
    made_profile().save(tmp_path / "a.profile")
    out = tmp_path / "all.profile"
    assert "is one profile; give two or more" in refused("merge", toy, "-o", out)
    told = refused("merge", tmp_path / "a.profile", toy, "-o", out)
    assert f"{toy} and {tmp_path / 'a.profile'}: profiles cannot be merged: networks" in told
    assert "no such profile" in refused("merge", toy, tmp_path / "none.profile", "-o", out)
    toy.write_bytes(toy.read_bytes()[:-100])
    assert "was cut short" in refused("merge", tmp_path / "a.profile", toy, "-o", out)
    assert not out.exists()


def test_search_finds_a_plan_without_the_model(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITOPT_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "plan.yaml"
    told = ok("search", toy, "--max-rel-error", "0.01", "-o", out)
    plan = Plan.load(out)
    assert plan.rules and not plan.measured and plan.target == {"max_rel_error": 0.01}
    assert 0 < plan.predicted["relative_error"] <= 0.01 and plan.predicted["speedup"] > 1.5
    assert "predicted, not measured" in told and f"{plan.predicted['speedup']:.2f}x" in told
    assert f"not verified: measure it with `ditopt bench DIR --plan {out}" in told
    side = json.loads((tmp_path / "plan.explain.json").read_text())
    assert side["reasons"][0].startswith("not verified: no rollout has been made")
    assert any(reason.startswith("found in p.profile, sha256:") for reason in side["reasons"])
    assert "computed" in ok("show", out) and "no rollout has been made" in ok("explain", out, "--all")
    ok("report", out, "-o", tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_search_hands_its_target_on(toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.yaml"
    ok("search", toy, "--quality", "fast", "-o", out)
    assert Plan.load(out).target == {"min_psnr": 32.0} and Plan.load(out).predicted["psnr"] >= 32
    ok("search", toy, "-o", out)
    assert Plan.load(out).target == {"min_psnr": 36.0}
    ok("search", toy, "--min-psnr", "60", "-o", out, "--technique", "reuse", "--technique", "forecast")
    kinds = {rule.do.kind for rule in Plan.load(out).rules}
    assert Plan.load(out).predicted["psnr"] >= 60 and kinds <= {"reuse", "forecast"}
    told = ok("search", toy, "--target-speedup", "900", "-o", out, "--max-variants", "2")
    assert "asked for 900x, predicted are" in told


def test_search_says_what_is_wrong(toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.yaml"
    assert "no such profile" in refused("search", tmp_path / "none.profile", "-o", out)
    assert "give one target" in refused("search", toy, "-o", out, "--max-rel-error", "0.1", "--min-psnr", "30")
    assert "makes no sense" in refused("search", toy, "-o", out, "--min-psnr", "-3")
    assert "magic" in refused("search", toy, "-o", out, "--technique", "magic")
    assert "does not exist" in refused("search", toy, "-o", tmp_path / "none" / "plan.yaml")
    plan = tmp_path / "other.yaml"
    plan.write_text("ditopt: 1\n")
    assert f"{plan}: is a plan" in refused("search", plan, "-o", out)
    made = made_profile()
    bare = Profile(made.networks, made.prompts, made.sample_norm)
    bare.save(toy)
    assert f"{toy}: the profile does not say what was profiled" in refused("search", toy, "-o", out)
    assert not out.exists()


def test_messages_say_what_the_file_is_and_what_does_not_go_together(toy: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    ok("search", toy, "--min-psnr", 20, "-o", plan)
    assert "is a plan; a profile is what `ditopt profile` writes" in refused("search", plan, "-o", tmp_path / "x.yaml")
    assert f"in a profile, `ditopt search {toy} -o PLAN` finds one" in refused("diff", toy, plan)
    assert "is no JSON" in refused("report", plan, "--bench", plan, "-o", tmp_path / "r.html")
    assert "is a folder; give the name of a file" in refused("report", plan, "-o", tmp_path)
    together = refused("search", toy, "--quality", "fast", "--min-psnr", 30, "-o", plan)
    assert "quality='fast' and min_psnr are given together" in together
    assert "give a number below 1" in refused("search", toy, "--max-rel-error", 7, "-o", plan)
    once = refused("search", toy, "--technique", "foo", "-o", plan)
    assert once.count(" reuse,") == 1
    assert toy.stat().st_mode & 0o777 == plan.stat().st_mode & 0o777
