"""HyperMoE: a hypernetwork turns the embeddings of a token's unselected experts into a small expert of its own.

Source: arXiv 2402.12656 and the official code (Bumble666/Hyper_MoE); numbers in comments are the equations of
docs/concepts/hypermoe.md. The generated expert depends on the token only through the *set* of experts it selected, so
it is generated once per distinct set of the batch, never per token.

Legend: T tokens, D hidden size, E experts, G distinct sets, t/q/c/m/h/r sizes of expert embedding, process MLP,
condition, layer embedding, hypernetwork and generated bottleneck.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moetrain.config.moe import HyperConfig
from moetrain.moe.hyper_network import HyperNetwork, SelectionEmbedding, set_linear
from moetrain.ops import generated_experts, plan_permutation


class HyperExperts(nn.Module):
    """One layer's generated expert. Runs on the tokens' home rank: it needs no dispatch."""

    def __init__(
        self,
        config: HyperConfig,
        num_experts: int,
        selectable: range,
        layer: int,
        selection: SelectionEmbedding,
        network: HyperNetwork,
    ) -> None:
        """`selectable`: the numbers of experts that the router may select for a token; `layer`: the global number.
        Parts that are the layer's own become submodules; shared ones are registered by the model, once."""
        super().__init__()
        self.num_experts, self.layer = num_experts, layer
        self.condition_on, self.aggregation = config.condition_on, config.aggregation
        self.coefficient, self.form, self.recompute = config.coefficient, config.form, config.recompute
        constant = config.condition_on == "constant"
        self.possible_sets = 1 if constant else sum(math.comb(num_experts, k) for k in selectable)
        # In a tuple, because what several layers share belongs to the model and must not be registered once per layer.
        self._parts = (selection, network)
        if config.embeddings == "layer":
            self.selection = selection
        if config.sharing == "layer":
            self.network = network

    def forward(self, x_TD: Tensor, chosen_TK: Tensor, probs_TE: Tensor) -> Tensor:
        """The generated expert's output times its coefficient, [T, D] in the dtype of x.

        Args:
            chosen_TK: int64, the experts that the router chose, -1 in unused slots; those that dropped the token for
                want of capacity included.
            probs_TE: fp32, the router's probabilities.

        Gradients reach x, the hypernetwork and the embeddings. None reaches the router through the condition: a
        selection enters only through indices, and probabilities as weights of embeddings are detached. One does with
        coefficient selected_probability.
        """
        weights_GE, set_of_token_T = self.condition_weights(chosen_TK, probs_TE.detach())
        coefficient_T = coefficient_of(self.coefficient, chosen_TK, probs_TE)
        inputs = (x_TD, weights_GE, set_of_token_T, coefficient_T)
        return recomputed(self._generate, *inputs) if self.recompute else self._generate(*inputs)

    def condition_weights(self, chosen_TK: Tensor, probs_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of the experts' embeddings in each distinct condition, fp32 [G, E], and the condition of each token,
        int64 [T]. The weights of a row are all 0 where no expert is left to aggregate."""
        if self.condition_on == "constant":
            return probs_TE.new_zeros(1, self.num_experts), chosen_TK.new_zeros(chosen_TK.shape[0])
        if self.aggregation == "prob":
            mass_TE = probs_TE * self._aggregated(members(chosen_TK, self.num_experts))
            total_T1 = mass_TE.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(mass_TE.dtype).tiny)
            return mass_TE / total_T1, torch.arange(chosen_TK.shape[0], device=chosen_TK.device)
        selected_GE, set_of_token_T = distinct_sets(chosen_TK, self.num_experts)
        weights_GE = self._aggregated(selected_GE).float()
        if self.aggregation == "mean":
            weights_GE = weights_GE / weights_GE.sum(dim=-1, keepdim=True).clamp(min=1.0)
        return weights_GE, set_of_token_T

    def _aggregated(self, selected_GE: Tensor) -> Tensor:
        """Whose embeddings make the condition, bool [G, E]."""
        return selected_GE if self.condition_on == "selected" else ~selected_GE

    def _generate(
        self, x_TD: Tensor, weights_GE: Tensor, set_of_token_T: Tensor, coefficient_T: Tensor | None
    ) -> Tensor:
        selection, network = self._parts
        hidden_Gh = network.encode(selection(weights_GE), self.layer)
        evaluate = FORMS[self._form(x_TD.shape[0], hidden_Gh.shape[1])]
        return scaled(evaluate(x_TD, hidden_Gh, set_of_token_T, network), coefficient_T)

    def _form(self, tokens: int, hidden: int) -> str:
        if self.form == "per_token":
            return self.form
        if tokens == 0 or self.aggregation == "prob":  # no set to generate for; a set for every token
            return "factorized"
        # By the sets that can occur, not those that do: else later tokens would choose the form of earlier ones, and
        # with it their last bits.
        sets = min(tokens, self.possible_sets)
        grouped = self.form == "grouped" or (self.form == "auto" and prefer_grouped(tokens, sets, hidden))
        return "grouped" if grouped else "factorized"


class StaticExpert(nn.Module):
    """A bottleneck branch with weights of the layer's own, U ReLU(D x + b_D) + b_U: what HyperMoE is without its
    hypernetwork (`condition_on: static`). Used like `HyperExperts`."""

    def __init__(self, config: HyperConfig, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.coefficient, self.recompute = config.coefficient, config.recompute
        self.down = nn.Linear(hidden_size, config.bottleneck, dtype=dtype)
        self.up = nn.Linear(config.bottleneck, hidden_size, dtype=dtype)

    def forward(self, x_TD: Tensor, chosen_TK: Tensor, probs_TE: Tensor) -> Tensor:
        """The branch's output times its coefficient, [T, D]; arguments as in `HyperExperts.forward`."""
        inputs = (x_TD, coefficient_of(self.coefficient, chosen_TK, probs_TE))
        return recomputed(self._branch, *inputs) if self.recompute else self._branch(*inputs)

    def _branch(self, x_TD: Tensor, coefficient_T: Tensor | None) -> Tensor:
        return scaled(self.up(F.relu(self.down(x_TD))), coefficient_T)


def recomputed(function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """`function(*inputs)`, of whose activations only the inputs are kept; the backward pass computes them again, to the
    same bits. Nothing random happens inside, so there is no random state to put back."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def coefficient_of(kind: str, chosen_TK: Tensor, probs_TE: Tensor) -> Tensor | None:
    """fp32 [T], differentiable in the probabilities; None stands for 1."""
    if kind == "one":
        return None
    return (probs_TE * members(chosen_TK, probs_TE.shape[1])).sum(dim=-1)


def scaled(y_TD: Tensor, coefficient_T: Tensor | None) -> Tensor:
    return y_TD if coefficient_T is None else (y_TD.float() * coefficient_T[:, None]).to(y_TD.dtype)


def members(expert_ids_TK: Tensor, num_experts: int) -> Tensor:
    """Which experts a token has, bool [T, E]; -1 stands for an unused slot."""
    # Unused slots write into an extra column that is cut off.
    member_TE = expert_ids_TK.new_zeros(expert_ids_TK.shape[0], num_experts + 1, dtype=torch.bool)
    member_TE.scatter_(1, torch.where(expert_ids_TK < 0, num_experts, expert_ids_TK), True)
    return member_TE[:, :num_experts]


def distinct_sets(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The distinct selected sets of a batch: bool [G, E], and int64 [T], the set of each token.

    Sets are compared as bit masks while they fit an int64, else row by row. Synchronises the host (G is data).
    """
    member_TE = members(expert_ids_TK, num_experts)
    if num_experts > 62:
        selected_GE, set_of_token_T = torch.unique(member_TE, dim=0, return_inverse=True)
        return selected_GE, set_of_token_T
    bits_E = 2 ** torch.arange(num_experts, dtype=torch.int64, device=member_TE.device)
    masks_G, set_of_token_T = torch.unique((member_TE * bits_E).sum(dim=1), return_inverse=True)
    return (masks_G[:, None] & bits_E) != 0, set_of_token_T


def prefer_grouped(tokens: int, sets: int, hidden: int) -> bool:
    """Whether generating a weight set per distinct set beats the factorized form: T/G > 128/h.

    Fitted to measurements on CPU over h = 16..128; see docs/concepts/hypermoe.md.
    """
    return tokens * hidden > 128 * sets


def grouped_form(x_TD: Tensor, hidden_Gh: Tensor, set_of_token_T: Tensor, network: HyperNetwork) -> Tensor:
    """Generate each distinct set's weights once, then two grouped products over tokens sorted by set.

    Extra memory: 2 G D r elements.
    """
    r, d = network.bottleneck, network.hidden_size
    down_GrD = set_linear(hidden_Gh, network.down).view(-1, r, d)
    up_GDr = set_linear(hidden_Gh, network.up).view(-1, d, r)
    down_bias_Gr, up_bias_GD = set_linear(hidden_Gh, network.down_bias), set_linear(hidden_Gh, network.up_bias)
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


def per_token_form(x_TD: Tensor, hidden_Gh: Tensor, set_of_token_T: Tensor, network: HyperNetwork) -> Tensor:
    """Weights for every token, as the official code makes them: what the other forms are measured against.

    Extra memory: 2 T D r elements, kept for the backward pass.
    """
    r, d = network.bottleneck, network.hidden_size
    e_Th = hidden_Gh[set_of_token_T]
    down_TrD, up_TDr = set_linear(e_Th, network.down).view(-1, r, d), set_linear(e_Th, network.up).view(-1, d, r)
    z_Tr = F.relu((down_TrD @ x_TD[:, :, None]).squeeze(-1) + set_linear(e_Th, network.down_bias))
    return (up_TDr @ z_Tr[:, :, None]).squeeze(-1) + set_linear(e_Th, network.up_bias)


FORMS = {"grouped": grouped_form, "factorized": factorized_form, "per_token": per_token_form}
