"""Parameters and floating-point operations of a model, counted from its config alone.

The shapes are those of the checkpoint format: `parameter_count(model).total` is the number of weights in a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from moetrain.config.hypernetworks import hypernetworks
from moetrain.config.model import Activation, ModelConfig
from moetrain.config.moe import HyperConfig, MoEConfig
from moetrain.config.relatives import gate_width, state_width


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of weights. `total` is the sum of the five parts below it.

    `active_per_token` leaves out the experts that a token does not visit, at the mean number of experts per token;
    where that mean is not known in advance (DA-MoE with budget `paper`) it is the upper bound `max_k`.
    """

    total: int
    active_per_token: int
    embedding: int
    attention: int
    mlp: int
    expert: int
    hyper: int


def parameter_count(model: ModelConfig) -> ParameterCount:
    """Weights of the model by kind. `mlp` counts dense MLPs, shared experts, routers with
    their choices and norms; a tied output layer counts once."""
    parts = {"embedding": 0, "attention": 0, "mlp": 0, "expert": 0, "hyper": 0}
    for name, shape in parameter_shapes(model):
        parts[_part_of(name)] += math.prod(shape)
    total = sum(parts.values())
    idle = 0
    if model.moe is not None:
        idle = round(parts["expert"] * (1 - model.moe.expected_mean_k / model.moe.num_experts))
    return ParameterCount(total=total, active_per_token=total - idle, **parts)


def parameter_shapes(model: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every weight in a checkpoint of this model, without its `weight.` prefix."""
    d = model.hidden_size
    yield "embedding.word_embeddings.weight", (model.vocab_size, d)
    if model.position_embedding == "relative":
        yield "relative_positions.weight", (model.relative_buckets, model.num_attention_heads)
    for i in range(model.num_layers):
        layer = f"decoder.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (d,)
        of_attention = _attention_shapes if model.multi_latent_attention is None else _latent_attention_shapes
        yield from of_attention(f"{layer}.self_attention", model)
        yield f"{layer}.pre_mlp_layernorm.weight", (d,)
        if model.moe is not None and model.is_moe_layer(i):
            if model.moe.cartesian is None:
                yield from _moe_shapes(f"{layer}.mlp", model.moe, d, projections_in(model.activation))
            else:
                yield from _moe_shapes(f"{layer}.mlp.first", model.moe, d, projections_in(model.activation))
                yield from _moe_shapes(f"{layer}.mlp.second", model.moe, d, projections_in(model.activation))
                yield f"{layer}.mlp.layernorm.weight", (d,)
        else:
            yield f"{layer}.mlp.linear_fc1.weight", (projections_in(model.activation) * model.ffn_hidden_size, d)
            yield f"{layer}.mlp.linear_fc2.weight", (d, model.ffn_hidden_size)
    yield "decoder.final_layernorm.weight", (d,)
    if model.moe is not None and model.moe.hyper is not None:
        hyper = model.moe.hyper
        for name, layers in hypernetworks(model).items():
            yield from _hypernetwork_shapes(name, hyper, len(layers), d)
        if hyper.embeddings == "model":
            yield from _selection_shapes("selection_embedding", hyper, model.moe.num_experts)
    if model.moe is not None and model.moe.router_state is not None and model.moe.router_state.type == "recurrent":
        width = state_width(model.moe)
        yield from _linear("router_gru.input", 3 * width, width)
        yield from _linear("router_gru.state", 3 * width, width)
    if model.head is not None:
        yield from _linear("head", model.head.outputs, d)
    elif not model.share_embeddings_and_output_weights:
        yield "output_layer.weight", (model.vocab_size, d)


def projections_in(activation: Activation) -> int:
    """Matrices of an MLP or expert before its activation: SwiGLU's gate and up, or one."""
    return 2 if activation == "swiglu" else 1


def flops_per_token(model: ModelConfig, mean_k: float | None = None) -> float:
    """Floating-point operations per token for forward and backward: three times the forward pass.

    Counted: matrix products, 2 per multiply-add, with attention's scores and values at the mean visible length, which
    is seq_length in an encoder and seq_length / 2 in a decoder. Not counted: a head (once per sequence), norms,
    softmax, positions, activation recompute, the optimizer. `mean_k` is the mean number of experts per token
    (default: `MoEConfig.expected_mean_k`).

    HyperMoE is counted in its grouped form in the limit of many tokens per selected set: each token pays for its two
    bottleneck products (4 * d * r); generating the matrices is paid once per distinct set and is left out. That is the
    lower bound; with one set per token, generation would add 2 * (2 * d * r + d + r) * h per token and layer. With
    `form: factorized`, `form: per_token` or `aggregation: prob` nothing is shared between tokens, and all of it counts.
    """
    d = model.hidden_size
    attention = _attention_flops(model)
    of_unit = 2 * d * (projections_in(model.activation) + 1)  # of a hidden unit of an MLP or expert
    dense_mlp = of_unit * model.ffn_hidden_size
    forward = 2.0 * d * model.vocab_size if model.head is None else 0.0
    for i in range(model.num_layers):
        moe = model.moe if model.is_moe_layer(i) else None
        forward += attention
        if moe is None:
            forward += dense_mlp
            continue
        k = moe.expected_mean_k if mean_k is None else mean_k
        mixtures = 1 if moe.cartesian is None else 2
        forward += mixtures * (k * of_unit * moe.ffn_hidden_size + _beside_experts(moe, d, of_unit))
        if moe.hyper is not None:
            forward += _hyper_flops(moe.hyper, moe.num_experts, d)
    return 3.0 * forward


def _attention_flops(model: ModelConfig) -> int:
    """Forward, per token and layer: all projections, scores, and sums of values."""
    of_attention = _attention_shapes if model.multi_latent_attention is None else _latent_attention_shapes
    matrices = sum(math.prod(shape) for _, shape in of_attention("", model) if len(shape) == 2)
    visible_twice = model.seq_length * (2 if model.type == "encoder" else 1)
    return 2 * matrices + visible_twice * model.num_attention_heads * (model.head_dim + model.value_dim)


def _hyper_flops(hyper: HyperConfig, num_experts: int, d: int) -> int:
    """Forward, per token and MoE layer."""
    r, h, c = hyper.bottleneck, hyper.hidden, hyper.condition
    flops = 4 * d * r
    if hyper.form in ("factorized", "per_token") or hyper.aggregation == "prob":
        flops += 4 * h * d * r + 4 * h * r + 2 * h * (d + r)  # D_j and U_j, their contraction with e, the two biases
    if hyper.aggregation == "prob":
        t, q = hyper.expert_embedding, hyper.process
        flops += 2 * num_experts * t + 2 * (t * q + q * c) + 2 * h * (c + hyper.layer_embedding)
    return flops


def _beside_experts(moe: MoEConfig, d: int, of_unit: int) -> float:
    """Forward operations per token of the router and of what every token passes besides its experts. A constant expert
    is computed for all tokens, because its mixture costs less than to sort them out."""
    gate = gate_width(moe, d)
    flops = 2.0 * (gate * moe.num_choices + sum(math.prod(s) for s in moe.router.extra_parameters(gate).values()))
    flops += of_unit * (moe.shared_expert_ffn_hidden_size or 0)
    if moe.computation_free is not None:
        flops += moe.computation_free.constant_experts * (4 * d + 2 * d)
    if moe.router_state is not None and moe.router_state.type == "recurrent":
        width = state_width(moe)
        flops += 2 * d * width + 2 * (2 * width * 3 * width)
    return flops


def _attention_shapes(prefix: str, model: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    d, hd, heads = model.hidden_size, model.head_dim, model.num_attention_heads
    qkv_heads = heads + 2 * model.kv_heads
    yield f"{prefix}.linear_qkv.weight", (qkv_heads * hd, d)
    if model.add_qkv_bias:
        yield f"{prefix}.linear_qkv.bias", (qkv_heads * hd,)
    if model.qk_layernorm is not None:
        of_all = model.qk_layernorm == "projection"
        yield f"{prefix}.q_layernorm.weight", (hd * (heads if of_all else 1),)
        yield f"{prefix}.k_layernorm.weight", (hd * (model.kv_heads if of_all else 1),)
    yield f"{prefix}.linear_proj.weight", (d, heads * hd)


def _latent_attention_shapes(prefix: str, model: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    latent, d, heads = model.multi_latent_attention, model.hidden_size, model.num_attention_heads
    assert latent is not None
    if latent.q_lora_rank is None:
        yield f"{prefix}.linear_q_proj.weight", (heads * latent.qk_width, d)
    else:
        yield f"{prefix}.linear_q_down_proj.weight", (latent.q_lora_rank, d)
        yield f"{prefix}.q_layernorm.weight", (latent.q_lora_rank,)
        yield f"{prefix}.linear_q_up_proj.weight", (heads * latent.qk_width, latent.q_lora_rank)
    yield f"{prefix}.linear_kv_down_proj.weight", (latent.kv_lora_rank + latent.qk_pos_emb_head_dim, d)
    yield f"{prefix}.kv_layernorm.weight", (latent.kv_lora_rank,)
    yield f"{prefix}.linear_kv_up_proj.weight", (heads * (latent.qk_head_dim + latent.v_head_dim), latent.kv_lora_rank)
    yield f"{prefix}.linear_proj.weight", (d, heads * latent.v_head_dim)


def _moe_shapes(prefix: str, moe: MoEConfig, d: int, n_in: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    e, f = moe.num_experts, moe.ffn_hidden_size
    gate = gate_width(moe, d)
    yield f"{prefix}.router.weight", (moe.num_choices, gate)
    yield from ((f"{prefix}.router.{name}", shape) for name, shape in moe.router.extra_parameters(gate).items())
    if moe.expert_widths is None:
        yield f"{prefix}.experts.fc1", (e, n_in * f, d)
        yield f"{prefix}.experts.fc2", (e, d, f)
    else:
        yield f"{prefix}.experts.fc1", (n_in * e * f, d)
        yield f"{prefix}.experts.fc2", (e * f, d)
    yield from _relatives_shapes(prefix, moe, d, n_in)
    if moe.hyper is None:
        return
    if moe.hyper.condition_on == "static":
        yield from _linear(f"{prefix}.hyper.down", moe.hyper.bottleneck, d)
        yield from _linear(f"{prefix}.hyper.up", d, moe.hyper.bottleneck)
    elif moe.hyper.embeddings == "layer":
        yield from _selection_shapes(f"{prefix}.hyper", moe.hyper, e)


def _relatives_shapes(prefix: str, moe: MoEConfig, d: int, n_in: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Of the parts in docs/concepts/relatives.md."""
    if moe.computation_free is not None and (constants := moe.computation_free.constant_experts) > 0:
        yield f"{prefix}.computation_free.mix", (constants, 2, d)
        yield f"{prefix}.computation_free.vector", (constants, d)
    if moe.router_state is not None and moe.router_state.type == "recurrent":
        yield f"{prefix}.memory.project.weight", (state_width(moe), d)
    if (f := moe.shared_expert_ffn_hidden_size) is not None:
        yield f"{prefix}.shared_expert.fc1", (n_in * f, d)
        yield f"{prefix}.shared_expert.fc2", (d, f)


def _selection_shapes(prefix: str, hyper: HyperConfig, num_experts: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """What turns a selection into a condition."""
    if hyper.condition_on == "constant":
        yield f"{prefix}.constant", (hyper.condition,)
        return
    if hyper.condition_on != "random_fixed":  # fixed embeddings follow from their names
        yield f"{prefix}.expert_embedding", (num_experts, hyper.expert_embedding)
    yield from _linear(f"{prefix}.process_in", hyper.process, hyper.expert_embedding)
    yield from _linear(f"{prefix}.process_out", hyper.condition, hyper.process)


def _hypernetwork_shapes(
    prefix: str, hyper: HyperConfig, num_layers: int, d: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    h, r = hyper.hidden, hyper.bottleneck
    if hyper.layer_embedding:
        yield f"{prefix}.layer_embedding", (num_layers, hyper.layer_embedding)
    yield from _linear(f"{prefix}.input", h, hyper.condition + hyper.layer_embedding)
    yield from _linear(f"{prefix}.down", r * d, h)
    yield from _linear(f"{prefix}.down_bias", r, h)
    yield from _linear(f"{prefix}.up", d * r, h)
    yield from _linear(f"{prefix}.up_bias", d, h)


def _linear(name: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (rows, columns)
    yield f"{name}.bias", (rows,)


def _part_of(name: str) -> str:
    if name.startswith(("embedding.", "output_layer.", "head.")):
        return "embedding"
    if name.startswith(("hypernetwork", "selection_embedding.")) or ".hyper." in name:
        return "hyper"
    if ".experts." in name:
        return "expert"
    return "attention" if ".self_attention." in name or name.startswith("relative_positions.") else "mlp"
