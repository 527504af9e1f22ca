"""DA-MoE: importance decides how many experts a token gets (arXiv 2409.06669).

Legend: T tokens, D hidden size, E experts, K the most experts that a token can get, B buckets of positions, M
thresholds of a bucket.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moetrain.config.da_moe import DAMoERouterConfig
from moetrain.config.moe import MoEConfig
from moetrain.moe.routing import Router, RoutingContext, RoutingDecision, take_best
from moetrain.moe.telemetry import RouterCounts
from moetrain.moe.thresholds import QuantileState, ThresholdCounts
from moetrain.ops import row_invariant_linear

_HASH_BITS = 16


class DAMoERouter(Router):
    """Softmax over all experts; K of a token grows with its importance, or falls with it (`direction: low`).

    budget: paper. K = ceil(I * E), clamped. The mean K is whatever attention's sharpness makes it.

    budget: mean_k. K = min_k + the number of thresholds that the importance reaches. The thresholds are running
    quantiles of the layer's importances, moved once per optimizer step by counts over the whole global batch, never by
    what the present sequence holds; they stand still in evaluation. Their shares (`DAMoERouterConfig.shares`) make the
    mean of K the budget, whatever the distribution of importances.

    debias: position. Thresholds per bucket of positions. At position 0 every causal statistic of attention is a
    constant that ranks nothing: the token gets mean_k experts, rounded, and the others' shares make up for the rest.
    """

    thresholds: Tensor
    quartiles: Tensor
    offsets: Tensor
    visits: Tensor
    threshold: Tensor
    projection: Tensor

    def __init__(self, moe: MoEConfig, hidden_size: int, dtype: torch.dtype, layer: int) -> None:
        super().__init__(moe, hidden_size, dtype, layer)
        settings = moe.router
        assert isinstance(settings, DAMoERouterConfig)
        self.settings, self.min_k = settings, settings.min_k
        self.by_position = settings.debias == "position"
        self.first_k = settings.first_k(self.num_experts)
        # Statistics that may exceed one are ranked by their logarithm, shares of one by their log-odds.
        self.to_importance = torch.exp if settings.importance == "col_sum" else torch.sigmoid
        if settings.importance == "predicted":
            self.predictor = nn.Parameter(torch.empty(hidden_size, dtype=dtype))
        if settings.importance == "random":
            self.register_buffer("projection", _projection(hidden_size, layer), persistent=False)
        if settings.has_thresholds:
            state = QuantileState.initial(settings.shares(self.num_experts), settings.position_buckets)
            for name, value in self._controllers_of(state).items():
                self.add_controller(name, value)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        logits_TE = self.logits(x_TD, context)
        probs_TE = logits_TE.softmax(dim=-1)
        importance_T, loss = self.importance(x_TD, context)
        num_selected_T, statistics = self.count(importance_T, context.positions(x_TD.device), context.valid_T)
        ids_TK, weights_TK = take_best(probs_TE, probs_TE, num_selected_T, self.max_k)
        if self.settings.gates == "renormalized":
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return RoutingDecision(ids_TK, weights_TK, probs_TE, logits_TE, num_selected_T, statistics, loss)

    def importance(self, x_TD: Tensor, context: RoutingContext) -> tuple[Tensor, Tensor | None]:
        """Importance, fp32 [T], without gradient, and in training the predictor's loss."""
        if self.settings.importance == "predicted":
            return self._predicted(x_TD, context)
        if self.settings.importance == "random":
            return self._random(x_TD, context), None
        assert context.importance_T is not None
        return context.importance_T.detach(), None

    def count(
        self, importance_T: Tensor, positions_T: Tensor, valid_T: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """K of each token, int64 [T], and in training what `update` needs to know of those that are no padding."""
        if self.settings.budget == "paper":
            wanted_T = torch.ceil(importance_T * self.num_experts).to(torch.int64)
            return wanted_T.clamp_(self.min_k, self.max_k), None
        if not self.settings.has_thresholds:
            return torch.full_like(positions_T, self.max_k), None
        edges_BN = torch.cat([self.thresholds, self.quartiles], dim=1)
        bucket_T = self._bucket(positions_T)
        if self.settings.direction == "high":
            above_TN = importance_T[:, None] >= self.to_importance(edges_BN)[bucket_T]
        else:
            above_TN = importance_T[:, None] <= self.to_importance(-edges_BN)[bucket_T]
        num_selected_T = self.min_k + above_TN[:, : self.thresholds.shape[1]].sum(dim=1)
        if self.by_position:
            num_selected_T = torch.where(positions_T == 0, self.first_k, num_selected_T)
        return num_selected_T, self._statistics(bucket_T, above_TN, valid_T) if self.training else None

    def update(self, counts: RouterCounts) -> None:
        if not self.settings.has_thresholds:
            return
        buckets, number = self.thresholds.shape
        rows = torch.tensor(counts.statistics, dtype=torch.float64).view(buckets, -1)
        numbers_B, above_BN = rows[:, 0].clone(), rows[:, 1 : number + 3]
        mean_k = self.settings.mean_k
        if self.by_position:
            firsts, tokens = float(numbers_B[0]), float(numbers_B.sum())
            # First tokens have their K; what they take too much or too little of the budget, the others balance.
            if tokens > firsts:
                mean_k = (mean_k * tokens - self.first_k * firsts) / (tokens - firsts)
            numbers_B[0] = 0.0
        state = QuantileState(*(t.cpu().double() for t in (self.quartiles, self.offsets, self.visits)))
        state = state.moved(
            ThresholdCounts(numbers_B, above_BN[:, :number], above_BN[:, number:]),
            self.settings.shares(self.num_experts, mean_k),
            self.settings.controller_rate,
        )
        for name, value in self._controllers_of(state).items():
            self.get_buffer(name).copy_(value)

    def _predicted(self, x_TD: Tensor, context: RoutingContext) -> tuple[Tensor, Tensor | None]:
        """sigmoid(w x). The hidden state is cut off from the loss: learning to foretell must not bend the model towards
        what is easy to foretell (mixture-of-depths, arXiv 2404.02258, cuts its predictor off alike)."""
        score_T = (x_TD.detach().float() * self.predictor.float()).sum(dim=-1)
        loss = None
        if self.training and context.importance_T is not None:
            loss_T = F.binary_cross_entropy_with_logits(score_T, context.importance_T, reduction="none")
            loss = self.settings.predictor_loss_coeff * context.mean_part(loss_T)
        return score_T.detach().sigmoid(), loss

    @torch.no_grad()
    def _random(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """A number in (0, 1) from layer, position and the signs of 16 fixed random projections of the hidden state:
        the same wherever the token is computed, without a meaning, and known when decoding."""
        signs_TH = row_invariant_linear(x_TD.float(), self.projection) > 0
        code_T = (signs_TH.long() << torch.arange(_HASH_BITS, device=x_TD.device)).sum(dim=1)
        code_T += (context.positions(x_TD.device) << _HASH_BITS) + (self.layer << 48)
        return (_mix(code_T) + 0.5) / 2**24

    def _bucket(self, positions_T: Tensor) -> Tensor:
        buckets = self.settings.position_buckets
        starts = torch.tensor([2**b - 1 for b in range(1, buckets)], device=positions_T.device)
        return torch.bucketize(positions_T, starts, right=True)

    def _statistics(self, bucket_T: Tensor, above_TN: Tensor, valid_T: Tensor | None) -> Tensor:
        """For each bucket: its tokens, and how many reach each threshold and each quartile; fp64, flat."""
        rows_TN = F.pad(above_TN.double(), (1, 0), value=1.0)
        if valid_T is not None:
            rows_TN = rows_TN * valid_T[:, None]
        room = self.settings.num_statistics // self.settings.position_buckets
        sums_BN = rows_TN.new_zeros(self.settings.position_buckets, room)
        sums_BN[:, : rows_TN.shape[1]].index_add_(0, bucket_T, rows_TN)
        return sums_BN.flatten()

    def _controllers_of(self, state: QuantileState) -> dict[str, Tensor]:
        """`threshold` is for people: the importance at the threshold in the middle, at the latest positions."""
        thresholds_BM = state.thresholds()
        middle = thresholds_BM[-1, thresholds_BM.shape[1] // 2]
        shown = self.to_importance(middle if self.settings.direction == "high" else -middle)
        values = {
            "thresholds": thresholds_BM,
            "quartiles": state.quartiles_B2,
            "offsets": state.offsets_BM,
            "visits": state.visits_B,
            "threshold": shown,
        }
        return {name: value.float() for name, value in values.items()}


def _projection(hidden_size: int, layer: int) -> Tensor:
    """The fixed directions of the hash, fp32 [16, D]."""
    digest = hashlib.sha256(f"random importance/{layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randn(_HASH_BITS, hidden_size, generator=generator)


def _mix(code_T: Tensor) -> Tensor:
    """24 well-mixed bits of each int64 (splitmix64's finalizer, with torch's wrapping products)."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        code_T = (code_T ^ _shift(code_T, shift)) * factor
    return _shift(code_T ^ _shift(code_T, 31), 40)


def _shift(code_T: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's is arithmetic."""
    return (code_T >> bits) & ((1 << (64 - bits)) - 1)
