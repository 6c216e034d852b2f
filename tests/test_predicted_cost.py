"""What a step costs in which all blocks are predicted: hardly more than its embedding and output layers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from ditopt.backend import Session
from ditopt.decisions import Reuse
from ditopt.plan import DevicePrint, Inputs, ModelPrint, Plan, Rule, SamplerPrint
from tests.trace.models import compiled, interpreted

pytest.importorskip("diffusers")

BLOCKS = 3
TIMES = (1000.0, 500.0)
ROUNDS, WARM_UP = 15, 2
INPUTS = Inputs(identity="encoder_hidden_states")


def wan(blocks: int) -> nn.Module:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model: nn.Module = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=3, attention_head_dim=64, in_channels=12, out_channels=12,
        text_dim=64, freq_dim=64, ffn_dim=576, num_layers=blocks, cross_attn_norm=True, rope_max_seq_len=64,
    )  # fmt: skip
    return model.eval().requires_grad_(False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """So that the processor time of the process is that of the work, whatever else runs on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_step_with_all_blocks_predicted_costs_its_embedding_and_output_layers() -> None:
    inputs = {"hidden_states": torch.randn(1, 12, 6, 32, 32), "encoder_hidden_states": torch.randn(1, 24, 64)}
    session = Session(inputs=INPUTS)
    program = compiled(wan(BLOCKS), session=session)
    shell: Callable[..., Any] = torch.compile(wan(0), backend="inductor", fullgraph=True)
    contenders = {
        "dense": (program, torch.tensor(TIMES[:1])),
        "predicted": (program, torch.tensor(TIMES[1:])),
        "no blocks": (shell, torch.tensor(TIMES[1:])),
    }
    turns = ("dense", "predicted", "dense", "no blocks")  # so that both come upon caches that a dense step has filled
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with torch.no_grad():
        with interpreted():  # the dense graph, which the plan does not need, is captured and not compiled
            program(**inputs, timestep=torch.tensor(TIMES[:1]), return_dict=False)
        session.bind(all_blocks_reused(session.programs[0].variants.trace.structure))
        for turn in range(WARM_UP + ROUNDS):
            for name in turns:
                forward, timestep = contenders[name]
                began = time.process_time()
                forward(**inputs, timestep=timestep, return_dict=False)
                if turn >= WARM_UP:
                    seconds[name].append(time.process_time() - began)
    assert session.programs[0].statistics.predicted_calls == WARM_UP + ROUNDS
    dense, predicted, bare = (statistics.median(seconds[name]) for name in contenders)
    told = f"dense {1e3 * dense:.1f} ms, predicted {1e3 * predicted:.1f} ms, no blocks {1e3 * bare:.1f} ms"
    assert (dense - bare) / BLOCKS > 2 * bare, f"{told}: one block is too small to be missed"
    assert predicted < 2 * bare, f"{told}: more than the slot's read and the program's dispatch (a third, when quiet)"
    assert predicted < 0.05 * dense, told


def all_blocks_reused(structure: str) -> Plan:
    """Two steps, of which the second reads the residual of all blocks from the first."""
    return Plan(
        model=ModelPrint(class_name="WanTransformer3DModel", structure=structure, blocks=BLOCKS),
        sampler=SamplerPrint(
            class_name="none", steps=2, timesteps={"transformer": TIMES}, sigmas={"transformer": (1.0, 0.5)}
        ),
        device=DevicePrint(device="cpu", torch=torch.__version__, dtype="float32"),
        inputs=INPUTS,
        rules=(Rule(sites=f"blocks.0..{BLOCKS - 1}", steps=(1,), do=Reuse()),),
    )
