"""Prints how fast the kernels are; asserts nothing, for the GPU may be shared. Run with ``-s``.

TFLOP/s count multiply-adds of the products; ``torch`` is its own grouped product. Medians of alternating runs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moetrain import ops

DEVICE = "cuda"
TOKENS, SLOTS, HIDDEN = 16384, 2, 4096
SHAPES = {"many_small_experts": (64, 1408), "few_large_experts": (8, 14336)}
by_shape = pytest.mark.parametrize("shape", SHAPES)

_ops = torch.ops.moetrain


def alternate(calls: dict[str, Callable[[], object]], rounds: int = 7) -> dict[str, float]:
    """Milliseconds of each call: the median over rounds in which each runs once."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 2):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            if round_ >= 2:  # the first ones warm up
                times[name].append(start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def report(title: str, milliseconds: dict[str, float], flops: float = 0.0) -> None:
    print(f"\n  {title}")
    for name, value in milliseconds.items():
        rate = f"{flops / value / 1e9:8.1f} TFLOP/s" if flops else ""
        print(f"    {name:24s} {value:9.3f} ms {rate}")


def bf16(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).mul_(shape[-1] ** -0.5)


def routing(experts: int) -> ops.PermutePlan:
    torch.manual_seed(0)
    ids = torch.rand(TOKENS, experts, device=DEVICE).topk(SLOTS).indices
    return ops.plan_permutation(ids, experts)


def with_library(name: str, call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> Callable[[], object]:
    def run() -> object:
        monkeypatch.setenv("MOETRAIN_CUDA_GEMM", name)
        return call()

    return run


@by_shape
def test_products(shape, monkeypatch):
    experts, width = SHAPES[shape]
    counts = routing(experts).tokens_per_expert_E
    rows = TOKENS * SLOTS
    x, w, grad = bf16(rows, HIDDEN), bf16(experts, 2 * width, HIDDEN), bf16(rows, 2 * width)
    kept = torch.zeros(w.shape, device=DEVICE)
    products = {
        "fprop": lambda: _ops.grouped_gemm(x, w, counts),
        "dgrad": lambda: _ops.grouped_gemm_dgrad(grad, w, counts),
        "wgrad": lambda: _ops.grouped_gemm_wgrad(grad, x, counts),
    }
    for name, product in products.items():
        both = {library: with_library(library, product, monkeypatch) for library in ("own", "torch")}
        report(f"{shape} {name}", alternate(both), 2.0 * rows * HIDDEN * 2 * width)
    into = {"own": lambda: _ops.grouped_gemm_wgrad_out(grad, x, counts, kept, True)}
    report(f"{shape} wgrad added to float32", alternate(into), 2.0 * rows * HIDDEN * 2 * width)


@by_shape
def test_expert_layer(shape, monkeypatch):
    experts, width = SHAPES[shape]
    plan = routing(experts)
    x, fc1, fc2 = bf16(TOKENS, HIDDEN), bf16(experts, 2 * width, HIDDEN), bf16(experts, HIDDEN, width)
    weights, grad = torch.rand(TOKENS, SLOTS, device=DEVICE), bf16(TOKENS, HIDDEN)
    arguments = (x, weights, fc1, fc2, plan.row_token_R, plan.slot_row_TK, plan.tokens_per_expert_E)
    _, z = _ops.expert_layer_forward(*arguments, True)

    def composed() -> Tensor:
        gate, up = ops.grouped_gemm(ops.permute(x, plan), fc1, plan.tokens_per_expert_E).chunk(2, dim=-1)
        return ops.combine(ops.grouped_gemm(F.silu(gate) * up, fc2, plan.tokens_per_expert_E), weights, plan)

    directions: dict[str, tuple[Callable[[], object], int]] = {
        "forward": (lambda: _ops.expert_layer_forward(*arguments, True), 1),
        "backward": (lambda: _ops.expert_layer_backward(grad, *arguments, z, [True] * 4), 2),
    }
    flops = 2.0 * TOKENS * SLOTS * HIDDEN * 3 * width
    for name, (call, products) in directions.items():
        calls = {library: with_library(library, call, monkeypatch) for library in ("own", "torch")}
        if name == "forward":
            calls["composed, torch"] = with_library("torch", composed, monkeypatch)
        report(f"{shape} expert layer {name}", alternate(calls), products * flops)


def test_importance():
    seq, heads, groups, width = 8192, 32, 8, 128
    q, k = bf16(seq, 1, heads, width), bf16(seq, 1, groups, width)
    lse = torch.full((1, heads, seq), 9.0, device=DEVICE)
    q_BHSd = q.permute(1, 2, 0, 3).contiguous()
    k_BHSd = k.repeat_interleave(heads // groups, dim=2).permute(1, 2, 0, 3).contiguous()
    calls: dict[str, Callable[[], object]] = {
        "SDPA alone": lambda: F.scaled_dot_product_attention(q_BHSd, k_BHSd, k_BHSd, is_causal=True)
    }
    for measure in ("self_weight", "row_max", "row_entropy", "col_max", "col_sum"):
        calls[measure] = lambda measure=measure: _ops.importance_from_lse(q, k, lse, measure, True, 0.1, None)
    report(f"importance, {seq} tokens, {heads} heads, causal", alternate(calls))


def test_row_movement():
    plan = routing(64)
    x, rows = bf16(TOKENS, HIDDEN), bf16(TOKENS * SLOTS, HIDDEN)
    weights = torch.rand(TOKENS, SLOTS, device=DEVICE)
    ids = torch.randint(0, 64, (TOKENS, SLOTS), device=DEVICE)
    report(
        f"rows, {TOKENS} tokens, {SLOTS} slots, {HIDDEN} wide",
        alternate(
            {
                "plan": lambda: ops.plan_permutation(ids, 64),
                "permute": lambda: ops.permute(x, plan),
                "index_select": lambda: x.index_select(0, plan.row_token_R),
                "combine": lambda: ops.combine(rows, weights, plan),
            }
        ),
    )
