"""A small synthetic profile with every table of every collector, and values as a real model has them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from ditopt.geometry import Geometry
from ditopt.kernels.patterns.registry import pattern_to_data
from ditopt.kernels.patterns.spatial import Spatial
from ditopt.kernels.patterns.temporal import Temporal
from ditopt.kernels.patterns.whole import Nothing
from ditopt.kernels.patterns.window import Window
from ditopt.measures import Label, Measure, Numbers, Table
from ditopt.profile import Array, FeatureGram, NetworkProfile, Profile
from ditopt.profiler.site_sensitivity import Planted, compared

STEPS, PROMPTS, LAGS, BLOCK = 10, 2, (1, 2, 3), 16
SIZES = (3, 8, 8)
ROLES = ("spatial", "temporal", "local")
PATTERNS = [json.dumps(pattern_to_data(p), sort_keys=True) for p in (Nothing(), Spatial(), Temporal(), Window())]
FORMATS = ("bfloat16", "int8_dynamic", "int8_weight", "fp8_e4m3", "int8_smooth", "int8_rotated")
REGIONS = ("mass_text", "mass_first_frame", "mass_sinks", "mass_in_frame", "mass_same_pixel")
TIMES = tuple(1000.0 - 100 * step for step in range(STEPS))
ALONG = ("prompt", "step", "branch", "head")


def make_profile(layers: int = 8, heads: int = 3, branches: int = 1, tables: bool = True) -> Profile:
    """A profile of one network with ``layers`` blocks, whose heads are spatial, temporal and local in turn.

    The last head of the last layer is idle.
    """
    rng = np.random.default_rng(0)
    names = tuple(f"branch{b}" for b in range(branches))
    grams = {site: _of_site(rng, site, names, drift) for site, drift in (("step", 0.2), ("blocks.0..1", 0.1))}
    found: dict[str, dict[str, Table]] = {"attention": {}, "patterns": {}, "features": {}, "tokens": {}, "linear": {}}
    found["sensitivity"] = {}
    for layer in range(layers) if tables else ():
        self_site, cross_site = f"blocks.{layer}.attn1", f"blocks.{layer}.attn2"
        roles = [ROLES[(layer + head) % 3] for head in range(heads)]
        idle = layer == layers - 1
        found["attention"][self_site] = _attention(rng, roles, branches)
        found["attention"][cross_site] = _cross(rng, heads, branches)
        found["patterns"][self_site] = _patterns(rng, roles, branches, idle)
        for kind, site in (("self", self_site), ("cross", cross_site), ("mlp", f"blocks.{layer}.ffn")):
            found["features"][site] = _features(rng, kind, branches)
            grams[site] = _of_site(rng, site, names, 0.1 + 0.02 * layer)
            found["sensitivity"][site] = _sensitivity(rng, kind, 1.0 + 0.1 * layer)
        found["linear"][f"{self_site}.to_q"] = _linear(rng, branches)
    if tables:
        found["features"]["step"] = _features(rng, "step", branches)
        found["tokens"]["step"] = _tokens(rng, branches)
        found["sensitivity"]["rollouts"] = _rollouts(rng)
        found["tokens"]["blocks.4"] = _tokens(rng, branches)
    network = NetworkProfile(
        TIMES, tuple(t / 1000 for t in TIMES), (0.1,) * STEPS, tuple(1.0 + 0.1 * t for t in range(STEPS)),
        (1.0,) if branches == 1 else (4.0, -3.0), grams,
        {"full": 0.134, "bfloat16": 0.065, "predicted": 7e-5, "blocks.0..1": 0.03},
        tables=found if tables else {}, geometry=Geometry(*SIZES),
    )  # fmt: skip
    return Profile(
        {"transformer": network}, tuple(f"prompt {i}" for i in range(PROMPTS)), 10.0, plan=_template(layers),
        sample={"peak": 1.0, "numel": 18432.0}, reasons=("tokens: 3 sites left out",),
    )  # fmt: skip


def _template(layers: int) -> dict[str, Any]:
    return {
        "ditopt": 1,
        "model": {"class": "WanTransformer3DModel", "structure": "sha256:00ff", "blocks": layers},
        "sampler": {
            "class": "FlowMatchEulerDiscreteScheduler", "steps": STEPS,
            "timesteps": {"transformer": list(TIMES)}, "sigmas": {"transformer": [t / 1000 for t in TIMES]},
        },
        "device": {"device": "EPYC, 2 cores", "torch": "2.13.0", "dtype": "float32"},
    }  # fmt: skip


def _of_site(rng: np.random.Generator, site: str, names: tuple[str, ...], drift: float) -> FeatureGram:
    latents, present = site == "step", np.ones((len(names), STEPS), dtype=bool)
    return FeatureGram(site, STEPS, names, _gram(rng, STEPS, len(names), drift, latents), present, latents)


def _gram(rng: np.random.Generator, steps: int, branches: int, drift: float, latents: bool = False) -> Array:
    """Inner products of features that walk by ``drift`` of their norm a step."""
    rows = steps * (branches + latents)
    walk = np.cumsum(rng.normal(size=(PROMPTS, rows, 32)) * drift, axis=1) + rng.normal(size=(PROMPTS, 1, 32))
    return np.asarray(walk @ walk.transpose(0, 2, 1), dtype=np.float64)


def _coordinates() -> Numbers:
    return np.stack(np.unravel_index(np.arange(int(np.prod(SIZES))), SIZES), axis=1).astype(float)


def _attention(rng: np.random.Generator, roles: list[str], branches: int) -> Table:
    at = _coordinates()
    apart = np.abs(at[:, None] - at)
    scores = {
        "spatial": -8.0 * apart[..., 0],
        "temporal": -8.0 * apart[..., 1:].sum(-1),
        "local": -4.0 * apart.max(-1),
    }
    maps, masses = [], {name: np.zeros(len(roles)) for name in REGIONS}
    near = np.zeros((len(roles), 3))
    for head, role in enumerate(roles):
        weights = np.exp(scores[role] + rng.normal(size=apart.shape[:2]))
        weights /= weights.sum(-1, keepdims=True)
        same, pixel = apart[..., 0] == 0, apart[..., 1:].sum(-1) == 0
        regions = {"mass_first_frame": at[None, :, 0] == 0, "mass_in_frame": same, "mass_same_pixel": pixel & ~same}
        for name, where in regions.items():
            masses[name][head] = (weights * where).sum(-1).mean()
        near[head] = [(weights * (apart.max(-1) <= d)).sum(-1).mean() for d in (1, 2, 4)]
        blocks = weights.reshape(-1, BLOCK, weights.shape[1] // BLOCK, BLOCK).mean(1).sum(-1)
        maps.append(blocks)
    anchors = (0, 5, 9)
    shape = (PROMPTS, STEPS, branches, len(roles))
    measures = {name: Measure(ALONG, _noisy(rng, np.broadcast_to(mass, shape))) for name, mass in masses.items()}
    measures["mass_near"] = Measure((*ALONG, "distance"), np.broadcast_to(near, (*shape, 3)).astype(np.float32))
    measures["entropy"] = Measure(ALONG, _noisy(rng, np.full(shape, 0.5)))
    stacked = np.stack(maps).astype(np.float16)
    measures["map"] = Measure(
        ("prompt", "anchor", "branch", "head", "query_block", "key_block"),
        np.broadcast_to(stacked, (PROMPTS, len(anchors), branches, *stacked.shape)).copy(),
    )
    tokens = len(at)
    uniform: dict[str, Any] = {
        "mass_text": 0.0, "mass_first_frame": 1 / 3, "mass_sinks": 0.02, "mass_in_frame": 1 / 3,
        "mass_same_pixel": 2 / tokens, "mass_near": [0.1, 0.3, 0.45],
    }  # fmt: skip
    facts = {"heads": len(roles), "queries": tokens, "keys": tokens, "kind": "self", "block": BLOCK, "uniform": uniform}
    return Table(measures, {"anchor": anchors, "distance": (1, 2, 4)}, facts)


def _cross(rng: np.random.Generator, heads: int, branches: int) -> Table:
    shape = (PROMPTS, STEPS, branches, heads)
    maps = rng.dirichlet(np.ones(4), size=(PROMPTS, 3, branches, heads, 12)).astype(np.float16)
    measures = {
        "entropy": Measure(ALONG, _noisy(rng, np.full(shape, 0.8))),
        "mass_sinks": Measure(ALONG, _noisy(rng, np.full(shape, 0.1))),
        "map": Measure(("prompt", "anchor", "branch", "head", "query_block", "key_block"), maps),
    }
    facts = {"heads": heads, "queries": 192, "keys": 12, "kind": "cross", "uniform": {"mass_sinks": 0.08}}
    return Table(measures, {"anchor": (0, 5, 9)}, facts)


def _patterns(rng: np.random.Generator, roles: list[str], branches: int, idle: bool) -> Table:
    shape = (PROMPTS, STEPS, branches, len(roles))
    errors = np.full((*shape, len(PATTERNS)), 0.3)
    share = np.full(shape, 0.5)
    for head, role in enumerate(roles):
        errors[..., head, ("skip", "spatial", "temporal", "local").index(role)] = 0.01
    if idle:
        share[..., -1] = errors[..., -1, 0] = 0.005
    measures = {
        "error": Measure((*ALONG, "candidate"), _noisy(rng, errors)),
        "reuse": Measure((*ALONG, "lag"), _of_lags(rng, shape), partial=True),
        "share": Measure(ALONG, _noisy(rng, share)),
        "output": Measure(ALONG[:3], _noisy(rng, np.ones(shape[:3]))),
        "density": Measure(("candidate",), np.array([0.0, 0.34, 0.4, 0.5], dtype=np.float32)),
    }
    labels: dict[str, tuple[Label, ...]] = {"candidate": tuple(PATTERNS), "lag": LAGS}
    return Table(measures, labels, {"block_queries": 16, "block_keys": 16, "projected": True})


def _features(rng: np.random.Generator, kind: str, branches: int) -> Table:
    shape = (PROMPTS, STEPS, branches)
    measures = {
        "plain": Measure((*ALONG[:3], "lag"), _of_lags(rng, shape), partial=True),
        "affine": Measure((*ALONG[:3], "lag"), _of_lags(rng, shape) * 0.7, partial=True),
    }
    return Table(measures, {"lag": LAGS}, {"kind": kind, "channels": 32, "tokens": 192})


def _tokens(rng: np.random.Generator, branches: int) -> Table:
    at = _coordinates()
    change = np.stack(
        [np.exp(-np.square(at[:, 1:] - [2 + 0.4 * step, 4]).sum(1) / 6) for step in range(STEPS)]
    )  # a spot that wanders down
    values = np.broadcast_to(change[:, None], (PROMPTS, STEPS, branches, len(at))).copy()
    values[:, 0] = np.nan
    facts = dict(zip(("frames", "rows", "columns"), SIZES, strict=True))
    return Table({"change": Measure((*ALONG[:3], "cell"), values.astype(np.float16), partial=True)}, {}, facts)


def _linear(rng: np.random.Generator, branches: int) -> Table:
    snr = np.broadcast_to([52.0, 38.0, 42.0, 30.0, 41.0, 43.0], (PROMPTS, 3, branches, 6)).astype(float)
    measures = {
        "snr": Measure(("prompt", "anchor", "branch", "format"), _noisy(rng, snr)),
        "outlier": Measure(ALONG[:3], _noisy(rng, np.full((PROMPTS, STEPS, branches), 7.0))),
    }
    facts = {"in_features": 32, "out_features": 32, "rows": 192}
    return Table(measures, {"anchor": (0, 5, 9), "format": FORMATS}, facts)


def _sensitivity(rng: np.random.Generator, kind: str, growth: float) -> Table:
    measure = Measure(("anchor", "error"), _noisy(rng, np.full((3, 3), growth)), partial=True)
    return Table({"to_output": measure}, {"anchor": (0, 5, 9), "error": ("noise", "head", "pattern")}, {"kind": kind})


def _rollouts(rng: np.random.Generator) -> Table:
    predicted = np.geomspace(0.1, 2.0, 9)
    measured = _noisy(rng, predicted * 1.1)
    each = enumerate(zip(measured.tolist(), predicted.tolist(), strict=True))
    return compared([Planted(f"blocks.{i}.ffn, step 5, noise", "noise", *moved) for i, moved in each], PROMPTS)


def _of_lags(rng: np.random.Generator, shape: tuple[int, ...]) -> Numbers:
    """Errors that grow with the lag, and are not there before it."""
    errors = _noisy(rng, np.broadcast_to([0.05 * lag for lag in LAGS], (*shape, len(LAGS))))
    for i, lag in enumerate(LAGS):
        errors[:, :lag, ..., i] = np.nan
    return errors


def _noisy(rng: np.random.Generator, values: Numbers) -> Numbers:
    return np.asarray(values * (1 + 0.02 * rng.uniform(-1, 1, size=values.shape)), dtype=np.float32)
