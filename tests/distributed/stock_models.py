"""Tiny random models of stock architectures, made by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.08,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
ROPE = {"rope_type": "default", "rope_theta": 500.0}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-wide-heads": ("llama", {"head_dim": 12, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 12}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "mixtral-wide-heads": ("mixtral", {"num_local_experts": 4, "head_dim": 12, "num_experts_per_tok": 3}),
    "qwen3_moe": ("qwen3_moe", MOE | {"num_experts": 4, "norm_topk_prob": True, "head_dim": 12}),
    "qwen3_moe-dense-layers": ("qwen3_moe", MOE | {"num_experts": 4, "decoder_sparse_step": 2, "mlp_only_layers": [0]}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "dots1": (
        "dots1",
        MOE
        | {"n_routed_experts": 8, "n_shared_experts": 2, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1}
        | {"norm_topk_prob": True, "routed_scaling_factor": 2.5},
    ),
}


LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 18, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 14}
DEEPSEEK = (
    MOE | LATENT | {"n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1, "rms_norm_eps": 1e-4}
)
# Of positions up to 64: some pairs as fast as before, some slower, some between.
YARN = ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0}
KINDS |= {
    "deepseek_v3": ("deepseek_v3", DEEPSEEK | {"q_lora_rank": 20, "n_group": 4, "topk_group": 2}),
    "deepseek_v3-yarn": (
        "deepseek_v3",
        DEEPSEEK
        | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "rope_interleave": False, "norm_topk_prob": False}
        | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}},
    ),
    "deepseek_v2": (
        "deepseek_v2",
        DEEPSEEK
        | {"q_lora_rank": 20, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
        | {"routed_scaling_factor": 1.5, "rope_parameters": YARN},
    ),
    "deepseek_v2-greedy": ("deepseek_v2", DEEPSEEK | {"q_lora_rank": None}),
}


def stock_model(kind: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A model with weights that all matter: biases, norms and choices of experts are no defaults."""
    name, choices = KINDS[kind]
    config = AutoConfig.for_model(name, **(SIZES | {"rope_parameters": dict(ROPE)} | choices | changes))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for label, tensor in (*model.named_parameters(), *model.named_buffers()):
            if label.endswith("norm.weight"):
                tensor.copy_(1 + 0.3 * torch.randn_like(tensor))
            elif label.endswith((".bias", "e_score_correction_bias")):
                tensor.copy_(0.3 * torch.randn_like(tensor))
            elif "gate.weight" in label:
                tensor.copy_(torch.randn_like(tensor))
    return model


def save_stock(kind: str, folder: Path, **options: Any) -> nn.Module:
    """The model, saved as transformers does."""
    model = stock_model(kind)
    model.save_pretrained(folder, **options)
    return model
