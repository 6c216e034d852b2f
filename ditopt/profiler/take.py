"""Takes the profile of a prepared model: what the search needs, and what further collectors are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ditopt.adapters import Adapter
from ditopt.console import Reporter
from ditopt.cost_models.measured import FORMS
from ditopt.errors import InputError
from ditopt.geometry import Geometry
from ditopt.prepare import Preparation, Prepared, as_it_was, seeded
from ditopt.profile import LATENCY, NetworkProfile, Profile
from ditopt.profiled_tensors import profiled_tensors
from ditopt.profiler.checkpoint import Checkpoints, weights_print
from ditopt.profiler.observe import Pair
from ditopt.profiler.run import ProfileRun
from ditopt.profiler.split import SplitProfileRun
from ditopt.quality import value_range
from ditopt.search.sparse import site_costs
from ditopt.techniques import Techniques

TABLES = 17
"""Counts up when collectors measure otherwise: checkpoints of before are not taken up."""


SPARSE_PROMPTS = 2
"""Of so many prompts ``optimize`` measures what patterns cost."""
SPARSE_TABLES = ("patterns", "sensitivity")
"""What it measures for that."""
LEAST_DENSITY = 0.25
MOST_REASONS = 3
WORTH_LOOKING = 0.1
"""Where sparse heads at that density save less than this share of a step, nothing is measured of them."""


def take_profile(
    prepared: Prepared,
    techniques: Techniques,
    checkpoints: Checkpoints,
    pairs: Sequence[Pair],
    reporter: Reporter,
    for_tuning: bool = True,
) -> Profile:
    """What the search for decisions of ``techniques`` needs, over (prompt, seed) ``pairs``.

    ``for_tuning``: what rollouts that tune its plans need, too.

    Raises:
        RolloutError: the loop calls the model differently from prompt to prompt, or is not deterministic.
    """
    evaluator, calls, sampler = prepared.evaluator, prepared.calls, prepared.adapter.sampler()
    run: ProfileRun | SplitProfileRun
    if prepared.whole:
        run = ProfileRun(
            evaluator,
            calls,
            sampler,
            checkpoints,
            reporter,
            use_ranges=techniques.ranges,
            use_fits="fit" in techniques.predictors,
            dtypes=techniques.dtypes,
            simplify=techniques.simplify,
            for_tuning=for_tuning,
        )
    else:
        run = SplitProfileRun(evaluator, prepared.graphs, calls, sampler, checkpoints, reporter)
    profile = prepared.profile(partial(run, pairs), checkpoints, reporter)
    samples = [evaluator.references[pair] for pair in pairs]
    facts = {"peak": float(np.mean([value_range(each) for each in samples])), "numel": float(samples[0].numel())}
    plan = evaluator.template.model_dump(mode="json", exclude={"target"})
    weights = {name: weights_print(prepared.adapter.networks[name]) for name in calls}
    return replace(profile, sample=facts, plan=plan, weights=weights)


def add_tables(
    prepared: Prepared,
    profile: Profile,
    collect: Sequence[str],
    geometry: Geometry | None,
    checkpoints: Checkpoints,
    pairs: Sequence[Pair],
    reporter: Reporter,
) -> Profile:
    """The profile with the tables of the collectors ``collect``; ``geometry`` is the user's, None: to be found."""
    if not collect:
        return profile
    if not prepared.whole:
        reason = "attention, features and activations are not measured where graph breaks cut a network"
        reporter.say(f"  {reason}")
        return replace(profile, reasons=(*profile.reasons, reason))
    from ditopt.profiler.detail import DetailRun  # so that who wants no tables does not wait for the collectors

    run = DetailRun(prepared.evaluator, prepared.calls, checkpoints, reporter, tuple(collect), geometry)
    networks, reasons = run(profile, pairs)
    return replace(profile, networks=networks, reasons=(*profile.reasons, *reasons))


def add_sparse_tables(
    prepared: Prepared,
    profile: Profile,
    checkpoints: Checkpoints,
    pairs: Sequence[Pair],
    reporter: Reporter,
    reasons: list[str],
) -> Profile:
    """The profile with what the choice of sparse heads needs, where that may pay; else ``reasons`` say why not.

    How the tokens of networks lie is told by the evaluator's plans from then on, and which blocks listed heads have.
    """
    if not prepared.whole or len(prepared.calls) != 1:
        reasons.append("sparse: heads are looked at where one network runs in a loop, and as one graph")
        return profile
    from ditopt.profiler.detail import DetailRun

    run = DetailRun(prepared.evaluator, prepared.calls, checkpoints, reporter, SPARSE_TABLES, attention_only=True)
    ((name, timed),) = run.latency(profile).items()
    network = replace(profile.networks[name], tables={**profile.networks[name].tables, LATENCY: timed})
    share, told = attention_share(network)
    if share < WORTH_LOOKING:
        reasons += [f"sparse: {reason}" for reason in (*run.reasons, told)]
        reporter.say(f"  sparse: {told}")
        return profile
    run.find_geometries(pairs[0])
    geometry = run.geometry[name]
    if geometry is None:
        reasons += [f"sparse: {reason}" for reason in run.reasons]
        return profile
    networks, left_out = run(profile, pairs[:SPARSE_PROMPTS])
    reasons += [f"sparse: {reason}" for reason in left_out]
    tables = {**networks[name].tables, LATENCY: timed}
    network = replace(networks[name], tables=tables)
    tell_plans(prepared, name, network)
    return replace(profile, networks={name: network})


def tell_plans(prepared: Prepared, name: str, network: NetworkProfile) -> None:
    """Let the evaluator's plans say how the tokens of a profiled network lie, and which blocks listed heads have."""
    evaluator = prepared.evaluator
    tokens = {} if network.geometry is None else {name: network.geometry}
    template = evaluator.template.model_copy(update={"tokens": tokens})
    evaluator.template = template.with_beside(profiled_tensors(name, network))


def attention_share(network: NetworkProfile) -> tuple[float, str]:
    """The largest share of a step, in any form, that heads with ``LEAST_DENSITY`` would save; and that in words."""
    shares: dict[str, float] = {}
    reasons: dict[str, None] = {}  # a set in order
    for form in FORMS.keys() & network.seconds.keys():
        costs, refused = site_costs(network, form)
        reasons |= dict.fromkeys(refused)
        saved = sum(max(cost.dense - cost.seconds(LEAST_DENSITY), 0.0) for cost in costs.values())
        shares[form] = saved / network.seconds[form]
    best = max(shares, key=lambda form: shares[form], default=None)
    if best is None or not shares[best]:
        return 0.0, "; ".join(["no self-attention takes less time block-sparse here", *list(reasons)[:MOST_REASONS]])
    told = f"a quarter of all blocks would save {shares[best]:.0%} of a {best} step, less than {WORTH_LOOKING:.0%}"
    return shares[best], f"heads were not looked at: {told}"


def profile_alone(
    adapter: Adapter,
    prompts: Sequence[str],
    techniques: Techniques,
    collect: Sequence[str],
    geometry: Geometry | None,
    settings: Mapping[str, Any] | None,
    seed: int,
    resume: bool,
    reporter: Reporter,
) -> Profile:
    """Prepare a model, take its profile with tables, and give the model back as it was.

    Raises:
        InputError: a network runs for one step only, or the geometry does not fit.
        RolloutError: the sampling loop does not call the model, gives NaN or is not deterministic.
        TraceError: nothing was found to decide on.
    """
    pairs = seeded(prompts, seed)
    reasons: list[str] = []
    with as_it_was(adapter, always=True):
        prepare = Preparation(adapter, reporter, reasons, lambda _: nullcontext(), settings, techniques.ranges)
        prepared = prepare(pairs[0])
        for name, part in prepared.calls.items():
            if len(part.timesteps) < 2:
                raise InputError(
                    f"{name} runs for {len(part.timesteps)} step only; a profile compares steps: sample with 2 or more"
                )
        facts = {"ranges": techniques.ranges, "profile": pairs, "geometry": str(geometry), "tables": TABLES}
        checkpoints = prepared.checkpoints(facts, settings, resume)
        profile = take_profile(prepared, techniques, checkpoints, pairs, reporter, for_tuning=False)
        profile = add_tables(prepared, profile, collect, geometry, checkpoints, pairs, reporter)
    return replace(profile, reasons=tuple(dict.fromkeys((*reasons, *profile.reasons))))
