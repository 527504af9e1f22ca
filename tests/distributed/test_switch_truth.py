"""Relative positions, ReLU experts and a capacity by probability once more in NumPy, float64, from the equations:
losses, routing, and gradients by central differences."""

from __future__ import annotations

from typing import Any

import numpy as np
from encoders import classifier_config
from test_encoder_truth import Array, Truth, check_loss_and_routing, ours, softmax

from moetrain.testing import run_distributed

SWITCH: dict[str, Any] = {
    "training__global_batch_size": 4,
    "model__position_embedding": "relative",
    "model__relative_buckets": 8,
    "model__relative_max_distance": 9,
    "model__activation": "relu",
    "model__kv_channels": 12,  # of four heads, in a model of width 32
    "model__moe__shared_expert_ffn_hidden_size": 10,
    "model__moe__capacity": {"tokens": 4, "order": "probability", "dropped": "input"},
}


def bucket(distance: int) -> int:
    """T5's, of 8 rows and distances below 9: 0 and 1 have rows of their own; 2 to 4 and all from 5 on share one,
    because 2 + floor(2 ln(n / 2) / ln(9 / 2)) is 3 from 2 sqrt(4.5) = 4.24 on. Later keys have the second half."""
    n = abs(distance)
    return (4 if distance > 0 else 0) + (n if n < 2 else 2 if n < 5 else 3)


class SwitchTruth(Truth):
    def attention(self, x: Array, at: str) -> tuple[Array, Array]:
        m, n = self.model, len(x)
        per_group, hd = m.num_attention_heads // m.kv_heads, m.head_dim
        qkv = (x @ self.w[f"{at}.self_attention.linear_qkv.weight"].T).reshape(n, m.kv_heads, per_group + 2, hd)
        table = self.w["relative_positions.weight"]
        rows = np.array([[bucket(j - i) for j in range(n)] for i in range(n)])
        heads, importance = [], np.zeros(n)
        for h in range(m.num_attention_heads):
            group, own = divmod(h, per_group)
            query, key, value = qkv[:, group, own], qkv[:, group, -2], qkv[:, group, -1]
            a = softmax(query @ key.T / np.sqrt(hd) + table[rows, h])
            heads.append(a @ value)
            importance += a.max(0)
        out = np.concatenate(heads, 1) @ self.w[f"{at}.self_attention.linear_proj.weight"].T
        return out, importance / m.num_attention_heads

    def swiglu(self, x: Array, fc1: Array, fc2: Array) -> Array:
        return np.maximum(x @ fc1.T, 0) @ fc2.T

    def experts(self, x: Array, importance: Array, at: str, layer: int) -> tuple[Array, float]:
        moe = self.model.moe
        assert moe is not None and moe.capacity is not None and moe.capacity.tokens is not None
        logits = x @ self.w[f"{at}.router.weight"].T
        probs, ks = softmax(logits), [self.count(float(i)) for i in importance]
        chosen = [np.argsort(-p, kind="stable")[:k].tolist() for p, k in zip(probs, ks, strict=True)]
        out = self.swiglu(x, self.w[f"{at}.shared_expert.fc1"], self.w[f"{at}.shared_expert.fc2"])
        for e in range(moe.num_experts):
            asking = sorted((t for t in range(len(x)) if e in chosen[t]), key=lambda t: -probs[t, e])
            for place, t in enumerate(asking):
                fc1, fc2 = self.w[f"{at}.experts.fc1"][e], self.w[f"{at}.experts.fc2"][e]
                out[t] += probs[t, e] * (self.swiglu(x[t], fc1, fc2) if place < moe.capacity.tokens else x[t])
                self.dropped += place >= moe.capacity.tokens
        for t, mine in enumerate(chosen):
            out[t] += self.generated(x[t], set(range(moe.num_experts)) - set(mine), at, layer)
        self.decisions.append((importance, ks))
        counts = np.bincount([e for mine in chosen for e in mine], minlength=moe.num_experts)
        balance = moe.num_experts * float(counts / counts.sum() @ probs.mean(0))
        z_loss = float((np.log(np.exp(logits).sum(-1)) ** 2).mean())
        return out, moe.aux_loss_coeff * balance + moe.z_loss_coeff * z_loss

    dropped = 0


def test_loss_routing_and_gradients_are_those_of_the_equations() -> None:
    config = classifier_config(**SWITCH)
    run = run_distributed(ours, 1, config)[0]
    weights, batches = run["weights"], run["batches"]
    check_loss_and_routing(config, run, SwitchTruth)
    truth = SwitchTruth(config, weights)
    truth.loss(batches)
    assert truth.dropped > 10
    assert weights.keys() == run["gradients"].keys()
    random = np.random.default_rng(0)
    for name, gradient in run["gradients"].items():
        direction, step = random.standard_normal(gradient.shape), 1e-8  # so short that few ReLUs turn
        up, down = (
            SwitchTruth(config, weights | {name: weights[name] + sign * step * direction}).loss(batches)[1]
            for sign in (1, -1)
        )
        measured = (up - down) / (2 * step)
        size = np.linalg.norm(gradient)
        assert abs((gradient * direction).sum() - measured) <= 1e-4 * (abs(measured) + size), name


def test_the_rows_of_the_table_are_used() -> None:
    assert {bucket(d) for d in range(-15, 16)} == set(range(8)) - {4}  # no key is later at distance 0
