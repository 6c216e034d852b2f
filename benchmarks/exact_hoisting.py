"""What exact hoisting gains for each model family: ``python -m benchmarks.exact_hoisting --json OUT``.

Random weights, as the time does not depend on them. A loop of ``--steps`` network calls, the prologues among them, runs
dense (Inductor) and with what is the same in many steps computed ahead, in turn; the gain is the median of the ratios
of loops that followed each other, with the interval of the middle half. CPU seconds are told beside wall seconds: they
suffer less from what else runs on the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ditopt._torch import forget_compiled_code
from ditopt.backend import Session, ditopt_backend
from ditopt.bench import versions
from ditopt.decisions import Hoist
from ditopt.plan import DevicePrint, Inputs, ModelPrint, Plan, Rule, SamplerPrint
from ditopt.runtime.prologue import hoisted_work
from ditopt.sites import STEP

Built = tuple[nn.Module, dict[str, Any]]
HEADS, DEPTH, TEXT = 8, 64, 128
"""Heads of attention and channels of each, and text tokens, of all families."""
WIDTH = HEADS * DEPTH


def _wan(layers: int) -> Built:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=HEADS, attention_head_dim=DEPTH, in_channels=16, out_channels=16,
        text_dim=1024, freq_dim=256, ffn_dim=4 * WIDTH, num_layers=layers, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=64,
    )  # fmt: skip
    return model, {"hidden_states": torch.randn(1, 16, 4, 32, 32), "encoder_hidden_states": torch.randn(1, TEXT, 1024)}


def _sd3(layers: int) -> Built:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=16, out_channels=16, num_layers=layers, attention_head_dim=DEPTH,
        num_attention_heads=HEADS, joint_attention_dim=1024, caption_projection_dim=WIDTH, pooled_projection_dim=512,
        pos_embed_max_size=64,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 16, 32, 32),
        "encoder_hidden_states": torch.randn(1, TEXT, 1024),
        "pooled_projections": torch.randn(1, 512),
    }


def _flux(layers: int) -> Built:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=layers // 3 or 1, num_single_layers=layers - (layers // 3 or 1),
        attention_head_dim=DEPTH, num_attention_heads=HEADS, joint_attention_dim=1024, pooled_projection_dim=512,
        axes_dims_rope=(8, 28, 28), guidance_embeds=True,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 256, 64),
        "guidance": torch.tensor([3.5]),
        "encoder_hidden_states": torch.randn(1, TEXT, 1024),
        "pooled_projections": torch.randn(1, 512),
        "txt_ids": torch.zeros(TEXT, 3),
        "img_ids": torch.randint(0, 16, (256, 3)).float(),
    }


def _cogvideox(layers: int) -> Built:
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=DEPTH, in_channels=16, out_channels=16, time_embed_dim=WIDTH,
        text_embed_dim=1024, num_layers=layers, sample_width=32, sample_height=32, sample_frames=13, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=TEXT,
    )  # fmt: skip
    return model, {"hidden_states": torch.randn(1, 4, 16, 32, 32), "encoder_hidden_states": torch.randn(1, TEXT, 1024)}


def _ltx(layers: int) -> Built:
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(
        in_channels=128, out_channels=128, num_attention_heads=HEADS, attention_head_dim=DEPTH,
        cross_attention_dim=WIDTH, num_layers=layers, caption_channels=1024,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 1024, 128),
        "encoder_hidden_states": torch.randn(1, TEXT, 1024),
        "encoder_attention_mask": torch.ones(1, TEXT),
        "num_frames": 4,
        "height": 16,
        "width": 16,
    }


def _pixart(layers: int) -> Built:
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=DEPTH, in_channels=4, out_channels=8, num_layers=layers,
        sample_size=32, cross_attention_dim=WIDTH, caption_channels=1024, use_additional_conditions=False,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, 32, 32),
        "encoder_hidden_states": torch.randn(1, TEXT, 1024),
        "encoder_attention_mask": torch.ones(1, TEXT),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _hunyuan_video(layers: int) -> Built:
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=HEADS, attention_head_dim=DEPTH,
        num_layers=layers // 3 or 1, num_single_layers=layers - (layers // 3 or 1), num_refiner_layers=2, patch_size=2,
        patch_size_t=1, guidance_embeds=True, text_embed_dim=1024, pooled_projection_dim=512, rope_axes_dim=(8, 28, 28),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 16, 4, 32, 32),
        "encoder_hidden_states": torch.randn(1, TEXT, 1024),
        "encoder_attention_mask": torch.ones(1, TEXT),
        "pooled_projections": torch.randn(1, 512),
        "guidance": torch.tensor([6000.0]),
    }


def _dit(layers: int) -> Built:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=DEPTH, in_channels=4, out_channels=8, num_layers=layers,
        sample_size=32, num_embeds_ada_norm=1000,
    )  # fmt: skip
    return model, {"hidden_states": torch.randn(1, 4, 32, 32), "class_labels": torch.tensor([7])}


FAMILIES: dict[str, Callable[[int], Built]] = {
    "Wan": _wan, "SD3": _sd3, "Flux": _flux, "CogVideoX": _cogvideox, "LTX": _ltx, "PixArt": _pixart,
    "HunyuanVideo": _hunyuan_video, "DiT": _dit,
}  # fmt: skip


@dataclass(frozen=True)
class Gain:
    """One family: seconds of a step either way (medians), ratios of paired loops, and what is computed ahead.

    ``quartiles`` are of the ratios dense to hoisted, in wall and in CPU seconds; ``carried_mib`` is what prologues
    give, ``weights_mib`` the parameters that steps read no more (of ``of_mib``).
    """

    family: str
    parameters: int
    dense_s: float
    hoisted_s: float
    quartiles: tuple[float, ...]
    cpu_quartiles: tuple[float, ...]
    max_rel: float
    values: int
    carried_mib: float
    weights_mib: float
    of_mib: float
    reasons: tuple[str, ...]


def measure(family: str, layers: int, steps: int, turns: int) -> Gain:
    """Compile one family both ways and time loops in turn."""
    forget_compiled_code()
    torch.manual_seed(0)
    model, inputs = FAMILIES[family](layers)
    model.eval().requires_grad_(False)
    scale = 1.0 if family == "Flux" else 1000.0
    whole = family in ("DiT", "CogVideoX", "LTX", "PixArt", "HunyuanVideo")
    times = [scale * (1 - step / steps) for step in range(steps)]
    kind = torch.int64 if whole else torch.float32
    schedule = torch.tensor([round(each) for each in times] if whole else times).to(kind)
    if family == "DiT":
        schedule = schedule - 1
    plan = _plan(tuple(schedule.double().tolist()), "encoder_hidden_states" in inputs)
    sessions = {"dense": Session(inputs=plan.inputs), "hoisted": Session(plan=plan)}
    options: dict[str, dict[str, Any]] = {name: {"session": session} for name, session in sessions.items()}
    calls = {
        name: torch.compile(model, backend=ditopt_backend, fullgraph=True, options=given)
        for name, given in options.items()
    }

    @torch.no_grad()
    def loop(name: str) -> tuple[Tensor, float, float]:
        latents = inputs["hidden_states"]
        began, busy = time.perf_counter(), time.process_time()
        for timestep in schedule:
            out = calls[name](**{**inputs, "hidden_states": latents, "timestep": timestep[None]}, return_dict=False)[0]
            latents = latents - out[tuple(slice(size) for size in latents.shape)] / steps
        return latents, time.perf_counter() - began, time.process_time() - busy

    first = {name: loop(name)[0] for name in calls}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(turns):
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            taken[name].append(loop(name)[1:])
    program = sessions["hoisted"].programs[0]
    assert program.bound is not None
    work = hoisted_work(program.variants, program.bound.variants)
    read, every = (_weights(program.variants, part) for part in (program.variants.get(program.bound.full).inputs, None))
    seconds = {name: statistics.median(wall for wall, _ in taken[name]) / steps for name in calls}
    pairs = list(zip(taken["dense"], taken["hoisted"], strict=True))
    return Gain(
        family=family,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        dense_s=seconds["dense"],
        hoisted_s=seconds["hoisted"],
        quartiles=_quartiles([dense[0] / hoisted[0] for dense, hoisted in pairs]),
        cpu_quartiles=_quartiles([dense[1] / hoisted[1] for dense, hoisted in pairs]),
        max_rel=float((first["dense"] - first["hoisted"]).abs().max() / first["dense"].abs().max()),
        values=sum(each["values"] for each in work),
        carried_mib=sum(each["bytes"] for each in work) / 2**20,
        weights_mib=(every - read) / 2**20,
        of_mib=every / 2**20,
        reasons=tuple(reason for reason in program.variants.reasons if reason.startswith("hoist")),
    )


def _plan(times: tuple[float, ...], prompted: bool) -> Plan:
    return Plan(
        model=ModelPrint(class_name="any", structure="any", blocks=0),
        sampler=SamplerPrint(
            class_name="FlowMatchEulerDiscreteScheduler",
            steps=len(times),
            timesteps={"transformer": times},
            sigmas={"transformer": times},
        ),
        device=DevicePrint(device="cpu", torch=str(torch.__version__), dtype="float32"),
        inputs=Inputs(identity="encoder_hidden_states" if prompted else None),
        rules=(Rule(sites=STEP, steps=tuple(range(len(times))), do=Hoist()),),
    )


def _weights(variants: Any, inputs: Sequence[int | str] | None) -> int:
    """Bytes of parameters and buffers among a graph's inputs (None: all that were captured)."""
    placeholders = variants.trace.placeholders
    found = variants.trace.state_names.values()
    values = (placeholders[position].meta["val"] for position in found if inputs is None or position in inputs)
    return sum(value.numel() * value.element_size() for value in values)


def _quartiles(ratios: Sequence[float]) -> tuple[float, ...]:
    return tuple(statistics.quantiles(ratios, n=4, method="inclusive"))


def tabulated(gains: Sequence[Gain]) -> Table:
    """The gains as a table."""
    table = Table(title="exact hoisting: dense over hoisted, paired loops", title_justify="left", width=118)
    for column in (
        "family",
        "step, dense",
        "hoisted",
        "ratio (middle half)",
        "CPU time",
        "weights unread",
        "carried",
        "max diff.",
    ):
        table.add_column(column, justify="left" if column == "family" else "right")
    for gain in gains:
        low, middle, high = gain.quartiles
        busy_low, busy, busy_high = gain.cpu_quartiles
        table.add_row(
            gain.family,
            f"{gain.dense_s * 1e3:.1f} ms",
            f"{gain.hoisted_s * 1e3:.1f} ms",
            f"{middle:.3f} ({low:.3f}-{high:.3f})",
            f"{busy:.3f} ({busy_low:.3f}-{busy_high:.3f})",
            f"{gain.weights_mib / gain.of_mib:.0%} of {gain.of_mib:.0f} MiB",
            f"{gain.values} ({gain.carried_mib:.1f} MiB)",
            f"{gain.max_rel:.0e}",
        )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--turns", type=int, default=9, help="loops of each, in turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="where to write the figures")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    gains = []
    for family in given.families:
        gains.append(measure(family, given.layers, given.steps, given.turns))
        Console(width=120).print(tabulated(gains[-1:]))
    Console(width=120).print(tabulated(gains))
    if given.json is not None:
        given.json.write_text(json.dumps(_figures(given, gains), indent=1) + "\n")


def _figures(given: argparse.Namespace, gains: Sequence[Gain]) -> Mapping[str, Any]:
    settings = {"layers": given.layers, "steps": given.steps, "turns": given.turns, "threads": given.threads}
    return {"settings": settings, "versions": versions(), "gains": [asdict(gain) for gain in gains]}


if __name__ == "__main__":
    main()
