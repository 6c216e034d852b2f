"""The HTML report: what it says, and that it is one file which fetches nothing."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from typer.testing import CliRunner

from ditopt.cli import app
from ditopt.decisions import Dense, Fit, Forecast, Reuse, Sparse
from ditopt.geometry import Geometry
from ditopt.plan import DevicePrint, ModelPrint, Plan, Rule, SamplerPrint
from ditopt.report import charts, svg
from ditopt.report.explained import Explained, side_path
from ditopt.report.figures import bench_notes, bench_rows, figure
from ditopt.report.html import render_report
from ditopt.report.picture import HIDDEN, kinds_in, pictures
from ditopt.report.samples import Samples, samples_path
from tests.report_pages import make_clips, write_all
from tests.report_profiles import make_profile

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
    """Collects tags and what could fetch something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.outside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)
        for name, value in attrs:
            inside = (value or "").startswith("#" if name == "href" else "data:image/png;base64,")
            if (name in ("src", "href") and not inside) or name.startswith("on"):
                self.outside.append(f"{tag} {name} {value}")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_tells_everything_and_fetches_nothing(plan: Plan) -> None:
    clips = Samples(make_clips(), {"prompt": "a red circle", "seed": "7"})
    text = render_report(plan, Explained.model_validate(SIDE), BENCH, "plan.yaml", make_profile(layers=2), clips)
    page = _Page(text)
    assert page.open == [] and page.outside == []
    assert not {"link", "iframe", "object", "form"} & set(page.tags)
    assert page.tags.count("script") == 1 and page.tags.count("img") > 12
    written = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text)
    assert "url(" not in written and "@import" not in written and "://" not in written
    assert "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:" in text
    assert page.tags.count("svg") >= 4  # schedule, trials, similarity, sensitivity
    for expected in (
        "WanTransformer3DModel", "2.5", "38.25", "transformer: 3 of 5 steps computed (0-1, 3)", "41.5", "28.25",
        "forecast1", "ranges: too few blocks", "dense, 3 steps", "EPYC, 2 cores", "sha256:00ff",
        "bisect: 3 evaluations, 38.00 dB", "target 36", "a blue square", "prefers-color-scheme: dark",
        "4.00× faster at 41.5 dB", "“a red circle”, seed 7", "self-attention output", "int8, smoothed",
    ):  # fmt: skip
        assert expected in text, expected


def test_what_a_side_file_holds_is_text_and_never_markup(plan: Plan) -> None:
    profile = make_profile(layers=2)
    part = profile.networks["transformer"]
    tables = {name: {HOSTILE: next(iter(of_sites.values()))} for name, of_sites in part.tables.items()}
    profile = replace(profile, networks={"transformer": replace(part, tables=tables)}, prompts=(HOSTILE,))
    clips = Samples(make_clips(), {"prompt": HOSTILE})
    text = render_report(plan, Explained.model_validate(SIDE), {**BENCH, "prompts": HOSTILE}, HOSTILE, profile, clips)
    assert HOSTILE not in text and text.count("<script") == 1
    assert text.count("&lt;script&gt;") > 10


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


def test_the_command_takes_what_lies_beside_a_plan(tmp_path: Path) -> None:
    plan, page, profile = write_all(tmp_path), tmp_path / "report.html", tmp_path / "p.profile"
    words = ["report", str(plan), "-o", str(page)]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0 and "is not there" not in done.output
    text = page.read_text()
    assert "ditopt profile DIR --prompts FILE" in text, "what would show attention is said"
    assert "blocks.0.attn1" not in text and "differences to dense, ×" in text
    done = CliRunner().invoke(app, [*words, "--profile", str(profile)], catch_exceptions=False)
    assert done.exit_code == 0 and "blocks.0.attn1" in page.read_text()
    save_file({"dense": make_clips()["dense"][0]}, samples_path(plan))
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 2 and "should be uint8 [F, H, W, 3]" in done.output.replace("\n", " ")


def test_the_command_reports_on_a_profile_alone(tmp_path: Path) -> None:
    write_all(tmp_path)
    page, path, profile = tmp_path / "report.html", tmp_path / "renamed", tmp_path / "p.profile"
    path.write_bytes(profile.read_bytes())  # known by how it begins
    for source in (profile, path):
        done = CliRunner().invoke(app, ["report", str(source), "-o", str(page)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    text = page.read_text()
    assert "Profile of WanTransformer3DModel" in text and "blocks.0.attn1" in text and "<h2>Schedule" not in text
    words = ["report", str(path), "-o", str(page), "--bench", str(profile)]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 2 and "is a profile already" in done.output.replace("\n", " ")


def test_a_profile_of_another_model_is_refused(tmp_path: Path, plan: Plan) -> None:
    write_all(tmp_path)
    words = ["-o", str(tmp_path / "report.html"), "--profile", str(tmp_path / "p.profile")]
    other = plan.model_copy(update={"model": plan.model.model_copy(update={"structure": "sha256:ff"})})
    for wrong, expected in ((other, "of WanTransformer3DModel sha256:00ff"), (plan, "has 10 steps of transformer")):
        wrong.save(tmp_path / "wrong.yaml")
        done = CliRunner().invoke(app, ["report", str(tmp_path / "wrong.yaml"), *words], catch_exceptions=False)
        assert done.exit_code == 2 and expected in done.output.replace("\n", " "), done.output


def test_a_profile_without_tables_shows_what_it_has() -> None:
    text = render_report(None, None, None, "p.profile", make_profile(tables=False))
    assert "what a range of blocks adds" in text and "the whole step" in text
    assert "this profile has no table “attention”" in text


def test_the_picture_has_a_row_for_each_layer(plan: Plan) -> None:
    reused = Rule(sites="blocks.1..2", steps=(1,), do=Reuse())
    layers = [f"blocks.{i}" for i in range(4)]
    (picture,) = pictures(plan.model_copy(update={"rules": (plan.rules[0], reused)}), {"transformer": layers})
    assert [row.site for row in picture.rows] == ["step", *layers], "ranges of layers have no row of their own"
    assert [row.cells[1].kind for row in picture.rows] == ["dense", "dense", "reuse", "reuse", "dense"]
    assert [row.cells[2].kind for row in picture.rows[1:]] == [HIDDEN] * 4
    assert not picture.rows[0].layer and all(row.layer for row in picture.rows[1:])


def test_the_picture_follows_the_plan(plan: Plan) -> None:
    (picture,) = pictures(plan)
    assert [row.site for row in picture.rows] == ["step", "blocks.*"]
    kinds = [[cell.kind for cell in row.cells] for row in picture.rows]
    assert kinds[0] == ["dense", "dense", "forecast2", "dense", "fit"]
    assert kinds[1] == ["dense", "reuse", HIDDEN, "dense", HIDDEN]
    assert "steps 3, 1, factors 1.5, -0.5" in picture.rows[0].cells[4].note
    assert kinds_in((picture,)) == ("dense", "reuse", "forecast2", "fit", HIDDEN)


SKIP = Sparse(pattern='{"pattern": "skip"}')
TEMPORAL = Sparse(pattern='{"pattern": "temporal", "rows": 1}')
OF_HEADS = (
    Rule(sites="blocks.*.attn1", heads=(0, 2, 3), steps=(0, 1, 2), do=TEMPORAL),
    Rule(sites="blocks.1.attn1", heads=(2,), steps=(1,), do=SKIP),
)


def test_the_picture_tells_what_heads_do(plan: Plan) -> None:
    planned = plan.model_copy(update={"rules": (*plan.rules, *OF_HEADS)})
    (before,), (picture,) = pictures(plan), pictures(planned)
    assert picture.rows[: len(before.rows)] == before.rows
    one, other = picture.rows[len(before.rows) :]
    assert (one.site, other.site) == ("blocks.*.attn1", "blocks.1.attn1")
    assert [cell.kind for cell in other.cells] == ["sparse", "sparse", HIDDEN, "dense", HIDDEN]
    assert other.cells[1].note == "step 1: heads 0, 3: temporal, rows 1; heads 2: skip; other heads: dense"
    assert other.cells[3].note == "step 3: all heads: dense"
    assert picture.heads == (
        ("blocks.*.attn1", "blocks.*.attn1 heads 0, 2-3 @ 0-2: temporal, rows 1"),
        ("blocks.1.attn1", "blocks.1.attn1 heads 2 @ 1: skip"),
    )
    layers = {"transformer": [f"blocks.{i}" for i in range(4)]}
    (picture,) = pictures(planned, layers, "blocks.3.attn1")
    assert [row.site for row in picture.rows if not row.layer][1:] == [one.site, other.site, "blocks.3.attn1"]


def test_page_and_terminal_tell_the_heads_of_rules(tmp_path: Path, plan: Plan) -> None:
    path = tmp_path / "heads.yaml"
    of_heads = {"rules": (*plan.rules, *OF_HEADS), "tokens": {"transformer": Geometry(4, 8, 8)}}
    planned = plan.model_copy(update=of_heads)
    planned.save(path)
    assert "<code>blocks.*.attn1 heads 0, 2-3</code>" in render_report(planned, None, None, "heads.yaml")
    shown = CliRunner().invoke(app, ["show", str(path)], env={"COLUMNS": "120"}, catch_exceptions=False).stdout
    assert "blocks.*.attn1 heads 0, 2-3 @ 0-2: temporal, rows 1" in shown
    assert "transformer geometry of 4 x 8 x 8 tokens" in shown
    assert "s computed, some heads attend to a pattern of blocks only" in shown
    side_path(path).write_text("{}")
    told = CliRunner().invoke(app, ["explain", str(path), "blocks.3.attn1"], catch_exceptions=False)
    assert told.exit_code == 0 and "heads 0, 2-3 @ 0-2" in told.stdout and "skip" not in told.stdout


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
    found = svg.ticks(low, high)
    slack = 1e-6 * max(abs(low), abs(high), found[-1] - found[0])
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


def test_a_profile_of_two_networks_has_both_in_every_part() -> None:
    profile = make_profile(layers=2)
    part = profile.networks["transformer"]
    text = render_report(None, None, None, "p.profile", replace(profile, networks={"high": part, "low": part}, plan={}))
    assert _Page(text).open == []
    for network in ("high", "low"):
        assert text.count(f"<h3>{network}</h3>") == 4, "attention, features, precision and time"
    assert text.count('name="anchor-high"') == 3 == text.count('name="anchor-low"')
