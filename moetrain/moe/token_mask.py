"""Which experts a token may see, by its vocabulary id alone (MaskMoE, arXiv 2407.09816).

Legend: V vocabulary, E experts, T tokens, K slots per token.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from moetrain.config.relatives import TokenMaskConfig
from moetrain.moe.routing import RoutingDecision

_STEP = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, odd


def hidden_experts(config: TokenMaskConfig, vocab_size: int, num_experts: int, layer: int) -> Tensor:
    """bool [V, E], True = the expert is hidden from the token. Frequent tokens see `frequent_experts` experts, others
    `rare_experts`, uniformly at random. A pure function of its arguments, on every machine and in every version."""
    draw = layer if config.share == "layer" else 0
    first = np.array((config.seed * _STEP + (draw << 48)) % 2**64, dtype=np.uint64)
    keys_VE = np.arange(vocab_size * num_experts, dtype=np.uint64).reshape(vocab_size, num_experts)
    order_VE = np.argsort(_mixed(_mixed(keys_VE + first)), axis=1, kind="stable")
    visible_V1 = np.where(
        np.arange(vocab_size)[:, None] < config.frequent_ids, config.frequent_experts, config.rare_experts
    )
    hidden_VE = np.empty((vocab_size, num_experts), dtype=bool)
    np.put_along_axis(hidden_VE, order_VE, np.arange(num_experts)[None, :] >= visible_V1, axis=1)
    return torch.from_numpy(hidden_VE)


def _mixed(keys: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014): a bijection whose values look random."""
    keys = keys + np.uint64(_STEP)
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))


def without_hidden(decision: RoutingDecision, hidden_TE: Tensor) -> RoutingDecision:
    """The decision without choices of hidden experts, which a router makes where it wants more experts than a token
    may see. They have weight 0 already."""
    ids_TK = decision.expert_ids_TK
    hidden_TK = hidden_TE.gather(1, ids_TK.clamp(min=0)) & (ids_TK >= 0)
    return replace(
        decision,
        expert_ids_TK=torch.where(hidden_TK, -1, ids_TK),
        weights_TK=decision.weights_TK.masked_fill(hidden_TK, 0.0),
        num_selected_T=decision.num_selected_T - hidden_TK.sum(dim=-1),
    )
