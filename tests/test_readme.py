"""The README's examples run.

Python blocks run in their order in one fresh process. A block under `<!-- no-run: reason -->` is left out.
Of console blocks, those under `<!-- run -->` run: every line that starts with `$ `, one shell for the block.
The working directory is empty but for a link to `examples`, so that a block may write files.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

BLOCK = re.compile(r"(?:^<!--\s*(?P<mark>.*?)\s*-->\n\s*)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    language: str
    mark: str
    line: int
    code: str


def blocks(text: str) -> list[Block]:
    return [
        Block(m["language"], m["mark"] or "", text.count("\n", 0, m.start("code")) + 1, m["code"])
        for m in BLOCK.finditer(text)
    ]


@pytest.fixture(scope="module")
def readme(root: Path) -> list[Block]:
    file = root / "README.md"
    assert file.exists(), "there is no README.md"
    return blocks(file.read_text())


@pytest.fixture
def desk(root: Path, tmp_path: Path) -> Path:
    (tmp_path / "examples").symlink_to(root / "examples")
    return tmp_path


def run(command: list[str], cwd: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(command, cwd=cwd, env={**os.environ, "PATH": path}, text=True, capture_output=True)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_python_blocks_run(readme: list[Block], desk: Path) -> None:
    python = [block for block in readme if block.language == "python"]
    assert python, "README.md shows no Python"
    chosen = [block for block in python if not block.mark.startswith("no-run:")]
    # The padding makes a traceback name the README's own lines.
    sources = [(f"README.md, line {block.line}", "\n" * (block.line - 1) + block.code) for block in chosen]
    program = "".join(f"exec(compile({code!r}, {name!r}, 'exec'))\n" for name, code in sources)
    run([sys.executable, "-c", program], desk)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_marked_console_blocks_run(readme: list[Block], desk: Path) -> None:
    for block in readme:
        if block.language == "console" and block.mark == "run":
            lines = [line.removeprefix("$ ") for line in block.code.splitlines() if line.startswith("$ ")]
            assert lines, f"README.md, line {block.line}: a console block to run has no line that starts with '$ '"
            run(["bash", "-euo", "pipefail", "-c", "\n".join(lines)], desk)


def test_marks_are_known_and_give_reasons(readme: list[Block]) -> None:
    wrong = [
        b for b in readme if b.mark.startswith(("no-run", "run")) and not re.fullmatch(r"run|no-run: .{8,}", b.mark)
    ]
    assert not wrong, [f"README.md, line {b.line}: {b.mark!r} is neither 'run' nor 'no-run: REASON'" for b in wrong]


def test_no_placeholder_is_left(root: Path) -> None:
    for page in (root / "README.md", *(root / "docs").glob("*.md")):
        assert "@@" not in page.read_text(), f"{page.name} has a placeholder"


def test_blocks_are_read_as_written() -> None:
    text = (
        "# t\n```python\na = 1\n```\n\n"
        "<!-- no-run: needs a GPU -->\n```python\nb\n```\n"
        "<!-- run -->\n\n```console\n$ ls\n```\n"
    )
    assert blocks(text) == [
        Block("python", "", 3, "a = 1\n"),
        Block("python", "no-run: needs a GPU", 8, "b\n"),
        Block("console", "run", 13, "$ ls\n"),
    ]
