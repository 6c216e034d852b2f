"""The commands about profiles: ``profile`` takes one, ``merge`` puts some together, ``search`` finds a plan in one.

``ditopt.cli`` registers them.
"""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ditopt.cli_inputs import (
    Device,
    Directory,
    Dtype,
    Guidance,
    Precision,
    Prompts,
    Quality,
    Recipe,
    Settings,
    Steps,
    Trust,
    load_pipeline,
    pipe_settings,
    read_prompts,
)
from ditopt.errors import InputError, ProfileError
from ditopt.geometry import Geometry

ProfileFile = Annotated[Path, typer.Argument(metavar="PROFILE", help="a profile file")]
ProfileOutput = Annotated[Path, typer.Option("--output", "-o", metavar="PROFILE", help="where to write the profile")]


class Collect(StrEnum):
    """What can be measured beside the features of steps and block ranges."""

    attention = "attention"
    patterns = "patterns"
    features = "features"
    tokens = "tokens"
    linear = "linear"
    sensitivity = "sensitivity"
    latency = "latency"
    linear_rest = "linear_rest"


def profile(
    model: Directory,
    prompts: Prompts,
    output: ProfileOutput,
    limit: Annotated[int | None, typer.Option(min=1, help="use the first N prompts only")] = None,
    collect: Annotated[
        list[Collect] | None,
        typer.Option(
            help="what to measure beside similarity of steps, growth of errors and seconds, repeatable; default: all"
        ),
    ] = None,
    technique: Annotated[
        list[str] | None,
        typer.Option(help="measure only what a search for these needs, as `optimize` names them; default: all"),
    ] = None,
    geometry: Annotated[
        str | None,
        typer.Option(
            metavar="FxRxC[+TEXT]",
            help="how tokens lie: frames, rows, columns, and text behind (TEXT+FxRxC: before); default: found out",
        ),
    ] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    setting: Settings = None,
    seed: Annotated[int, typer.Option(help="of the first prompt's noise")] = 0,
    resume: Annotated[bool, typer.Option(help="take up an interrupted run")] = True,
    trust_remote_code: Trust = None,
    dtype: Precision = Dtype.float32,
    device: Device = None,
) -> None:
    """Measure what a pipeline does on some prompts, and write it as a profile."""
    texts = read_prompts(prompts)[:limit]
    settings = pipe_settings(steps, guidance, setting)
    tokens = None if geometry is None else read_geometry(geometry)
    check_output(output, "p.profile")
    from ditopt.api import profile_model

    pipe = load_pipeline(model, trust_remote_code, dtype, device)
    found = profile_model(
        pipe,
        texts,
        pipe_kwargs=settings,
        seed=seed,
        techniques=technique or None,
        collect=[each.value for each in collect] if collect else None,
        geometry=tokens,
        resume=resume,
        quiet=False,
    )
    found.save(output)
    typer.echo(f"profile: {output}  (find a plan in it with `ditopt search {output} -o PLAN`)")


def merge(
    profiles: Annotated[list[Path], typer.Argument(metavar="PROFILES...", help="two profile files or more")],
    output: ProfileOutput,
) -> None:
    """Put profiles of one model together: other prompts, other machines."""
    if len(profiles) < 2:
        raise InputError(f"{profiles[0]} is one profile; give two or more to merge")
    check_output(output, "all.profile")
    from ditopt.profile import Profile
    from ditopt.profile import merge as merged

    found = Profile.load(profiles[0])
    known = set(found.reasons)
    for path in profiles[1:]:
        other = Profile.load(path)
        known |= set(other.reasons)
        try:
            found = merged(found, other)
        except ProfileError as error:
            raise ProfileError(f"{path} and {profiles[0]}: {error}") from None
    found.save(output)
    for reason in found.reasons:
        if reason not in known:
            typer.echo(f"  {reason}")
    typer.echo(f"profile: {output}, {len(found.prompts)} prompts from {len(profiles)} profiles")


def search(
    profile: ProfileFile,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PLAN", help="where to write the plan")],
    quality: Annotated[
        Quality | None, typer.Option(help="42, 36 or 32 dB to the dense run, predicted; default: balanced")
    ] = None,
    min_psnr: Annotated[float | None, typer.Option(help="instead: PSNR in dB; or beside a speed-up")] = None,
    max_rel_error: Annotated[float | None, typer.Option(help="instead: relative L2 error")] = None,
    target_speedup: Annotated[float | None, typer.Option(help="instead: at least this many times faster")] = None,
    technique: Annotated[
        list[str] | None, typer.Option(help="as for `optimize`, repeatable; what needs rollouts is left out")
    ] = None,
    recipe: Recipe = None,
    max_variants: Annotated[int, typer.Option(min=1, help="the most distinct graphs to compile")] = 8,
) -> None:
    """Find a plan in a profile alone, without the model: its figures are predicted, not measured."""
    from ditopt.console import Reporter
    from ditopt.offline import OfflineSearch
    from ditopt.predicted import predicted_plan, predicted_table, write_predicted
    from ditopt.profile import Profile
    from ditopt.profile_file import fingerprint
    from ditopt.target import Target

    level = None if quality is None else quality.value
    target = Target.from_arguments(level, max_rel_error, min_psnr, target_speedup)
    check_output(output, "plan.yaml")
    loaded = Profile.load(profile)
    try:
        searching = OfflineSearch(loaded, target, technique or None, max_variants, recipe)
    except ProfileError as error:
        raise ProfileError(f"{profile}: {error}") from None
    reporter = Reporter()
    reporter.say(f"searching in {profile}: {len(loaded.prompts)} prompts; target {target.to_data()}")
    found = searching()
    plan = predicted_plan(searching.template, loaded, target, found)
    source = f"found in {profile.name}, {fingerprint(loaded)}"
    write_predicted(output, plan, loaded, found, [*searching.reasons, source])
    reporter.table(predicted_table(loaded, found))
    for reason in searching.missed:
        reporter.say(f"  {reason}")
    reporter.say(f"plan: {output}  (explained by `ditopt explain {output}`)")
    reporter.say(f"not verified: measure it with `ditopt bench DIR --plan {output} --prompts FILE --json OUT`")


def read_geometry(text: str) -> Geometry:
    """The token geometry that ``FxRxC``, ``FxRxC+TEXT`` or ``TEXT+FxRxC`` says.

    >>> read_geometry("6x16x16+12")
    Geometry(frames=6, rows=16, columns=16, text=12, text_first=False)

    Raises:
        InputError: the text is none of these, or a size is 0.
    """
    found = re.fullmatch(r"(?:(\d{1,9})\+)?(\d{1,9})x(\d{1,9})x(\d{1,9})(?:\+(\d{1,9}))?", text.strip())
    if not found or (found[1] and found[5]):
        raise InputError(
            f"--geometry {text}: should be frames x rows x columns, such as 6x16x16, with text tokens behind "
            "(6x16x16+12) or before (12+6x16x16)"
        )
    before, behind = int(found[1] or 0), int(found[5] or 0)
    return Geometry(int(found[2]), int(found[3]), int(found[4]), before + behind, text_first=bool(before))


def check_output(path: Path, example: str) -> None:
    """Refuse an output path before long work starts.

    Raises:
        InputError: it is a folder, or its folder is missing or not writable.
    """
    from ditopt.outcome import check_writable

    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file, e.g. {path / example}")
    check_writable(path)
