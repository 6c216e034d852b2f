"""Where the time of a step goes, and how near that is to what the machine can do."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from ditopt.report import charts
from ditopt.report.explained import Roofline, VariantWork, Work
from ditopt.report.figures import duration
from ditopt.report.svg import BOTTOM, LEFT, RIGHT, TOP, Axis, Canvas, draw_axes

KINDS = ("attention", "linear", "convolution", "normalisation", "elementwise", "copy", "other")
FULL, PREDICTED = "full", "predicted"


def step_times(seconds: Mapping[str, float]) -> Markup | None:
    """What a step takes: computed as the model has it, in other forms, predicted."""
    if FULL not in seconds:
        return None
    names = {FULL: "computed", PREDICTED: "predicted"}
    forms = [name for name in seconds if "." not in name and name not in names]
    saved = {name: value for name, value in seconds.items() if "." in name}
    shown = [name for name in (FULL, *forms, PREDICTED) if name in seconds]
    rows = [(names.get(name, f"computed, {name}"), seconds[name]) for name in shown]
    largest = sorted(saved.items(), key=lambda each: -each[1])[:4]
    rows += [(f"without {name}", max(seconds[FULL] - value, 0.0)) for name, value in largest]
    drawn = [charts.Bar(label, [("step", value, "w-all")], duration(value)) for label, value in rows]
    return charts.bars(drawn, "seconds of one step")


def work_bars(variants: Mapping[str, VariantWork]) -> Markup | None:
    """A bar per variant: what each kind of operator takes of a step, and what no kind accounts for."""
    rows = []
    for name, variant in variants.items():
        known = [kind for kind in kinds_of(variants) if kind in variant.kinds]
        parts = [(kind, variant.kinds[kind].seconds, style_of(kind)) for kind in known]
        rest = variant.seconds - sum(value for _, value, _ in parts)
        parts += [("not accounted for", rest, "w-rest")] if rest > 0 else []
        rows.append(charts.Bar(name, parts, duration(variant.seconds)))
    return charts.bars(rows, "seconds of one step") if rows else None


def kinds_of(variants: Mapping[str, VariantWork]) -> list[str]:
    """The kinds of operators that occur, in the order in which they are drawn."""
    found = {kind for variant in variants.values() for kind in variant.kinds}
    return [*(kind for kind in KINDS if kind in found), *sorted(found.difference(KINDS))]


def style_of(kind: str) -> str:
    """The CSS class that colours a kind of operator."""
    return f"w-{kind}" if kind in KINDS else "w-other"


def roof(variants: Mapping[str, VariantWork], machine: Roofline) -> Markup | None:
    """Rates over operations per byte, logarithmic, under what the machine can do at most."""
    points = []
    for name, variant in variants.items():
        for kind, work in variant.kinds.items():
            if work.flops and work.bytes and work.seconds > 0:
                note = f"{name}, {kind}: {_rate(work)} GFLOP/s at {work.flops / work.bytes:.3g} FLOP per byte"
                note += f", {_share(work, machine):.0%} of what the roof allows"
                style = f"{style_of(kind)} {'' if name == 'dense' else 'ring'}".strip()
                points.append((work.flops / work.bytes, work.flops / work.seconds / 1e9, note, style))
    if not points:
        return None
    fastest = max(machine.flops_per_second.values()) / 1e9
    band = machine.bytes_per_second / 1e9
    size = charts.SIZE
    reach = [x for x, _, _, _ in points] + [fastest / band * 4, fastest / band / 8]
    across = Axis.over(reach, "operations per byte (FLOP/byte)", LEFT, size[0] - RIGHT, True)
    up = Axis.over([y for _, y, _, _ in points] + [fastest], "GFLOP/s", size[1] - BOTTOM, TOP, True)
    canvas = Canvas()
    draw_axes(canvas, across, up, size)
    for dtype, rate in machine.flops_per_second.items():
        top = rate / 1e9
        corner, start = top / band, max(across.marks[0], up.marks[0] / band)
        ends = (start, start * band), (max(corner, start), top), (across.marks[-1], top)
        canvas.add("polyline", points=" ".join(f"{across.at(x):.1f},{up.at(y):.1f}" for x, y in ends), class_="front")
        told = f"{dtype} {top:.4g} GFLOP/s"
        canvas.add("text", told, x=size[0] - RIGHT, y=up.at(top) - 4, text_anchor="end", class_="tick")
    for x, y, note, style in points:
        canvas.add("circle", title=note, cx=across.at(x), cy=up.at(max(y, up.marks[0])), r=5, class_=style)
    return canvas.done(*size, "rates of operators under the roofline")


def _rate(work: Work) -> str:
    return f"{(work.flops or 0) / work.seconds / 1e9:.3g}"


def _share(work: Work, machine: Roofline) -> float:
    """What was reached of what is possible at this many operations per byte."""
    intensity = (work.flops or 0) / (work.bytes or 1)
    rates = machine.flops_per_second
    bound = min(rates.get(work.dtype or "", max(rates.values())), intensity * machine.bytes_per_second)
    return (work.flops or 0) / work.seconds / bound


def variant_notes(variants: Mapping[str, VariantWork]) -> list[str]:
    """In which steps each variant runs, where that is told."""
    return [f"{name}: steps {variant.steps}" for name, variant in variants.items() if variant.steps]
