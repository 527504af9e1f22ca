"""The expert layer, from tokens, expert numbers and routing weights to tokens: ours against whole layers of others.

Everything between is timed, the sorting of the slots included. Each baseline computes the same function on the same
weights, and drops nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain import ops
from moetrain.bench.experts import Layer
from moetrain.bench.problem import Contender, Missing, NotHereError, Problem, load
from moetrain.bench.results import Point


@dataclass(frozen=True)
class Formulation:
    """One way to write the layer: `forward()` gives y, `leaves` what to differentiate it in.

    A list of leaves (an expert's weights each) is stacked before it is compared.
    """

    forward: Callable[[], Tensor]
    leaves: Mapping[str, Tensor | Sequence[Tensor]]


def our_layer(layer: Layer) -> Formulation:
    """The plan, and one operator."""

    def forward() -> Tensor:
        plan = ops.plan_permutation(layer.ids_TK, layer.experts)
        return ops.expert_layer(layer.x_TD, layer.weights_TK, layer.fc1, layer.fc2, plan)

    return Formulation(forward, leaves_of(layer))


def leaves_of(layer: Layer) -> dict[str, Tensor | Sequence[Tensor]]:
    """Of a formulation that uses the layer's tensors as they are."""
    return {"dx": layer.x_TD, "dweights": layer.weights_TK, "dfc1": layer.fc1, "dfc2": layer.fc2}


def grouped_mm(layer: Layer) -> Formulation:
    """The best that plain torch has: rows sorted by expert, two calls of F.grouped_mm, a weighted sum in float32."""

    def forward() -> Tensor:
        token_R, order_R, counts_E = _sort(layer)
        ends_E = counts_E.cumsum(0).to(torch.int32)
        rows_RD = layer.x_TD.index_select(0, token_R)
        gate_RF, up_RF = F.grouped_mm(rows_RD, layer.fc1.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
        y_RD = F.grouped_mm(F.silu(gate_RF) * up_RF, layer.fc2.transpose(1, 2), offs=ends_E)
        return _weighted_sum(layer, y_RD, token_R, order_R)

    return Formulation(forward, leaves_of(layer))


def padded_bmm(layer: Layer) -> Formulation:
    """Every expert padded to the busiest one, as layers with a capacity do it."""
    _ = layer.padded_rows  # refuses when it would be mostly padding

    def forward() -> Tensor:
        token_R, order_R, counts_E = _sort(layer)
        busiest = int(counts_E.max())
        expert_R = torch.repeat_interleave(torch.arange(layer.experts, device=counts_E.device), counts_E)
        first_E = counts_E.cumsum(0) - counts_E
        place_R = expert_R * busiest + torch.arange(layer.rows, device=counts_E.device) - first_E[expert_R]
        padded = layer.x_TD.new_zeros(layer.experts * busiest, layer.point.hidden)
        padded_ECD = padded.index_copy(0, place_R, layer.x_TD.index_select(0, token_R)).view(layer.experts, busiest, -1)
        gate_ECF, up_ECF = torch.bmm(padded_ECD, layer.fc1.transpose(1, 2)).chunk(2, dim=-1)
        y_ECD = torch.bmm(F.silu(gate_ECF) * up_ECF, layer.fc2.transpose(1, 2))
        return _weighted_sum(layer, y_ECD.flatten(0, 1).index_select(0, place_R), token_R, order_R)

    return Formulation(forward, leaves_of(layer))


def _sort(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """Token and flat slot of each row, rows of each expert."""
    slots = layer.ids_TK.reshape(-1)
    order_R = slots.argsort(stable=True)
    return order_R // layer.point.top_k, order_R, torch.bincount(slots, minlength=layer.experts)


def _weighted_sum(layer: Layer, y_RD: Tensor, token_R: Tensor, order_R: Tensor) -> Tensor:
    weighted_RD = y_RD * layer.weights_TK.reshape(-1).index_select(0, order_R)[:, None]
    y_TD = torch.zeros(layer.x_TD.shape, dtype=torch.float32, device=y_RD.device)
    return y_TD.index_add(0, token_R, weighted_RD.float()).to(y_RD.dtype)


# Name in the tables -> who builds its Formulation. Optional packages are imported only if they are asked for.
BASELINES: dict[str, str] = {
    "F.grouped_mm": "moetrain.bench.layer:grouped_mm",
    "padded bmm": "moetrain.bench.layer:padded_bmm",
    "transformers, eager": "moetrain.bench.transformers_layer:eager",
    "transformers, grouped_mm": "moetrain.bench.transformers_layer:grouped_mm",
    "DeepSpeed MoE": "moetrain.bench.deepspeed_layer:plain",
    "DeepSpeed MoE, Tutel": "moetrain.bench.deepspeed_layer:tutel",
}


def forward(point: Point) -> Problem:
    """Without gradients."""
    layer = Layer(point)
    return _problem(layer, _without_gradients, layer.flops())


def forward_backward(point: Point) -> Problem:
    """With gradients of tokens, routing weights and expert weights; each product of the forward has two more."""
    layer = Layer(point)
    return _problem(layer, lambda formulation: forward_and_backward(formulation, layer.grad_TD), 3 * layer.flops())


def _problem(layer: Layer, contender: Callable[[Formulation], Contender], flops: float) -> Problem:
    baselines: dict[str, Contender | Missing] = {}
    for name, builder in BASELINES.items():
        try:
            baselines[name] = contender(load(builder)(layer))
        except NotHereError as error:
            baselines[name] = Missing(str(error))
    return Problem(contender(our_layer(layer)), baselines, flops)


def _without_gradients(formulation: Formulation) -> Contender:
    def call() -> Tensor:
        with torch.no_grad():
            return formulation.forward()

    return Contender(call)


def forward_and_backward(formulation: Formulation, grad: Tensor) -> Contender:
    """Fresh gradients on every call; nobody adds to old ones."""
    flat = [leaf for value in formulation.leaves.values() for leaf in _as_list(value)]

    def call() -> tuple[Tensor, Sequence[Tensor]]:
        y = formulation.forward()
        return y, torch.autograd.grad(y, flat, grad)

    def result(returned: Any) -> dict[str, Tensor]:
        y, gradients = returned
        named, left = {"y": y}, list(gradients)
        for name, value in formulation.leaves.items():
            mine = [left.pop(0) for _ in _as_list(value)]
            named[name] = mine[0] if isinstance(value, Tensor) else torch.stack(mine)
        return named

    return Contender(call, result)


def _as_list(value: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [value] if isinstance(value, Tensor) else value
