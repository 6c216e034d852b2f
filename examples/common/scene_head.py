"""The head of the auxiliary loss of training that reads what stands where off a middle block.

A transformer learns to draw what its middle layers can name (representation alignment: Yu et al., 2024,
arXiv 2410.06940, with features of a pretrained encoder). Scenes are procedural, so the true answer takes the place of
a pretrained encoder: for every token the thing it belongs to, and where in it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUMBERS_WEIGHT = 3.0  # of the squared errors beside the cross-entropies


class SceneHead(nn.Module):
    """Reads class numbers and numbers off token features; used in training alone and never saved.

    Args:
        width: of the features.
        classes: how many classes each kind has; class 0 of the first kind is "no thing near".
        numbers: how many numbers there are.
    """

    def __init__(self, width: int, classes: tuple[int, ...], numbers: int) -> None:
        super().__init__()
        self.sizes = [*classes, numbers]
        self.read = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 256), nn.SiLU(), nn.Linear(256, sum(self.sizes))
        )

    def forward(self, features: Tensor, classes: Tensor, numbers: Tensor) -> Tensor:
        """Mean over tokens of cross-entropies and weighted squared errors; tokens far from things count a quarter.

        ``features`` are ``[B, tokens, width]``, ``classes`` ``[B, tokens, kinds]``, ``numbers`` ``[B, tokens, n]``.
        """
        read = self.read(features).float()
        *logits, values = read.split(self.sizes, -1)
        near = classes[..., 0] > 0
        weight = torch.where(near, 1.0, 0.25)
        loss = sum(
            F.cross_entropy(part.flatten(0, 1), classes[..., i].flatten().long(), reduction="none").view_as(weight)
            for i, part in enumerate(logits)
        )
        loss = (loss / len(logits) + NUMBERS_WEIGHT * (values - numbers).square().mean(-1)) * weight
        mean: Tensor = loss.sum() / weight.sum()
        return mean
