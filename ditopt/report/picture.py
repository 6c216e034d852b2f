"""The schedule of a plan as a grid of cells (sites x steps): what terminal and HTML draw."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ditopt.decisions import Decision, Dense, FeatureDecision, Fit, Forecast, HeadDecision, HeadDecisions, Hoist, Sparse
from ditopt.plan import Plan, format_steps
from ditopt.report.profiled import candidate_name
from ditopt.sites import STEP, range_names

HIDDEN = "hidden"

SYMBOLS = {
    "dense": "■",
    "dense-bfloat16": "b",
    "reuse": "=",
    "forecast1": "1",
    "forecast2": "2",
    "fit": "f",
    "sparse": "s",
    HIDDEN: "·",
}
MEANINGS = {
    "dense": "computed",
    "dense-bfloat16": "computed, matrix products and attention in bfloat16",
    "reuse": "reused from the latest computed step",
    "forecast1": "forecast of order 1 (line through two computed steps)",
    "forecast2": "forecast of order 2 (parabola through three computed steps)",
    "fit": "fitted combination of computed steps",
    "sparse": "computed, some heads attend to a pattern of blocks only",
    HIDDEN: "not asked for: the whole step is predicted",
}


@dataclass(frozen=True)
class Cell:
    """One site in one step; ``kind`` is the decision with its order, ``note`` tells it in words."""

    kind: str
    note: str

    @property
    def symbol(self) -> str:
        """One character; a kind that has none of its own shows its first letter."""
        return SYMBOLS.get(self.kind, self.kind[:1].upper())


@dataclass(frozen=True)
class Row:
    """One site over all steps; ``layer``: it is one block of all, whether a rule names it or not."""

    site: str
    cells: tuple[Cell, ...]
    layer: bool = False

    @property
    def computed(self) -> tuple[int, ...]:
        """The steps in which the site is computed."""
        return tuple(step for step, cell in enumerate(self.cells) if cell.kind.startswith(("dense", "sparse")))


@dataclass(frozen=True)
class Picture:
    """One network's schedule; the first row is the whole step, the others the sites that rules name.

    ``second_order`` are the shares of that formula that computed steps have, ``simplified`` whether they are; ``heads``
    the rules for heads of attention sites in words, by what they name; ``hoisted`` the steps that read what is computed
    ahead of them.
    """

    network: str
    rows: tuple[Row, ...]
    second_order: tuple[float, ...] = ()
    simplified: bool = False
    heads: tuple[tuple[str, str], ...] = ()
    hoisted: tuple[int, ...] = ()

    @property
    def steps(self) -> int:
        """The number of network evaluations of one branch that the sampler asks for."""
        return len(self.rows[0].cells)

    @property
    def summary(self) -> str:
        """How many steps run the network, and which."""
        kept = self.rows[0].computed
        shares = " and ".join(f"{share:g}" for share in self.second_order)
        form = ", these steps simplified (the same numbers to rounding, faster)" if self.simplified else ""
        form += f", with {shares} of the second-order formula" if shares else ""
        ahead = "" if set(self.hoisted) == set(kept) else f" in steps {format_steps(self.hoisted)}"
        form += f", what is the same in many computed ahead{ahead}" if self.hoisted else ""
        return f"{self.network}: {len(kept)} of {self.steps} steps computed ({format_steps(kept)}){form}"


def pictures(
    plan: Plan, layers: Mapping[str, Sequence[str]] | None = None, attention: str | None = None
) -> tuple[Picture, ...]:
    """The schedule of every network of a plan; those with ``layers`` have a row for each in place of ranges.

    ``attention`` is one more site of heads that has a row where rules are for it.
    """
    return tuple(
        _picture(plan, network, (layers or {}).get(network, ()), attention) for network in plan.sampler.timesteps
    )


def kinds_in(drawn: tuple[Picture, ...]) -> tuple[str, ...]:
    """The kinds that occur, in the legend's order; unknown ones last."""
    found = {cell.kind for picture in drawn for row in picture.rows for cell in row.cells}
    return (*(kind for kind in SYMBOLS if kind in found), *sorted(found - set(SYMBOLS)))


def kind_of(decision: Decision) -> str:
    """The decision's kind, with the order or dtype where that matters.

    >>> kind_of(Forecast(order=2)), kind_of(Dense(dtype="bfloat16"))
    ('forecast2', 'dense-bfloat16')
    """
    if isinstance(decision, Dense) and decision.dtype is not None:
        return f"{decision.kind}-{decision.dtype}"
    return f"{decision.kind}{decision.order}" if isinstance(decision, Forecast) else decision.kind


def _picture(plan: Plan, network: str, layers: Sequence[str], attention: str | None) -> Picture:
    ranges = range_names(layers)
    rules = [rule for rule in plan.rules if fnmatch.fnmatchcase(network, rule.network)]
    of_heads = [rule for rule in rules if rule.for_heads]
    named = [rule.sites for rule in rules if not rule.for_heads]
    shown = {site: not layers or not _covered(site, ranges) for site in dict.fromkeys(named)}
    sites = [STEP, *(site for site, own_row in shown.items() if site != STEP and own_row)]
    table = [
        {**plan.decisions(step, sites, network), **_of_layers(plan, network, step, layers, ranges)}
        for step in range(len(plan.sampler.timesteps[network]))
    ]
    whole = [not isinstance(decisions[STEP], Dense) for decisions in table]
    combined = [step for step, predicted in enumerate(whole[:-1]) if not predicted][1:]  # with the computed step before
    rows = []
    for site in (*sites, *layers):
        cells = []
        for step, decisions in enumerate(table):
            if site != STEP and whole[step]:
                cells.append(Cell(HIDDEN, f"step {step}: {MEANINGS[HIDDEN]}"))
            else:
                finer = site == STEP and step in combined
                cells.append(Cell(kind_of(decisions[site]), f"step {step}: {_words(decisions[site], step, finer)}"))
        rows.append(Row(site, tuple(cells), site in layers))
    also = [attention] if attention is not None and any(rule.names(attention) for rule in of_heads) else []
    for site in dict.fromkeys([*(rule.sites for rule in of_heads), *also]):
        told = enumerate(plan.head_decisions(site, network))
        rows.append(Row(site, tuple(_head_cell(each, step, whole[step]) for step, each in told)))
    led = [table[step][STEP] for step in combined]
    shares = {each.second_order for each in led if isinstance(each, Dense) and each.second_order is not None}
    simplified = any(isinstance(do := each[STEP], Dense) and do.simplify for each in table)
    heads = tuple((rule.sites, f"{rule.place} @ {format_steps(rule.steps)}: {_pattern(rule.do)}") for rule in of_heads)
    hoisted = tuple(sorted(plan.hoisted_steps(network)))
    return Picture(network, tuple(rows), tuple(sorted(shares)), simplified, heads, hoisted)


def _head_cell(found: HeadDecisions, step: int, predicted: bool) -> Cell:
    """What the heads of an attention site do in a step."""
    if predicted:
        return Cell(HIDDEN, f"step {step}: {MEANINGS[HIDDEN]}")
    alike: dict[HeadDecision, list[int]] = {}
    for head, do in found.named.items():
        alike.setdefault(do, []).append(head)
    told = [f"heads {format_steps(heads)}: {_pattern(do)}" for do, heads in alike.items()]
    told.append(f"{'other' if told else 'all'} heads: {_pattern(found.others)}")
    return Cell("sparse" if found.any_sparse else "dense", f"step {step}: {'; '.join(told)}")


def _pattern(decision: Decision) -> str:
    """The decision of a head in words."""
    return candidate_name(decision.pattern) if isinstance(decision, Sparse) else decision.kind


def _covered(site: str, ranges: Mapping[str, tuple[int, int]]) -> bool:
    """Whether what a rule names are ranges of the layers, which their rows show."""
    return site in ranges or any(fnmatch.fnmatchcase(name, site) for name in ranges)


def _of_layers(
    plan: Plan, network: str, step: int, layers: Sequence[str], ranges: Mapping[str, tuple[int, int]]
) -> dict[str, FeatureDecision]:
    """The decision of each layer: of the last rule for a range that it is in, else that of the whole step."""
    computed = plan.decisions(step, [STEP], network)[STEP]
    dtype = computed.dtype if isinstance(computed, Dense) else None
    found: dict[str, FeatureDecision] = dict.fromkeys(layers, Dense(dtype=dtype))
    for rule in plan.rules if layers else ():
        if isinstance(rule.do, Sparse | Hoist) or rule.for_heads:
            continue
        if step in rule.steps and rule.sites != STEP and fnmatch.fnmatchcase(network, rule.network):
            for name, (first, last) in ranges.items():
                if rule.names(name):
                    found |= dict.fromkeys(layers[first : last + 1], rule.do)
    return found


def layer_names(count: int, known: Sequence[str]) -> tuple[str, ...]:
    """The names of ``count`` blocks, from those of sites that are ``known``; none if they do not tell.

    >>> layer_names(3, ["step", "blocks.0..1", "blocks.0.attn1"])
    ('blocks.0', 'blocks.1', 'blocks.2')
    """
    stems: dict[str, int] = {}
    for name in known:
        first, dots, last = name.partition("..")
        stem, _, number = first.rpartition(".")
        last = last if dots else number
        if stem and number.isdecimal() and last.isdecimal():
            stems[stem] = max(stems.get(stem, 0), int(last))
        elif dots:  # from one stack into another
            return ()
    if len(stems) != 1 or max(stems.values()) >= count:
        return ()
    return tuple(f"{stem}.{i}" for stem in stems for i in range(count))


def _words(decision: Decision, step: int, combined: bool) -> str:
    """What is done in a step, with the settings that its symbol leaves out.

    >>> _words(Forecast(order=2, distances="steps", formula="taylor"), 5, False)
    "forecast of order 2 (Taylor's series from three computed steps), distances in steps"
    """
    kind = kind_of(decision)
    text = MEANINGS.get(kind, kind)
    if isinstance(decision, Fit):
        factors = ", ".join(f"{value:.3g}" for value in decision.coefficients.get(step, ()))
        sources = ", ".join(map(str, decision.sources.get(step, ())))
        latents = " and the latents" if decision.latents else ""
        text = f"fitted from steps {sources}{latents}, factors {factors}"
    elif isinstance(decision, Forecast):
        if decision.formula == "taylor":
            count = "three" if decision.order == 2 else "two"
            text = f"forecast of order {decision.order} (Taylor's series from {count} computed steps)"
        text += ", distances in steps" if decision.distances == "steps" else ""
    elif isinstance(decision, Dense):
        text += ", simplified" if decision.simplify else ""
        if decision.second_order is None or not combined:
            return text
        text = f"{text}, returned with {decision.second_order:g} of the second-order formula"
    return text
