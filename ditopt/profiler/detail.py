"""Further generations of the profiled prompts, run node by node under the collectors that were asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from ditopt.calls import NetworkCalls
from ditopt.console import Reporter
from ditopt.geometry import Geometry
from ditopt.measure import Evaluator
from ditopt.measures import Table, joined
from ditopt.profile import LATENCY, FeatureGram, NetworkProfile, Profile
from ditopt.profiler.attention import attention_collectors
from ditopt.profiler.attention_timing import attention_latency
from ditopt.profiler.checkpoint import Checkpoints
from ditopt.profiler.find_geometry import find_geometry
from ditopt.profiler.interpret import Collector, WatchedCalls, reasons_of
from ditopt.profiler.kept_tables import HEADER, Tables, from_tensors, reasons_in, to_tensors
from ditopt.profiler.linear_inputs import LinearInputs
from ditopt.profiler.memory import collect
from ditopt.profiler.observe import Pair, answered, inputs_of
from ditopt.profiler.places import attentions
from ditopt.profiler.run import whole_program
from ditopt.profiler.site_features import FeatureTables
from ditopt.profiler.site_sensitivity import SiteSensitivity
from ditopt.profiler.tokens import TokenChange
from ditopt.quality import relative_l2
from ditopt.runtime.program import Program
from ditopt.techniques import LINEAR_REST

MAP_BYTES = 32 << 20
"""Of all pooled attention maps of a prompt; with many heads they are coarser."""
INTERPRETED_APART = 1e-2
"""Relative L2 of the sample between an interpreted and a compiled generation beyond which it is said."""
ANCHORS = 6


@dataclass
class DetailRun:
    """What a run needs; ``calls`` are per network, ``given`` is the user's geometry (None: to be found).

    ``geometry`` is what was found, by network. ``attention_only``: errors are planted in self-attention alone.
    """

    evaluator: Evaluator
    calls: Mapping[str, NetworkCalls]
    checkpoints: Checkpoints
    reporter: Reporter
    collect: tuple[str, ...]
    given: Geometry | None = None
    attention_only: bool = False
    reasons: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._shared: dict[str, dict[str, Tensor]] = {}
        self.geometry: dict[str, Geometry | None] = {}

    def __call__(self, profile: Profile, pairs: Sequence[Pair]) -> tuple[dict[str, NetworkProfile], tuple[str, ...]]:
        """The networks' profiles with their tables, and what was left out.

        Raises:
            InputError: the given geometry does not fit the model's tokens.
            RolloutError: the loop calls the model differently from prompt to prompt.
        """
        collect()
        self.find_geometries(pairs[0])
        found: dict[str, list[Tables]] = {name: [] for name in self.programs}
        with self.reporter.stage(f"profile: {', '.join(self.collect)}", len(pairs)) as stage:
            for index, pair in enumerate(pairs):
                for name, tables in self._prompt(index, pair, found).items():
                    found[name].append(tables)
                collect()  # collectors that share rows refer to each other
                stage.advance()
        networks = {name: self._network(profile.networks[name], name, found[name]) for name in self.programs}
        if "sensitivity" in self.collect:
            sensitivity = SiteSensitivity(
                self.evaluator, self.calls, self.checkpoints, self.reporter, self.attention_only
            )
            for name, sites in sensitivity(replace(profile, networks=networks), pairs[0]).items():
                networks[name].tables["sensitivity"] = sites
            self.reasons += sensitivity.reasons
        if LATENCY in self.collect:
            for name, timed in self.latency(profile).items():
                networks[name].tables[LATENCY] = timed
        return networks, tuple(dict.fromkeys(self.reasons))

    @property
    def programs(self) -> dict[str, Program]:
        """The networks' programs."""
        return {name: whole_program(session) for name, session in self.evaluator.sessions.items()}

    def latency(self, profile: Profile) -> dict[str, dict[str, Table]]:
        """Per network the seconds of its self-attention in the forms of a step that ``profile`` has seconds of."""
        found = {}
        for name, program in self.programs.items():
            calls = self.calls[name]
            per_step = len(calls.calls) / len(calls.timesteps)
            forms = tuple(profile.networks[name].seconds)
            found[name], told = attention_latency(program.variants.trace, forms, per_step)
            self.reasons += [f"{name}: {reason}" for reason in told]
        return found

    def find_geometries(self, pair: Pair) -> None:
        """Find how the networks' tokens lie, once.

        Raises:
            InputError: the given geometry does not fit the model's tokens.
        """
        for name, program in self.programs.items() if not self.geometry else ():
            (arguments,) = inputs_of(self.evaluator, pair, [program])
            variants = program.variants
            config = getattr(self.evaluator.adapter.networks[name], "config", None)
            found, how = find_geometry(variants.trace, variants.latents, config, self.given, None, arguments=arguments)
            if found is None:
                found, how = self._inferred(name, program, pair, arguments)
            self.geometry[name] = found
            self.reporter.say(f"  {name}: {found if found is not None else 'tokens in one line'} ({how})")
            if found is None:
                self.reasons.append(f"{name}: the geometry of its tokens is not known ({how}); give geometry=")

    def _inferred(
        self, name: str, program: Program, pair: Pair, arguments: Sequence[Any]
    ) -> tuple[Geometry | None, str]:
        """From one more generation, in which attention is looked at as if tokens lay in one line."""
        trace = program.variants.trace
        collectors = attention_collectors(trace, self.calls[name], None, names=("attention",))
        self._generate(pair, {name: collectors})
        tables = [table for each in collectors for table in each.tables().values() if "by_distance" in table.measures]
        if not tables:
            return None, "no self-attention to infer it from"
        config = getattr(self.evaluator.adapter.networks[name], "config", None)
        return find_geometry(trace, program.variants.latents, config, None, tables[0], arguments=arguments)

    def _prompt(self, index: int, pair: Pair, earlier: Mapping[str, Sequence[Tables]]) -> dict[str, Tables]:
        """The tables of one prompt per network, from its checkpoint if there is one; ``earlier``: of those before."""
        names = list(self.programs)
        key = f"tables{index}.{'-'.join(self.collect)}"
        kept = {name: self.checkpoints.load(f"{key}.{name}", [HEADER]) for name in names}
        if not index and all(each is not None for each in kept.values()):
            self._shared = {name: _coefficients(each or {}) for name, each in kept.items()}
        if all(each is not None for each in kept.values()):
            self.reasons += [reason for each in kept.values() for reason in reasons_in(each or {})]
            return {name: from_tensors(each or {}) for name, each in kept.items()}
        collectors = {name: self._collectors(name, program, earlier[name]) for name, program in self.programs.items()}
        sample = self._generate(pair, collectors)
        apart = relative_l2(sample, self.evaluator.references[pair])
        differs = f"prompt {pair[0]!r}: its interpreted and compiled samples differ by {apart:.1%}"
        found = {}
        for name, of_network in collectors.items():
            found[name] = {each.name: each.tables() for each in of_network}
            told = [f"{name}: {reason}" for reason in reasons_of(of_network)]
            told += [differs] if apart > INTERPRETED_APART else []
            self.reasons += told
            bundle = to_tensors(found[name], told)
            if not index:
                of_features = [each.coefficients for each in of_network if isinstance(each, FeatureTables)]
                self._shared[name] = of_features[0] if of_features else {}
                bundle |= {f"{SHARED}{site}": value for site, value in self._shared[name].items()}
            self.checkpoints.save(f"{key}.{name}", bundle)
        return found

    def _collectors(self, name: str, program: Program, earlier: Sequence[Tables]) -> list[Collector]:
        trace, calls, geometry = program.variants.trace, self.calls[name], self.geometry[name]
        wanted = [each for each in ("attention", "patterns", LINEAR_REST) if each in self.collect]
        found: list[Collector] = []
        if wanted:
            heads = sum(entry.site.heads for entry in attentions(trace))
            maps = max(1, heads * ANCHORS * calls.branches)
            side = int(min(128, max(16, np.sqrt(MAP_BYTES / 2 / maps))))
            of_patterns = [tables.get("patterns", {}) for tables in earlier]
            before = {site: [each[site] for each in of_patterns] for site in (of_patterns[0] if of_patterns else ())}
            found += attention_collectors(trace, calls, geometry, map_side=side, names=tuple(wanted), before=before)
        if "features" in self.collect:
            found.append(FeatureTables(trace, calls, shared=self._shared.get(name)))
        if "tokens" in self.collect:
            found.append(TokenChange(trace, calls, geometry))
        if "linear" in self.collect:
            found.append(LinearInputs(trace, calls))
        return found

    def _generate(self, pair: Pair, collectors: Mapping[str, Sequence[Collector]]) -> Tensor:
        programs = self.programs
        watched = {
            name: WatchedCalls(programs[name].variants.trace, self.calls[name], c) for name, c in collectors.items()
        }
        return answered(self.evaluator, pair, programs, watched)

    def _network(self, profile: NetworkProfile, name: str, prompts: Sequence[Tables]) -> NetworkProfile:
        """A network's profile with the prompts' tables joined; Gram matrices of features become its own."""
        tables: Tables = {
            collector: {site: joined([each[collector][site] for each in prompts]) for site in sites}
            for collector, sites in prompts[0].items()
        }
        grams = dict(profile.grams)
        for site, table in tables.get("features", {}).items():
            rest = dict(table.measures)
            gram = rest.pop("gram", None)
            if gram is not None and site not in grams:
                values = np.asarray(gram.values, dtype=np.float64)
                grams[site] = FeatureGram(
                    site, len(profile.timesteps), self.calls[name].branch_names, values, profile.present
                )
            tables["features"][site] = replace(table, measures=rest)
        return replace(profile, grams=grams, tables=tables, geometry=self.geometry[name])


SHARED = "shared."


def _coefficients(bundle: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(SHARED): value for key, value in bundle.items() if key.startswith(SHARED)}
