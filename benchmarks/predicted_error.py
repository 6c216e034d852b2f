"""Predicted against measured error of random plans: whole steps reused or forecast, heads under patterns.

    python -m benchmarks.predicted_error --profile p.profile --json docs/results/predicted_error.json

Plans are drawn by a seed: how many steps are computed and which, how the others are predicted, which heads attend to
which pattern, and from which step on. Their errors are predicted from the profile alone, and measured by generations of
prompts that it did not see, in which captured graphs run node by node and heads are masked. Ends with Spearman's rank
correlation of the two and a plot beside the JSON.

Measured is the median over prompts: now and then a plan tips a prompt over into another sample altogether (another
motion, say), which no first-order prediction sees. Every prompt's error and the correlation with their root mean square
are in the JSON as well.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditopt.adapters import adapt
from ditopt.console import Reporter
from ditopt.device import describe_device
from ditopt.plan_text import write_text_atomically
from ditopt.prepare import Preparation, Prepared, as_it_was
from ditopt.profile import NetworkProfile, Profile
from ditopt.profiler.head_edits import under_blocks
from ditopt.profiler.interpret import Edit, Watched, moment_of
from ditopt.profiler.observe import intercepted
from ditopt.profiler.places import attentions
from ditopt.profiler.rollout_plants import masks_of
from ditopt.profiler.run import whole_program
from ditopt.quality import relative_l2
from ditopt.report.tried import rank_correlation
from ditopt.runtime.program import Compute
from ditopt.search.heads import HeadPattern, heads_error
from ditopt.search.joint import dense, draft_for, finish
from ditopt.search.problem import SearchProblem
from ditopt.search.solution import Draft

MODEL = Path("examples/tiny_video")


@dataclass(frozen=True)
class RandomPlan:
    """A schedule of whole steps, and heads under patterns in computed steps."""

    draft: Draft
    heads: tuple[HeadPattern, ...]

    def describe(self, total: int) -> str:
        """In a few words."""
        kinds = [candidate.name for candidate in self.draft.families.values()]
        counted = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)) or "none predicted"
        return f"{len(self.draft.kept)} of {total} steps ({counted}); {len(self.heads)} heads under patterns"


def draw_plan(rng: np.random.Generator, problem: SearchProblem, network: NetworkProfile) -> RandomPlan:
    """A random plan; a third of them have patterns alone, a third a schedule alone."""
    kind = rng.integers(3)
    draft = dense(problem)
    if kind != 0:
        count = int(rng.integers(problem.steps // 3, problem.steps - 1))
        others = rng.choice(np.arange(1, problem.steps), size=count - 1, replace=False)
        names = [["reuse"], ["forecast1"], ["reuse", "forecast1", "forecast2"]][rng.integers(3)]
        draft = draft_for(problem, sorted({0, *map(int, others)}), names)
    heads: list[HeadPattern] = []
    if kind != 1:
        share, start = rng.uniform(0.05, 0.7), int(rng.integers(0, problem.steps // 2))
        steps = tuple(step for step in draft.kept if step >= start)
        for site, table in network.tables["patterns"].items():
            written = {label: json.loads(str(label)) for label in table.labels.get("candidate", ())}
            plain = {
                label: each["pattern"] for label, each in written.items() if not {"rest", "order", "qk"} & each.keys()
            }
            labels = [label for label, pattern in plain.items() if pattern not in ("draft", "listed")]
            if len(labels) < 2 or not steps:  # masks are in raster order, have no rest and are not found in calls
                continue
            for head in range(table["error"].size("head")):
                if rng.uniform() < share:
                    heads.append(HeadPattern(site, head, labels[rng.integers(len(labels))], steps))
    return RandomPlan(draft, tuple(heads))


@dataclass
class Emulated:
    """An interceptor: answers a generation's calls under a random plan, predictions and masked heads included."""

    prepared: Prepared
    name: str
    plan: RandomPlan
    problem: SearchProblem
    network: NetworkProfile
    count: int = 0
    outputs: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.trace = whole_program(self.prepared.evaluator.sessions[self.name]).variants.trace
        self.calls = self.prepared.calls[self.name]
        self._names = [candidate.name for candidate in self.problem.candidates]
        self._edits = self._head_edits()

    def __call__(self, arguments: list[Any], compute: Compute) -> Sequence[Any]:
        """Answer one call."""
        moment = moment_of(self.calls, self.count)
        self.count += 1
        key = moment.branches[0]
        kept = [step for step in self.plan.draft.kept if step < moment.step]
        if moment.step in self.plan.draft.families:
            candidate = self.plan.draft.families[moment.step]
            history = kept[::-1][: candidate.history]
            factors = self.problem.table.coefficients(self._names.index(candidate.name), moment.step, kept[::-1])
            pairs = zip(history, factors, strict=False)
            return [torch.stack([factor * self.outputs[key, source] for source, factor in pairs]).sum(0)]
        edits = {
            node: edit for node, (steps, edit) in self._edits.items() if any(moment.step in each for each in steps)
        }
        outputs: Sequence[Any] = Watched(self.trace, (), edits).run(*arguments)
        self.outputs[key, moment.step] = outputs[0].clone()
        return outputs

    def _head_edits(self) -> dict[str, tuple[list[tuple[int, ...]], Edit]]:
        nodes = {entry.site.name: entry.node.name for entry in attentions(self.trace)}
        masks = masks_of(self.plan.heads, self.network, nodes)
        steps: dict[str, list[tuple[int, ...]]] = {}
        for choice in self.plan.heads:
            steps.setdefault(nodes[choice.site], []).append(choice.steps)
        return {node: (steps[node], under_blocks(heads)) for node, heads in masks.items()}


def predicted_error(problem: SearchProblem, network: NetworkProfile, plan: RandomPlan) -> float:
    """The final sample's relative error, root mean square: that of the schedule and that of the heads, as squares."""
    schedule = finish(problem, plan.draft, None, 64).predicted_error if plan.draft.families else 0.0
    heads = heads_error(network, problem, plan.draft, plan.heads) if plan.heads else 0.0
    return math.hypot(schedule, heads)


def drawn(rows: Sequence[Mapping[str, Any]], size: int = 420, margin: int = 52) -> str:
    """An SVG of measured over predicted error, both logarithmic, with the line on which they agree."""
    values = [row[key] for row in rows for key in ("predicted", "measured")]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))

    def at(value: float) -> float:
        return margin + (size - 2 * margin) * (math.log10(value) - low) / (high - low)

    parts = [f'<rect width="{size}" height="{size}" fill="#fff"/>']
    for decade in range(low, high + 1):
        x = at(10.0**decade)
        parts.append(
            f'<path d="M{x:.1f} {margin}V{size - margin}M{margin} {size - x:.1f}H{size - margin}" stroke="#ddd"/>'
        )
        parts.append(f'<text x="{x:.1f}" y="{size - margin + 16}" text-anchor="middle">1e{decade}</text>')
        parts.append(f'<text x="{margin - 6}" y="{size - x + 4:.1f}" text-anchor="end">1e{decade}</text>')
    parts.append(f'<path d="M{margin} {size - margin}L{size - margin} {margin}" stroke="#999" stroke-dasharray="4 4"/>')
    for row in rows:
        place = f'cx="{at(row["predicted"]):.1f}" cy="{size - at(row["measured"]):.1f}"'
        parts.append(f'<circle {place} r="4" fill="#1f4e8c" fill-opacity=".8"><title>{row["plan"]}</title></circle>')
    parts.append(f'<text x="{size / 2}" y="{size - 12}" text-anchor="middle">predicted relative error</text>')
    turned = f'transform="rotate(-90 14 {size / 2})"'
    parts.append(f'<text x="14" y="{size / 2}" text-anchor="middle" {turned}>measured relative error</text>')
    style = 'font-family="sans-serif" font-size="11" fill="#333"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size} {size}" {style}>{"".join(parts)}</svg>\n'


def measure(
    prepared: Prepared, name: str, plan: RandomPlan, problem: SearchProblem, profile: Profile, pairs: Sequence[Any]
) -> list[float]:
    """The relative error of the finished sample of each of ``pairs`` under a plan."""
    network = profile.networks[name]
    errors = []
    for pair in pairs:
        emulated = Emulated(prepared, name, plan, problem, network)
        programs = {key: whole_program(session) for key, session in prepared.evaluator.sessions.items()}
        with intercepted(prepared.evaluator, programs, {name: emulated}):
            sample = prepared.adapter.checked_rollout(*pair)
        errors.append(relative_l2(sample, prepared.evaluator.references[pair]))
    return errors


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Draw, predict and measure."""
    from diffusers import DiffusionPipeline

    profile = Profile.load(arguments.profile)
    ((name, network),) = profile.networks.items()
    texts = [line.strip() for line in arguments.prompts.read_text().splitlines() if line.strip()]
    unseen = [text for text in texts if text not in profile.prompts][arguments.skip :][: arguments.limit]
    pairs = [(text, 5000 + index) for index, text in enumerate(unseen)]
    pipe = DiffusionPipeline.from_pretrained(arguments.model, trust_remote_code=True)
    settings = dict(profile.plan["settings"])
    adapter, reporter = adapt(pipe, None, settings), Reporter()
    problem = SearchProblem.from_profile(
        network, ("reuse", "forecast"), sample_norm=profile.sample_norm, additive="norms"
    )
    rng = np.random.default_rng(arguments.seed)
    plans = [draw_plan(rng, problem, network) for _ in range(arguments.plans)]
    rows: list[dict[str, Any]] = []
    with as_it_was(adapter, always=True):
        prepared = Preparation(adapter, reporter, [], lambda _: nullcontext(), settings)(pairs[0])
        prepared.evaluator.dense(pairs)
        with reporter.stage("random plans", len(plans)) as stage:
            for plan in plans:
                predicted = predicted_error(problem, network, plan)
                measured = measure(prepared, name, plan, problem, profile, pairs)
                rows.append(
                    {
                        "plan": plan.describe(problem.steps),
                        "predicted": predicted,
                        "measured": float(np.median(measured)),
                        "root_mean_square": math.sqrt(float(np.mean(np.square(measured)))),
                        "by_prompt": measured,
                    }
                )
                stage.advance()
                told = ", ".join(f"{error:.4f}" for error in measured)
                reporter.say(f"  predicted {predicted:.4f}, measured {told}: {rows[-1]['plan']}")
    ranks = {
        key: rank_correlation([row["predicted"] for row in rows], [row[key] for row in rows])
        for key in ("measured", "root_mean_square")
    }
    return {
        "rank_correlation": ranks["measured"],
        "rank_correlation_root_mean_square": ranks["root_mean_square"],
        "plans": rows,
        "prompts": unseen,
        "seed": arguments.seed,
        "settings": settings,
        "profile_prompts": list(profile.prompts),
        "profile_device": profile.plan["device"],
        "model": {"folder": str(arguments.model), **profile.plan["model"], "weights": dict(profile.weights)},
        "device": describe_device(torch.device("cpu")),
        "torch": torch.__version__,
        "command": f"python -m benchmarks.predicted_error {shlex.join(sys.argv[1:])}",
    }


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--profile", type=Path, required=True, help="what `ditopt profile` wrote, with all tables")
    parser.add_argument("--prompts", type=Path, default=MODEL / "prompts.txt")
    parser.add_argument("--limit", type=int, default=3, help="prompts to measure on")
    parser.add_argument("--skip", type=int, default=0, help="prompts to leave out before them")
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    found = run(arguments)
    write_text_atomically(arguments.json, json.dumps(found, indent=1))
    write_text_atomically(arguments.json.with_suffix(".svg"), drawn(found["plans"]))
    print(f"rank correlation {found['rank_correlation']:.3f} over {len(found['plans'])} plans; {arguments.json}")


if __name__ == "__main__":
    main()
