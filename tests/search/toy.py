"""A diffusion loop small enough for real rollouts in a test: the exact velocity of a Gaussian mixture, in numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ditopt.decisions import Dense, Predictor
from ditopt.plan import Rule
from ditopt.profile import Array, FeatureGram, NetworkProfile
from ditopt.search import Measurement, predictor_coefficients


class Toy:
    """Rectified flow from noise to a mixture of ``modes`` points in ``size`` dimensions, by Euler steps.

    x_s = (1 - s) x0 + s noise; the velocity is E[noise - x0 | x_s], in closed form.
    """

    def __init__(self, steps: int = 20, size: int = 24, modes: int = 12, prompts: int = 6, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.sigmas = np.linspace(1.0, 0.0, steps + 1) ** 0.8
        self.modes = rng.normal(size=(prompts, modes, size))
        self.noise = rng.normal(size=(prompts, size))
        self.spread = 0.15
        self.steps, self.prompts = steps, prompts

    def velocity(self, prompt: int, x: Array, sigma: float) -> Array:
        scale = ((1 - sigma) * self.spread) ** 2 + sigma**2
        gaps = x - (1 - sigma) * self.modes[prompt]
        logits = -(gaps**2).sum(axis=1) / (2 * scale)
        share = np.exp(logits - logits.max())
        share /= share.sum()
        noise = share @ gaps * sigma / scale
        clean = share @ (self.modes[prompt] + (1 - sigma) * self.spread**2 / scale * gaps)
        return np.asarray(noise - clean)

    def rollout(
        self, prompt: int, rules: Sequence[Rule] = (), plant: tuple[int, Array] | None = None
    ) -> tuple[Array, Array]:
        """The final sample, and features and latents of all steps ``[2T, size]``."""
        x = self.noise[prompt].copy()
        computed: list[int] = []
        features: dict[int, Array] = {}
        latents: list[Array] = []
        for step in range(self.steps):
            latents.append(x)
            decision = next((rule.do for rule in rules if step in rule.steps), Dense())
            if not isinstance(decision, Predictor):
                output = self.velocity(prompt, x, float(self.sigmas[step]))
                features[step] = output
                computed.insert(0, step)
            else:
                read = computed[: decision.history]
                factors = predictor_coefficients(decision, self.sigmas[:-1].tolist(), step, read)
                inputs = [features[source] for source in read] + [x]
                output = np.asarray(sum(c * f for c, f in zip(factors, inputs, strict=False)))
            if plant and plant[0] == step:
                output = output + plant[1]
            x = x + (self.sigmas[step + 1] - self.sigmas[step]) * output
        rows = [features.get(step, np.zeros_like(x)) for step in range(self.steps)]
        return x, np.array(rows + latents)

    def profile(self) -> NetworkProfile:
        runs = [self.rollout(prompt) for prompt in range(self.prompts)]
        widths, rng = np.abs(np.diff(self.sigmas)), np.random.default_rng(1)
        growth = np.zeros(self.steps)
        for step in range(self.steps):
            for prompt, (sample, rows) in enumerate(runs):
                error = np.asarray(rng.normal(size=rows.shape[1])) * 0.01
                moved, _ = self.rollout(prompt, plant=(step, error))
                growth[step] += float(np.linalg.norm(moved - sample) / np.linalg.norm(error) / widths[step])
        growth /= self.prompts
        grams = np.array([rows @ rows.T for _, rows in runs])
        site = FeatureGram("step", self.steps, ("cond",), grams, np.ones((1, self.steps), bool), has_latents=True)
        sigmas = tuple(self.sigmas[:-1].tolist())
        return NetworkProfile(
            sigmas, sigmas, tuple(widths.tolist()), tuple(growth.tolist()), (1.0,), {"step": site},
            {"full": 1.0, "predicted": 0.02},
        )  # fmt: skip

    def norm(self) -> float:
        return float(np.mean([np.linalg.norm(self.rollout(p)[0]) for p in range(self.prompts)]))

    def measure(self, rules: Sequence[Rule]) -> Measurement:
        errors = [np.linalg.norm(self.rollout(p, rules)[0] - self.rollout(p)[0]) for p in range(self.prompts)]
        predicted = {step for rule in rules for step in rule.steps}
        return Measurement(float(np.sqrt(np.mean(np.square(errors)))) / self.norm(), self.steps - 0.98 * len(predicted))
