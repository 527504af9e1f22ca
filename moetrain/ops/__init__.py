"""Operators for mixture-of-experts layers: compiled (``csrc/``), differentiable, with a plain-torch
specification in :mod:`moetrain.ops.reference`. Depends on torch only, so other projects can use it."""

from moetrain.ops.all_to_all import PendingRows, all_to_all, start_all_to_all
from moetrain.ops.expert_layer import expert_layer
from moetrain.ops.generated_experts import generated_experts
from moetrain.ops.grouped_gemm import (
    gathered_grouped_gemm,
    grouped_gemm,
    grouped_gemm_wgrad_out,
    row_invariant_linear,
)
from moetrain.ops.importance import CAUSAL_MEASURES, NONCAUSAL_MEASURES, attention_with_importance, weights_importance
from moetrain.ops.library import ExtensionError, ExtensionInfo, extension_info
from moetrain.ops.permute import (
    PermutePlan,
    combine,
    permute,
    plan_permutation,
    reorder_by_expert,
    unpermute,
)

__all__ = [
    "CAUSAL_MEASURES",
    "NONCAUSAL_MEASURES",
    "ExtensionError",
    "ExtensionInfo",
    "PendingRows",
    "PermutePlan",
    "all_to_all",
    "attention_with_importance",
    "combine",
    "expert_layer",
    "extension_info",
    "gathered_grouped_gemm",
    "generated_experts",
    "grouped_gemm",
    "grouped_gemm_wgrad_out",
    "permute",
    "plan_permutation",
    "reorder_by_expert",
    "row_invariant_linear",
    "start_all_to_all",
    "unpermute",
    "weights_importance",
]
