"""Configuration of models trained with moetrain (HyperMoE and DA-MoE decoders)."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PretrainedConfig

ROUTERS = ("top_k", "expert_bias", "da_moe")
SCORES = ("softmax", "sigmoid")
GROUP_SCORES = ("top2_sum", "max")
GATES = ("raw", "renormalized")
IMPORTANCE = ("self_weight", "row_max", "row_entropy", "predicted")
DIRECTIONS = ("high", "low")
BUDGETS = ("mean_k", "paper")
QK_NORMS = (None, "head", "projection")
HYPER_CHOICES = {
    "condition_on": ("unselected", "selected", "constant", "static"),
    "aggregation": ("mean", "sum", "prob"),
    "sharing": ("model", "stage", "layer"),
    "embeddings": ("layer", "model"),
    "coefficient": ("one", "selected_probability"),
}


class MoetrainConfig(PretrainedConfig):
    r"""A causal decoder (RMSNorm, rotary positions, grouped-query attention, SwiGLU) whose layers are dense or MoE.

    Args:
        moe_layers: for each layer, 1 if it has experts, 0 if it is dense; empty means all dense.
        intermediate_size: hidden units of a dense layer; moe_intermediate_size: of one expert.
        head_dim: width of an attention head; default: hidden_size / num_attention_heads.
        qkv_bias: whether queries, keys and values have biases.
        qk_norm: RMSNorm of queries and keys: `head`, of each with one weight for all; `projection`, of all together.
        shared_expert_intermediate_size: hidden units of an expert that every token gets with weight 1; None: none.
        router_type: `top_k` gives every token `num_experts_per_tok` experts; `expert_bias` too, and chooses them by
            score and a trained bias; `da_moe` gives it between `min_k` and `max_k`, from its importance in the same
            layer's attention.
        router_gates: `raw` weighs an expert by its score (with da_moe its probability), `renormalized` by that divided
            by the sum over the selected ones.
        router_scores: (top_k, expert_bias) `softmax`: probabilities over all experts; `sigmoid`: of each by itself.
        router_scaling_factor: (top_k, expert_bias) on all weights.
        expert_groups: (top_k, expert_bias) groups of neighboring experts, of which a token chooses from the best
            `top_groups` (None: all), by the sum of a group's two best scores (`group_score`: top2_sum) or by its best
            (max).
        importance: (da_moe) `self_weight`, `row_max` or `row_entropy` of the token's attention row, mean over heads; or
            `predicted` from the token's hidden state.
        importance_direction: (da_moe) whether tokens of `high` or of `low` importance get more experts.
        budget: (da_moe) `paper`: ceil(importance * num_experts); `mean_k`: `min_k`, and one more for each of the
            layer's trained `thresholds` that the importance reaches.
        position_buckets: (da_moe, mean_k) groups of positions with thresholds of their own: group b holds positions
            2^b - 1 to 2^(b+1) - 2, the last one all beyond.
        first_k: (da_moe, mean_k) experts of the first token, where positions have groups; None: by importance too.
        hyper: HyperMoE's sizes, or None: `bottleneck`, `hidden`, `expert_embedding`, `process`, `condition` and
            `layer_embedding` (0: none). And its choices: `condition_on` (`unselected` or `selected` experts, one
            learned `constant`, or `static`: an ordinary branch in each layer), `aggregation` (`mean`, `sum`, or `prob`:
            weighted by renormalized router probabilities), `sharing` of the hypernetwork (by the `model`, by each of
            `stages` equal groups of layers, or none: `layer`), `embeddings` (each `layer`'s, or the `model`'s),
            `coefficient` (`one` or `selected_probability`).
        pretraining: what moetrain trained with and goes on with (`moetrain convert from-hf`); nothing here reads it.
        format_version: of this configuration; raised when a new field changes what is computed.
    """

    model_type = "moetrain"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 1024,
        intermediate_size: int = 4096,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        qk_norm: str | None = None,
        max_position_embeddings: int = 2048,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        moe_layers: list[int] | None = None,
        num_experts: int = 8,
        moe_intermediate_size: int = 1024,
        router_type: str = "top_k",
        num_experts_per_tok: int = 2,
        router_gates: str = "raw",
        router_scores: str = "softmax",
        router_scaling_factor: float = 1.0,
        expert_groups: int = 1,
        top_groups: int | None = None,
        group_score: str = "top2_sum",
        shared_expert_intermediate_size: int | None = None,
        importance: str = "self_weight",
        importance_direction: str = "high",
        budget: str = "mean_k",
        position_buckets: int = 1,
        first_k: int | None = None,
        min_k: int = 1,
        max_k: int | None = None,
        hyper: dict[str, Any] | None = None,
        pretraining: dict[str, Any] | None = None,
        format_version: int = 1,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.qkv_bias = qkv_bias
        self.qk_norm = qk_norm
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.moe_layers = list(moe_layers) if moe_layers else [0] * num_hidden_layers
        self.num_experts = num_experts
        self.moe_intermediate_size = moe_intermediate_size
        self.router_type = router_type
        self.num_experts_per_tok = num_experts_per_tok
        self.router_gates = router_gates
        self.router_scores = router_scores
        self.router_scaling_factor = router_scaling_factor
        self.expert_groups = expert_groups
        self.top_groups = top_groups
        self.group_score = group_score
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        self.importance = importance
        self.importance_direction = importance_direction
        self.budget = budget
        self.position_buckets = position_buckets
        self.first_k = first_k
        self.min_k = min_k
        self.max_k = max_k or num_experts
        self.hyper = hyper
        self.pretraining = pretraining
        self.format_version = format_version
        self._check()
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def _check(self) -> None:
        for name, legal in (
            ("router_type", ROUTERS),
            ("router_gates", GATES),
            ("router_scores", SCORES),
            ("group_score", GROUP_SCORES),
            ("importance", IMPORTANCE),
            ("importance_direction", DIRECTIONS),
            ("budget", BUDGETS),
            ("qk_norm", QK_NORMS),
        ):
            if getattr(self, name) not in legal:
                raise ValueError(f"{name} is {getattr(self, name)!r}; legal: {', '.join(map(str, legal))}")
        for name, legal in HYPER_CHOICES.items():
            if self.hyper is not None and self.hyper.get(name) not in legal:
                raise ValueError(f"hyper[{name!r}] is {self.hyper.get(name)!r}; legal: {', '.join(legal)}")
        if len(self.moe_layers) != self.num_hidden_layers:
            raise ValueError(
                f"moe_layers has {len(self.moe_layers)} entries; num_hidden_layers is {self.num_hidden_layers}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even for rotary positions")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_key_value_heads must divide num_attention_heads")
        if any(self.moe_layers) and not 1 <= self.top_experts <= self.num_experts:
            raise ValueError(
                f"a token may get {self.top_experts} experts; legal: 1 to num_experts ({self.num_experts})"
            )

        if self.num_experts % self.expert_groups or not 1 <= self.chosen_groups <= self.expert_groups:
            raise ValueError(
                f"expert_groups ({self.expert_groups}) must divide num_experts ({self.num_experts}), and top_groups "
                f"({self.top_groups}) must be 1 to expert_groups"
            )

    @property
    def chosen_groups(self) -> int:
        """Groups of experts that a token may choose from."""
        return self.top_groups or self.expert_groups

    @property
    def top_experts(self) -> int:
        """The most experts that a token can get."""
        return self.max_k if self.router_type == "da_moe" else self.num_experts_per_tok

    @property
    def attention_statistic(self) -> str | None:
        """What the router reads from attention."""
        return self.importance if self.router_type == "da_moe" and self.importance != "predicted" else None

    @property
    def has_thresholds(self) -> bool:
        """Whether importance is ranked by thresholds."""
        return self.router_type == "da_moe" and self.budget == "mean_k" and self.min_k < self.max_k
