"""The ``ditopt`` command: optimize, recipes, show, explain, diff, report, bench, doctor; of profiles: ``cli_profile``.

What the user did wrong ends in one line and exit code 2; ``diff`` exits with 1 where plans differ, ``doctor``
where something is broken.
"""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ParamSpec, TypeVar

import typer
from rich.console import Console

from ditopt import cli_profile
from ditopt.cli_inputs import (
    Device,
    Directory,
    Dtype,
    Guidance,
    Mismatch,
    PlanFile,
    PlanOrProfile,
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
from ditopt.errors import DitoptError, InputError

P = ParamSpec("P")
R = TypeVar("R")

app = typer.Typer(
    help="Find, show, explain and measure plans that make a diffusion transformer's sampling loop faster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def command(function: Callable[P, R]) -> Callable[P, R]:
    """Register a command whose deliberate errors are one line and exit code 2, without a traceback."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except DitoptError as error:
            raise fail(str(error), 2) from None
        except ValueError as error:
            # Diffusers pipelines judge their arguments in a method of this name.
            if not any(frame.name == "check_inputs" for frame in traceback.extract_tb(error.__traceback__)):
                raise
            raise fail(f"the pipeline refuses its arguments: {error}", 2) from None
        except KeyboardInterrupt:
            raise fail("interrupted; run the same command again to go on from what was finished", 130) from None

    app.command()(run)
    return run


def fail(message: str, code: int) -> typer.Exit:
    """Print an error and make the exit that goes with it."""
    Console(stderr=True).print(f"ditopt: {message}", markup=False, highlight=False, soft_wrap=True)
    return typer.Exit(code)


@command
def optimize(
    model: Directory,
    prompts: Prompts,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PLAN", help="where to write the plan")],
    quality: Annotated[
        Quality | None,
        typer.Option(
            help="42, 36 or 32 dB to the dense run, beside a speed-up too, or nothing approximated; default: balanced"
        ),
    ] = None,
    min_psnr: Annotated[float | None, typer.Option(help="instead: mean PSNR in dB; or beside a speed-up")] = None,
    max_rel_error: Annotated[float | None, typer.Option(help="instead: mean relative L2 error")] = None,
    target_speedup: Annotated[float | None, typer.Option(help="instead: at least this many times faster")] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    setting: Settings = None,
    seed: Annotated[int, typer.Option(help="of the first prompt's noise")] = 0,
    technique: Annotated[
        list[str] | None,
        typer.Option(
            help="reuse, forecast, fit, ranges, simplify, precision, second_order, sparse or hoist, repeatable; "
            "default: all"
        ),
    ] = None,
    recipe: Recipe = None,
    budget: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="how many plans to try in the first search (cheap ones count less); default: some minutes' worth",
        ),
    ] = None,
    max_variants: Annotated[int, typer.Option(min=1, help="the most distinct graphs to compile")] = 8,
    max_state_bytes: Annotated[
        int | None, typer.Option(min=0, help="the most bytes of slots in a generation; default: no limit")
    ] = None,
    on_mismatch: Annotated[Mismatch, typer.Option(help="what unplanned calls do")] = Mismatch.error,
    resume: Annotated[bool, typer.Option(help="take up an interrupted run")] = True,
    trust_remote_code: Trust = None,
    dtype: Precision = Dtype.float32,
    device: Device = None,
) -> None:
    """Find a faster equivalent of a pipeline's sampling loop and write it as a plan."""
    texts = read_prompts(prompts)
    settings = pipe_settings(steps, guidance, setting)
    from ditopt.api import check_prompts
    from ditopt.api import optimize as run
    from ditopt.outcome import check_writable
    from ditopt.recipes import find_recipe
    from ditopt.target import Target

    check_prompts(texts)
    level = None if quality is None else quality.value
    Target.from_arguments(level, max_rel_error, min_psnr, target_speedup)
    find_recipe(recipe)
    check_writable(output)
    pipe = load_pipeline(model, trust_remote_code, dtype, device)
    run(
        pipe, texts, quality=level, max_rel_error=max_rel_error, min_psnr=min_psnr,
        target_speedup=target_speedup, plan_path=output, pipe_kwargs=settings, seed=seed, techniques=technique or None,
        recipe=recipe, max_variants=max_variants, max_state_bytes=max_state_bytes, budget=budget,
        on_mismatch=on_mismatch.value, resume=resume,
    )  # fmt: skip


@command
def recipes() -> None:
    """List the published systems that `--recipe` restricts a search to."""
    from ditopt.recipes import RECIPES

    for recipe in RECIPES.values():
        typer.echo(f"{recipe.name}: {recipe.source}\n  {recipe.restriction}\n  departs: {recipe.departs}")


@command
def show(plan: PlanOrProfile) -> None:
    """Draw a plan: sites by steps, its figures, and what it was made for; or say what a profile holds."""
    from ditopt.plan import Plan
    from ditopt.report.in_terminal import show_profile
    from ditopt.report.sources import load_source
    from ditopt.terminal import show_plan

    console, found = Console(), load_source(plan)
    console.print(show_plan(found, console.width) if isinstance(found, Plan) else show_profile(found))


@command
def explain(
    plan: PlanOrProfile,
    site: Annotated[str | None, typer.Argument(metavar="SITE", help="all that is known of one site")] = None,
    step: Annotated[int | None, typer.Option(min=0, help="one step, with all rivals")] = None,
    everything: Annotated[bool, typer.Option("--all", help="every step, with all rivals")] = False,
) -> None:
    """Say why each decision was made and each rival was not; of a profile, what is known of a site."""
    from ditopt.plan import Plan
    from ditopt.report import one_site
    from ditopt.report.explained import Explained, side_path
    from ditopt.report.sources import load_source
    from ditopt.terminal import show_explanations, show_site

    console, found = Console(), load_source(plan)
    if not isinstance(found, Plan):
        console.print(one_site.explain(found, site, step, everything))
        return
    explained = Explained.load(side_path(plan))
    if site is None:
        console.print(show_explanations(explained, step, everything))
    else:
        console.print(show_site(found, explained, site, step, everything, console.width))


@command
def diff(old: PlanFile, new: PlanFile) -> None:
    """Say what differs between two plans; exit with 1 if anything does."""
    from ditopt.plan import Plan
    from ditopt.plan_diff import diff_plans

    lines = diff_plans(Plan.load(old), Plan.load(new))
    for line in lines or ["no difference"]:
        typer.echo(line)
    if lines:
        raise typer.Exit(1)


@command
def report(
    plan: PlanOrProfile,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="HTML", help="where to write the page")],
    bench_json: Annotated[
        Path | None, typer.Option("--bench", metavar="JSON", help="what `bench --json` wrote")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(metavar="PROFILE", help="what `profile` measured of the plan's model")
    ] = None,
) -> None:
    """Write one self-contained HTML page about a plan (with all that lies beside it) or about a profile."""
    from ditopt.plan_text import write_text_atomically
    from ditopt.report.html import render_report
    from ditopt.report.sources import gather

    found = gather(plan, profile, bench_json)
    for missing in found.missing:
        typer.echo(missing)
    write_text_atomically(output, render_report(**found.given, source=plan.name))
    typer.echo(f"report: {output}")


@command
def bench(
    model: Directory,
    plan: Annotated[list[Path], typer.Option(metavar="PLAN", help="the plan to measure; several share the dense runs")],
    prompts: Prompts,
    json: Annotated[list[Path], typer.Option(metavar="OUT", help="where to write the figures, one for each --plan")],
    limit: Annotated[int | None, typer.Option(min=1, help="use the first N prompts only")] = None,
    guidance: Guidance = None,
    steps: Steps = None,
    setting: Settings = None,
    repeats: Annotated[int, typer.Option(min=5, help="the least generations a median is over")] = 5,
    seed: Annotated[int, typer.Option(help="of the first prompt's noise")] = 1000,
    sheet: Annotated[Path | None, typer.Option(metavar="PNG", help="write a contact sheet (of the first plan)")] = None,
    score_prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="prompts for the pipeline's own score, untimed")
    ] = None,
    score_limit: Annotated[int | None, typer.Option(min=1, help="use the first N of these only")] = None,
    retarget: Annotated[bool, typer.Option("--retarget", help="fit plans made for another size or schedule")] = False,
    trust_remote_code: Trust = None,
    dtype: Precision = Dtype.float32,
    device: Device = None,
) -> None:
    """Measure plans against dense, fewer steps, UniPC and DPM-Solver++ on whole generations."""
    if len(plan) != len(json):
        raise InputError(f"--plan is given {len(plan)} times and --json {len(json)} times; give one --json a plan")
    texts = read_prompts(prompts)[:limit]
    scored = read_prompts(score_prompts, "--score-prompts")[:score_limit] if score_prompts else ()
    settings = pipe_settings(steps, guidance, setting)
    from ditopt.bench import BenchPlan, run_benches
    from ditopt.console import Reporter
    from ditopt.outcome import check_writable
    from ditopt.plan import Plan
    from ditopt.terminal import bench_table

    found = [BenchPlan(Plan.load(path), str(path), None if i else sheet) for i, path in enumerate(plan)]
    for path in (*json, *([sheet] if sheet else [])):
        check_writable(path)
    pipe = load_pipeline(model, trust_remote_code, dtype, device)
    reporter = Reporter()
    results = run_benches(
        pipe,
        found,
        texts,
        settings=settings,
        repeats=repeats,
        seed=seed,
        score_prompts=scored,
        reporter=reporter,
        retarget=retarget,
    )
    for result, path in zip(results, json, strict=True):
        result.save(path)
        reporter.table(bench_table(result.to_data()))
        reporter.say(f"figures: {path}")


@command
def doctor() -> None:
    """Check that this machine has what ditopt needs."""
    from ditopt.report.doctor import findings

    broken = False
    for finding in findings():
        typer.echo(str(finding))
        broken = broken or finding.broken
    if broken:
        raise typer.Exit(1)


command(cli_profile.profile)
command(cli_profile.merge)
command(cli_profile.search)


def main() -> None:
    """Entry point of the ``ditopt`` command."""
    sys.exit(app())


if __name__ == "__main__":
    main()
