"""What a report is about: a plan or a profile, and what lies beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditopt.errors import InputError
from ditopt.plan import Plan
from ditopt.profile import Profile
from ditopt.report.explained import Explained, read_json, side_path
from ditopt.report.samples import load_samples, samples_path

YAML, PROFILE = (".yaml", ".yml"), ".profile"


def load_source(path: Path) -> Plan | Profile:
    """The plan (``*.yaml``) or the profile that a path names.

    Raises:
        PlanError: it is a malformed plan, or there is no such file.
        ProfileError: it is a malformed profile.
    """
    return Profile.load(path) if is_profile(path) else Plan.load(path)


def is_profile(path: Path) -> bool:
    """Whether a path names a profile: by its ending, else by how the file begins (as safetensors do)."""
    if path.suffix in YAML or path.suffix == PROFILE:
        return path.suffix == PROFILE
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:  # a missing file is told as a missing plan
        return False
    return start[8:] == b"{" and b"\0" in start


@dataclass(frozen=True)
class Gathered:
    """All that a report is made from: arguments of ``render_report``, and what is said of what is missing."""

    given: dict[str, Any]
    missing: tuple[str, ...] = ()


def gather(path: Path, profile: Path | None, bench: Path | None) -> Gathered:
    """Read a plan with what lies beside it (side file, samples) and what was given with it, or a profile.

    Raises:
        DitoptError: one of the files cannot be used; the message says which, and why.
    """
    found = load_source(path)
    if isinstance(found, Profile):
        for option, value in (("--profile", profile), ("--bench", bench)):
            if value is not None:
                raise InputError(f"{option} {value}: is for the report on a plan; {path} is a profile already")
        return Gathered({"plan": None, "explained": None, "bench": None, "profile": found, "samples": None})
    side, samples = side_path(path), samples_path(path)
    explained = Explained.load(side) if side.exists() else None
    missing = () if explained is not None else (f"{side} is not there, so the page will not say why",)
    measured = None
    if bench is not None:
        measured = read_json(bench, "what `ditopt bench --json` writes")
        if not isinstance(measured, dict) or "optimized_s" not in measured:
            raise InputError(f"{bench}: field optimized_s is missing; give what `ditopt bench --json` wrote")
    of_model = None
    if profile is not None:
        of_model = Profile.load(profile)
        expect_same_model(found, of_model, profile)
    clips = load_samples(samples) if samples.exists() else None
    given = {"plan": found, "explained": explained, "bench": measured, "profile": of_model, "samples": clips}
    return Gathered(given, missing)


def expect_same_model(plan: Plan, profile: Profile, path: Path) -> None:
    """Check that a profile is of the model and the schedule that a plan is for.

    Raises:
        InputError: it is of another; the message says what differs.
    """
    of = dict(profile.plan).get("model", {})
    if of.get("structure", plan.model.structure) != plan.model.structure:
        raise InputError(
            f"--profile {path}: of {of.get('class')} {of['structure']}, the plan is for {plan.model.class_name} "
            f"{plan.model.structure}; give the profile that the plan was searched in, or make one of this model"
        )
    for name, part in profile.networks.items():
        steps = len(plan.sampler.timesteps.get(name, ()))
        if len(part.timesteps) != steps:
            raise InputError(
                f"--profile {path}: has {len(part.timesteps)} steps of {name}, the plan {steps or 'no such network'}; "
                "give the profile of the same schedule"
            )
