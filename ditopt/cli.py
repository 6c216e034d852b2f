"""The ``ditopt`` command: optimize, show, explain, diff, report, bench, doctor; of profiles: ``cli_profile``.

What the user did wrong ends in one line and exit code 2; ``diff`` exits with 1 where plans differ, ``doctor``
where something is broken.
"""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer
from rich.console import Console

from ditopt.errors import DitoptError, InputError

P = ParamSpec("P")
R = TypeVar("R")

app = typer.Typer(
    help="Find, show, explain and measure plans that make a diffusion transformer's sampling loop faster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Quality(StrEnum):
    """Quality levels of ``optimize``."""

    high = "high"
    balanced = "balanced"
    fast = "fast"


class Mismatch(StrEnum):
    """What a call outside of the planned schedule does."""

    error = "error"
    dense = "dense"
    retarget = "retarget"


class Dtype(StrEnum):
    """Number formats that a pipeline can be loaded in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Directory = Annotated[str, typer.Argument(metavar="DIR", help="a diffusers pipeline directory (or a Hub id)")]
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="a plan file")]
PlanOrProfile = Annotated[Path, typer.Argument(metavar="PLAN", help="a plan file, or a profile (*.profile)")]
Prompts = Annotated[Path, typer.Option(metavar="FILE", help="prompts, one a line")]
Steps = Annotated[int | None, typer.Option(min=1, help="sampling steps, as the pipeline counts them")]
Guidance = Annotated[float | None, typer.Option(help="guidance scale; 1 is without guidance")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="any argument of the pipeline's call, repeatable")
]
Trust = Annotated[
    bool | None,
    typer.Option(help="run pipeline code that lies with the model; default: yes for a local directory, no for the Hub"),
]
Precision = Annotated[Dtype, typer.Option(help="of the weights")]
Device = Annotated[str | None, typer.Option(help="where to run; default: cuda if there is one, else cpu")]


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
    quality: Annotated[Quality, typer.Option(help="42, 36 or 32 dB to the dense run")] = Quality.balanced,
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
            help="reuse, forecast, fit, ranges, simplify, precision or second_order, repeatable; default: all"
        ),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="how many plans to try in the first search (cheap ones count less); default: some minutes' worth",
        ),
    ] = None,
    max_variants: Annotated[int, typer.Option(min=1, help="the most distinct graphs to compile")] = 8,
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

    check_prompts(texts)
    check_writable(output)
    pipe = load_pipeline(model, trust_remote_code, dtype, device)
    run(
        pipe, texts, quality=quality.value, max_rel_error=max_rel_error, min_psnr=min_psnr,
        target_speedup=target_speedup, plan_path=output, pipe_kwargs=settings, seed=seed, techniques=technique or None,
        max_variants=max_variants, budget=budget, on_mismatch=on_mismatch.value, resume=resume,
    )  # fmt: skip


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
    from ditopt.plan import Plan, diff_plans

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
    from ditopt.plan import write_text_atomically
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


def read_prompts(path: Path, option: str = "--prompts") -> list[str]:
    """The lines of a prompt file, empty ones left out.

    Raises:
        InputError: it cannot be read, or holds no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"{option} {path}: no such file; give a text file with one prompt a line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{option} {path}: cannot be read as UTF-8 text: {error}") from None
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise InputError(f"{option} {path}: the file holds no prompts; write one a line")
    return texts


def pipe_settings(steps: int | None, guidance: float | None, given: list[str] | None) -> dict[str, Any]:
    """The arguments of the pipeline's call that the options name; values of ``--set`` are YAML.

    Raises:
        InputError: a setting is not ``key=value``, or its value is no YAML.
    """
    import yaml

    found: dict[str, Any] = {}
    if steps is not None:
        found["num_inference_steps"] = steps
    if guidance is not None:
        found["guidance_scale"] = guidance
    for text in given or ():
        key, equals, value = text.partition("=")
        if not equals or not key.strip().isidentifier():
            raise InputError(f"--set {text}: should be key=value, such as --set height=64")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(
                f"--set {text}: the value is not YAML; quote it, such as --set 'negative_prompt=\"a: b\"'"
            ) from None
    return found


def load_pipeline(model: str, trust: bool | None, dtype: Dtype, device: str | None) -> Any:
    """The pipeline of a directory, or of a Hub id.

    Code beside the model in a local directory is run (and named) unless ``trust`` is False; that of the Hub only
    where ``trust`` is True.

    Raises:
        InputError: there is no such directory, it is no pipeline, or its code may not be run.
    """
    path = Path(model)
    local = path.is_dir()
    if not local and (path.exists() or path.is_absolute() or len(path.parts) != 2 or path.parent.is_dir()):
        raise InputError(
            f"{model}: no such directory; give the directory of a diffusers pipeline (one with model_index.json)"
        )
    code = _own_code(path) if local else None
    if code is not None and trust is False:
        raise InputError(
            f"{model}: the pipeline is code of its own ({code}); read it and allow it with --trust-remote-code"
        )
    if code is not None and trust is None:
        typer.echo(f"running the pipeline's own code, {code} (--no-trust-remote-code forbids it)")
    try:
        import torch
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise InputError(
            f"diffusers cannot be imported ({error}); install it with `pip install ditopt[diffusers]`"
        ) from None
    try:
        pipe = DiffusionPipeline.from_pretrained(
            model, trust_remote_code=bool(trust) or code is not None, dtype=getattr(torch, dtype.value)
        )
        return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except Exception as error:  # what can be wrong with a directory is no closed list
        first = (str(error).strip().splitlines() or ["no details"])[0]
        raise InputError(
            f"{model}: cannot be loaded as a diffusers pipeline: {type(error).__name__}: {first}"
        ) from error


def _own_code(directory: Path) -> Path | None:
    """The pipeline code in a local directory, if its index names any.

    Raises:
        InputError: there is no readable index.
    """
    from ditopt.report.explained import read_json

    index = read_json(
        directory / "model_index.json", "the index of a diffusers pipeline, which its directory must have"
    )
    name = index.get("_class_name") if isinstance(index, dict) else None
    return directory / f"{name[0]}.py" if isinstance(name, list) and name else None


def main() -> None:
    """Entry point of the ``ditopt`` command."""
    sys.exit(app())


import ditopt.cli_profile  # noqa: E402  # its commands are registered here, and it needs what stands above

if __name__ == "__main__":
    ditopt.cli.main()  # of the module by that name: run as a script, this is another one, without those commands
