"""The report in a real browser: Chromium without a head, asked through its command line alone."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from ditopt.report.html import render_report
from ditopt.report.sources import gather
from tests.report_pages import write_all

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (Debian's package chromium)")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr",
    "--virtual-time-budget=2000",
)  # fmt: skip
DARK, LIGHT = 0, 1
"""Values of Blink's setting of the preferred colour scheme."""
MAX_BYTES = 5_000_000


@dataclass(frozen=True)
class Visit:
    """What a visit to a page left: what Chromium wrote, and what the page wrote to its console."""

    stdout: str
    console: list[str]


@dataclass(frozen=True)
class Browser:
    """Starts a Chromium with a new profile for each visit."""

    folder: Path

    def visit(self, page: Path, *flags: str, scheme: int = LIGHT, fragment: str = "") -> Visit:
        assert CHROMIUM is not None
        data = self.folder / f"data{len(list(self.folder.iterdir()))}"
        flags = (
            *FLAGS,
            f"--user-data-dir={data}",
            f"--blink-settings=preferredColorScheme={scheme}",
            *flags,
        )
        done = subprocess.run(
            [CHROMIUM, *flags, f"{page.as_uri()}{fragment}"], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return Visit(done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line])

    def ask(self, page: Path, script: str, scheme: int = LIGHT) -> tuple[Any, list[str]]:
        """What a script that fills ``found`` finds in the page, and the console."""
        told = f"<script>const found = {{}};\n{script}\ndocument.body.dataset.found = JSON.stringify(found);</script>"
        asked = self.folder / "asked.html"
        text = page.read_text()
        assert text.count("</body>") == 1
        asked.write_text(text.replace("</body>", f"{told}</body>"))
        visit = self.visit(asked, "--dump-dom", "--window-size=1280,720", scheme=scheme)
        match = re.search(r'data-found="([^"]*)"', visit.stdout)
        assert match is not None, visit.console
        return json.loads(match[1].replace("&quot;", '"').replace("&amp;", "&")), visit.console

    def picture(self, page: Path, size: tuple[int, int], scheme: int, fragment: str = "") -> PIL.Image.Image:
        """A screenshot."""
        path = self.folder / "shot.png"
        self.visit(page, f"--screenshot={path}", f"--window-size={size[0]},{size[1]}", scheme=scheme, fragment=fragment)
        with PIL.Image.open(io.BytesIO(path.read_bytes())) as shot:
            return shot.convert("RGB")


@pytest.fixture
def browser(tmp_path: Path) -> Browser:
    folder = tmp_path / "browser"
    folder.mkdir()
    return Browser(folder)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a plan with everything that can be beside it."""
    folder = tmp_path_factory.mktemp("page")
    plan = write_all(folder)
    path = folder / "report.html"
    path.write_text(render_report(**gather(plan, folder / "p.profile", None).given, source=plan.name))
    return path


def test_a_script_that_fails_is_seen(browser: Browser, page: Path) -> None:
    _, console = browser.ask(page, "console.error('planted');")
    assert len(console) == 1 and "planted" in console[0]


TABS = """
const parts = [...document.querySelectorAll("main > section")];
const shown = () => parts.filter(part => part.offsetHeight > 0).map(part => part.dataset.name);
const tabs = [...document.querySelectorAll(".tabs a")];
found.first = shown();
found.clicked = tabs.map(tab => { tab.click(); return [tab.hash.slice(1), ...shown()]; });
found.selected = tabs.filter(tab => tab.getAttribute("aria-selected") === "true").map(tab => tab.hash);
tabs.at(-1).dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
found.turned = shown();
found.wide = document.documentElement.scrollWidth <= innerWidth;
"""


@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_tabs_show_one_part_at_a_time(browser: Browser, page: Path, scheme: int) -> None:
    found, console = browser.ask(page, TABS, scheme)
    assert console == []
    parts = ["result", "plan", "search", "attention", "features", "precision", "time", "reasons", "source"]
    assert found["first"] == ["result"]
    assert found["clicked"] == [[part, part] for part in parts]
    assert found["selected"] == ["#source"]
    assert found["turned"] == ["result"]
    assert found["wide"], "the page is wider than the window"


HOVER = """
const tip = document.getElementById("tip");
const over = (part, mark) => {
  document.querySelector(`.tabs a[href="#${part}"]`).click();
  mark.scrollIntoView({ block: "nearest" });
  const box = mark.getBoundingClientRect();
  mark.dispatchEvent(new PointerEvent("pointerover", { bubbles: true, clientX: box.x + 3, clientY: box.y + 3 }));
  const at = tip.getBoundingClientRect();
  const inside = at.left >= 0 && at.right <= innerWidth && at.top >= 0 && at.bottom <= innerHeight;
  return { text: tip.hidden ? "" : tip.textContent, inside, pictures: tip.querySelectorAll("img").length };
};
found.before = tip.hidden;
const one = (selector, position) => [...document.querySelectorAll(selector)].at(position);
found.cell = over("plan", one("#part-plan svg .k-forecast1", 0));
found.layer = over("plan", one("#part-plan svg .k-reuse", 0));
found.trial = over("search", one("#part-search svg .met", 0));
found.head = over("attention", one(".tile", -1));
found.curve = over("features", one("#part-features svg .dot", 0));
found.roof = over("time", one("#part-time svg circle.w-linear", 0));
document.body.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
found.after = tip.hidden;
document.querySelector('.tabs a[href="#attention"]').click();
one(".tile", 0).focus();
found.focused = tip.textContent;
document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
found.escaped = tip.hidden;
"""


def test_what_one_points_at_is_explained(browser: Browser, page: Path) -> None:
    found, console = browser.ask(page, HOVER)
    assert console == []
    assert found["before"] and found["after"] and found["escaped"]
    for name, expected in {
        "cell": "step, step 3: forecast of order 1", "layer": "not compute: takes 0.13 s more",
        "trial": "6 evaluations, 36.00 dB", "head": "blocks.7.attn2, head 2", "curve": "mean, step 1: 0.9",
        "roof": "dense, linear: 133 GFLOP/s at 80 FLOP per byte",
    }.items():  # fmt: skip
        assert expected in found[name]["text"], found[name]
        assert found[name]["inside"], found[name]
        assert found[name]["pictures"] == (name == "head")
    for expected in (
        "blocks.0.attn1, head 0: spatial",
        "confidence",
        "entropy 0.50",
        "sparsest pattern under 2% error",
    ):
        assert expected in found["focused"]


SWITCHES = """
document.querySelector('.tabs a[href="#attention"]').click();
const tile = document.querySelector(".tile img");
found.steps = [0, 1, 2].map(i => {
  document.querySelector(`.a${i}`).click();
  return getComputedStyle(tile).objectPosition;
});
document.querySelector('.tabs a[href="#result"]').click();
const sizes = kind => [...document.querySelectorAll(`.clip.${kind}`)].map(clip => clip.offsetHeight > 0);
found.outputs = [sizes("output"), sizes("difference")];
document.querySelector(".to-difference").click();
found.differences = [sizes("output"), sizes("difference")];
const clip = document.querySelector(".clip");
found.animation = [getComputedStyle(clip).animationName, getComputedStyle(clip).animationTimingFunction];
found.size = [clip.offsetWidth, clip.offsetHeight, clip.naturalWidth, clip.naturalHeight];
"""


def test_steps_and_differences_can_be_chosen(browser: Browser, page: Path) -> None:
    found, console = browser.ask(page, SWITCHES)
    assert console == []
    assert len(set(found["steps"])) == 3
    assert found["outputs"] == [[True, True], [False, False]]
    assert found["differences"] == [[False, False], [True, True]]
    assert found["animation"] == ["play", "steps(6, jump-none)"]
    assert found["size"] == [160, 160, 32, 6 * 32], "one frame of the strip, enlarged by a whole number"


@pytest.mark.parametrize(("scheme", "size"), [(LIGHT, (1440, 900)), (DARK, (1280, 720))])
def test_a_picture_of_the_page_is_not_empty(browser: Browser, page: Path, scheme: int, size: tuple[int, int]) -> None:
    brightness = []
    for fragment in ("", "#attention"):
        shot = browser.picture(page, size, scheme, fragment)
        assert shot.size == size
        colours, counts = np.unique(np.asarray(shot).reshape(-1, 3), axis=0, return_counts=True)
        assert len(colours) > 200 and counts.max() < 0.9 * counts.sum()
        brightness.append(float(colours[counts.argmax()].mean()))
    assert all(value > 200 if scheme == LIGHT else value < 60 for value in brightness), brightness


STACKED = """
found.parts = [...document.querySelectorAll("main > section")].filter(part => part.offsetHeight > 0).length;
found.titles = document.querySelectorAll("main svg title, main .tile[title]").length;
document.querySelector('.tabs a[href="#time"]').click();
found.top = Math.round(document.getElementById("time").getBoundingClientRect().top);
document.querySelector(".a0").click();
found.position = getComputedStyle(document.querySelector(".tile img")).objectPosition;
"""


def test_without_its_script_all_parts_stand_below_each_other(browser: Browser, page: Path, tmp_path: Path) -> None:
    text, scripts = re.subn(r"<script>.*?</script>", "", page.read_text(), flags=re.DOTALL)
    assert scripts == 1
    bare = tmp_path / "bare.html"
    bare.write_text(text)
    found, console = browser.ask(bare, STACKED)
    assert console == []
    assert found["parts"] == 9 and found["titles"] > 100, "marks keep titles that browsers show"
    assert 0 <= found["top"] < 100, "the tabs are links to the parts"
    assert found["position"] == "0px 0%", "steps of the maps can be chosen"


def test_the_page_is_small(page: Path) -> None:
    assert page.stat().st_size < MAX_BYTES
