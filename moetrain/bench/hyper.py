"""HyperMoE's generated expert as a share of the experts' own time."""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.bench.experts import TORCH_DTYPES, Layer
from moetrain.bench.layer import Formulation, forward_and_backward, our_layer
from moetrain.bench.problem import Contender, Problem
from moetrain.bench.results import Point
from moetrain.config.moe import HyperConfig
from moetrain.moe.hyper import HyperExperts
from moetrain.moe.hyper_network import HyperNetwork, SelectionEmbedding


def hyper(point: Point) -> Problem:
    """Forward and backward of both; they are different functions, so nothing but their shapes is compared."""
    layer = Layer(point)
    config = HyperConfig(bottleneck=64, hidden=128)
    dtype = TORCH_DTYPES[point.dtype]
    with torch.device(point.device):
        network = HyperNetwork(config, range(1), (0,), point.hidden, dtype)
        selection = SelectionEmbedding(config, point.experts, (0,), "hyper", dtype)
    experts = HyperExperts(config, point.experts, range(point.top_k, point.top_k + 1), 0, selection, network)
    probs_TE = torch.full((point.tokens, point.experts), 1 / point.experts, device=point.device)
    parameters = [*network.parameters(), *selection.parameters()]
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.02)
    x_TD = layer.random(point.tokens, point.hidden).requires_grad_()
    generated = Formulation(
        lambda: experts(x_TD, layer.ids_TK, probs_TE), {"x": x_TD, **{str(i): p for i, p in enumerate(parameters)}}
    )
    ours = forward_and_backward(generated, layer.grad_TD)
    theirs = forward_and_backward(our_layer(layer), layer.grad_TD)
    return Problem(
        Contender(ours.call, _shape_of_y),
        {"expert layer": Contender(theirs.call, _shape_of_y)},
        work=_flops(layer, config),
    )


def _shape_of_y(returned: tuple[Tensor, object]) -> dict[str, Tensor]:
    return {"shape": torch.tensor(returned[0].shape)}


def _flops(layer: Layer, config: HyperConfig) -> float:
    """The grouped form: generate each set's two matrices, then two products of every token; twice more backward."""
    point, width = layer.point, config.bottleneck
    sets = len(layer.ids_TK.unique(dim=0))
    return 3 * 2.0 * 2 * width * point.hidden * (point.tokens + sets * config.hidden)
