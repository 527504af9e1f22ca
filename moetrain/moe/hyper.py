"""HyperMoE: a hypernetwork turns the embeddings of a token's unselected experts into a small expert of its own.

Source: arXiv 2402.12656 and the official code (Bumble666/Hyper_MoE); numbers in comments are the equations of
docs/concepts/hypermoe.md. The generated expert depends on the token only through the *set* of experts it selected, so
it is generated once per distinct set of the batch, never per token.

Legend: T tokens, D hidden size, E experts, G distinct sets, t/q/c/m/h/r sizes of expert embedding, process MLP,
condition, layer embedding, hypernetwork and generated bottleneck.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moetrain.config.schema import HyperConfig
from moetrain.ops import generated_experts, plan_permutation, row_invariant_linear


class HyperNetwork(nn.Module):
    """Shared by all layers of the model: condition -> weights of a generated expert.

    Under pipeline parallelism every stage holds a copy. The copies start equal, their gradients are summed over the
    stages before the step, and the parameters count once in the gradient norm and in checkpoints.
    """

    def __init__(self, config: HyperConfig, num_layers: int, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        r, h, d = config.bottleneck, config.hidden, hidden_size
        self.hidden_size, self.bottleneck = d, r
        self.layer_embedding = nn.Parameter(torch.empty(num_layers, config.layer_embedding, dtype=dtype))
        self.input = nn.Linear(config.condition + config.layer_embedding, h, dtype=dtype)
        self.down = nn.Linear(h, r * d, dtype=dtype)
        self.down_bias = nn.Linear(h, r, dtype=dtype)
        self.up = nn.Linear(h, d * r, dtype=dtype)
        self.up_bias = nn.Linear(h, d, dtype=dtype)

    def encode(self, condition_Gc: Tensor, layer: int) -> Tensor:
        """e = ReLU(A1 [p_S; tau_layer] + a1), [G, h]."""
        tau_Gm = self.layer_embedding[layer].expand(condition_Gc.shape[0], -1)
        return F.relu(_linear(torch.cat([condition_Gc, tau_Gm], dim=-1), self.input))


class HyperExperts(nn.Module):
    """One layer's part: expert embeddings, the MLP that turns a sum of them into a condition, and the evaluation.

    Runs on the tokens' home rank: it needs no dispatch.
    """

    def __init__(
        self, config: HyperConfig, num_experts: int, selectable: range, layer: int, dtype: torch.dtype
    ) -> None:
        """`selectable`: the numbers of experts that the router may select for a token."""
        super().__init__()
        self.aggregation, self.form, self.layer = config.aggregation, config.form, layer
        self.possible_sets = sum(math.comb(num_experts, k) for k in selectable)
        self.expert_embedding = nn.Parameter(torch.empty(num_experts, config.expert_embedding, dtype=dtype))
        self.process_in = nn.Linear(config.expert_embedding, config.process, dtype=dtype)
        self.process_out = nn.Linear(config.process, config.condition, dtype=dtype)

    def forward(self, x_TD: Tensor, expert_ids_TK: Tensor, network: HyperNetwork) -> Tensor:
        """The generated expert's output, [T, D]: U ReLU(D x + b_D) + b_U with coefficient 1.

        Gradients reach x, the hypernetwork and the embeddings; none reaches the router, because the selection enters
        only through indices.
        """
        selected_GE, set_of_token_T = distinct_sets(expert_ids_TK, self.expert_embedding.shape[0])
        hidden_Gh = network.encode(self._condition(selected_GE), self.layer)
        tokens = x_TD.shape[0]
        # By the sets that can occur, not those that do: else later tokens would choose the form of earlier ones, and
        # with it their last bits.
        sets = min(tokens, self.possible_sets)
        grouped = self.form == "grouped" or (self.form == "auto" and prefer_grouped(tokens, sets, hidden_Gh.shape[1]))
        if grouped and tokens > 0:  # without tokens there is no set to generate for
            return grouped_form(x_TD, hidden_Gh, set_of_token_T, network)
        return factorized_form(x_TD, hidden_Gh, set_of_token_T, network)

    def _condition(self, selected_GE: Tensor) -> Tensor:
        """p_S = B2 ReLU(B1 v_S + b1) + b2 where v_S sums (or averages) the embeddings of unselected experts."""
        unselected_GE = (~selected_GE).to(self.expert_embedding.dtype)
        if self.aggregation == "mean":
            unselected_GE = unselected_GE / unselected_GE.sum(dim=-1, keepdim=True).clamp(min=1.0)
        v_Gt = row_invariant_linear(unselected_GE, self.expert_embedding.t().contiguous())
        return _linear(F.relu(_linear(v_Gt, self.process_in)), self.process_out)


def distinct_sets(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The distinct selected sets of a batch: bool [G, E], and int64 [T], the set of each token.

    Sets are compared as bit masks while they fit an int64, else row by row. Synchronises the host (G is data).
    """
    tokens = expert_ids_TK.shape[0]
    device = expert_ids_TK.device
    # Unused slots (-1) write into an extra column that is cut off.
    member_TE = torch.zeros(tokens, num_experts + 1, dtype=torch.bool, device=device)
    member_TE.scatter_(1, torch.where(expert_ids_TK < 0, num_experts, expert_ids_TK), True)
    member_TE = member_TE[:, :num_experts]
    if num_experts > 62:
        selected_GE, set_of_token_T = torch.unique(member_TE, dim=0, return_inverse=True)
        return selected_GE, set_of_token_T
    bits_E = 2 ** torch.arange(num_experts, dtype=torch.int64, device=device)
    masks_G, set_of_token_T = torch.unique((member_TE * bits_E).sum(dim=1), return_inverse=True)
    return (masks_G[:, None] & bits_E) != 0, set_of_token_T


def prefer_grouped(tokens: int, sets: int, hidden: int) -> bool:
    """Whether generating a weight set per distinct set beats the factorised form: T/G > 128/h.

    Fitted to measurements on CPU over h = 16..128; see docs/concepts/hypermoe.md.
    """
    return tokens * hidden > 128 * sets


def grouped_form(x_TD: Tensor, hidden_Gh: Tensor, set_of_token_T: Tensor, network: HyperNetwork) -> Tensor:
    """Generate each distinct set's weights once, then two grouped products over tokens sorted by set.

    Extra memory: 2 G D r elements.
    """
    r, d = network.bottleneck, network.hidden_size
    down_GrD = _linear(hidden_Gh, network.down).view(-1, r, d)
    up_GDr = _linear(hidden_Gh, network.up).view(-1, d, r)
    down_bias_Gr, up_bias_GD = _linear(hidden_Gh, network.down_bias), _linear(hidden_Gh, network.up_bias)
    plan = plan_permutation(set_of_token_T[:, None], hidden_Gh.shape[0])
    return generated_experts(x_TD, down_GrD, down_bias_Gr, up_GDr, up_bias_GD, plan)


def factorized_form(x_TD: Tensor, hidden_Gh: Tensor, set_of_token_T: Tensor, network: HyperNetwork) -> Tensor:
    """The same function with no generated weight at all, for batches whose sets are nearly all distinct.

    D(e) = D_0 + sum_j e_j D_j, so D(e) x contracts x with every D_j first and with e afterwards; likewise U.
    Extra memory: 2 T h r elements.
    """
    r, d = network.bottleneck, network.hidden_size
    h = hidden_Gh.shape[1]
    e_Th = hidden_Gh[set_of_token_T]
    # down.weight is [(r d), h]: one GEMM over x gives x D_j for every j.
    down_hrD = network.down.weight.view(r, d, h).permute(2, 0, 1).reshape(h * r, d)
    q_Thr = F.linear(x_TD, down_hrD).view(-1, h, r)
    z_Tr = torch.einsum("thr,th->tr", q_Thr, e_Th) + F.linear(x_TD, network.down.bias.view(r, d))
    z_Tr = F.relu(z_Tr + F.linear(e_Th, network.down_bias.weight, network.down_bias.bias))
    ez_Trh = (z_Tr[:, :, None] * e_Th[:, None, :]).reshape(-1, r * h)
    up_DX = network.up.weight.view(d, r * h)
    y_TD = F.linear(ez_Trh, up_DX) + F.linear(z_Tr, network.up.bias.view(d, r))
    return y_TD + F.linear(e_Th, network.up_bias.weight, network.up_bias.bias)


def _linear(x_Gn: Tensor, layer: nn.Linear) -> Tensor:
    """A linear layer whose rows do not depend on how many sets the batch has: G depends on later tokens, and a BLAS
    that picks its blocking by G would let them change the last bits of earlier ones."""
    return row_invariant_linear(x_Gn, layer.weight, layer.bias)
