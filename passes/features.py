"""The feature of a site in a captured graph: which nodes it is made of, and how to put it back.

A block range's feature is the residual that it adds to the stream (stream out minus stream in, where a
tensor of the same shape goes in; else the stream out itself). A component's is what its module hands on,
the step's what the forward returns. Every rewrite that records or predicts a feature goes through here, so
that the two agree.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ditopt.passes._infra import GraphIndex, find, outputs, tensor_value
from ditopt.sites import STEP


@dataclass(frozen=True)
class Feature:
    """The tensors of a site's feature: ``ends[i] - starts[i]``, or ``ends[i]`` where ``starts[i]`` is None."""

    site: str
    ends: tuple[fx.Node, ...]
    starts: tuple[fx.Node | None, ...]


def feature(gm: fx.GraphModule, index: GraphIndex, site: str) -> Feature:
    """The feature of ``site`` in ``gm``.

    Raises:
        KeyError: the graph has no such site; the argument is its name.
    """
    if site == STEP:
        ends = tuple(node for node in outputs(gm)[: user_outputs(gm)] if node is not None)
        return Feature(site, ends, (None,) * len(ends))
    if site in index.components:
        return Feature(site, (find(gm, index.components[site].node),), (None,))
    if site not in index.ranges:
        raise KeyError(site)
    first, last = index.ranges[site]
    start_names, end_names = index.boundaries[first].streams, index.boundaries[last + 1].streams
    ends = tuple(find(gm, name) for name in end_names)
    free = [find(gm, name) for name in start_names]
    starts: list[fx.Node | None] = []
    for end in ends:
        same = next((node for node in free if _alike(node, end)), None)
        if same is not None:
            free.remove(same)
        starts.append(same)
    return Feature(site, ends, tuple(starts))


def user_outputs(gm: fx.GraphModule) -> int:
    """How many of the graph's outputs were there before passes appended features."""
    count: int = gm.meta.setdefault("ditopt_user_outputs", len(outputs(gm)))
    return count


def _alike(left: fx.Node, right: fx.Node) -> bool:
    one, two = tensor_value(left), tensor_value(right)
    return one.shape == two.shape and one.dtype == two.dtype
