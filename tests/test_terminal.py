"""The terminal's twins of the report: what a profile holds, and what is known of one site."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from ditopt.cli import app
from tests.report_pages import write_all
from tests.report_profiles import make_profile


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "120"}, catch_exceptions=False)


def refused(*words: object) -> str:
    """The message of a command that must fail as the user's mistake."""
    done = run(*words)
    assert done.exit_code == 2, done.output
    return str(done.output).replace("\n", " ")


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return write_all(tmp_path)


@pytest.fixture
def profile(plan: Path) -> Path:
    return plan.with_name("p.profile")


def test_show_tells_what_a_profile_holds(profile: Path) -> None:
    done = run("show", profile)
    assert done.exit_code == 0, done.output
    for expected in (
        "WanTransformer3DModel, 8 blocks, sha256:00ff", "prompts: 2",
        "10 steps, 1 branch, geometry of 3 x 8 x 8 tokens", "attention of 16 sites", "S spatial 7 (29%)",
        "· idle 1 (4%)", "self-attention output", "int8, smoothed",
        "tokens: 3 sites left out",
    ):  # fmt: skip
        assert expected in done.stdout, expected
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("blocks.7.attn1")] == ["blocks.7.attn1  TL·"]


def test_show_bears_a_profile_without_tables(tmp_path: Path) -> None:
    make_profile(tables=False).save(tmp_path / "bare.profile")
    done = run("show", tmp_path / "bare.profile")
    assert done.exit_code == 0 and "features of the step and of ranges of blocks only" in done.stdout
    assert "what a range of blocks adds" in done.stdout


def test_explain_tells_all_that_is_known_of_a_head(profile: Path) -> None:
    text = run("explain", profile, "blocks.3.attn1").stdout
    for expected in ("self-attention, 192 queries", "temporal", "own frame", "spatial, frames 0", "steps earlier"):
        assert expected in text, expected
    grid = text.partition("error of patterns, the least on average first")[2].partition("└")[0]
    patterns = [line.split("│")[1].strip() for line in grid.splitlines() if line.count("│") == 6 and "%" in line]
    assert len(patterns) == 4


def test_explain_tells_of_every_kind_of_site(profile: Path) -> None:
    assert "output SNR in dB" in run("explain", profile, "blocks.3.attn1.to_q").stdout
    assert "growth of an error" in run("explain", profile, "step").stdout
    assert "MLP output" in run("explain", profile, "blocks.3.ffn").stdout
    planted = run("explain", profile, "rollouts").stdout
    assert "blocks.8.ffn, step 5, noise" in planted and "noise at a module: measured 1.1 times" in planted
    tokens = run("explain", profile, "blocks.4").stdout
    assert "change" in tokens, "a collector without words of its own has its range"


def test_an_unknown_site_is_refused_with_near_ones(plan: Path, profile: Path) -> None:
    message = refused("explain", profile, "blocks.3.atn1")
    assert "knows no site 'blocks.3.atn1'" in message and "blocks.3.attn1" in message
    assert "blocks.3.attn1, blocks.3.attn2" in refused("explain", profile, "blocks.3")
    assert "blocks.2..5" in refused("explain", plan, "blocks.2..6")
    assert "name the site" in refused("explain", profile)
    assert "--all is for plans" in refused("explain", profile, "step", "--all")


def test_explain_of_a_plan_can_be_about_one_site(plan: Path) -> None:
    text = run("explain", plan, "blocks.3").stdout
    assert "blocks.3  ■■=·■··=■■" in text
    assert "step 2, blocks.2..5" in text and "forecast1" not in text
    assert "takes 0.13 s more" in text
    steps = run("explain", plan, "step").stdout
    assert "steps 3, 5-6, step" in steps and "blocks.2..5" not in steps
    assert "its error is 3 times" in run("explain", plan, "step", "--step", "5").stdout


def test_reasons_that_are_equal_are_told_once(plan: Path) -> None:
    text = run("explain", plan).stdout
    assert "steps 3, 5-6, step" in text and "step 2, blocks.2..5" in text


def test_a_broken_profile_is_one_line(profile: Path) -> None:
    profile.write_bytes(profile.read_bytes()[:-100])
    for words in (("show", profile), ("explain", profile, "step"), ("report", profile, "-o", profile.with_name("r"))):
        assert "p.profile" in refused(*words)
