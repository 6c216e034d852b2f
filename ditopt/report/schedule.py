"""A plan as a picture: what is decided where (down) and when (across), a coloured cell each."""

from __future__ import annotations

from markupsafe import Markup

from ditopt.report.picture import Picture
from ditopt.report.svg import Canvas

CELL, GAP = 18, 2
LAYER = 13
"""How high a cell of the whole step and of sites that rules name is, and that of one layer."""
WIDTH, NARROWEST, WIDEST = 1080, 12, 46
"""How wide the picture is where its cells can make it so."""


def schedule(picture: Picture, why: dict[tuple[int, str], str] | None = None) -> Markup:
    """Sites by steps; ``why`` says, by step and site, what is added to a cell's note."""
    canvas, told = Canvas(), why or {}
    left = 12 + 7.2 * max(len(row.site) for row in picture.rows)
    wide = max(NARROWEST, min(WIDEST, (WIDTH - left) / picture.steps - GAP))
    for step in range(0, picture.steps, 1 if picture.steps <= 40 else 5):
        x = left + step * (wide + GAP) + wide / 2
        canvas.add("text", str(step), x=x, y=12, text_anchor="middle", class_="tick")
    y = 18
    for row in picture.rows:
        height = LAYER if row.layer else CELL
        canvas.add("text", row.site, x=left - 6, y=y + height / 2 + 4, text_anchor="end", class_="label")
        for step, cell in enumerate(row.cells):
            x = left + step * (wide + GAP)
            title = "\n".join(filter(None, (f"{row.site}, {cell.note}", told.get((step, row.site)))))
            rounded = 2 if row.layer else 3
            canvas.add("rect", title=title, x=x, y=y, width=wide, height=height, rx=rounded, class_=f"k-{cell.kind}")
        y += height + GAP
    return canvas.done(left + picture.steps * (wide + GAP), y, f"schedule of {picture.network}")
