"""Profiles made by hand: one with a bit of everything, and those of the toy loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from ditopt.geometry import Geometry
from ditopt.measures import Measure, Numbers, Table
from ditopt.plan import DevicePrint, ModelPrint, Plan, SamplerPrint
from ditopt.profile import FeatureGram, NetworkProfile, Profile
from tests.search.toy import Toy

STEPS = 4
TIMES = (900.0, 600.0, 300.0, 100.0)
GEOMETRY = Geometry(2, 3, 4)


def made_plan(networks: Mapping[str, tuple[float, ...]], device: str = "EPYC", **changes: Any) -> dict[str, Any]:
    """What a profile says of what was profiled."""
    plan = Plan(
        model=ModelPrint(class_name="Net", structure="sha256:00ff", blocks=2),
        sampler=SamplerPrint(
            class_name="Euler",
            steps=sum(map(len, networks.values())),
            guidance=3.0,
            timesteps=dict(networks),
            sigmas={name: tuple(t / 1000 for t in times) for name, times in networks.items()},
        ),
        settings={"height": 64},
        geometry={name: (1, 4, 2, 6, 8) for name in networks},
        device=DevicePrint(device=device, torch="2.13.0", dtype="float32"),
    )
    return plan.model_copy(update=changes).model_dump(mode="json")


def made_table(seed: int, prompts: int, weight: float = 1.0) -> Table:
    rng = np.random.default_rng(seed)
    reuse = rng.random((prompts, STEPS, 2, 3)).astype(np.float32)
    reuse[:, 0] = np.nan
    maps = rng.random((prompts, 2, 2, 3, 5)).astype(np.float16)
    return Table(
        {
            "entropy": Measure(("prompt", "step", "branch", "head"), rng.random((prompts, STEPS, 2, 3), np.float32)),
            "reuse": Measure(("prompt", "step", "branch", "head"), reuse, partial=True),
            "map": Measure(("prompt", "anchor", "branch", "head", "key_block"), maps),
            "weight_max": Measure(("channel",), np.full(5, weight, np.float32)),
        },
        {"anchor": (0, 3), "channel": ("a", "b", 3, 4, 5.5)},
        {"kind": "self", "queries": 24, "heads": 3, "uniform": {"mass_text": 0.0}, "sizes": (2, 3, 4)},
    )


def made_gram(site: str, seed: int, prompts: int, latents: bool) -> FeatureGram:
    rows = np.random.default_rng(seed).normal(size=(prompts, STEPS * (2 + latents), 6))
    values: Numbers = rows @ rows.transpose(0, 2, 1)
    return FeatureGram(site, STEPS, ("cond", "uncond"), np.asarray(values, float), np.ones((2, STEPS), bool), latents)


def made_profile(seed: int = 0, prompts: int = 2, weight: float = 1.0, device: str = "EPYC") -> Profile:
    """A profile with two sites, tables of two collectors, and a geometry; ``weight`` is what is not per prompt."""
    sites = ("step", "blocks.0..1")
    network = NetworkProfile(
        timesteps=TIMES,
        sigmas=tuple(t / 1000 for t in TIMES),
        step_widths=(0.3, 0.3, 0.2, 0.1),
        sensitivity=(weight, 2 * weight, weight, weight),
        branch_weights=(3.0, -2.0),
        grams={site: made_gram(site, seed + i, prompts, site == "step") for i, site in enumerate(sites)},
        seconds={"full": weight, "predicted": 0.1 * weight, "blocks.0..1": 0.4 * weight},
        range_weights={"blocks.0..1": (weight, weight, 3 * weight, weight)},
        tables={
            "attention": {f"blocks.{i}.attn1": made_table(seed + i, prompts, weight) for i in range(2)},
            "patterns": {"a/b %c": made_table(seed + 9, prompts, weight)},
        },
        geometry=GEOMETRY,
    )
    texts = tuple(f"prompt {seed} {i} äπ" for i in range(prompts))
    plan = made_plan({"transformer": TIMES}, device)
    sample = {"peak": 2.0 * weight, "numel": 1000.0}
    return Profile({"transformer": network}, texts, 10.0 * weight, plan, sample, (f"reason {seed}",))


def with_network(profile: Profile, **changes: Any) -> Profile:
    """The profile with its one network changed."""
    ((name, network),) = profile.networks.items()
    return replace(profile, networks={name: replace(network, **changes)})


@cache
def toy_profile(steps: int = 12, seed: int = 0, seconds: float = 1.0, networks: tuple[str, ...] = ("net",)) -> Profile:
    """The profile of the toy loop; several networks have it twice."""
    toy = Toy(steps=steps, seed=seed)
    part = toy.profile()
    times = {"full": seconds, "predicted": 0.02 * seconds, "simplified": 0.9 * seconds, "bfloat16": 0.5 * seconds}
    part = replace(part, seconds=times)
    return Profile(
        dict.fromkeys(networks, part),
        tuple(f"prompt {i}" for i in range(toy.prompts)),
        toy.norm(),
        made_plan(dict.fromkeys(networks, part.timesteps)),
        {"peak": 4.0, "numel": 24.0},
        ("attention: not measured",),
    )
