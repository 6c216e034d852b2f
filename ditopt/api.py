"""``optimize()``: trace, profile, search, verify, compile - the whole flow in one screen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ditopt.errors import InputError, PlanMismatchError
from ditopt.geometry import Geometry
from ditopt.plan import Plan
from ditopt.profile import Profile

ModelT = TypeVar("ModelT")


def optimize(
    model: ModelT,
    calib_prompts: Sequence[str],
    *,
    rollout: Any = None,
    quality: str | None = None,
    max_rel_error: float | None = None,
    min_psnr: float | None = None,
    target_speedup: float | None = None,
    plan_path: str | Path | None = None,
    pipe_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    techniques: Sequence[str] | None = None,
    recipe: str | None = None,
    max_variants: int = 8,
    max_state_bytes: int | None = None,
    budget: int | None = None,
    on_mismatch: str = "error",
    resume: bool = True,
    quiet: bool = False,
) -> ModelT:
    """Find a faster equivalent of a model's sampling loop, prove it, and return the model running by it.

    Args:
        model: a diffusers pipeline (its networks are compiled in place), or an ``nn.Module`` with ``rollout``.
        calib_prompts: at least two; half of them are profiled, the other half only judge the result.
        rollout: ``rollout(model, prompt, seed) -> Tensor``, the caller's own sampling loop for a bare module.
        quality: ``high``, ``balanced`` (the default) or ``fast``: 42, 36 or 32 dB mean paired PSNR to the dense run; or
            ``exact``: nothing is approximated, what is the same in many steps is computed ahead of them.
        max_rel_error: instead, the largest mean relative L2 error of the sample.
        min_psnr: instead, the mean paired PSNR in dB to reach.
        target_speedup: instead, the least ratio of dense to optimised seconds of whole generations; the best quality
            at it is sought. Where it is missed within the rounds of search, the nearest plan is kept and that is said.
            With ``min_psnr`` or a level of ``quality`` beside it no plan below that is taken, be it slower; quality
            that is to spare is spent on being as near to converged samples as dense ones are.
        plan_path: where to write the plan (YAML); it is kept in the user's cache as well.
        pipe_kwargs: what the pipeline is called with later: steps, guidance, size.
        seed: of the first prompt's noise; prompt i uses ``seed + i``.
        techniques: kinds of decision to consider; default all (``reuse``, ``forecast``, ``fit``, ``ranges``,
            ``simplify``, ``precision``, ``second_order``, ``hoist`` (see ``exact``), and ``sparse``, which alone
            computes every step).
        recipe: the name of a published system (``ditopt recipes`` lists them) to which sparse heads, or predictors and
            schedules of the loop are restricted; its own techniques are all that is considered unless ``techniques``
            name more.
        max_variants: the most distinct graphs to compile.
        max_state_bytes: the most bytes that what is carried from step to step (slots, not what is computed ahead) may
            take in a generation, its guidance branches together; no plan above it is tried or returned.
        budget: how many plans to try by real rollouts in the first search, a quarter more in each after it; plans that
            compute less than half of the steps count less, down to a third. Default: some minutes' worth, 4 to 16.
            Sparse heads are tried beside that, with up to three further schedules in at most 24 plans.
        on_mismatch: what calls of another schedule or geometry do later: ``error``, ``dense`` or ``retarget``.
        resume: take up an interrupted run's checkpoints.
        quiet: print nothing.

    Returns:
        The model. If nothing beats the dense compiled model, it runs dense, and says so.

    Raises:
        InputError: an argument cannot be used; the message says which and what would be right.
        RolloutError: the sampling loop does not call the model, gives NaN or is not deterministic.
        TraceError: no step, block or attention was found to decide on.
    """
    from ditopt.optimizer import Optimizer
    from ditopt.target import Target

    prompts = check_prompts(calib_prompts)
    target = Target.from_arguments(quality, max_rel_error, min_psnr, target_speedup)
    Optimizer(
        model,
        prompts,
        rollout=rollout,
        target=target,
        plan_path=plan_path,
        pipe_kwargs=pipe_kwargs,
        seed=seed,
        techniques=techniques,
        max_variants=max_variants,
        max_state_bytes=max_state_bytes,
        budget=budget,
        on_mismatch=on_mismatch,
        resume=resume,
        quiet=quiet,
        recipe=recipe,
    ).run()
    return model


def apply(model: ModelT, plan: str | Path | Plan, *, on_mismatch: str = "error") -> ModelT:
    """Let a model run by a plan that exists: what ``optimize`` ended with, in another process or machine.

    A call of another geometry than the plan's (the batch apart) or another schedule is one that the plan is not for. A
    pipeline that generates under another guidance than the plan was measured with, or whose scheduler is exchanged
    later, is warned of in the log.

    Args:
        model: a diffusers pipeline, or a network as an ``nn.Module``; compiled in place.
        plan: a plan or the path of its file.
        on_mismatch: what a call that the plan is not for does: ``error``, ``dense`` or ``retarget``.

    Raises:
        PlanError: the plan cannot be read.
        PlanMismatchError: the pipeline lacks a network of the plan, or has another scheduler than it was made for.
    """
    from torch import nn

    from ditopt.adapters import is_pipeline
    from ditopt.backend import Session, ditopt_backend
    from ditopt.guidance import watch_guidance

    found = plan if isinstance(plan, Plan) else Plan.load(plan)
    networks: dict[str, Any] = {name: getattr(model, name, None) for name in found.sampler.timesteps}
    if not is_pipeline(model):
        networks = dict.fromkeys(list(networks)[:1], model)
    else:
        scheduler = type(getattr(model, "scheduler", None)).__name__
        if scheduler != found.sampler.class_name and on_mismatch == "error" and not found.is_exact:
            raise PlanMismatchError(
                f"plan was made for {found.sampler.class_name}, the pipeline samples with {scheduler}; "
                'set that scheduler, make a plan for this one, or pass on_mismatch="retarget"'
            )
    watch = watch_guidance(model, found) if is_pipeline(model) and not found.is_exact else None
    for name, network in networks.items():
        if not isinstance(network, nn.Module):
            raise PlanMismatchError(f"plan is for network {name!r}, which {type(model).__name__} does not have")
        session = Session.from_options({"plan": found, "network": name, "on_mismatch": on_mismatch})
        session.on_generation = watch
        network.compile(backend=ditopt_backend, options={"session": session})
    return model


def profile_model(
    model: Any,
    prompts: Sequence[str],
    *,
    rollout: Callable[..., Any] | None = None,
    pipe_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    techniques: Sequence[str] | None = None,
    collect: Sequence[str] | None = None,
    geometry: Geometry | tuple[int, ...] | None = None,
    resume: bool = True,
    quiet: bool = False,
) -> Profile:
    """Measure what a model does under its sampling loop, and give the model back as it was.

    Args:
        model: a diffusers pipeline, or a bare ``nn.Module`` with ``rollout``.
        prompts: at least one; prompt i is generated with ``seed + i``.
        rollout: of a bare module, as for ``optimize``.
        pipe_kwargs: what the pipeline is called with: steps, guidance, size.
        seed: of the first prompt's noise.
        techniques: kinds of decision to measure for, as for ``optimize``; default all.
        collect: which tables to take beside that: ``attention``, ``patterns``, ``features``, ``tokens``, ``linear``,
            ``sensitivity`` and ``latency``; default all, or where ``techniques`` are given those that speak of them.
        geometry: how the self-attention's tokens lie, (frames, rows, columns) with the number of text tokens as an
            optional fourth; default: found from the model's config, its inputs or its attention.
        resume: take up an interrupted run's checkpoints; they are kept prompt by prompt.
        quiet: print nothing.

    Returns:
        The profile: ``save`` it, look at it with ``ditopt report``, or search it with ``ditopt search``.

    Raises:
        InputError: an argument cannot be used; the message says which and what would be right.
        RolloutError: the sampling loop does not call the model, gives NaN or is not deterministic.
        TraceError: no step, block or attention was found to decide on.
    """
    from ditopt.adapters import adapt
    from ditopt.console import Reporter
    from ditopt.profiler.take import profile_alone
    from ditopt.techniques import Techniques, choose_collectors

    texts = check_prompts(prompts, least=1)
    chosen, tables = Techniques.choose(techniques), choose_collectors(collect, techniques)
    if isinstance(geometry, tuple):
        if len(geometry) not in (3, 4) or not all(isinstance(size, int) for size in geometry):
            raise InputError(f"geometry={geometry!r}: give (frames, rows, columns) or (frames, rows, columns, text)")
        frames, rows, columns, text = (*geometry, 0)[:4]
        geometry = Geometry(frames, rows, columns, text)
    adapter = adapt(model, rollout, pipe_kwargs)
    return profile_alone(adapter, texts, chosen, tables, geometry, pipe_kwargs, seed, resume, Reporter(quiet))


def check_prompts(prompts: Sequence[str], least: int = 2) -> tuple[str, ...]:
    """The prompts as a tuple.

    Raises:
        InputError: there are fewer than ``least``, or one is not a text.
    """
    if isinstance(prompts, str):
        raise InputError(f"calib_prompts is one text ({prompts!r}); give a list of texts, at least {least}")
    found = tuple(prompts)
    wrong = [prompt for prompt in found if not isinstance(prompt, str)]
    if wrong:
        raise InputError(f"calib_prompts holds {wrong[0]!r}, a {type(wrong[0]).__name__}; prompts are texts")
    if not found and least == 1:
        raise InputError("there are no prompts; give a list of texts")
    if len(found) < least:
        raise InputError(
            f"{len(found)} calibration prompts are too few: one half is profiled and the other verifies; give at "
            "least 2, better 8"
        )
    return found
