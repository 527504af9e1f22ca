"""The encoder against itself written once more from the equations, in NumPy, float64, one sequence and one token at a
time: losses, routing, and gradients by central differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from encoders import batch_of, classifier_config, encoder_config
from parity import layout_of

from moetrain.config.da_moe import DAMoERouterConfig
from moetrain.config.schema import RunConfig
from moetrain.model.build import build_chunks
from moetrain.model.parameters import describe_parameters, initialize, named_parameters
from moetrain.moe.layer import MoELayer
from moetrain.runtime.groups import create_groups
from moetrain.testing import run_distributed
from moetrain.train.step import TrainStep

Array = np.ndarray
Weights = dict[str, Array]


# --- the equations --------------------------------------------------------------------------------------------------


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def norm(x: Array, weight: Array) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight


def rotated(x: Array) -> Array:
    """Rotary positions of one head, [S, hd]."""
    half = x.shape[1] // 2
    angle = np.outer(np.arange(len(x)), 10000.0 ** (-np.arange(half) / half))
    a, b = x[:, :half], x[:, half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], 1)


class Truth:
    """The model of `encoders.py`. `decisions` collects importance and number of experts, layer by layer."""

    def __init__(self, config: RunConfig, weights: Weights) -> None:
        self.model, self.w = config.model, weights
        self.decisions: list[tuple[Array, list[int]]] = []

    def states(self, tokens: Array) -> tuple[Array, float]:
        """Final hidden states [n, d] of the n real tokens of a sequence, and its auxiliary losses."""
        x, auxiliary = self.w["embedding.word_embeddings.weight"][tokens], 0.0
        for i in range(self.model.num_layers):
            at = f"decoder.layers.{i}"
            attended, importance = self.attention(norm(x, self.w[f"{at}.input_layernorm.weight"]), at)
            x = x + attended
            y = norm(x, self.w[f"{at}.pre_mlp_layernorm.weight"])
            if self.model.is_moe_layer(i):
                out, losses = self.experts(y, importance, f"{at}.mlp", i)
                auxiliary += losses
            else:
                out = self.swiglu(y, self.w[f"{at}.mlp.linear_fc1.weight"], self.w[f"{at}.mlp.linear_fc2.weight"])
            x = x + out
        return norm(x, self.w["decoder.final_layernorm.weight"]), auxiliary

    def attention(self, x: Array, at: str) -> tuple[Array, Array]:
        m = self.model
        per_group, hd = m.num_attention_heads // m.kv_heads, m.head_dim
        qkv = x @ self.w[f"{at}.self_attention.linear_qkv.weight"].T
        heads, importance = [], np.zeros(len(x))
        for g in range(m.kv_heads):
            block = qkv[:, g * (per_group + 2) * hd : (g + 1) * (per_group + 2) * hd]
            parts = [block[:, j * hd : (j + 1) * hd] for j in range(per_group + 2)]
            key, value = rotated(parts[-2]), parts[-1]
            for query in parts[:-2]:
                a = softmax(rotated(query) @ key.T / np.sqrt(hd))
                heads.append(a @ value)
                importance += {"col_max": a.max(0), "col_sum": a.sum(0), "row_max": a.max(1)}[self.importance]
        return (
            np.concatenate(heads, 1) @ self.w[f"{at}.self_attention.linear_proj.weight"].T,
            importance / m.num_attention_heads,
        )

    @property
    def router(self) -> DAMoERouterConfig:
        assert self.model.moe is not None and isinstance(self.model.moe.router, DAMoERouterConfig)
        return self.model.moe.router

    @property
    def importance(self) -> str:
        return self.router.importance

    def swiglu(self, x: Array, fc1: Array, fc2: Array) -> Array:
        gate, up = np.split(x @ fc1.T, 2, axis=-1)
        return (silu(gate) * up) @ fc2.T

    def experts(self, x: Array, importance: Array, at: str, layer: int) -> tuple[Array, float]:
        moe = self.model.moe
        assert moe is not None
        logits = x @ self.w[f"{at}.router.weight"].T
        probs = softmax(logits)
        out, counts, ks = np.zeros_like(x), np.zeros(moe.num_experts), []
        for t in range(len(x)):
            k = self.count(float(importance[t]))
            chosen = np.argsort(-probs[t], kind="stable")[:k]
            for e in chosen:
                fc1, fc2 = self.w[f"{at}.experts.fc1"][e], self.w[f"{at}.experts.fc2"][e]
                out[t] += probs[t, e] * self.swiglu(x[t], fc1, fc2)
            counts[chosen] += 1
            out[t] += self.generated(x[t], set(range(moe.num_experts)) - set(chosen.tolist()), at, layer)
            ks.append(k)
        self.decisions.append((importance, ks))
        balance = moe.num_experts * float(counts / counts.sum() @ probs.mean(0))
        z_loss = float((np.log(np.exp(logits).sum(-1)) ** 2).mean())
        return out, moe.aux_loss_coeff * balance + moe.z_loss_coeff * z_loss

    def count(self, importance: float) -> int:
        """The paper's ceil(I E); or, before the first step, 1 and one more for each k / alpha that the rank of the
        importance reaches. With alpha = 2 mean_k - 1 the mean over ranks is mean_k: 1 + (1 - 1 / 3) + (1 - 2 / 3) = 2.
        Ranks are at first those of a standard logistic distribution of the log-odds, for col_sum of the logarithm."""
        moe = self.model.moe
        assert moe is not None
        if self.router.budget == "paper":
            return int(np.clip(np.ceil(np.float32(importance) * np.float32(moe.num_experts)), 1, moe.max_top_k))
        assert self.router.mean_k == 2.0
        rank = importance / (1 + importance) if self.importance == "col_sum" else importance
        return 1 + sum(rank >= k / 3 for k in (1, 2))

    def generated(self, x: Array, unselected: set[int], at: str, layer: int) -> Array:
        table = self.w[f"{at}.hyper.expert_embedding"]
        v = table[sorted(unselected)].mean(0) if unselected else np.zeros(table.shape[1])
        s = self.linear(np.maximum(self.linear(v, f"{at}.hyper.process_in"), 0), f"{at}.hyper.process_out")
        code = np.concatenate([s, self.w["hypernetwork.layer_embedding"][layer]])
        e = np.maximum(self.linear(code, "hypernetwork.input"), 0)
        down = self.linear(e, "hypernetwork.down").reshape(-1, len(x))
        up = self.linear(e, "hypernetwork.up").reshape(len(x), -1)
        hidden = np.maximum(down @ x + self.linear(e, "hypernetwork.down_bias"), 0)
        return up @ hidden + self.linear(e, "hypernetwork.up_bias")

    def linear(self, x: Array, name: str) -> Array:
        return self.w[f"{name}.weight"] @ x + self.w[f"{name}.bias"]

    def loss(self, batches: list[dict[str, Array]]) -> tuple[float, float]:
        """(task loss, task loss + auxiliary losses) of a global batch."""
        cost = total_weight = auxiliary = 0.0
        for batch in batches:
            length = int(batch["valid"].sum()) if "valid" in batch else len(batch["tokens"])
            states, extra = self.states(batch["tokens"][:length])
            auxiliary += extra / len(batches)
            if self.model.head is None:
                logp = np.log(softmax(states @ self.w["output_layer.weight"].T))
                costs = -logp[np.arange(length), batch["labels"]]
                cost, total_weight = cost + costs @ batch["weights"], total_weight + batch["weights"].sum()
            else:
                logp = np.log(softmax(self.linear(states.mean(0), "head")))
                cost, total_weight = cost - logp[batch["labels"]] * batch["weights"], total_weight + batch["weights"]
        return float(cost / total_weight), float(cost / total_weight + auxiliary)


# --- ours -----------------------------------------------------------------------------------------------------------


def ours(config: RunConfig) -> dict[str, Any]:
    """Loss, gradients and routing of one global batch in a single process, with the weights and the data behind it."""
    groups = create_groups(layout_of(config), seed=1)
    chunks = build_chunks(config.model, config.parallel, groups, torch.float32, torch.device("cpu"))
    initialize(chunks, describe_parameters(chunks, groups, False), config.model, 3)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in named_parameters(chunks):
        if name.startswith("hypernetwork."):  # far from zero, or a difference would step over the kinks of its ReLU
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    decisions = []
    for module in chunks[0].modules():
        if isinstance(module, MoELayer):
            module.router.register_forward_hook(
                lambda _, inputs, decision: decisions.append(
                    (inputs[1].importance_T.numpy(), decision.num_selected_T.tolist())
                )
            )
    step = TrainStep(config, chunks, groups, None)
    chunks[0].train()
    batches = batch_of(0, config, 0, 1)
    results = step._forward_backward(batches, step._count_labels(batches), forward_only=False)
    named = dict(named_parameters(chunks))
    return {
        "loss": sum(float(r["loss"]) for r in results) / len(results),
        "weights": {k: p.detach().double().numpy() for k, p in named.items()},
        "gradients": {k: p.grad.double().numpy() for k, p in named.items() if p.grad is not None},
        "decisions": decisions,
        "batches": [{k: t[0].numpy() for k, t in vars(batch).items() if t is not None} for batch in batches],
    }


SMALL: dict[str, Any] = {"training__global_batch_size": 4}
PAPER = {"type": "da_moe", "budget": "paper"}
CASES = {
    "masked, col_max, paper": encoder_config(**SMALL, model__moe__router=PAPER | {"importance": "col_max"}),
    "masked, row_max, paper": encoder_config(**SMALL, model__moe__router=PAPER | {"importance": "row_max"}),
    "masked, col_sum": encoder_config(**SMALL, model__moe__router={"type": "da_moe", "importance": "col_sum"}),
}
WITH_GRADIENTS = {"masked, col_max": encoder_config(**SMALL), "classes of padded texts": classifier_config(**SMALL)}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_routing_are_those_of_the_equations(case: str) -> None:
    check_loss_and_routing(CASES[case], run_distributed(ours, 1, CASES[case])[0])


@pytest.mark.parametrize("case", WITH_GRADIENTS)
def test_gradients_are_the_slopes_of_the_equations(case: str) -> None:
    config = WITH_GRADIENTS[case]
    run = run_distributed(ours, 1, config)[0]
    check_loss_and_routing(config, run)
    assert run["weights"].keys() == run["gradients"].keys()
    random = np.random.default_rng(0)
    for name, gradient in run["gradients"].items():
        direction = random.standard_normal(gradient.shape)
        measured = slope(config, run["weights"], run["batches"], name, direction)
        size = np.linalg.norm(gradient)  # a random direction may be nearly at right angles to the gradient
        assert abs((gradient * direction).sum() - measured) <= 1e-4 * (abs(measured) + size), name


def check_loss_and_routing(config: RunConfig, run: dict[str, Any], equations: type[Truth] = Truth) -> None:
    truth = equations(config, run["weights"])
    assert run["loss"] == pytest.approx(truth.loss(run["batches"])[0], rel=2e-6)
    assert len(run["decisions"]) == len(truth.decisions) == 3 * len(run["batches"])
    for (mine, my_ks), (importance, ks) in zip(run["decisions"], truth.decisions, strict=True):
        np.testing.assert_allclose(mine[: len(importance)], importance, rtol=1e-4)
        assert my_ks[: len(ks)] == ks
        np.testing.assert_array_equal(mine[len(importance) :], 0.0)  # padding
    assert len({k for _, ks in truth.decisions for k in ks}) > 1


def slope(config: RunConfig, weights: Weights, batches: list[dict[str, Array]], name: str, direction: Array) -> float:
    """Central difference of the whole loss along a direction of one weight."""
    step = 1e-6
    up, down = (
        Truth(config, weights | {name: weights[name] + sign * step * direction}).loss(batches)[1] for sign in (1, -1)
    )
    return (up - down) / (2 * step)
