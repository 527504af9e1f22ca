"""Auxiliary losses of a router. No layout changes their values.

Legend: S local sequence positions, B sequences of the micro-batch, T = S * B tokens of this rank, E experts, K slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.config.moe import MoEConfig
from moetrain.config.relatives import expected_shares
from moetrain.moe.controllers import Controlled
from moetrain.moe.routing import RoutingContext, RoutingDecision
from moetrain.moe.telemetry import RouterCounts


@dataclass(frozen=True)
class RouterLoss:
    """This rank's parts, scalars: over the tensor ranks the parts sum to the losses of the micro-batch.

    Attributes:
        load_balance, z_loss: before their coefficients.
        total: what is added to the model's loss: these with their coefficients, and the router's own.
    """

    load_balance: Tensor
    z_loss: Tensor
    total: Tensor


def balanced_load(moe: MoEConfig) -> Tensor:
    """Mean number of choices per token that each choice gets where the balance loss is least, fp32 [E]."""
    return torch.tensor([moe.expected_choices * share for share in expected_shares(moe)], dtype=torch.float32)


class RouterLosses(Controlled):
    """All auxiliary losses of a layer.

    Load balance is E sum_e f_e P_e (Switch, arXiv 2101.03961 eq. 4-6). P_e is the mean router probability. f_e, which
    has no gradient, is the share of the (token, expert) *assignments* that went to expert e, so that it stays right
    when tokens have different numbers of experts. Choices without computation count as experts do, with probabilities
    as `ComputationFreeExperts.weigh` makes them. The assignments are those of one sequence, of a micro-batch, or of a
    global batch (`moe.aux_loss`), before any is dropped for want of capacity.

    The global batch is the one of the step before: its counts are complete on every rank before the first micro-batch
    begins, so the loss depends neither on the layout nor on the size or order of micro-batches. They are a controller,
    `load`, balanced before the first step. (arXiv 2501.11873 instead counts what the ranks hold of the running batch,
    which is another number on every layout.)
    """

    load: Tensor

    def __init__(self, moe: MoEConfig, tensor_group: dist.ProcessGroup) -> None:
        """`tensor_group`: ranks that hold the other parts of the same sequences."""
        super().__init__()
        self.moe, self.tensor_group = moe, tensor_group
        if moe.aux_loss == "global_batch":
            self.add_controller("load", balanced_load(moe))

    def forward(self, decision: RoutingDecision, context: RoutingContext) -> RouterLoss:
        """Of one micro-batch.

        Communication: one all-reduce of [B, E] over the tensor ranks when there are several, except with
        `global_batch`.
        """
        loads_XE = self._loads(decision.expert_ids_TK, context)
        # A sequence may be padding alone, or its tokens may all have been left without an expert.
        share_XE = loads_XE / loads_XE.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        balance = _weighed(decision.probs_TE, share_XE, context)
        z_loss = context.mean_part(decision.logits_TE.logsumexp(dim=-1).square())
        total = self.moe.aux_loss_coeff * balance + self.moe.z_loss_coeff * z_loss
        if decision.loss is not None:
            total = total + decision.loss
        if decision.load_penalty is not None:
            penalty = decision.load_penalty
            total = total + penalty.coefficient * _weighed(penalty.values_TE, loads_XE, context)
        return RouterLoss(balance, z_loss, total)

    def update(self, counts: RouterCounts) -> None:
        """Take over the loads of the global batch that was just trained on."""
        if self.moe.aux_loss == "global_batch":
            tokens = max(sum(counts.k_histogram), 1)
            loads = [count / tokens for count in counts.tokens_per_expert]
            self.load.copy_(torch.tensor(loads, dtype=torch.float32))

    def _loads(self, expert_ids_TK: Tensor, context: RoutingContext) -> Tensor:
        """Which part of the tokens went to each expert: [B, E], or [1, E] when one number holds for all sequences."""
        if self.moe.aux_loss == "global_batch":
            return self.load[None]
        counts_BE = assignments(expert_ids_TK, self.moe.num_choices).unflatten(0, context.shape).sum(dim=0)
        if self.tensor_group.size() > 1:
            dist.all_reduce(counts_BE, group=self.tensor_group)
        lengths_B = context.lengths(counts_BE.device)
        if self.moe.aux_loss == "per_micro_batch":
            return counts_BE.sum(dim=0, keepdim=True) / lengths_B.sum()
        return counts_BE / lengths_B[:, None]


def assignments(expert_ids_TK: Tensor, num_experts: int) -> Tensor:
    """fp32 [T, E]: 1 where the token goes to the expert."""
    # Unused slots (-1) count into an extra column that is cut off.
    slots_TK = torch.where(expert_ids_TK < 0, num_experts, expert_ids_TK)
    selected_TE = torch.zeros(slots_TK.shape[0], num_experts + 1, device=slots_TK.device).scatter_(1, slots_TK, 1.0)
    return selected_TE[:, :num_experts]


def _weighed(values_TE: Tensor, weights_XE: Tensor, context: RoutingContext) -> Tensor:
    """E times the sum over experts of a weight of the sequence (or of all) times the mean value; this rank's part."""
    return values_TE.shape[-1] * (weights_XE * context.mean_parts(values_TE)).sum(dim=-1).mean()
