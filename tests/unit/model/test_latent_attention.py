"""Latent attention and its positions against the equations of DeepSeek-V2 (arXiv 2405.04434 section 2.1) and YaRN
(arXiv 2309.00071 section 3), in NumPy and float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moetrain.config.attention import MultiLatentAttentionConfig, YarnConfig
from moetrain.config.layout import ParallelLayout
from moetrain.config.model import ModelConfig
from moetrain.config.schema import ParallelConfig
from moetrain.model.build import build_chunks
from moetrain.model.rotary import frequencies
from moetrain.runtime.groups import ParallelGroups, create_groups, destroy_groups

HEADS, HIDDEN, LENGTH, BASE = 3, 10, 13, 50.0
LATENT = {"kv_lora_rank": 5, "qk_head_dim": 3, "qk_pos_emb_head_dim": 4, "v_head_dim": 6}
YARN = {"factor": 8.0, "original_max_position_embeddings": 6, "beta_fast": 2.0, "mscale": 0.5, "mscale_all_dim": 0.8}
VARIANTS = {
    "latent queries, stretched": LATENT | {"q_lora_rank": 7, "yarn": YARN, "layernorm_epsilon": 1e-3},
    "queries from the token, wide values": LATENT | {"v_head_dim": 9, "rotary_interleaved": False},
}
Weights = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def alone() -> Iterator[ParallelGroups]:
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(minutes=1))
    yield create_groups(ParallelLayout(1), seed=0)
    destroy_groups()
    dist.destroy_process_group()


def stretched(pair: int, width: int, yarn: dict) -> float:
    """Radians per token of a pair: YaRN eq. 17 to 20 with DeepSeek's rounding of the bounds to whole pairs."""
    fast = BASE ** (-2 * pair / width)

    def with_rotations(count: float) -> float:
        return width * math.log(yarn["original_max_position_embeddings"] / (2 * math.pi * count)) / (2 * math.log(BASE))

    low = max(math.floor(with_rotations(yarn.get("beta_fast", 32.0))), 0)
    high = min(math.ceil(with_rotations(yarn.get("beta_slow", 1.0))), width - 1)
    slowness = min(max((pair - low) / max(high - low, 0.001), 0.0), 1.0)
    return slowness * fast / yarn["factor"] + (1 - slowness) * fast


def rotated(x: np.ndarray, settings: dict, yarn: dict | None) -> np.ndarray:
    """[S, ..., r]: each pair turned by its angle, at the place where it stood."""
    width, out = x.shape[-1], np.empty_like(x)
    for pair in range(width // 2):
        a, b = (2 * pair, 2 * pair + 1) if settings.get("rotary_interleaved", True) else (pair, pair + width // 2)
        speed = BASE ** (-2 * pair / width) if yarn is None else stretched(pair, width, yarn)
        angle = (np.arange(len(x)) * speed).reshape(-1, *[1] * (x.ndim - 2))
        out[..., a] = x[..., a] * np.cos(angle) - x[..., b] * np.sin(angle)
        out[..., b] = x[..., a] * np.sin(angle) + x[..., b] * np.cos(angle)
    if yarn is None:
        return out
    sharpened = [0.1 * yarn[name] * math.log(yarn["factor"]) + 1 for name in ("mscale", "mscale_all_dim")]
    return out * sharpened[0] / sharpened[1]


def normed(x: np.ndarray, weight: np.ndarray, settings: dict) -> np.ndarray:
    epsilon = settings.get("layernorm_epsilon", 1e-6)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * weight


def truth(x_SD: np.ndarray, weights: Weights, settings: dict) -> tuple[np.ndarray, np.ndarray]:
    """Of one sequence: output [S, D], and the largest weight of each query, averaged over the heads, [S]."""
    yarn, latent, wide = settings.get("yarn"), settings["kv_lora_rank"], settings["qk_head_dim"]
    if "q_lora_rank" in settings:
        compressed = normed(x_SD @ weights["linear_q_down_proj"].T, weights["q_layernorm"], settings)
        queries = compressed @ weights["linear_q_up_proj"].T
    else:
        queries = x_SD @ weights["linear_q_proj"].T
    queries = queries.reshape(len(x_SD), HEADS, -1)
    down = x_SD @ weights["linear_kv_down_proj"].T
    up = normed(down[:, :latent], weights["kv_layernorm"], settings) @ weights["linear_kv_up_proj"].T
    up, shared_key = up.reshape(len(x_SD), HEADS, -1), rotated(down[:, latent:], settings, yarn)
    q_rotated = rotated(queries[..., wide:], settings, yarn)
    scale = 1 / math.sqrt(wide + settings["qk_pos_emb_head_dim"])
    if yarn is not None:
        scale *= (0.1 * yarn["mscale_all_dim"] * math.log(yarn["factor"]) + 1) ** 2
    heads, largest = [], []
    for head in range(HEADS):
        scores = queries[:, head, :wide] @ up[:, head, :wide].T + q_rotated[:, head] @ shared_key.T
        scores = np.where(np.tri(len(x_SD), dtype=bool), scale * scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        heads.append(shares @ up[:, head, wide:])
        largest.append(shares.max(-1))
    return np.concatenate(heads, axis=-1) @ weights["linear_proj"].T, np.mean(largest, axis=0)


def filled_attention(settings: dict, groups: ParallelGroups, **changes: object) -> torch.nn.Module:
    """The attention of a layer that routes by importance."""
    router = {"type": "da_moe", "importance": "row_max"}
    model = ModelConfig.model_validate(
        {"num_layers": 1, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "ffn_hidden_size": 4}
        | {"vocab_size": 8, "seq_length": LENGTH, "rotary_base": BASE, "multi_latent_attention": settings}
        | {"moe": {"num_experts": 2, "ffn_hidden_size": 4, "router": router}}
        | changes
    )
    (decoder,) = build_chunks(model, ParallelConfig(), groups, torch.float32, torch.device("cpu"))
    attention = decoder.decoder.layers[0].self_attention
    generator = torch.Generator().manual_seed(5)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.6 if parameter.dim() > 1 else 1.0, generator=generator)
    return attention


@pytest.mark.parametrize("variant", VARIANTS)
def test_output_and_gradients_are_those_of_the_equations(variant: str, alone: ParallelGroups) -> None:
    settings = VARIANTS[variant]
    attention, generator = filled_attention(settings, alone), torch.Generator().manual_seed(6)
    x = torch.randn(LENGTH, 2, HIDDEN, generator=generator, requires_grad=True)
    upstream = torch.randn(LENGTH, 2, HIDDEN, generator=generator)
    out, bias = attention(x, None)
    (out * upstream).sum().backward()
    assert bias is None
    weights = {name.removesuffix(".weight"): p.detach().double().numpy() for name, p in attention.named_parameters()}
    inputs = x.detach().double().numpy()

    def of_both(inputs: np.ndarray, weights: Weights) -> tuple[np.ndarray, ...]:
        found = [truth(inputs[:, i], weights, settings) for i in range(2)]
        return tuple(np.stack(part, axis=1) for part in zip(*found, strict=True))

    expected_out, expected_importance = of_both(inputs, weights)
    np.testing.assert_allclose(out.detach().numpy(), expected_out, atol=2e-6 * float(out.abs().max()))
    np.testing.assert_allclose(attention.core_attention.take_importance().numpy(), expected_importance, atol=2e-6)
    random = np.random.default_rng(1)
    gradients = {name.removesuffix(".weight"): p.grad for name, p in attention.named_parameters()} | {"": x.grad}
    for name, gradient in gradients.items():
        assert gradient is not None
        direction, step = random.standard_normal(gradient.shape), 1e-5
        losses = []
        for sign in (1, -1):
            moved = inputs + sign * step * direction if not name else inputs
            changed = weights if not name else weights | {name: weights[name] + sign * step * direction}
            losses.append((of_both(moved, changed)[0] * upstream.double().numpy()).sum())
        expected = (losses[0] - losses[1]) / (2 * step)
        found = float((gradient.double().numpy() * direction).sum())
        assert found == pytest.approx(expected, rel=2e-5, abs=1e-4), name


def test_an_encoder_of_latents_sees_all_real_tokens_and_no_padding(alone: ParallelGroups) -> None:
    attention = filled_attention(VARIANTS["latent queries, stretched"], alone, type="encoder")
    x, real = torch.randn(LENGTH, 2, HIDDEN, generator=torch.Generator().manual_seed(7)), 8
    valid = torch.arange(LENGTH) < torch.tensor([LENGTH, real])[:, None]
    with torch.no_grad():
        padded, _ = attention(x, valid)
        short, _ = attention(x[:real, 1:], None)
        longer, _ = attention(x[:, 1:], None)
    torch.testing.assert_close(padded[:real, 1:], short, rtol=1e-5, atol=1e-5)
    assert not padded[real:, 1].any() and not torch.allclose(longer[:real], short, atol=1e-2)


def test_stretched_pairs_go_over_from_fast_to_slow() -> None:
    """DeepSeek-V3's own numbers: some pairs keep their speed, some have a fortieth of it, some are between."""
    yarn = {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}
    config = YarnConfig.model_validate(yarn)
    plain, slowed = frequencies(64, 10000.0, None), frequencies(64, 10000.0, config)
    kept, fortieth = (slowed == plain).sum(), torch.isclose(slowed, plain / 40, rtol=1e-6).sum()
    assert (int(kept), int(fortieth)) == (11, 9)
    assert config.rotated_factor == 1.0 and config.score_factor == pytest.approx((0.1 * math.log(40) + 1) ** 2)
    alone = YarnConfig(factor=40.0, original_max_position_embeddings=4096, mscale_all_dim=0.5)
    assert alone.rotated_factor == pytest.approx(0.1 * math.log(40) + 1)
    assert MultiLatentAttentionConfig.model_validate(LATENT | {"yarn": yarn}).yarn == config
