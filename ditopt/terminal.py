"""Pictures and tables for the terminal: a plan's schedule, its figures, why it is so."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ditopt.errors import InputError
from ditopt.plan import Plan
from ditopt.report.explained import Explained, Explanation
from ditopt.report.figures import bench_notes, bench_rows, figure
from ditopt.report.layers import layers_of, with_site
from ditopt.report.one_site import find_site
from ditopt.report.picture import MEANINGS, Cell, Picture, kinds_in, pictures
from ditopt.report.tried import nearest_rivals
from ditopt.sites import STEP

STYLES = {
    "dense": "bold blue",
    "dense-bfloat16": "blue",
    "reuse": "yellow",
    "forecast1": "green",
    "forecast2": "cyan",
    "fit": "magenta",
    "sparse": "bright_blue",
    "hidden": "dim",
}


def show_plan(plan: Plan, width: int) -> RenderableType:
    """The schedule, its legend, predicted and measured figures, target and provenance, ``width`` columns wide."""
    drawn = pictures(plan)
    parts: list[RenderableType] = []
    for picture in drawn:
        parts += [Text(picture.summary, style="bold"), *_grid(picture, width), *_of_heads(picture), Text("")]
    parts += [_legend(kinds_in(drawn)), Text(""), _figures(plan), Text(""), _provenance(plan)]
    return Group(*parts)


def _grid(picture: Picture, width: int) -> Iterator[Text]:
    """Rows of symbols under step numbers, wrapped to the width."""
    label = max(len(row.site) for row in picture.rows) + 2
    count = max(10, (width - label) // 10 * 10)
    for start in range(0, picture.steps, count):
        steps = range(start, min(start + count, picture.steps))
        tens = "".join(f"{step:<10}" if step % 10 == 0 else "" for step in steps)
        yield Text(" " * label + tens.rstrip(), style="dim")
        for row in picture.rows:
            yield Text(f"{row.site:<{label}}").append(_symbols([row.cells[step] for step in steps]))


def _of_heads(picture: Picture, site: str | None = None) -> Iterator[Text]:
    """The rules for heads, in order, a line each; of one ``site``, those that name it."""
    for sites, told in picture.heads:
        if site is None or site == sites or fnmatch.fnmatchcase(site, sites):
            yield Text(told)


def _symbols(cells: Sequence[Cell]) -> Text:
    return Text.assemble(*((cell.symbol, STYLES.get(cell.kind, "red")) for cell in cells))


def _legend(kinds: Sequence[str]) -> Text:
    text = Text()
    for kind in kinds:
        text.append(Cell(kind, "").symbol, STYLES.get(kind, "red")).append(f" {MEANINGS.get(kind, kind)}\n")
    text.rstrip()
    return text


def _figures(plan: Plan) -> RenderableType:
    if not plan.predicted and not plan.measured:
        return Text("no figures: the plan was written by hand")
    table = Table("", "predicted", "measured", title="figures", title_justify="left")
    for key in dict.fromkeys([*plan.measured, *plan.predicted]):
        _row(table, key, figure(plan.predicted.get(key)), figure(plan.measured.get(key)))
    return table


def _provenance(plan: Plan) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    _row(table, "target", figure(plan.target) if plan.target else "none")
    if plan.recipe is not None:
        _row(table, "recipe", plan.recipe)
    _row(table, "model", f"{plan.model.class_name}, {plan.model.blocks} blocks, {plan.model.structure}")
    _row(table, "sampler", f"{plan.sampler.class_name}, {plan.sampler.steps} steps, guidance {plan.sampler.guidance:g}")
    if plan.geometry:
        _row(
            table, "geometry", "; ".join(f"{name} {' × '.join(map(str, size))}" for name, size in plan.geometry.items())
        )
    if plan.tokens:
        _row(table, "tokens", "; ".join(f"{name} {tokens}" for name, tokens in plan.tokens.items()))
    if plan.tensors is not None:
        kinds = (plan.beside.maps, "lists of heads"), (plan.beside.projections, "projections")
        told = [f"{sum(len(each.heads) for each in entries)} {what}" for entries, what in kinds if entries]
        _row(table, "tensors", f"{' and '.join(told)}, in {plan.tensors.file} beside the plan")
    for name, broken in plan.breaks.items():
        _row(table, "breaks", f"{name}: {'; '.join(broken.at) or 'not told'}")
    _row(table, "device", f"{plan.device.device}, torch {plan.device.torch}, {plan.device.dtype}")
    return table


LEGEND = (
    "error: what predicting so adds to the final sample's, relative. objective: what the search made as small as it "
    "could: summed errors where the number of computed steps was set, else seconds with errors priced in them. "
    "fit2: fitted to the last two computed outputs; +latents: and to the current latents."
)


def show_explanations(explained: Explained, step: int | None, everything: bool) -> RenderableType:
    """Why each decision was made: a line each, or with all rivals for one ``step`` or for ``everything``.

    Raises:
        InputError: there is no decision in ``step``.
    """
    parts: list[RenderableType] = []
    for network, made in explained.explanations.items():
        chosen = [one for one in made if step in (None, one.step) or (one.step is None and one.site == STEP)]
        if step is not None and not any(one.step == step for one in made):
            known = sorted({one.step for one in made if one.step is not None})
            where = f"steps {known[0]} to {known[-1]}" if known else "none"
            raise InputError(f"--step {step}: {network} has no decision in it; known are {where}")
        parts.append(Text(network, style="bold"))
        parts += [_with_rivals(one) for one in chosen] if everything or step is not None else [_one_line_each(chosen)]
    for network, ahead in explained.hoisted.items() if step is None else ():
        parts += [
            Text(f"\n{network}: computed ahead of the steps", style="bold"),
            *(Text(f"- {o.told}") for o in ahead),
        ]
    if not explained.explanations and not explained.hoisted:
        parts.append(Text("the side file explains no decisions"))
    elif everything or step is not None:
        parts.append(Text(LEGEND, style="dim"))
    if explained.reasons and (step is None or everything):
        parts.append(Text("\ndid not apply", style="bold"))
        parts += [Text(f"- {reason}") for reason in explained.reasons]
    return Group(*parts)


def show_site(
    plan: Plan, explained: Explained, site: str, step: int | None, everything: bool, width: int
) -> RenderableType:
    """What a plan decides at one site, ``width`` columns wide, and why (``step``, ``everything``: see above).

    Raises:
        InputError: neither the plan nor its side file speaks of the site, or there is no decision in ``step``.
    """
    layers = {name: layers_of(plan, name, explained) for name in plan.sampler.timesteps}
    drawn = [*pictures(plan), *pictures(plan, layers, site)]
    told = [one.site for made in explained.explanations.values() for one in made]
    find_site(site, [*(row.site for picture in drawn for row in picture.rows), *told], "the plan")
    found: dict[str, Picture] = {}
    for picture in drawn:
        rows = tuple(row for row in picture.rows if row.site == site)
        if rows:
            found.setdefault(picture.network, replace(picture, rows=rows))
    parts: list[RenderableType] = []
    for name, picture in found.items():
        parts += [Text(name, style="bold"), *_grid(picture, width), *_of_heads(picture, site)]
    parts += [_legend(kinds_in(tuple(found.values()))), Text("")] if found else []
    why = {name: tuple(with_site(made, site, layers.get(name, ()))) for name, made in explained.explanations.items()}
    of_site = {"explanations": {name: made for name, made in why.items() if made}, "reasons": ()}
    return Group(*parts, show_explanations(explained.model_copy(update=of_site), step, everything))


def _title(one: Explanation) -> str:
    return f"step {one.step}, {one.site}" if one.step is not None else one.site


def _one_line_each(made: Sequence[Explanation]) -> Table:
    """Decisions with their nearest rivals; those that say the same are one, over their steps."""
    table = Table("decision", "chosen", "nearest rival", "why not")
    for one in nearest_rivals(made):
        _row(table, one.title, one.chosen, one.rival, one.reason)
    return table


def _with_rivals(one: Explanation) -> Table:
    title = Text(f"{_title(one)}: {one.chosen} (objective {figure(one.objective)})")
    table = Table("rival", "error", "objective", "why not", title=title, title_justify="left")
    for rival in one.rivals:
        _row(table, rival.name, figure(rival.error), figure(rival.objective), rival.reason)
    return table


def bench_table(bench: Mapping[str, Any]) -> Table:
    """The table that closes a benchmark; ``bench`` is its JSON."""
    title = f"{bench['prompts']} prompts, medians of whole generations"
    table = Table("contender", title=title, title_justify="left", caption="; ".join(bench_notes(bench)) or None)
    for name in ("evaluations", "seconds", "× Inductor", "PSNR mean", "PSNR worst"):
        table.add_column(name, justify="right")
    for name, *values in bench_rows(bench):
        _row(table, name, *map(figure, values))
    return table


def _row(table: Table, *cells: str) -> None:
    """Add a row whose texts are taken as they are, brackets included."""
    table.add_row(*(Text(cell) for cell in cells))
