"""What docs/concepts/relatives.md says, written once more in NumPy float64, token by token, from the equations; outputs
and gradients of our layers against it. Gradients are central differences along random directions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from parity import SINGLE, layout_of, tiny_config

from moetrain.config.size import parameter_shapes
from moetrain.model.parameters import named_parameters
from moetrain.moe.cartesian import CartesianMoE
from moetrain.moe.layer import MoELayer
from moetrain.runtime.groups import create_groups
from moetrain.testing import run_distributed
from moetrain.train.setup import build_step

E, D, S, B = 4, 32, 16, 2
BALANCE = 0.3
LAYERS = (0, 2)  # two MoE layers in a row, so that a router's state has somewhere to go

VARIANTS: dict[str, dict] = {
    "plain": {},
    "computation-free": {
        "computation_free": {"zero_experts": 1, "copy_experts": 1, "constant_experts": 2, "balance_weight": 0.4},
        "router": {"type": "top_k", "top_k": 3},
    },
    "null experts": {
        "computation_free": {"zero_experts": 3, "gates": "nonzero", "pooled_balance": True},
        "router": {"type": "top_k", "top_k": 2},
    },
    "capacity": {"capacity": {"factor": 0.75}},
    "capacity of Switch": {"capacity": {"tokens": 5}, "router": {"type": "top_k", "top_k": 1}},
    "capacity, padded": {"capacity": {"factor": 0.75, "pad": True}},
    "capacity, computation-free": {
        "computation_free": {"zero_experts": 1, "copy_experts": 2, "balance_weight": 0.5},
        "capacity": {"factor": 0.8},
    },
    "token mask": {"token_mask": {"frequent_ids": 20, "frequent_experts": 3, "rare_experts": 1}},
    "recurrent": {"router_state": {"type": "recurrent", "width": 6}},
    "gating residual": {"router_state": {"type": "gating_residual"}},
    "gating residual over all choices": {
        "router_state": {"type": "gating_residual"},
        "computation_free": {"constant_experts": 2},
    },
    "diverse sizes": {"expert_widths": [40, 8, 24, 24]},
    "cartesian": {"cartesian": {}, "shared_expert_ffn_hidden_size": 10},
    "cartesian, inner, masked, recurrent": {
        "cartesian": {"residual": "inner"},
        "token_mask": {"frequent_ids": 20, "frequent_experts": 3},
        "router_state": {"type": "recurrent", "width": 6},
    },
    "shared expert": {"shared_expert_ffn_hidden_size": 10},
}


@dataclass(frozen=True)
class Observed:
    """Two layers as we compute them."""

    parameters: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    shapes: dict[str, tuple[int, ...]]
    hidden: list[np.ndarray | None]
    inputs: list[np.ndarray]
    weights_of_loss: list[np.ndarray]
    tokens: np.ndarray
    outputs: list[np.ndarray]
    counts: list[list[int]]
    dropped: list[int]


def changes_of(variant: str) -> dict:
    base = {"router": {"type": "top_k", "top_k": 2}, "hyper": None, "z_loss_coeff": 0.0, "aux_loss_coeff": BALANCE}
    return {f"model__moe__{name}": value for name, value in {**base, **VARIANTS[variant]}.items()}


def observe_all() -> dict[str, Observed]:
    groups = create_groups(layout_of(tiny_config(SINGLE)), seed=1)
    return {variant: observe(variant, groups) for variant in VARIANTS}


def observe(variant: str, groups: Any) -> Observed:
    step = build_step(tiny_config(SINGLE, **changes_of(variant)), groups, torch.device("cpu"))
    (decoder,) = step.chunks
    names = dict(named_parameters([decoder]))
    with torch.no_grad():
        for name, parameter in names.items():  # routers that tell tokens apart
            if ".router." in name or ".memory." in name or name.startswith("router_gru"):
                parameter.mul_(4.0)
    mixtures = [m for m in decoder.modules() if isinstance(m, MoELayer) and m.layer in LAYERS]
    layers = [m for m in decoder.modules() if isinstance(m, CartesianMoE) and m.first.layer in LAYERS] or mixtures
    generator = torch.Generator().manual_seed(7)
    inputs = [torch.randn(S, B, D, generator=generator) for _ in layers]
    weights = [torch.randn(S, B, D, generator=generator) for _ in layers]
    tokens = torch.randint(0, 64, (S, B), generator=generator)
    state, outputs = None, []
    for layer, x in zip(layers, inputs, strict=True):
        output, state = layer(x, None, token_ids_SB=tokens, state_SBP=state)
        outputs.append(output)
    torch.autograd.backward(outputs, weights)
    counts = [layer.telemetry.decode(layer.telemetry.take(torch.device("cpu")), 1, False) for layer in mixtures]
    used = {name: p for name, p in names.items() if p.grad is not None}
    return Observed(
        parameters={name: p.detach().double().numpy() for name, p in used.items()},
        gradients={name: p.grad.double().numpy() for name, p in used.items() if p.grad is not None},
        shapes={name: tuple(p.shape) for name, p in names.items()},
        hidden=[None if m.hidden_VE is None else m.hidden_VE.numpy() for m in mixtures],
        inputs=[x.double().numpy() for x in inputs],
        weights_of_loss=[w.double().numpy() for w in weights],
        tokens=tokens.numpy(),
        outputs=[y.detach().double().numpy() for y in outputs],
        counts=[c.tokens_per_expert for c in counts],
        dropped=[c.dropped for c in counts],
    )


# --- the truth ------------------------------------------------------------------------------------------------------


def softmax(v: np.ndarray) -> np.ndarray:
    e = np.exp(v - v.max())
    return e / e.sum()


def sigmoid(v: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-v))


def swiglu(fc1: np.ndarray, fc2: np.ndarray, x: np.ndarray) -> np.ndarray:
    gate, up = np.split(fc1 @ x, 2)
    return fc2 @ (gate * sigmoid(gate) * up)


def gru(p: dict[str, np.ndarray], x: np.ndarray, h: np.ndarray) -> np.ndarray:
    r_x, z_x, n_x = np.split(p["router_gru.input.weight"] @ x + p["router_gru.input.bias"], 3)
    r_h, z_h, n_h = np.split(p["router_gru.state.weight"] @ h + p["router_gru.state.bias"], 3)
    r, z = sigmoid(r_x + r_h), sigmoid(z_x + z_h)
    return (1 - z) * np.tanh(n_x + r * n_h) + z * h


def computation_free_output(p: dict, at: str, free: dict, number: int, x: np.ndarray) -> np.ndarray:
    zero, copy = free.get("zero_experts", 0), free.get("copy_experts", 0)
    if number < zero:
        return np.zeros(D)
    if number < zero + copy:
        return x
    j = number - zero - copy
    a1, a2 = softmax(p[f"{at}.computation_free.mix"][j] @ x)
    return a1 * x + a2 * p[f"{at}.computation_free.vector"][j]


def expert_weights(p: dict, at: str, moe: dict, expert: int) -> tuple[np.ndarray, np.ndarray]:
    fc1, fc2 = p[f"{at}.experts.fc1"], p[f"{at}.experts.fc2"]
    if "expert_widths" not in moe:
        return fc1[expert], fc2[expert]
    first, stop = sum(moe["expert_widths"][:expert]), sum(moe["expert_widths"][: expert + 1])
    return fc1[2 * first : 2 * stop], fc2[first:stop].T


def capacity_of(moe: dict, k: int, choice: int, free_total: int) -> float:
    if "capacity" not in moe:
        return math.inf
    if "tokens" in moe["capacity"]:
        return moe["capacity"]["tokens"]
    tau = moe.get("computation_free", {}).get("balance_weight", 1.0)
    share = (tau if choice < E else 1.0) / (tau * E + free_total)  # MoE++ Eq. 8, times k
    return math.ceil(moe["capacity"]["factor"] * S * k * share - 1e-9)


@dataclass
class Mixture:
    """One mixture on one batch: its output and the balance loss, with the counts of choices and of dropped ones."""

    output: np.ndarray
    balance: float
    counts: list[int]
    dropped: int


def mixture(
    moe: dict, p: dict, at: str, x: np.ndarray, tokens: np.ndarray, hidden: np.ndarray | None, state: np.ndarray
) -> Mixture:
    """Overwrites `state` by the next one."""
    free = moe.get("computation_free", {})
    free_total = sum(free.get(f"{kind}_experts", 0) for kind in ("zero", "copy", "constant"))
    n, k = E + free_total, moe.get("router", {"top_k": 2})["top_k"]
    memory, router = moe.get("router_state", {}).get("type"), p[f"{at}.router.weight"]
    y, counts, dropped, balance = np.zeros_like(x), np.zeros(n, dtype=int), 0, 0.0
    for b in range(B):
        taken, mean_probs, chosen = np.zeros(n, dtype=int), np.zeros(n), np.zeros(n)
        for s in range(S):
            token = x[s, b]
            if memory == "recurrent":
                state[s, b] = gru(p, p[f"{at}.memory.project.weight"] @ token, state[s, b])
                logits = router @ state[s, b]
            elif memory == "gating_residual":
                logits = router[:, :D] @ token + router[:, D:] @ state[s, b]
                state[s, b] = logits
            else:
                logits = router @ token
            if hidden is not None:
                logits = np.where(hidden[tokens[s, b]], -np.inf, logits)
            probs = softmax(logits)
            choices = [c for c in np.argsort(-probs)[:k] if probs[c] > 0]
            gates = gates_of(choices, probs, free)
            for c in choices:
                chosen[c] += 1
                taken[c] += 1
                if taken[c] > capacity_of(moe, k, c, free_total):
                    dropped += 1
                elif c < E:
                    y[s, b] += gates[c] * swiglu(*expert_weights(p, at, moe, c), token)
                else:
                    y[s, b] += gates[c] * computation_free_output(p, at, free, c - E, token)
            if "shared_expert_ffn_hidden_size" in moe:
                y[s, b] += swiglu(p[f"{at}.shared_expert.fc1"], p[f"{at}.shared_expert.fc2"], token)
            mean_probs += probs / S
        counts += chosen.astype(int)
        share = seen_share(chosen, free.get("pooled_balance", False))
        eta = np.where(np.arange(n) < E, 1.0, free.get("balance_weight", 1.0))
        balance += n * float((eta * share * mean_probs).sum()) / B
    return Mixture(y, balance, counts.tolist(), dropped)


def two_layers(variant: str, seen: Observed, p: dict[str, np.ndarray]) -> tuple[list, float, list, list]:
    """Outputs, the loss that was differentiated, and the counts of choices and of dropped ones."""
    moe = VARIANTS[variant]
    choices = E + sum(v for name, v in moe.get("computation_free", {}).items() if name.endswith("_experts"))
    width = {"recurrent": 6, "gating_residual": choices, None: 0}[moe.get("router_state", {}).get("type")]
    state = np.zeros((S, B, width))
    hidden = iter(seen.hidden)
    outputs, loss, mixtures = [], 0.0, []
    for layer, x, weight in zip(LAYERS, seen.inputs, seen.weights_of_loss, strict=True):
        at = f"decoder.layers.{layer}.mlp"
        if "cartesian" in moe:
            first = mixture(moe, p, f"{at}.first", x, seen.tokens, next(hidden), state)
            normed = rms_norm(x + first.output, p[f"{at}.layernorm.weight"])
            second = mixture(moe, p, f"{at}.second", normed, seen.tokens, next(hidden), state)
            inner = moe["cartesian"].get("residual") == "inner"
            y = first.output + second.output if inner else second.output
            mixtures += [first, second]
        else:
            mixtures.append(mixture(moe, p, at, x, seen.tokens, next(hidden), state))
            y = mixtures[-1].output
        outputs.append(y)
        loss += float((weight * y).sum())
    loss += BALANCE * sum(m.balance for m in mixtures)
    return outputs, loss, [m.counts for m in mixtures], [m.dropped for m in mixtures]


def rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5) * weight


def gates_of(choices: list[int], probs: np.ndarray, free: dict) -> dict[int, float]:
    gates = {c: probs[c] for c in choices}
    if free.get("gates") != "nonzero":
        return gates
    gates = {c: 0.0 if c >= E else g for c, g in gates.items()}  # the variant has zero experts only
    total = sum(gates.values())
    return {c: g / total if total else 0.0 for c, g in gates.items()}


def seen_share(chosen: np.ndarray, pooled: bool) -> np.ndarray:
    """f of the balance loss: AdaMoE averages it over the null experts."""
    share = chosen / chosen.sum()
    if pooled:
        share[E:] = share[E:].mean()
    return share


@pytest.fixture(scope="module")
def observed() -> dict[str, Observed]:
    return run_distributed(observe_all, 1)[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_counts_are_those_of_the_equations(observed: dict[str, Observed], variant: str) -> None:
    seen = observed[variant]
    outputs, _, counts, dropped = two_layers(variant, seen, seen.parameters)
    for mine, theirs in zip(seen.outputs, outputs, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5 * np.abs(theirs).max())
    assert seen.counts == counts
    assert seen.dropped == dropped
    assert ("capacity" in VARIANTS[variant]) == (sum(dropped) > 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_the_equations(observed: dict[str, Observed], variant: str) -> None:
    """Every parameter of the two layers, along two random directions each."""
    seen = observed[variant]
    generator = np.random.default_rng(3)
    step = 1e-6
    for name, value in seen.parameters.items():
        for _ in range(2):
            direction = generator.standard_normal(value.shape)
            ends = [
                two_layers(variant, seen, {**seen.parameters, name: value + sign * step * direction})[1]
                for sign in (1, -1)
            ]
            expected = (ends[0] - ends[1]) / (2 * step)
            found = float((seen.gradients[name] * direction).sum())
            scale = float(np.linalg.norm(seen.gradients[name])) * math.sqrt(value.size)
            assert abs(found - expected) <= 1e-4 * max(scale, 1e-3), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_parts_of_a_layer_were_compared_and_are_those_that_the_config_counts(
    observed: dict[str, Observed], variant: str
) -> None:
    seen = observed[variant]
    assert seen.shapes == dict(parameter_shapes(tiny_config(SINGLE, **changes_of(variant)).model))
    of_layers = {n for n in seen.shapes if any(f"layers.{i}.mlp." in n for i in LAYERS) or n.startswith("router_gru")}
    assert set(seen.parameters) == of_layers
