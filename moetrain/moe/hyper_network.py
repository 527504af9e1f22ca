"""The learned parts of HyperMoE: what makes a condition from a selection, and weights of an expert from a condition.

Either part belongs to one layer or to several; the equations and their sources are in docs/concepts/hypermoe.md.

Legend: G conditions, E experts, t/q/c/m/h/r sizes of expert embedding, process MLP, condition, layer embedding,
hypernetwork and generated bottleneck, D hidden size.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moetrain.config.moe import HyperConfig
from moetrain.ops import row_invariant_linear


class SelectionEmbedding(nn.Module):
    """Weights over experts -> condition: p = B2 ReLU(B1 v + b1) + b2 where v is the weighted sum of embeddings.

    With `condition_on: constant` the condition is one learned vector; with `random_fixed` the embeddings are drawn from
    normal(1) as a function of `name` alone, and are not learned, stored or counted.
    """

    def __init__(
        self, config: HyperConfig, num_experts: int, users: tuple[int, ...], name: str, dtype: torch.dtype
    ) -> None:
        """`users`: global numbers of all MoE layers, here and on other ranks, that use it. `name`: its global name."""
        super().__init__()
        self.users = users
        if config.condition_on == "constant":
            self.constant = nn.Parameter(torch.empty(config.condition, dtype=dtype))
            return
        shape = (num_experts, config.expert_embedding)
        if config.condition_on == "random_fixed":
            self.register_buffer("expert_embedding", fixed_embedding(name, shape).to(dtype), persistent=False)
        else:
            self.expert_embedding = nn.Parameter(torch.empty(shape, dtype=dtype))
        self.process_in = nn.Linear(config.expert_embedding, config.process, dtype=dtype)
        self.process_out = nn.Linear(config.process, config.condition, dtype=dtype)

    def forward(self, weights_GE: Tensor) -> Tensor:
        """[G, E] -> [G, c]; a constant looks at nothing but G."""
        if hasattr(self, "constant"):
            return self.constant.expand(weights_GE.shape[0], -1)
        weights_GE = weights_GE.to(self.expert_embedding.dtype)
        v_Gt = row_invariant_linear(weights_GE, self.expert_embedding.t().contiguous())
        return set_linear(F.relu(set_linear(v_Gt, self.process_in)), self.process_out)


class HyperNetwork(nn.Module):
    """Condition -> weights of a generated expert, for the layers `layers` (global numbers, dense ones included).

    Under pipeline parallelism every stage that holds one of `users` has a copy. The copies start equal, their gradients
    are summed over these stages before the step, and the parameters count once in the gradient norm and in checkpoints.
    """

    def __init__(
        self, config: HyperConfig, layers: range, users: tuple[int, ...], hidden_size: int, dtype: torch.dtype
    ) -> None:
        """`users`: global numbers of all MoE layers, here and on other ranks, that use it."""
        super().__init__()
        r, h, d, m = config.bottleneck, config.hidden, hidden_size, config.layer_embedding
        self.hidden_size, self.bottleneck = d, r
        self.users, self.first_layer = users, layers.start
        self.layer_embedding = nn.Parameter(torch.empty(len(layers), m, dtype=dtype)) if m else None
        self.input = nn.Linear(config.condition + m, h, dtype=dtype)
        self.down = nn.Linear(h, r * d, dtype=dtype)
        self.down_bias = nn.Linear(h, r, dtype=dtype)
        self.up = nn.Linear(h, d * r, dtype=dtype)
        self.up_bias = nn.Linear(h, d, dtype=dtype)

    def encode(self, condition_Gc: Tensor, layer: int) -> Tensor:
        """e = ReLU(A1 [p_S; tau_layer] + a1), [G, h]; `layer` is a global number."""
        if self.layer_embedding is not None:
            tau_Gm = self.layer_embedding[layer - self.first_layer].expand(condition_Gc.shape[0], -1)
            condition_Gc = torch.cat([condition_Gc, tau_Gm], dim=-1)
        return F.relu(set_linear(condition_Gc, self.input))


def set_linear(x_Gn: Tensor, layer: nn.Linear) -> Tensor:
    """A linear layer whose rows do not depend on how many sets the batch has: G depends on later tokens, and a BLAS
    that picks its blocking by G would let them change the last bits of earlier ones."""
    return row_invariant_linear(x_Gn, layer.weight, layer.bias)


def fixed_embedding(name: str, shape: tuple[int, int]) -> Tensor:
    """normal(1), fp32, the same in every run and on every layout: a function of the name and the shape."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
