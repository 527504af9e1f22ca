"""The layer that stands in Megatron's MLP slot.

Legend: S sequence positions of this rank, B sequences of the micro-batch, D hidden size, T = S * B tokens.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from moetrain.config.schema import MoEConfig
from moetrain.moe.dispatcher import TokenDispatcher
from moetrain.moe.experts import GroupedExperts
from moetrain.moe.hyper import HyperExperts, StaticExpert
from moetrain.moe.losses import RouterLosses
from moetrain.moe.routing import RoutingContext, RoutingDecision, build_router
from moetrain.moe.telemetry import RouterCounts, RouterTelemetry
from moetrain.runtime.groups import ParallelGroups


class MoELayer(nn.Module):
    """y = sum_{e in S(x)} g_e Expert_e(x)  [+ hyper-expert(x)].

    Tokens are always split over the tensor ranks here: by sequence parallelism where it is on, else by the layer
    itself, which scatters its input and gathers its output. So no token is routed twice, and the gradients of the
    router and the hyper-expert are partial sums over the tensor ranks in both cases (`sum_over_tensor` parameters).
    """

    def __init__(
        self,
        config: TransformerConfig,
        moe: MoEConfig,
        groups: ParallelGroups,
        hyper: HyperExperts | StaticExpert | None,
        layer: int,
        dispatcher: TokenDispatcher,
    ) -> None:
        """`layer` is the 0-based global number; `config` is Megatron's, which the module spec passes."""
        super().__init__()
        assert (hyper is None) == (moe.hyper is None)
        dtype = config.params_dtype
        self.moe, self.groups, self.layer, self.dispatcher = moe, groups, layer, dispatcher
        self.sequence_parallel = config.sequence_parallel
        self.recompute = config.recompute_granularity == "full"
        self.router = build_router(moe, config.hidden_size, dtype, layer)
        self.losses = RouterLosses(moe, groups.tensor)
        self.experts = GroupedExperts(
            moe.num_experts // groups.layout.expert, config.hidden_size, moe.ffn_hidden_size, dtype
        )
        self.hyper = hyper
        self.telemetry = RouterTelemetry(moe.num_experts, moe.max_top_k, moe.router.num_statistics)

    def forward(self, x_SBD: Tensor, importance_SB: Tensor | None, valid_SB: Tensor | None = None) -> Tensor:
        """[S, B, D] -> [S, B, D].

        Args:
            x_SBD: normalised hidden states; this rank's part of the sequence under sequence parallelism, else all.
            importance_SB: fp32 importance of every token of the whole sequence, or None for routers without it.
            valid_SB: bool, True = a real token, of the whole sequence; None: all are. Padding gets no expert and no
                hyper-expert, and counts in no loss and no statistic.

        Communication: the dispatch's gather of counts and all-to-alls over the expert ranks; the balance loss's
        all-reduce and, without sequence parallelism, a gather over the tensor ranks.
        """
        scatter = self.groups.tensor.size() > 1 and not self.sequence_parallel
        if scatter:
            x_SBD = scatter_to_sequence_parallel_region(x_SBD)
        x_TD = x_SBD.reshape(-1, x_SBD.shape[-1])
        context = self._context(x_SBD.shape, importance_SB, valid_SB)
        chosen, valid_T = self.router(x_TD, context), context.valid_T
        decision = chosen if valid_T is None else chosen.without_padding(valid_T)
        dispatch = self.dispatcher.start(x_TD, decision.expert_ids_TK)
        # Work of the tokens' home rank, while their rows travel.
        hyper_TD = self._hyper_expert(x_TD, chosen)
        if hyper_TD is not None and valid_T is not None:
            hyper_TD = hyper_TD.masked_fill(~valid_T[:, None], 0.0)
        losses = self.losses(decision, context) if self.training else None
        experts_TD = self.dispatcher.finish(dispatch, decision.weights_TK, self.experts)
        output_TD = experts_TD if hyper_TD is None else experts_TD + hyper_TD
        if losses is not None:
            if self._is_first_pass():
                self.telemetry.add(
                    dispatch.plan.tokens_per_expert_E,
                    decision.num_selected_T if valid_T is None else decision.num_selected_T[valid_T],
                    decision.statistics,
                    losses.load_balance,
                    losses.z_loss,
                    experts_TD,
                    hyper_TD,
                    sequences=x_SBD.shape[1],
                )
            output_TD = MoEAuxLossAutoScaler.apply(output_TD, losses.total)
        output_SBD = output_TD.view(x_SBD.shape)
        if scatter:
            output_SBD = gather_from_sequence_parallel_region(output_SBD, tensor_parallel_output_grad=False)
        return output_SBD

    def _hyper_expert(self, x_TD: Tensor, decision: RoutingDecision) -> Tensor | None:
        if self.hyper is None:
            return None
        return self.hyper(x_TD, decision.expert_ids_TK, decision.probs_TE)

    def _context(self, shape_SBD: torch.Size, importance_SB: Tensor | None, valid_SB: Tensor | None) -> RoutingContext:
        """Of this rank's part of the sequences."""
        local_length, sequences, _ = shape_SBD
        return RoutingContext(
            local_length=local_length,
            sequences=sequences,
            length=local_length * self.groups.tensor.size(),
            start=self.groups.coordinates.tensor * local_length,
            importance_T=self._local(importance_SB, local_length),
            valid_T=self._local(valid_SB, local_length),
            real_lengths_B=None if valid_SB is None else valid_SB.sum(dim=0),
        )

    def _local(self, whole_SB: Tensor | None, local_length: int) -> Tensor | None:
        """What a tensor over the whole sequence says of this rank's tokens, [T]."""
        if whole_SB is None:
            return None
        start = self.groups.coordinates.tensor * local_length
        return whole_SB[start : start + local_length].reshape(-1)

    def update(self, counts: RouterCounts) -> None:
        """Move all controllers of the layer, once per optimizer step, by the counts of the whole global batch."""
        self.router.update(counts)
        self.losses.update(counts)

    def _is_first_pass(self) -> bool:
        """Whether this is the forward pass and not its recomputation, which must not be counted again.

        Full recompute runs the forward pass without gradients and the recomputation with them.
        """
        return torch.is_grad_enabled() != self.recompute
