"""A block range that ends at the very tensor which the caller gets: what is remembered of it stays as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditopt.backend import Session
from ditopt.decisions import Reuse
from ditopt.plan import DevicePrint, Inputs, ModelPrint, Plan, Rule, SamplerPrint
from tests.trace.models import compiled

TIMES = (1000.0, 500.0)
INPUTS = Inputs(identity=None, forward=("hidden_states", "timestep"))


class Narrowing(nn.Module):
    """Self-attention whose result has another width than its input, so that it adds to no residual stream."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, out)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        q, k, v = (self.qkv(x) + shift)[:, None].chunk(3, -1)
        out: Tensor = self.out(F.scaled_dot_product_attention(q, k, v)[:, 0])
        return out


class EndsInABlock(nn.Module):
    """Returns its last block's stream: that tensor itself, or a copy (which Inductor finds needless and drops)."""

    def __init__(self, copy: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.copy = nn.ModuleList([Narrowing(16, 16), Narrowing(16, 4)]), copy

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states, timestep[:, None, None] / 1000)
        return hidden_states.clone() if self.copy else hidden_states


@pytest.mark.parametrize("copy", [False, True])
def test_a_callers_write_does_not_reach_a_recorded_range(copy: bool) -> None:
    torch._dynamo.reset()
    session = Session(inputs=INPUTS)
    model = EndsInABlock(copy).eval().requires_grad_(False)
    forward = compiled(model, session=session)
    latents = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(1))
    first, second = (torch.tensor([t]) for t in TIMES)
    with torch.no_grad():
        expected = forward(latents, first).clone()
        (program,) = session.programs
        site = "blocks.0..1"
        assert site in program.variants.trace.ranges()
        session.bind(reusing(site, program.variants.trace.structure))
        computed = forward(latents, first)
        torch.testing.assert_close(computed, expected)
        computed.fill_(float("nan"))
        predicted = forward(latents, second)
    assert program.statistics.predicted_calls == 1
    torch.testing.assert_close(predicted, expected)
    torch._dynamo.reset()


def reusing(site: str, structure: str) -> Plan:
    """Two steps, of which the second reads ``site`` from the first."""
    return Plan(
        model=ModelPrint(class_name="EndsInABlock", structure=structure, blocks=2),
        sampler=SamplerPrint(
            class_name="none", steps=2, timesteps={"transformer": TIMES}, sigmas={"transformer": (1.0, 0.5)}
        ),
        device=DevicePrint(device="cpu", torch=torch.__version__, dtype="float32"),
        inputs=INPUTS,
        rules=(Rule(sites=site, steps=(1,), do=Reuse()),),
    )
