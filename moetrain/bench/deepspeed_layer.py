"""DeepSpeed's MoE layer on our routing and weights, with a capacity of the busiest expert, so that it drops nothing.

What differs from the others: its gate turns logits into a routing of its own (softmax, one-hot, cumulative sums), and
that is part of its time; the logits are given, so the router's product is not. Its capacity pads every expert to the
busiest. Its experts are modules called in a loop, here SwiGLU of two linear layers.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from deepspeed.moe import sharded_moe
from deepspeed.moe.experts import Experts
from torch import Tensor, nn

from moetrain.bench.experts import Layer
from moetrain.bench.layer import Formulation
from moetrain.bench.problem import NotHereError

_NEVER = -1e4  # logit of an expert that is not selected


class _GivenGate(nn.Module):
    """In the place of its TopKGate: the same gating functions, on logits that select what we selected."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.top_k = layer.point.top_k
        logits = torch.full((layer.point.tokens, layer.experts), _NEVER, device=layer.device)
        self.logits_TE = nn.Parameter(logits.scatter(1, layer.ids_TK, layer.weights_TK.detach().log()))

    def forward(self, x_TD: Tensor, used_token: None, sparse_routes: bool, use_tutel: bool) -> tuple:
        if self.top_k == 2:
            return sharded_moe.top2gating(
                self.logits_TE, 1.0, 0, drop_tokens=False, top2_2nd_expert_sampling=False, sparse_routes=sparse_routes
            )
        return sharded_moe.topkgating(
            self.logits_TE, self.top_k, 1.0, 0, drop_tokens=False, sparse_routes=sparse_routes
        )


class _Expert(nn.Module):
    def __init__(self, fc1_FD: Tensor, fc2_DF: Tensor) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Parameter(fc1_FD), nn.Parameter(fc2_DF)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.fc1).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.fc2)


def plain(layer: Layer) -> Formulation:
    """With its own dispatch."""
    return _formulation(layer, use_tutel=False)


def tutel(layer: Layer) -> Formulation:
    """With Tutel's dispatch, which DeepSpeed calls when it is installed."""
    if importlib.util.find_spec("tutel") is None:
        raise NotHereError("the package tutel is not installed")
    return _formulation(layer, use_tutel=True)


def _formulation(layer: Layer, use_tutel: bool) -> Formulation:
    if layer.point.routing == "all_to_one" and layer.point.top_k > 1:
        raise NotHereError("its gate sends a token to distinct experts")
    _ = layer.padded_rows  # refuses when it would be mostly padding
    # Slices share the memory of our weights. `Experts` copies the module that it is given, so it is given the one with
    # no weights, and the real ones are put in its place.
    experts = Experts(nn.Identity(), layer.experts, "experts")
    pairs = zip(layer.fc1.detach(), layer.fc2.detach(), strict=True)
    modules = [_Expert(fc1, fc2) for fc1, fc2 in pairs]
    experts.deepspeed_experts = nn.ModuleList(modules)
    gate = _GivenGate(layer)
    moe = sharded_moe.MOELayer(gate, experts, "experts", 1, layer.experts, use_tutel=use_tutel)
    leaves = {
        "dx": layer.x_TD,
        "dlogits": gate.logits_TE,
        "dfc1": [module.fc1 for module in modules],
        "dfc2": [module.fc2 for module in modules],
    }
    return Formulation(lambda: moe(layer.x_TD, None), leaves)
