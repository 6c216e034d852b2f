"""The tables of the documentation come from figures alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.goals import GOALS


@pytest.fixture
def folder(root: Path, tmp_path: Path) -> Path:
    shutil.copy(root / "docs/results/unguided-3.0x.bench.json", tmp_path / f"{GOALS[0].name}.bench.json")
    return tmp_path


def test_a_goal_has_a_line_of_its_figures(folder: Path) -> None:
    figures = json.loads((folder / f"{GOALS[0].name}.bench.json").read_text())
    _, _, line = tables.short(tables.read(folder))
    assert f"**{figures['speedup_vs_inductor']:.2f}x**" in line
    assert f"**{figures['psnr_db']:.1f} dB** ({figures['worst_psnr_db']:.1f})" in line
    assert f"{figures['dpmpp']['psnr_db']:.1f} ({figures['dpmpp']['steps']})" in line


def test_rows_are_as_wide_as_their_heads(folder: Path) -> None:
    for table in (
        "\n".join(tables.short(tables.read(folder))),
        *"\n".join(tables.full(tables.read(folder))).split("\n\n"),
    ):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table


def test_what_was_not_measured_is_a_dash_or_no_row(folder: Path) -> None:
    path = folder / f"{GOALS[0].name}.bench.json"
    figures = json.loads(path.read_text())
    left_out = ("unipc", "unipc_cast", "converged", "attribute_score", "dense_cast", "fewer_steps_cast")
    path.write_text(json.dumps({**figures, **dict.fromkeys(left_out)}))
    _, _, line = tables.short(tables.read(folder))
    assert line.count(" - |") == 3 and ", -, " in line
    assert "UniPC" not in "\n".join(tables.full(tables.read(folder)))


def test_an_empty_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no figures of unguided-42"):
        tables.read(tmp_path)
