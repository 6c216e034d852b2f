"""Sparse heads that the search mixes, against one pattern for all heads and an oracle: quality over attention's time.

    python -m benchmarks.sparse_search --set height=112 --set width=112 --json docs/results/sparse_search.json

Two prompts are profiled (what patterns cost heads, what attention takes), others judge: every plan generates them
compiled, in float32 and with every step computed, so that nothing but sparse heads errs. Families of plans:

- ``mix``: each head of each site in each of three phases has its own pattern or stays dense, at one price of error.
- ``single``: one pattern for all heads in all steps, or behind a dense first quarter (as published methods are used).
- ``recipe`` (with ``--recipes``): the mix under the restriction of each published system (``ditopt recipes``).
- ``oracle``: of each head in each call the blocks with most attention mass in that very call, as many as the head's
  work under the mix is worth (its means included). It reads the whole map of attention, so it is no method; graphs run
  node by node under it.

Attention's time is the sum over sites and steps of what was measured at their densities, relative to torch's dense
attention in the same run.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.flow import digest, source_digest, surroundings
from benchmarks.partial import Partial, Rows
from ditopt.adapters import adapt
from ditopt.cli_inputs import pipe_settings
from ditopt.console import Reporter
from ditopt.cost_models.measured import FULL
from ditopt.cost_models.sparse import SparseCost
from ditopt.decisions import Sparse
from ditopt.device import describe_device
from ditopt.errors import InputError
from ditopt.kernels.block_sparse_attention.lists import blocks, kernel_blocks
from ditopt.plan import Plan, Rule
from ditopt.plan_text import write_text_atomically
from ditopt.prepare import Preparation, Prepared, as_it_was, seeded
from ditopt.profile import NetworkProfile, Profile
from ditopt.profiler.head_edits import BlockMask, under_blocks
from ditopt.profiler.interpret import Edit, Watched, moment_of
from ditopt.profiler.observe import intercepted
from ditopt.profiler.places import attentions
from ditopt.profiler.run import whole_program
from ditopt.profiler.take import TABLES, add_sparse_tables, take_profile, tell_plans
from ditopt.quality import Quality, compare
from ditopt.recipes import RECIPES, Recipe
from ditopt.runtime.program import Compute
from ditopt.search.joint import from_kept
from ditopt.search.problem import SearchProblem
from ditopt.search.solution import SparsePart
from ditopt.search.sparse import planned_saving, profiled_candidates, site_costs
from ditopt.search.with_heads import HeadsBeside
from ditopt.techniques import Techniques

MODEL = Path("examples/tiny_video")
SHARES = (0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.2, 0.12)
"""Of the time of dense attention in the sparse kernel, what mixes are to take."""
DENSE_FIRST = (0.0, 0.25)
SLAB = 1 << 24
PROFILED, JUDGED_SEED = 2, 5000


def attention_seconds(
    plan: Plan, name: str, network: NetworkProfile, costs: Mapping[str, SparseCost]
) -> tuple[float, float]:
    """What self-attention takes in a generation under a plan that computes every step, and dense."""
    steps = range(len(network.timesteps))
    whole = sum(cost.dense for cost in costs.values()) * len(steps)
    return whole - planned_saving(plan, name, network, costs, steps), whole


def single_rules(network: NetworkProfile, costs: Mapping[str, SparseCost], candidate: str, first: float) -> list[Rule]:
    """One pattern for all heads of the sites, behind a share of dense steps."""
    total = len(network.timesteps)
    steps = tuple(range(round(first * total), total))
    return [Rule(sites=site, steps=steps, do=Sparse(pattern=candidate)) for site in costs]


def by_mass(kept: Mapping[int, int]) -> Edit:
    """Heads anew, each on so many of its blocks: those of most attention mass, one in every row of blocks at least."""

    def edit(given: tuple[Any, ...], value: Tensor) -> Tensor:
        query, key = given[:2]
        query_block, key_block = kernel_blocks(query.shape[2], key.shape[2])
        masks = {}
        for head, count in kept.items():
            mass = block_mass(query[0, head], key[0, head], query_block, key_block)
            attended = torch.zeros_like(mass, dtype=torch.bool)
            attended.scatter_(1, mass.argmax(1, keepdim=True), True)
            rest = mass.masked_fill(attended, -1.0).flatten().topk(max(count - len(mass), 0)).indices
            attended.view(-1)[rest] = True
            masks[head] = BlockMask(attended.numpy(), query_block, key_block)
        found: Tensor = under_blocks(masks)(given, value)
        return found

    return edit


def block_mass(query: Tensor, key: Tensor, query_block: int, key_block: int) -> Tensor:
    """``[Qb, Kb]``: the probabilities of ``[S, D]`` queries on ``[L, D]`` keys, added up by block."""
    columns = blocks(len(key), key_block)
    found = []
    step = max(1, SLAB // len(key) // query_block) * query_block
    for part in torch.split(query, step):
        shares = (part @ key.T * query.shape[1] ** -0.5).softmax(1)
        by_key = F.pad(shares, (0, columns * key_block - len(key))).view(len(part), columns, -1).sum(2)
        rows = F.pad(by_key, (0, 0, 0, -len(part) % query_block))
        found.append(rows.view(-1, query_block, columns).sum(1))
    return torch.cat(found)


def oracle_quality(prepared: Prepared, name: str, network: NetworkProfile, plan: Plan, pairs: Sequence[Any]) -> Quality:
    """Quality with, of every head in every call, as many blocks as its work under ``plan``, chosen by their mass."""
    program = whole_program(prepared.evaluator.sessions[name])
    trace, calls = program.variants.trace, prepared.calls[name]
    counts: list[dict[str, dict[int, int]]] = [{} for _ in network.timesteps]
    for entry in attentions(trace):
        table = network.tables["patterns"].get(entry.site.name)
        if table is None or entry.cross:
            continue
        query_block, key_block = kernel_blocks(entry.site.queries, entry.site.keys)
        whole = blocks(entry.site.queries, query_block) * blocks(entry.site.keys, key_block)
        work = dict(zip(table.labels["candidate"], table["density"].values.tolist(), strict=True))
        for step, decided in enumerate(plan.head_decisions(entry.site.name, name)):
            each = enumerate(decided.of(entry.site.heads))
            kept = {head: round(work[do.pattern] * whole) for head, do in each if isinstance(do, Sparse)}
            if kept:
                counts[step][entry.node.name] = kept
    prepared.evaluator.bind(())
    samples = []
    for pair in pairs:
        number = 0

        def answer(arguments: list[Any], compute: Compute) -> Sequence[Any]:
            nonlocal number
            moment = moment_of(calls, number)
            number += 1
            edits = {node: by_mass(kept) for node, kept in counts[moment.step].items()}
            result: Sequence[Any] = Watched(trace, (), edits).run(*arguments)
            return result

        with intercepted(prepared.evaluator, {name: program}, {name: answer}):
            samples.append(prepared.adapter.checked_rollout(*pair))
    return compare(samples, [prepared.evaluator.references[pair] for pair in pairs])


class Bench:
    """Plans of one prepared and profiled model, measured on ``pairs``; ``rows`` are what was found.

    They are kept in ``partial`` as they come: ``rows`` that an interrupted run has measured are not measured again.
    """

    def __init__(
        self,
        prepared: Prepared,
        profile: Profile,
        pairs: Sequence[Any],
        reporter: Reporter,
        partial: Partial,
        rows: Rows,
    ) -> None:
        self.prepared, self.profile, self.pairs, self.reporter = prepared, profile, pairs, reporter
        self.partial, self.rows = partial, rows
        ((self.name, self.network),) = profile.networks.items()
        self.costs, _ = site_costs(self.network, FULL)
        self.problem = SearchProblem.from_profile(self.network, ("reuse",), sample_norm=profile.sample_norm)

    def add(self, family: str, what: str, rules: Sequence[Rule], oracle: int = 0) -> None:
        """Measure one plan; ``oracle``: on so many prompts the oracle with as many blocks."""
        known = {(row["family"], row["plan"]): row for row in self.rows}
        plan = self.prepared.evaluator.template.model_copy(update={"rules": tuple(rules)})
        taken, whole = attention_seconds(plan, self.name, self.network, self.costs)
        if (family, what) not in known:
            began = time.perf_counter()
            quality, _ = self.prepared.evaluator.quality(rules, self.pairs)
            row = {
                "family": family,
                "plan": what,
                "attention": taken / whole,
                "psnr": quality.psnr,
                "rel_l2": quality.rel_l2,
                "per_prompt": quality.per_prompt,
                "seconds": time.perf_counter() - began,
            }
            self.rows.append(row)
            self.reporter.say(f"  {family} {what}: attention {taken / whole:.3f}, {quality.psnr:.2f} dB")
            known[family, what] = row
        if oracle and ("oracle", what) not in known:
            found = oracle_quality(self.prepared, self.name, self.network, plan, self.pairs[:oracle])
            own = float(np.mean(known[family, what]["per_prompt"][:oracle]))
            self.rows.append(
                {
                    "family": "oracle",
                    "plan": what,
                    "attention": taken / whole,
                    "psnr": found.psnr,
                    "mix_psnr_on_the_same": own,
                    "per_prompt": found.per_prompt,
                }
            )
            self.reporter.say(f"  oracle {what}: {found.psnr:.2f} dB, the mix {own:.2f} on the same prompts")
        self.partial.save(self.rows)

    def mixes(self, oracles: Sequence[float], judged: int) -> None:
        """Mixes that take each of ``SHARES``."""
        for share, part in self.parts(None):
            self.add("mix", share, part.rules, judged if share in {f"{each:g}" for each in oracles} else 0)

    def recipes(self) -> None:
        """The mixes of every recipe that take each of ``SHARES`` as far as it goes, and where it ends its fastest."""
        for recipe in (each for each in RECIPES.values() if each.of_heads):
            for told in recipe.told(profiled_candidates(self.network)):
                self.reporter.say(f"  {told}")
            for share, part in self.parts(recipe):
                self.add("recipe", f"{recipe.name} {share}", part.rules)

    def parts(self, recipe: Recipe | None) -> Iterator[tuple[str, SparsePart]]:
        """The choices of least error that take no longer than each of ``SHARES``; ``fastest`` where none is so fast."""
        base = from_kept(self.problem, range(self.problem.steps))
        heads = HeadsBeside(self.network, self.problem, base, self.costs, lambda _: True, recipe)
        whole = sum(cost.dense for cost in self.costs.values()) * self.problem.steps
        in_kernel = sum(cost.seconds(1.0) for cost in self.costs.values()) * self.problem.steps
        for share in SHARES:
            needed = whole - share * in_kernel
            if needed > heads.most_saved:
                part = heads.saving(heads.most_saved)
                if part is not None:
                    yield "fastest", part
                return
            part = heads.saving(needed)
            if part is not None:  # else torch's dense attention is as fast as that
                yield f"{share:g}", part

    def singles(self, dense_first: Sequence[float]) -> None:
        """Every candidate by itself, behind each of these shares of dense steps."""
        labels = dict.fromkeys(
            label
            for site in self.costs
            for label in self.network.tables["patterns"][site].labels["candidate"]
            if '"qk"' not in str(label)  # which err as the same without int8 scores, nearly
        )
        for first in dense_first:
            for label in labels:
                what = f"{label}, first {first:.0%} of steps dense" if first else str(label)
                self.add("single", what, single_rules(self.network, self.costs, str(label), first))


def facts_of(arguments: argparse.Namespace, loop: str) -> dict[str, Any]:
    """What rows hold for: the code, the libraries and processor, the arguments, and the model and its ``loop``."""
    asked = {name: str(value) for name, value in sorted(vars(arguments).items()) if name != "json"}
    benchmark = digest([Path(__file__)])
    return {"code": f"{source_digest()} {benchmark}", "arguments": asked, "model and loop": loop, **surroundings()}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Profile, plan, measure."""
    from diffusers import DiffusionPipeline

    texts = [line.strip() for line in arguments.prompts.read_text().splitlines() if line.strip()]
    profiled = seeded(texts[:PROFILED], 0)
    judged = seeded(texts[PROFILED : PROFILED + arguments.limit], JUDGED_SEED)
    pipe = DiffusionPipeline.from_pretrained(arguments.model, trust_remote_code=True)
    settings = pipe_settings(arguments.steps, 1.0, arguments.set)
    adapter, reporter = adapt(pipe, None, settings), Reporter()
    reasons: list[str] = []
    techniques = Techniques.choose(("reuse", "sparse"))
    with as_it_was(adapter, always=True):
        prepared = Preparation(adapter, reporter, reasons, lambda _: nullcontext(), settings, False)(profiled[0])
        checkpoints = prepared.checkpoints({"sparse_search": profiled, "tables": TABLES}, settings, True)
        partial = Partial(arguments.json.with_suffix(".partial"), facts_of(arguments, checkpoints.folder.name))
        profile, rows = partial.resume() or (None, [])
        if profile is None:
            profile = take_profile(prepared, techniques, checkpoints, profiled, reporter, for_tuning=False)
            profile = add_sparse_tables(prepared, profile, checkpoints, profiled, reporter, reasons)
            partial.begin(profile)
        else:
            ((name, network),) = profile.networks.items()
            tell_plans(prepared, name, network)
        prepared.evaluator.dense(judged)
        bench = Bench(prepared, profile, judged, reporter, partial, rows)
        bench.mixes(arguments.oracle, arguments.oracle_limit)
        if arguments.recipes:
            bench.recipes()
        if not arguments.mixes_only:
            bench.singles(arguments.dense_first)
    return {
        "rows": bench.rows,
        "costs": {site: vars(cost) for site, cost in bench.costs.items()},
        "step_seconds": bench.network.seconds[FULL],
        "tokens": str(bench.network.geometry),
        "prompts": {"profiled": texts[:PROFILED], "judged": [text for text, _ in judged]},
        "settings": settings,
        "reasons": reasons,
        "model": {"folder": str(arguments.model), **profile.plan["model"], "weights": dict(profile.weights)},
        "device": describe_device(torch.device("cpu")),
        "torch": torch.__version__,
        "command": f"python -m benchmarks.sparse_search {shlex.join(sys.argv[1:])}",
    }


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--prompts", type=Path, default=MODEL / "prompts.txt")
    parser.add_argument("--limit", type=int, default=2, help="prompts that judge")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the pipeline's call")
    parser.add_argument("--oracle", type=float, nargs="*", default=[0.6, 0.3], help="shares to compare with the oracle")
    parser.add_argument("--oracle-limit", type=int, default=1, help="prompts of the oracle")
    parser.add_argument("--dense-first", type=float, nargs="*", default=DENSE_FIRST, help="of single patterns")
    parser.add_argument("--mixes-only", action="store_true", help="no single patterns")
    parser.add_argument("--recipes", action="store_true", help="published systems beside the mix")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        found = run(arguments)
    except InputError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    write_text_atomically(arguments.json, json.dumps(found, indent=1) + "\n")
    Partial(arguments.json.with_suffix(".partial"), {}).remove()


if __name__ == "__main__":
    main()
