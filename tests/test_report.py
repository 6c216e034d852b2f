"""The HTML report: what it says, and that it is one file which fetches and runs nothing."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from ditopt.cli import app
from ditopt.decisions import Dense, Fit, Forecast, Reuse
from ditopt.plan import DevicePrint, ModelPrint, Plan, Rule, SamplerPrint
from ditopt.report import charts
from ditopt.report.explained import Explained, side_path
from ditopt.report.figures import bench_notes, bench_rows, figure
from ditopt.report.html import render_report
from ditopt.report.picture import HIDDEN, kinds_in, pictures

TIMES = (1000.0, 800.0, 600.0, 400.0, 200.0)
HOSTILE = "<script>alert('x')</script>"

SIDE = {
    "explanations": {
        "transformer": [
            {
                "step": 2,
                "site": "step",
                "chosen": "forecast1",
                "objective": 3.5,
                "rivals": [{"name": "compute", "error": 0.0, "objective": math.inf, "reason": HOSTILE}],
            }
        ]
    },
    "trials": [
        {"kept": [0, 1], "evaluations": 3, "psnr": 38.0, "stage": "bisect", "met": True},
        {"kept": [0], "evaluations": 2, "psnr": 30.0, "stage": "refine", "met": False},
    ],
    "reasons": ["ranges: too few blocks"],
    "prompts": {"profiled": [HOSTILE], "held_out": ["a blue square"]},
    "timings": {"profile": 12.5},
    "table": [
        {"name": "ditopt", "seconds": 1.0, "speedup": 2.5, "psnr": 38.0, "worst_psnr": 36.0, "evaluations": 3},
        {"name": "dense, 3 steps", "seconds": 1.1, "speedup": 2.2, "psnr": 27.0, "worst_psnr": 25.0, "evaluations": 3},
    ],
    "profile": {
        "transformer": {
            "timesteps": TIMES,
            "sigmas": [t / 1000 for t in TIMES],
            "similarity": [[1 - abs(a - b) / 10 for a in range(5)] for b in range(5)],
            "sensitivity": [1.0, 1.2, 1.1, 1.0, 0.9],
            "range_weights": {},
            "seconds": {"full": 0.2},
        }
    },
}
BENCH: dict[str, Any] = {
    "steps": 5, "kept": 3, "dense_eager_s": 3.0, "dense_inductor_s": 2.0, "optimized_s": 0.5, "psnr_db": 41.5,
    "worst_psnr_db": 39.25, "rel_l2": 0.01, "ssim": 0.99, "prompts": 8, "graph_breaks": 0, "recompiles": 0,
    "fewer_steps": {"steps": 2, "seconds": 0.55, "psnr_db": 28.25, "worst_psnr_db": 26.0, "reason": None},
    "unipc": {"steps": 2, "seconds": None, "psnr_db": None, "reason": "does not run"},
    "converged": {"dense_db": 33.0, "optimized_db": 33.5}, "attribute_score": None,
}  # fmt: skip


@pytest.fixture
def plan() -> Plan:
    rules = (
        Rule(sites="step", steps=(2, 4), do=Forecast(order=2)),
        Rule(sites="step", steps=(4,), do=Fit(coefficients={4: (1.5, -0.5)}, sources={4: (3, 1)})),
        Rule(sites="blocks.*", steps=(1, 2), do=Reuse(), network="transf*"),
    )
    return Plan(
        model=ModelPrint(class_name="WanTransformer3DModel", structure="sha256:00ff", blocks=2),
        sampler=SamplerPrint(
            class_name="FlowMatchEulerDiscreteScheduler",
            steps=5,
            timesteps={"transformer": TIMES},
            sigmas={"transformer": tuple(t / 1000 for t in TIMES)},
        ),
        device=DevicePrint(device="EPYC, 2 cores", torch="2.13.0", dtype="float32"),
        target={"min_psnr": 36.0},
        measured={"psnr": 38.25, "speedup": 2.5, "variants": 3, "fewer_steps": {"steps": 3, "psnr": 27.9}},
        rules=rules,
    )


class _Page(HTMLParser):
    """Collects tags and what could fetch or run something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.outside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta",):
            self.open.append(tag)
        self.outside += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href") or name.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_tells_everything_and_fetches_nothing(plan: Plan) -> None:
    text = render_report(plan, Explained.model_validate(SIDE), BENCH, "plan.yaml")
    page = _Page(text)
    assert page.open == [] and page.outside == []
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "url(" not in text and "@import" not in text and "//" not in re.sub(r"<!doctype html>", "", text)
    assert page.tags.count("svg") >= 4  # schedule, trials, similarity, sensitivity
    for expected in (
        "WanTransformer3DModel", "2.5", "38.25", "transformer: 3 of 5 steps computed (0-1, 3)", "41.5", "28.25",
        "forecast1", "ranges: too few blocks", "dense, 3 steps", "EPYC, 2 cores", "sha256:00ff",
        "bisect: 3 evaluations, 38.00 dB", "target 36", "a blue square", "prefers-color-scheme: dark",
    ):  # fmt: skip
        assert expected in text, expected


def test_what_a_side_file_holds_is_text_and_never_markup(plan: Plan) -> None:
    text = render_report(plan, Explained.model_validate(SIDE), None, HOSTILE)
    assert HOSTILE not in text and "<script" not in text
    assert "&lt;script&gt;" in text


def test_a_plan_alone_makes_a_page_that_says_what_is_missing(plan: Plan) -> None:
    text = render_report(plan, None, None, "plan.yaml")
    assert "explain.json" in text and "Schedule" in text
    assert "Benchmark" not in text


def test_the_command_writes_the_page(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.yaml")
    page = tmp_path / "report.html"
    words = ["report", str(tmp_path / "plan.yaml"), "-o", str(page)]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0 and "plan.explain.json is not there" in done.output.replace("\n", "")
    side_path(tmp_path / "plan.yaml").write_text(json.dumps(SIDE))
    (tmp_path / "bench.json").write_text(json.dumps(BENCH))
    done = CliRunner().invoke(app, [*words, "--bench", str(tmp_path / "bench.json")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "Benchmark" in page.read_text()
    (tmp_path / "bench.json").write_text("{}")
    done = CliRunner().invoke(app, [*words, "--bench", str(tmp_path / "bench.json")], catch_exceptions=False)
    assert done.exit_code == 2 and "optimized_s" in done.output
    words[-1] = str(tmp_path / "no" / "report.html")
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 2


def test_the_picture_follows_the_plan(plan: Plan) -> None:
    (picture,) = pictures(plan)
    assert [row.site for row in picture.rows] == ["step", "blocks.*"]
    kinds = [[cell.kind for cell in row.cells] for row in picture.rows]
    assert kinds[0] == ["dense", "dense", "forecast2", "dense", "fit"]
    assert kinds[1] == ["dense", "reuse", HIDDEN, "dense", HIDDEN]
    assert "steps 3, 1, factors 1.5, -0.5" in picture.rows[0].cells[4].note
    assert kinds_in((picture,)) == ("dense", "reuse", "forecast2", "fit", HIDDEN)


def test_the_picture_shows_the_dtype_of_computed_steps(plan: Plan) -> None:
    cast = Rule(sites="step", steps=tuple(range(5)), do=Dense(dtype="bfloat16"))
    (picture,) = pictures(plan.model_copy(update={"rules": (cast, *plan.rules)}))
    kinds = [cell.kind for cell in picture.rows[0].cells]
    assert kinds == ["dense-bfloat16", "dense-bfloat16", "forecast2", "dense-bfloat16", "fit"]
    assert picture.rows[0].computed == (0, 1, 3) and "".join(cell.symbol for cell in picture.rows[0].cells) == "bb2bf"
    assert "in bfloat16" in picture.rows[0].cells[0].note


def test_the_picture_tells_that_computed_steps_are_simplified(plan: Plan) -> None:
    simple = Rule(sites="step", steps=tuple(range(5)), do=Dense(simplify=True))
    (before,), (after,) = pictures(plan), pictures(plan.model_copy(update={"rules": (simple, *plan.rules)}))
    assert after.summary == before.summary + ", these steps simplified (the same numbers to rounding, faster)"
    told = [step for step, cell in enumerate(after.rows[0].cells) if cell.note.endswith("computed, simplified")]
    assert told == [0, 1, 3], "a predicted step computes nothing"


def test_the_picture_tells_the_share_of_second_order(plan: Plan) -> None:
    finer = Rule(sites="step", steps=tuple(range(5)), do=Dense(second_order=0.25))
    (before,), (after,) = pictures(plan), pictures(plan.model_copy(update={"rules": (finer, *plan.rules)}))
    assert after.summary == before.summary + ", with 0.25 of the second-order formula"
    told = [step for step, cell in enumerate(after.rows[0].cells) if "second-order" in cell.note]
    assert told == [1, 3], "neither in the first computed step nor where a step is predicted"
    assert after.rows[0].cells[1].note == "step 1: computed, returned with 0.25 of the second-order formula"
    assert [cell.kind for cell in after.rows[0].cells] == [cell.kind for cell in before.rows[0].cells]


def test_rivals_in_a_dtype_say_so() -> None:
    rules: list[dict[str, Any]] = [{"sites": "step", "steps": "1", "do": {"dense": {"second_order": 0.25}}}]
    assert bench_rows({"plan": {"rules": rules}})[-1][0] == "optimised", "no dtype of its own, no rivals in one"
    rules += [{"sites": "step", "steps": "0-4", "do": {"dense": {"dtype": "bfloat16"}}}]
    cast = {"steps": 5, "seconds": 1.0, "psnr_db": 60.0, "worst_psnr_db": 58.0}
    fewer = {"steps": 3, "seconds": 0.5, "psnr_db": 30.0, "worst_psnr_db": 28.0}
    bench = {**BENCH, "plan": {"rules": rules}, "dense_cast": cast, "fewer_steps_cast": fewer, "unipc_cast": None}
    rows = {row[0]: row[1:] for row in bench_rows(bench)}
    assert list(rows)[3:] == ["fewer steps", "dense, bfloat16", "fewer steps, bfloat16"]
    assert rows["dense, bfloat16"] == (5, 1.0, 2.0, 60.0, 58.0)
    assert rows["fewer steps, bfloat16"] == (3, 0.5, 4.0, 30.0, 28.0)


def test_the_side_file_round_trips(tmp_path: Path) -> None:
    explained = Explained.model_validate(SIDE)
    explained.save(tmp_path / "plan.explain.json")
    assert Explained.load(tmp_path / "plan.explain.json") == explained


def test_benchmark_rows_leave_out_rivals_without_figures() -> None:
    rows = {row[0]: row[1:] for row in bench_rows(BENCH)}
    assert list(rows) == ["dense, eager", "dense, Inductor", "optimised", "fewer steps"]
    assert rows["optimised"] == (3, 0.5, 4.0, 41.5, 39.25)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (math.nan, "–"),
        (3.14159, "3.142"),
        (7, "7"),
        ("x", "x"),
        ({"steps": 6, "psnr": 2.5}, "steps 6, psnr 2.5"),
        ((1, 2), "1, 2"),
    ],
)
def test_figures_for_people(value: Any, text: str) -> None:
    assert figure(value) == text


numbers = st.floats(-1e6, 1e6, allow_nan=False)


@given(numbers, numbers)
def test_ticks_cover_their_range_with_few_round_numbers(one: float, two: float) -> None:
    low, high = min(one, two), max(one, two)
    found = charts.ticks(low, high)
    slack = 1e-6 * max(abs(low), abs(high), high - low, 1e-300)
    assert found[0] <= low + slack and found[-1] >= high - slack
    assert 2 <= len(found) <= 12
    assert found == sorted(set(found))


def test_charts_bear_degenerate_input() -> None:
    assert "svg" in charts.scatter([charts.Point(1, 1, "one", "met"), charts.Point(2, math.inf, "no", "met")], "x", "y")
    assert "svg" in charts.curve([1.0], "x", "y")
    assert "svg" in charts.heat_map([[1.0]], "m")
    assert "svg" in charts.heat_map([[math.nan, 1.0], [1.0, math.nan]], "m")
    assert charts.heat_map([[0.0] * 200] * 200, "m").count("<rect") <= 64 * 64


def test_what_a_benchmark_says_beside_its_table() -> None:
    assert bench_notes({"converged": None}) == []
    figures = {
        "converged": {"dense_db": 42.87, "optimized_db": 33.43},
        "attribute_score": {"dense": 0.8276, "optimized": 0.7931},
    }
    assert bench_notes(figures) == [
        "to a converged run: dense 42.87 dB, optimised 33.43 dB",
        "attribute score: dense 0.8276, optimised 0.7931",
    ]
