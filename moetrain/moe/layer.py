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

from moetrain.config.model import ModelConfig
from moetrain.config.moe import MoEConfig
from moetrain.config.relatives import capacities, gate_width
from moetrain.moe.capacity import most_probable_within_capacity, within_capacity
from moetrain.moe.computation_free import ComputationFreeExperts
from moetrain.moe.dispatcher import TokenDispatcher
from moetrain.moe.diverse_experts import DiverseExperts
from moetrain.moe.experts import GroupedExperts
from moetrain.moe.hyper import HyperExperts, StaticExpert
from moetrain.moe.losses import RouterLoss, RouterLosses
from moetrain.moe.router_state import RouterGRU, RouterMemory
from moetrain.moe.routing import RoutingContext, RoutingDecision, build_router
from moetrain.moe.shared_expert import SharedExpert
from moetrain.moe.telemetry import RouterCounts, RouterTelemetry
from moetrain.moe.token_mask import hidden_experts, without_hidden
from moetrain.runtime.groups import ParallelGroups


class MoELayer(nn.Module):
    """y = sum_{e in S(x)} g_e Expert_e(x)  [+ hyper-expert(x)] [+ shared expert(x)].

    Tokens are always split over the tensor ranks here: by sequence parallelism where it is on, else by the layer
    itself, which scatters its input and gathers its output. So no token is routed twice, and the gradients of the
    router and the hyper-expert are partial sums over the tensor ranks in both cases (`sum_over_tensor` parameters).
    """

    capacity_N: Tensor | None
    hidden_VE: Tensor | None

    def __init__(
        self,
        config: TransformerConfig,
        moe: MoEConfig,
        groups: ParallelGroups,
        hyper: HyperExperts | StaticExpert | None,
        layer: int,
        dispatcher: TokenDispatcher,
        model: ModelConfig,
        router_gru: RouterGRU | None = None,
        sublayer: int = 0,
    ) -> None:
        """`layer` is the 0-based global number; `config` is Megatron's, which the module spec passes. `sublayer` tells
        the two mixtures of a cartesian layer apart."""
        super().__init__()
        self.number = layer if moe.cartesian is None else 2 * layer + sublayer
        assert (hyper is None) == (moe.hyper is None)
        dtype = config.params_dtype
        self.moe, self.groups, self.layer, self.dispatcher = moe, groups, layer, dispatcher
        self.sequence_parallel = config.sequence_parallel
        self.recompute = config.recompute_granularity == "full"
        self.router = build_router(moe, gate_width(moe, config.hidden_size), dtype, layer)
        self.losses = RouterLosses(moe, groups.tensor)
        local_experts = moe.num_experts // groups.layout.expert
        size, activation = config.hidden_size, model.activation
        if moe.expert_widths is None:
            self.experts = GroupedExperts(local_experts, size, moe.ffn_hidden_size, dtype, activation)
        else:
            first = groups.coordinates.expert * local_experts
            self.experts = DiverseExperts(moe.expert_widths[first : first + local_experts], size, dtype, activation)
        self.hyper = hyper
        self.telemetry = RouterTelemetry(moe.num_choices, moe.max_top_k, moe.router.num_statistics)
        self._add_relatives(model, dtype)
        # In a tuple, because the cell belongs to the model and must not be registered once per layer.
        self._router_gru = (router_gru,)

    def _add_relatives(self, model: ModelConfig, dtype: torch.dtype) -> None:
        """The parts of docs/concepts/relatives.md; each is None where the settings do not name it."""
        moe, hidden_size = self.moe, model.hidden_size
        self.computation_free = self.memory = self.shared_expert = None
        if moe.computation_free is not None:
            self.computation_free = ComputationFreeExperts(moe.computation_free, moe.num_experts, hidden_size, dtype)
        if moe.router_state is not None:
            self.memory = RouterMemory(moe, hidden_size, dtype)
        if moe.shared_expert_ffn_hidden_size is not None:
            width = moe.shared_expert_ffn_hidden_size
            self.shared_expert = SharedExpert(hidden_size, width, dtype, model.activation)
        limits = capacities(moe, model.seq_length)
        capacity_N = None if limits is None else torch.tensor(limits)
        self.register_buffer("capacity_N", capacity_N, persistent=False)
        self._largest_capacity = max(limits[: moe.num_experts]) if limits is not None else 0
        mask = moe.token_mask
        hidden_VE = None if mask is None else hidden_experts(mask, model.vocab_size, moe.num_experts, self.number)
        self.register_buffer("hidden_VE", hidden_VE, persistent=False)

    def forward(
        self,
        x_SBD: Tensor,
        importance_SB: Tensor | None,
        valid_SB: Tensor | None = None,
        *,
        token_ids_SB: Tensor | None = None,
        state_SBP: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[S, B, D] -> [S, B, D], and the router's next state where it has one.

        Args:
            x_SBD: normalized hidden states; this rank's part of the sequence under sequence parallelism, else all.
            importance_SB: fp32 importance of every token of the whole sequence, or None for routers without it.
            valid_SB: bool, True = a real token, of the whole sequence; None: all are. Padding gets no expert of any
                kind, takes no place within a capacity, and counts in no loss and no statistic.
            token_ids_SB: vocabulary ids of the whole sequence, where the settings have a token mask.
            state_SBP: the router's state from the MoE layer before, in the layout of `x_SBD`.

        Communication: the dispatch's gather of counts and all-to-alls over the expert ranks; the balance loss's
        all-reduce, with a capacity a gather and, without sequence parallelism, another over the tensor ranks.
        """
        scatter = self.groups.tensor.size() > 1 and not self.sequence_parallel
        if scatter:
            x_SBD = scatter_to_sequence_parallel_region(x_SBD)
            state_SBP = None if state_SBP is None else scatter_to_sequence_parallel_region(state_SBP)
        x_TD = x_SBD.reshape(-1, x_SBD.shape[-1])
        context = self._context(x_SBD.shape, importance_SB, valid_SB, token_ids_SB)
        chosen, state_TP = self._route(x_TD, context, state_SBP)
        decision = self._settled(chosen, context)
        placed_TK = self._within_capacity(decision, context)
        dispatch = self.dispatcher.start(x_TD, self._travelers(placed_TK), self._rows_per_expert(context))
        # Work of the tokens' home rank, while their rows travel.
        hyper_TD = _of_real_tokens(self._hyper_expert(x_TD, chosen), context)
        at_home_TD = _of_real_tokens(self._at_home(x_TD, placed_TK, decision), context)
        losses = self.losses(decision, context) if self.training else None
        experts_TD = self.dispatcher.finish(dispatch, decision.weights_TK, self.experts)
        if at_home_TD is not None:
            experts_TD = (experts_TD.float() + at_home_TD).to(x_TD.dtype)
        output_TD = experts_TD if hyper_TD is None else experts_TD + hyper_TD
        if losses is not None:
            if self._is_first_pass():
                rows_E = dispatch.plan.tokens_per_expert_E
                self._observe(decision, placed_TK, rows_E, context, losses, experts_TD, hyper_TD)
            output_TD = MoEAuxLossAutoScaler.apply(output_TD, losses.total)
        output_SBD = output_TD.view(x_SBD.shape)
        next_SBP = None if state_TP is None else state_TP.to(x_TD.dtype).view(*x_SBD.shape[:2], -1)
        if scatter:
            output_SBD = gather_from_sequence_parallel_region(output_SBD, tensor_parallel_output_grad=False)
            if next_SBP is not None:
                next_SBP = gather_from_sequence_parallel_region(next_SBP, tensor_parallel_output_grad=False)
        return output_SBD, next_SBP

    def update(self, counts: RouterCounts) -> None:
        """Move all controllers of the layer, once per optimizer step, by the counts of the whole global batch."""
        self.router.update(counts)
        self.losses.update(counts)

    def _route(
        self, x_TD: Tensor, context: RoutingContext, state_SBP: Tensor | None
    ) -> tuple[RoutingDecision, Tensor | None]:
        """The router's choice, and its next state."""
        gate_TG = x_TD
        if self.memory is not None:
            (gru,) = self._router_gru
            before_TP = x_TD.new_zeros(1, self.memory.width).expand(x_TD.shape[0], -1)
            if state_SBP is not None:
                before_TP = state_SBP.reshape(x_TD.shape[0], -1)
            gate_TG = self.memory.gate_input(x_TD, before_TP, gru)
        chosen = self.router(gate_TG, context)
        if context.hidden_TE is not None:
            chosen = without_hidden(chosen, context.hidden_TE)
        if self.memory is None:
            return chosen, None
        return chosen, gate_TG if self.memory.recurrent else chosen.logits_TE

    def _settled(self, chosen: RoutingDecision, context: RoutingContext) -> RoutingDecision:
        """What comes of the router's choice: nothing for padding, and the weights of computation-free choices."""
        decision = chosen if context.valid_T is None else chosen.without_padding(context.valid_T)
        return decision if self.computation_free is None else self.computation_free.weigh(decision)

    def _within_capacity(self, decision: RoutingDecision, context: RoutingContext) -> Tensor:
        """The choices without those that an expert has no place for."""
        if self.capacity_N is None:
            return decision.expert_ids_TK
        choices_TK, of_sequences = decision.expert_ids_TK, (context.sequences, self.groups.tensor)
        if self.moe.capacity is not None and self.moe.capacity.order == "probability":
            return most_probable_within_capacity(choices_TK, decision.probs_TE, self.capacity_N, *of_sequences)
        return within_capacity(choices_TK, self.capacity_N, *of_sequences)

    def _rows_per_expert(self, context: RoutingContext) -> int | None:
        """Size of the padded buffer that goes to an expert; None without padding. A rank holds no more tokens of a
        sequence than its own part."""
        if self.moe.capacity is None or not self.moe.capacity.pad:
            return None
        return context.sequences * min(self._largest_capacity, context.local_length)

    def _travelers(self, choices_TK: Tensor) -> Tensor:
        return choices_TK if self.computation_free is None else self.computation_free.travelers(choices_TK)

    def _at_home(self, x_TD: Tensor, placed_TK: Tensor, decision: RoutingDecision) -> Tensor | None:
        """What the token's own rank adds to the experts' output."""
        parts = []
        if self.computation_free is not None:
            parts.append(self.computation_free(x_TD, placed_TK, decision.weights_TK))
        if self.moe.capacity is not None and self.moe.capacity.dropped == "input":
            dropped_T = decision.weights_TK.masked_fill(placed_TK == decision.expert_ids_TK, 0.0).sum(dim=-1)
            parts.append(dropped_T[:, None] * x_TD.float())
        if self.shared_expert is not None:
            parts.append(self.shared_expert(x_TD))
        return sum(parts[1:], start=parts[0]) if parts else None

    def _hyper_expert(self, x_TD: Tensor, chosen: RoutingDecision) -> Tensor | None:
        """From the router's own choice, before a capacity or other weights: among the experts, and the probabilities
        that it gave to these."""
        if self.hyper is None:
            return None
        probs_TE = chosen.probs_TE[:, : self.moe.num_experts]
        return self.hyper(x_TD, self._travelers(chosen.expert_ids_TK), probs_TE)

    def _observe(
        self,
        decision: RoutingDecision,
        placed_TK: Tensor,
        rows_E: Tensor,
        context: RoutingContext,
        losses: RouterLoss,
        experts_TD: Tensor,
        hyper_TD: Tensor | None,
    ) -> None:
        """Count the micro-batch: choices before any is dropped."""
        choices_TK, selected_T, valid_T = decision.expert_ids_TK, decision.num_selected_T, context.valid_T
        all_traveled = self.capacity_N is None and self.computation_free is None
        self.telemetry.add(
            rows_E if all_traveled else self._count(choices_TK),
            selected_T if valid_T is None else selected_T[valid_T],
            decision.statistics,
            losses.load_balance,
            losses.z_loss,
            experts_TD,
            hyper_TD,
            sequences=context.sequences,
            dropped=0 if self.capacity_N is None else (choices_TK != placed_TK).sum(),
        )

    def _count(self, choices_TK: Tensor) -> Tensor:
        """How often each choice was made."""
        return torch.bincount(choices_TK.flatten() + 1, minlength=self.moe.num_choices + 1)[1:]

    def _context(
        self,
        shape_SBD: torch.Size,
        importance_SB: Tensor | None,
        valid_SB: Tensor | None,
        token_ids_SB: Tensor | None,
    ) -> RoutingContext:
        """Of this rank's part of the sequences."""
        local_length, sequences, _ = shape_SBD
        hidden_TE = None
        if self.hidden_VE is not None:
            token_ids_T = self._local(token_ids_SB, local_length)
            assert token_ids_T is not None
            hidden_TE = self.hidden_VE[token_ids_T]
        return RoutingContext(
            local_length=local_length,
            sequences=sequences,
            length=local_length * self.groups.tensor.size(),
            start=self.groups.coordinates.tensor * local_length,
            importance_T=self._local(importance_SB, local_length),
            valid_T=self._local(valid_SB, local_length),
            real_lengths_B=None if valid_SB is None else valid_SB.sum(dim=0),
            hidden_TE=hidden_TE,
        )

    def _local(self, whole_SB: Tensor | None, local_length: int) -> Tensor | None:
        """What a tensor over the whole sequence says of this rank's tokens, [T]."""
        if whole_SB is None:
            return None
        start = self.groups.coordinates.tensor * local_length
        return whole_SB[start : start + local_length].reshape(-1)

    def _is_first_pass(self) -> bool:
        """Whether this is the forward pass and not its recomputation, which must not be counted again.

        Full recompute runs the forward pass without gradients and the recomputation with them.
        """
        return torch.is_grad_enabled() != self.recompute


def _of_real_tokens(y_TD: Tensor | None, context: RoutingContext) -> Tensor | None:
    """Zeros for padding."""
    if y_TD is None or context.valid_T is None:
        return y_TD
    return y_TD.masked_fill(~context.valid_T[:, None], 0.0)
