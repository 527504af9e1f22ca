from __future__ import annotations

import math
from typing import Any

import pytest

from moetrain.config.loader import config_from_dict
from moetrain.config.model import ModelConfig
from moetrain.config.size import flops_per_token, parameter_count, parameter_shapes


def _model(tree: dict[str, Any], **changes: Any) -> ModelConfig:
    return config_from_dict({**tree, "model": {**tree["model"], **changes}}, "test").model


@pytest.fixture
def hyper(tree: dict[str, Any]) -> ModelConfig:
    sizes = {"bottleneck": 5, "hidden": 6, "expert_embedding": 7, "process": 9, "condition": 10, "layer_embedding": 3}
    tree["model"]["moe"]["hyper"] = sizes
    return _model(tree)


def test_the_count_is_the_sum_of_the_checkpoints_shapes(hyper: ModelConfig) -> None:
    """d=64 H=4 G=2 hd=16 ffn=96 V=512 E=8 f=48, layers 1 and 3 of 4 MoE; r=5 h=6 t=7 q=9 c=10 m=3."""
    embedding = [(512, 64), (512, 64)]
    attention = [((4 + 2 * 2) * 16, 64), (64, 4 * 16)] * 4
    norms = [(64,), (64,)] * 4 + [(64,)]
    dense = [(2 * 96, 64), (64, 96)] * 2
    router = [(8, 64)] * 2
    expert = [(8, 2 * 48, 64), (8, 64, 48)] * 2
    per_layer = [(8, 7), (9, 7), (9,), (10, 9), (10,)] * 2
    shared = [(4, 3), (6, 13), (6,), (5 * 64, 6), (5 * 64,), (5, 6), (5,), (64 * 5, 6), (64 * 5,), (64, 6), (64,)]

    def size(shapes: list[tuple[int, ...]]) -> int:
        return sum(math.prod(shape) for shape in shapes)

    count = parameter_count(hyper)
    assert count.embedding == size(embedding)
    assert count.attention == size(attention)
    assert count.mlp == size(norms + dense + router)
    assert count.expert == size(expert)
    assert count.hyper == size(per_layer + shared)
    assert count.total == count.embedding + count.attention + count.mlp + count.expert + count.hyper
    assert count.active_per_token == count.total - size(expert) * 6 // 8


def test_names_are_unique_and_those_of_the_checkpoint_format(hyper: ModelConfig) -> None:
    names = [name for name, _ in parameter_shapes(hyper)]
    assert len(names) == len(set(names))
    assert {
        "decoder.layers.0.mlp.linear_fc1.weight",
        "decoder.layers.1.mlp.experts.fc1",
        "decoder.layers.1.mlp.hyper.process_in.bias",
        "hypernetwork.layer_embedding",
        "hypernetwork.up_bias.weight",
        "output_layer.weight",
    } <= set(names)
    assert "decoder.layers.0.mlp.router.weight" not in names


def test_tied_embeddings_count_once(tree: dict[str, Any]) -> None:
    tied, untied = (parameter_count(_model(tree, share_embeddings_and_output_weights=t)) for t in (True, False))
    assert untied.total - tied.total == 512 * 64


def test_active_parameters_follow_the_mean_number_of_experts(tree: dict[str, Any]) -> None:
    def idle(router: dict[str, Any]) -> int:
        count = parameter_count(_model(tree, moe={**tree["model"]["moe"], "router": router}))
        return count.total - count.active_per_token

    expert = parameter_count(_model(tree)).expert
    assert idle({"type": "top_k", "top_k": 8}) == 0
    assert idle({"type": "da_moe", "mean_k": 2.0}) == idle({"type": "top_k", "top_k": 2}) == expert * 6 // 8
    assert idle({"type": "da_moe", "budget": "paper", "max_k": 4}) == expert * 4 // 8  # the bound
    assert idle({"type": "da_moe", "budget": "paper"}) == 0


def test_flops_are_six_per_active_matrix_weight_plus_attention(tree: dict[str, Any]) -> None:
    model = _model(tree)
    count = parameter_count(model)
    norms = (2 * model.num_layers + 1) * model.hidden_size
    lookup = model.vocab_size * model.hidden_size  # the embedding is read, not multiplied
    attention = 3 * model.num_layers * 2 * model.seq_length * model.num_attention_heads * model.head_dim
    assert flops_per_token(model) == 6 * (count.active_per_token - norms - lookup) + attention


def test_flops_grow_with_mean_k_by_the_experts_and_with_hyper_by_its_bottleneck(
    tree: dict[str, Any], hyper: ModelConfig
) -> None:
    plain = _model({**tree, "model": {**tree["model"], "moe": {**tree["model"]["moe"], "hyper": None}}})
    assert flops_per_token(plain, mean_k=3) - flops_per_token(plain, mean_k=2) == 2 * 3 * 2 * (3 * 64 * 48)
    assert flops_per_token(hyper) - flops_per_token(plain) == 2 * 3 * 2 * (2 * 64 * 5)


def test_hyper_flops_count_generation_where_every_token_has_an_expert_of_its_own(tree: dict[str, Any]) -> None:
    """d=64, two MoE layers, E=8; r=5 h=6 t=7 q=9 c=10 m=3. Forward and backward is three times the forward pass."""
    sizes = {"bottleneck": 5, "hidden": 6, "expert_embedding": 7, "process": 9, "condition": 10, "layer_embedding": 3}

    def extra(**choices: Any) -> float:
        moe = {**tree["model"]["moe"], "hyper": sizes | choices}
        return flops_per_token(_model(tree, moe=moe)) - flops_per_token(_model(tree))

    generation = 4 * 6 * 64 * 5 + 4 * 6 * 5 + 2 * 6 * (64 + 5)
    condition = 2 * 8 * 7 + 2 * (7 * 9 + 9 * 10) + 2 * 6 * (10 + 3)
    assert extra(condition_on="static") == extra() == 2 * 3 * (4 * 64 * 5)
    assert extra(form="factorized") == 2 * 3 * (4 * 64 * 5 + generation)
    assert extra(aggregation="prob") == 2 * 3 * (4 * 64 * 5 + generation + condition)


def test_an_encoder_sees_twice_the_tokens_and_a_head_replaces_the_output_layer(tree: dict[str, Any]) -> None:
    decoder, encoder, headed = (
        ModelConfig.model_validate(tree["model"] | changes)
        for changes in ({}, {"type": "encoder"}, {"type": "encoder", "head": {"outputs": 3}})
    )
    assert parameter_count(decoder) == parameter_count(encoder)
    assert flops_per_token(encoder) - flops_per_token(decoder) == 3 * 4 * 2 * 32 * 64  # 4 layers, 32 tokens, 64 wide
    assert parameter_count(encoder).total - parameter_count(headed).total == 512 * 64 - (3 * 64 + 3)
    assert flops_per_token(encoder) - flops_per_token(headed) == 3 * 2 * 512 * 64
