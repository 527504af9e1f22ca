"""Inference and fine-tuning of models trained with moetrain, in plain torch.

Every routing decision of a token depends on that token's hidden state and row of the attention matrix alone, so
decoding with a cache, a full forward pass and left-padded batches route every token alike. Fine-tuning here optimizes
the language-model loss; the balance losses and controllers of pretraining are not part of this file: `thresholds`, and
the state from which pretraining would move them, stay as trained.

Shape letters: b batch, s query tokens, n key tokens, h heads, T = b * s tokens, d width, E experts, r bottleneck.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_moetrain import MoetrainConfig

ROWS_AT_ONCE = 512
"""Query rows whose attention probabilities exist at one time when a router needs them: memory is b*h*512*n."""


class MoetrainRMSNorm(nn.Module):
    """x / rms(x) in fp32, times the weight in x's dtype."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class MoetrainMLP(nn.Module):
    """SwiGLU: a dense layer's MLP, or one expert."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


# --- attention ------------------------------------------------------------------------------------------------------


def rotary_tables(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [b, 1, s, head_dim]. Computed afresh, because a buffer would be lost when weights load on `meta`."""
    even = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device)
    angles = position_ids[:, None, :, None].float() * theta ** (-even / head_dim)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in the rotate-half layout; x [b, h, s, head_dim]."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def visible_keys(attention_mask: Tensor | None, batch: int, queries: int, past: int, device: torch.device) -> Tensor:
    """Which keys a query sees, bool [b or 1, 1, s, n]: itself and earlier tokens that are not padding.

    `attention_mask` is None, [b, n] with 0 for padding, or the finished [b, 1, s, n] mask that `generate` makes for a
    static cache (bool, or additive with 0 for visible). A padding token sees itself, so that no softmax is empty.
    """
    made = attention_mask is not None and attention_mask.dim() == 4
    keys = torch.arange(attention_mask.shape[-1] if made else past + queries, device=device)
    rows = torch.arange(past, past + queries, device=device)[:, None]
    itself, causal = (keys == rows)[None, None], (keys <= rows)[None, None]
    if attention_mask is None:
        return causal
    if made:
        return itself | (attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0)
    if attention_mask.shape != (batch, past + queries):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; must be [batch, cached + new tokens] "
            f"= {(batch, past + queries)}"
        )
    return itself | causal & attention_mask.bool()[:, None, None]


def row_statistic(kind: str, probabilities: Tensor, visible: Tensor, first: int) -> Tensor:
    """One number per attention row, [b, h, s]. The first row's own key has index `first`."""
    if kind == "row_max":
        return probabilities.amax(-1)
    if kind == "self_weight":
        return probabilities.diagonal(first, -2, -1)
    entropy = torch.special.entr(probabilities).sum(-1)
    count = visible.sum(-1)
    # ln 1 = 0 in the denominator: a token that sees only itself has entropy 0, divided by anything positive.
    return entropy / count.clamp(min=2).float().log()


def attend_with_importance(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, past: int, kind: str
) -> tuple[Tensor, Tensor]:
    """Attention output [b, h, s, head_dim], and each token's importance, fp32 [b, s].

    Scores are fp32 whatever the model's dtype: a rounding that depends on the batch's shape would change the number of
    experts between prefill and decoding.
    """
    outputs, importance = [], []
    for start in range(0, query.shape[2], ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        seen = visible[:, :, rows]
        scores = query[:, :, rows].float() @ key.float().transpose(-1, -2) / math.sqrt(query.shape[-1])
        probabilities = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(probabilities.to(value.dtype) @ value)
        importance.append(row_statistic(kind, probabilities, seen, past + start).mean(1))
    return torch.cat(outputs, dim=2), torch.cat(importance, dim=1)


class MoetrainAttention(nn.Module):
    """Grouped-query attention; with `importance`, also tells how much a token matters in its attention row."""

    def __init__(self, config: MoetrainConfig, layer: int) -> None:
        super().__init__()
        width, head = config.hidden_size, config.head_dim
        self.layer_idx = layer
        self.head_dim = head
        self.importance = config.attention_statistic if config.moe_layers[layer] else None
        self.q_proj = nn.Linear(width, config.num_attention_heads * head, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * head, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * head, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * head, width, bias=False)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        if config.qk_norm is not None:
            of_all = config.qk_norm == "projection"
            self.q_norm = MoetrainRMSNorm(head * (config.num_attention_heads if of_all else 1), config.rms_norm_eps)
            self.k_norm = MoetrainRMSNorm(head * (config.num_key_value_heads if of_all else 1), config.rms_norm_eps)
        self.norm_of_heads = config.qk_norm == "head"

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], visible: Tensor, past: int, past_key_values: Cache | None
    ) -> tuple[Tensor, Tensor | None]:
        b, s, _ = x.shape
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.norm_of_heads:
            query, key = (part.unflatten(-1, (-1, self.head_dim)) for part in (query, key))
        parts = (self.q_norm(query), self.k_norm(key), value)
        query, key, value = (part.view(b, s, -1, self.head_dim).transpose(1, 2) for part in parts)
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        if past_key_values is not None:
            # transformers 4 needs the place of new tokens for a static cache; 5 keeps count itself.
            place = {"cache_position": torch.arange(past, past + s, device=x.device)}
            key, value = past_key_values.update(key, value, self.layer_idx, place)
            # A static cache returns room for tokens to come, which nobody sees yet.
            visible = F.pad(visible, (0, key.shape[2] - visible.shape[-1]))
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        importance = None
        if self.importance is None:
            output = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        else:
            output, importance = attend_with_importance(query, key, value, visible, past, self.importance)
        return self.o_proj(output.transpose(1, 2).flatten(2)), importance


# --- mixture of experts ---------------------------------------------------------------------------------------------


class MoetrainRouter(nn.Module):
    """Which experts a token goes to, and how much each weighs; all in fp32."""

    def __init__(self, config: MoetrainConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        if config.router_type == "expert_bias":
            self.register_buffer("bias", torch.zeros(config.num_experts, dtype=torch.float32))
        if config.router_type == "da_moe" and config.importance == "predicted":
            self.predictor = nn.Parameter(torch.empty(config.hidden_size))
        if config.has_thresholds:
            buckets, number = config.position_buckets, config.max_k - config.min_k
            self.register_buffer("thresholds", torch.zeros(buckets, number, dtype=torch.float32))
            # Where pretraining goes on from (`moetrain convert from-hf`). Nothing here reads these.
            state = {"quartiles": (buckets, 2), "offsets": (buckets, number), "visits": (buckets,), "threshold": ()}
            for name, shape in state.items():
                self.register_buffer(name, torch.zeros(shape, dtype=torch.float32))

    def forward(self, x: Tensor, importance: Tensor | None, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, d], importance [T] or None, positions [T] -> gates fp32 [T, E] (0 where not selected), selected bool
        [T, E], probabilities fp32 [T, E]."""
        scores = self._scores(F.linear(x.float(), self.weight.float()))
        experts = self._preference(scores).topk(self.config.top_experts, dim=-1).indices
        ranks = torch.arange(experts.shape[-1], device=x.device)
        kept = ranks < self._budget(x, importance, positions)[:, None]
        best = scores.gather(-1, experts) * kept
        if self.config.router_gates == "renormalized":
            best = shares(best)
        if self.config.router_type != "da_moe":
            best = best * self.config.router_scaling_factor
        gates = torch.zeros_like(scores).scatter(-1, experts, best)
        selected = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, experts, kept)
        return gates, selected, scores if self._is_softmax else shares(scores)

    @property
    def _is_softmax(self) -> bool:
        return self.config.router_type == "da_moe" or self.config.router_scores == "softmax"

    def _scores(self, logits: Tensor) -> Tensor:
        if self._is_softmax:
            return logits.softmax(-1)
        # The sigmoid as a softmax of (logit, 0): torch.sigmoid computes the last few elements of a tensor by another
        # formula, so that a token's last bits would depend on the size of the batch.
        return torch.stack((logits, torch.zeros_like(logits)), dim=-1).softmax(-1)[..., 0]

    def _preference(self, scores: Tensor) -> Tensor:
        """What experts are chosen by: -inf outside the token's best groups."""
        config = self.config
        order = scores + self.bias if config.router_type == "expert_bias" else scores
        if config.router_type == "da_moe" or config.chosen_groups == config.expert_groups:
            return order
        grouped = order.unflatten(-1, (config.expert_groups, -1))
        best = grouped.topk(min(grouped.shape[-1], 2 if config.group_score == "top2_sum" else 1), dim=-1).values
        groups = best.sum(-1).topk(config.chosen_groups, dim=-1).indices
        allowed = torch.zeros(grouped.shape[:-1], dtype=torch.bool, device=order.device).scatter(-1, groups, True)
        return grouped.masked_fill(~allowed[..., None], -torch.inf).flatten(-2)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Moves of the module (`.to`, `.half`) take controllers along; rounded ones would choose otherwise."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, kept in before.items():
            if getattr(self, name).dtype != kept.dtype:
                setattr(self, name, kept.to(getattr(self, name).device))
        return self

    def _budget(self, x: Tensor, importance: Tensor | None, positions: Tensor) -> Tensor:
        """How many experts each token gets, [T]."""
        config = self.config
        if config.router_type != "da_moe":
            return torch.full(x.shape[:1], config.num_experts_per_tok, device=x.device)
        if config.importance == "predicted":
            importance = (x.float() * self.predictor.float()).sum(-1).sigmoid()
        if config.budget == "paper":
            return (importance * config.num_experts).ceil().clamp(config.min_k, config.max_k)
        if not config.has_thresholds:
            return torch.full(x.shape[:1], config.max_k, device=x.device)
        starts = torch.tensor([2**b - 1 for b in range(1, config.position_buckets)], device=x.device)
        bucket = torch.bucketize(positions, starts, right=True)
        # Thresholds are log-odds of an importance.
        if config.importance_direction == "high":
            above = importance[:, None] >= self.thresholds.sigmoid()[bucket]
        else:
            above = importance[:, None] <= (-self.thresholds).sigmoid()[bucket]
        number = config.min_k + above.sum(-1)
        return number if config.first_k is None else torch.where(positions == 0, config.first_k, number)


def shares(scores: Tensor) -> Tensor:
    """Scores divided by their sum; 0 where all have vanished."""
    return scores / scores.sum(-1, keepdim=True).clamp(min=1e-20)


class MoetrainMadeMatrix(nn.Linear):
    """The code of an expert -> a matrix of that expert, and its product with tokens."""

    def __init__(self, hidden: int, rows: int, columns: int) -> None:
        super().__init__(hidden, rows * columns)
        self.rows, self.columns = rows, columns

    def forward(self, codes: Tensor, x: Tensor) -> Tensor:
        """x [t, columns] -> [t, rows], by the matrix of one code [h], or by that of each token's, [t, h].

        In the second case no matrix is made: it is linear in the code, so x meets these weights first and the code
        afterwards, or where there are more rows than columns their outer product does.
        """
        if codes.dim() == 1:
            return F.linear(x, super().forward(codes).view(self.rows, self.columns))
        from_bias = F.linear(x, self.bias.view(self.rows, self.columns))
        if self.rows < self.columns:
            met = torch.einsum("tc,rch->trh", x, self.weight.view(self.rows, self.columns, -1))
            return torch.einsum("trh,th->tr", met, codes) + from_bias
        met = (x[:, :, None] * codes[:, None, :]).flatten(1)
        return F.linear(met, self.weight.view(self.rows, -1)) + from_bias


class MoetrainHyperNetwork(nn.Module):
    """Makes the weights of a small expert from a condition, for `layers` layers from `first` on (HyperMoE, arXiv
    2402.12656)."""

    def __init__(self, config: MoetrainConfig, first: int, layers: int) -> None:
        super().__init__()
        sizes, width = config.hyper, config.hidden_size
        hidden, bottleneck, place = sizes["hidden"], sizes["bottleneck"], sizes["layer_embedding"]
        self.first = first
        self.layer_embedding = nn.Parameter(torch.empty(layers, place)) if place else None
        self.input = nn.Linear(sizes["condition"] + place, hidden)
        self.down = MoetrainMadeMatrix(hidden, bottleneck, width)
        self.down_bias = nn.Linear(hidden, bottleneck)
        self.up = MoetrainMadeMatrix(hidden, width, bottleneck)
        self.up_bias = nn.Linear(hidden, width)

    def forward(self, condition: Tensor, layer: int, x: Tensor, counts: list[int] | None) -> Tensor:
        """x [t, d] -> [t, d]. `condition` [sets, c] has that of the first counts[0] tokens, then that of the next
        counts[1] and so on; without counts one for each token."""
        if self.layer_embedding is not None:
            place = self.layer_embedding[layer - self.first].expand(condition.shape[0], -1)
            condition = torch.cat((condition, place), dim=-1)
        codes = F.relu(self.input(condition))
        if counts is None:
            return self.expert(codes, x)
        return torch.cat([self.expert(code, part) for code, part in zip(codes, x.split(counts), strict=True)])

    def expert(self, codes: Tensor, x: Tensor) -> Tensor:
        """The expert that a code [h] stands for, on tokens [t, d]; or of codes [t, h], each on its token."""
        return self.up(codes, F.relu(self.down(codes, x) + self.down_bias(codes))) + self.up_bias(codes)


class MoetrainSelection(nn.Module):
    """Weights over experts -> the condition of a hypernetwork; or one learned condition for all."""

    def __init__(self, config: MoetrainConfig) -> None:
        super().__init__()
        sizes = config.hyper
        if sizes["condition_on"] == "constant":
            self.constant = nn.Parameter(torch.empty(sizes["condition"]))
            return
        self.expert_embedding = nn.Parameter(torch.empty(config.num_experts, sizes["expert_embedding"]))
        self.process_in = nn.Linear(sizes["expert_embedding"], sizes["process"])
        self.process_out = nn.Linear(sizes["process"], sizes["condition"])

    def forward(self, weights: Tensor) -> Tensor:
        """[sets, E] -> [sets, c]."""
        if hasattr(self, "constant"):
            return self.constant.expand(weights.shape[0], -1)
        total = weights.to(self.expert_embedding.dtype) @ self.expert_embedding
        return self.process_out(F.relu(self.process_in(total)))


Shared = tuple[Callable[..., Tensor] | None, Callable[..., Tensor] | None]
"""The hypernetwork and the selection that a layer of HyperMoE has from the model and not of its own."""


class MoetrainHyper(nn.Module):
    """A layer's generated expert; or, `static`, an ordinary branch."""

    def __init__(self, config: MoetrainConfig, layer: int) -> None:
        super().__init__()
        self.layer_idx, self.choices = layer, config.hyper
        if config.hyper["condition_on"] == "static":
            self.down = nn.Linear(config.hidden_size, config.hyper["bottleneck"])
            self.up = nn.Linear(config.hyper["bottleneck"], config.hidden_size)
            return
        if config.hyper["sharing"] == "layer":
            self.network = MoetrainHyperNetwork(config, layer, 1)
        if config.hyper["embeddings"] == "layer":
            self.selection = MoetrainSelection(config)

    def forward(self, x: Tensor, selected: Tensor, probabilities: Tensor, shared: Shared) -> Tensor:
        """x [T, d], selected bool [T, E], probabilities fp32 [T, E] -> [T, d]."""
        if self.choices["condition_on"] == "static":
            output = self.up(F.relu(self.down(x)))
        else:
            output = self.generated(x, selected, probabilities, shared)
        if self.choices["coefficient"] == "selected_probability":
            output = ((probabilities * selected).sum(-1, keepdim=True) * output.float()).to(output.dtype)
        return output

    def generated(self, x: Tensor, selected: Tensor, probabilities: Tensor, shared: Shared) -> Tensor:
        """Weights are made once per distinct selected set; not at all where every token has a condition of its own."""
        network = shared[0] if shared[0] is not None else self.network
        selection = shared[1] if shared[1] is not None else self.selection

        def expert(weights: Tensor, x: Tensor, counts: list[int] | None) -> Tensor:
            return network(selection(weights), self.layer_idx, x, counts).to(x.device)

        if self.choices["condition_on"] == "constant":
            return expert(selected[:1], x, [len(x)])
        if self.choices["aggregation"] == "prob":
            mass = probabilities.detach() * self.aggregated(selected)
            weights = mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)
            return expert(weights, x, None)
        sets, set_of_token = selected.unique(dim=0, return_inverse=True)
        weights = self.aggregated(sets).float()
        if self.choices["aggregation"] == "mean":
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)
        order = set_of_token.argsort(stable=True)
        counts = set_of_token.bincount(minlength=len(sets)).tolist()
        return torch.empty_like(x).index_copy(0, order, expert(weights, x[order], counts))

    def aggregated(self, selected: Tensor) -> Tensor:
        """Whose embeddings make the condition."""
        return selected if self.choices["condition_on"] == "selected" else ~selected


class MoetrainMoE(nn.Module):
    """Selected experts, weighted, plus the generated expert if the model is a HyperMoE, plus a shared one if it has
    one."""

    def __init__(self, config: MoetrainConfig, layer: int) -> None:
        super().__init__()
        self.gate = MoetrainRouter(config)
        self.experts = nn.ModuleList(
            MoetrainMLP(config.hidden_size, config.moe_intermediate_size) for _ in range(config.num_experts)
        )
        if config.shared_expert_intermediate_size is not None:
            self.shared_experts = MoetrainMLP(config.hidden_size, config.shared_expert_intermediate_size)
        if config.hyper is not None:
            self.hyper = MoetrainHyper(config, layer)

    def forward(self, x: Tensor, importance: Tensor | None, positions: Tensor, shared: Shared) -> Tensor:
        """x [b, s, d], importance [b, s] or None, positions [b, s] -> [b, s, d]."""
        tokens = x.flatten(0, 1)
        gates, selected, probabilities = self.gate(
            tokens, None if importance is None else importance.flatten(), positions.flatten()
        )
        output = torch.zeros_like(tokens, dtype=torch.float32)
        for number, expert in enumerate(self.experts):
            rows = selected[:, number].nonzero().squeeze(-1)
            if len(rows):
                output.index_add_(0, rows, gates[rows, number, None] * expert(tokens[rows]).float())
        output = output.to(x.dtype)
        if hasattr(self, "hyper"):
            output = output + self.hyper(tokens, selected, probabilities, shared)
        if hasattr(self, "shared_experts"):
            output = output + self.shared_experts(tokens)
        return output.view_as(x)


# --- model ----------------------------------------------------------------------------------------------------------


class MoetrainDecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then + MLP(norm(x))."""

    def __init__(self, config: MoetrainConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = MoetrainRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MoetrainAttention(config, layer)
        self.post_attention_layernorm = MoetrainRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.sparse = bool(config.moe_layers[layer])
        self.mlp = (
            MoetrainMoE(config, layer) if self.sparse else MoetrainMLP(config.hidden_size, config.intermediate_size)
        )

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        visible: Tensor,
        past: int,
        shared: Shared,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        attended, importance = self.self_attn(self.input_layernorm(x), rotary, visible, past, past_key_values)
        x = x + attended
        normed = self.post_attention_layernorm(x)
        if not self.sparse:
            return x + self.mlp(normed)
        # A token sees itself and what came before it, padding left out.
        positions = (visible.sum(-1)[:, 0] - 1).expand(x.shape[:2])
        return x + self.mlp(normed, importance, positions, shared)


class MoetrainPreTrainedModel(PreTrainedModel):
    config_class = MoetrainConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["MoetrainDecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, MoetrainRouter):
            nn.init.normal_(module.weight, std=std)
            if hasattr(module, "predictor"):
                nn.init.normal_(module.predictor, std=std)
            for buffer in module.buffers(recurse=False):
                nn.init.zeros_(buffer)
        elif isinstance(module, MoetrainSelection):
            nn.init.normal_(module.constant if hasattr(module, "constant") else module.expert_embedding)
        elif isinstance(module, MoetrainHyperNetwork) and module.layer_embedding is not None:
            nn.init.normal_(module.layer_embedding)


class MoetrainModel(MoetrainPreTrainedModel):
    """Token ids to final hidden states."""

    def __init__(self, config: MoetrainConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MoetrainDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = MoetrainRMSNorm(config.hidden_size, config.rms_norm_eps)
        self._add_shared_parts_of_hypermoe()
        self.gradient_checkpointing = False
        self.post_init()

    def _add_shared_parts_of_hypermoe(self) -> None:
        config, choices, layers = self.config, self.config.hyper, self.config.num_hidden_layers
        if choices is None or choices["condition_on"] == "static":
            return
        if choices["sharing"] == "model":
            self.hypernetwork = MoetrainHyperNetwork(config, 0, layers)
        elif choices["sharing"] == "stage":
            size = layers // choices["stages"]
            self.hypernetworks = nn.ModuleList(
                MoetrainHyperNetwork(config, first, size) for first in range(0, layers, size)
            )
        if choices["embeddings"] == "model":
            self.selection_embedding = MoetrainSelection(config)

    def _shared(self, layer: int) -> Shared:
        """What this layer does not have of its own. Not as modules: accelerate moves every argument that has a `to`
        to the layer's device, and these may lie elsewhere."""
        network = getattr(self, "hypernetwork", None)
        if hasattr(self, "hypernetworks"):
            network = self.hypernetworks[layer * len(self.hypernetworks) // self.config.num_hidden_layers]
        selection = getattr(self, "selection_embedding", None)
        return None if network is None else partial(network), None if selection is None else partial(selection)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError("output_attentions is not supported: attention runs without storing its probabilities")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        batch, queries, _ = x.shape
        past = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        if position_ids is None:
            position_ids = default_positions(attention_mask, queries, past, x.device)
        rotary = rotary_tables(position_ids, self.config.head_dim, self.config.rope_theta, x.dtype)
        visible = visible_keys(attention_mask, batch, queries, past, x.device)
        states = []
        for number, layer in enumerate(self.layers):
            if output_hidden_states:
                states.append(x)
            x = layer(x, rotary, visible, past, self._shared(number), past_key_values=past_key_values)
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*states, x) if output_hidden_states else None,
        )


def default_positions(attention_mask: Tensor | None, queries: int, past: int, device: torch.device) -> Tensor:
    """Positions of the new tokens, counted from the first one that is not padding; [b or 1, s]."""
    if attention_mask is None or attention_mask.dim() == 4:
        return torch.arange(past, past + queries, device=device)[None]
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -queries:]


class MoetrainForCausalLM(MoetrainPreTrainedModel, GenerationMixin):
    """The decoder with its language-model head."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MoetrainConfig) -> None:
        super().__init__(config)
        self.model = MoetrainModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits [b, s, V] in the model's dtype; with `labels` [b, s] (-100: ignore) also their shifted cross-entropy.

        `kwargs` go to the loss function (`num_items_in_batch` of the Trainer).
        """
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            output_attentions,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return result if as_dict else result.to_tuple()


__all__ = ["MoetrainForCausalLM", "MoetrainModel", "MoetrainPreTrainedModel"]
