"""From a `ModelConfig` to this rank's model chunks. The only place that makes a Megatron `TransformerConfig`."""

from __future__ import annotations

from functools import partial

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import nn

from moetrain.config.hypernetworks import moe_layers
from moetrain.config.model import ModelConfig
from moetrain.config.relatives import state_width
from moetrain.config.schema import ParallelConfig
from moetrain.model.attention import ImportanceAttention
from moetrain.model.decoder import Decoder, MoETransformerLayer, ParallelRMSNorm, global_layers
from moetrain.model.latent_attention import LatentAttention
from moetrain.model.qk_norm import qk_norm
from moetrain.model.relative_positions import RelativePositions
from moetrain.model.rotary import RotaryPositions
from moetrain.model.sequence_head import SequenceModel
from moetrain.moe.cartesian import CartesianMoE
from moetrain.moe.dispatcher import TokenDispatcher
from moetrain.moe.hyper_modules import HyperModules, build_hyper
from moetrain.moe.layer import MoELayer
from moetrain.moe.router_state import RouterGRU
from moetrain.runtime import megatron_cpu
from moetrain.runtime.groups import ParallelGroups


def build_chunks(
    model: ModelConfig, parallel: ParallelConfig, groups: ParallelGroups, dtype: torch.dtype, device: torch.device
) -> list[Decoder]:
    """This rank's pipeline chunks, uninitialized (see `initialize`), on `device`.

    What several layers share, of HyperMoE, of a recurrent router and of relative positions, is registered in the first
    chunk of every rank that has such a layer, and used by the layers of all its chunks.
    """
    config = transformer_config(model, parallel, dtype)
    layout, stage = groups.layout, groups.coordinates.pipeline
    layers_of_chunks = [layout.layers_of(model.num_layers, stage, chunk) for chunk in range(layout.virtual_pipeline)]
    here = {i for layers in layers_of_chunks for i in layers}
    hyper = build_hyper(model, here, dtype)
    router_gru = _router_gru(model, here, dtype)
    positions = _positions(model, parallel, dtype)
    chunks = []
    for chunk, layers in enumerate(layers_of_chunks):
        kind = Decoder if model.head is None else partial(SequenceModel, head=model.head)
        decoder = kind(
            config,
            _block_spec(model, layers, groups, hyper, router_gru, positions),  # pyright: ignore[reportArgumentType]
            vocab_size=model.vocab_size,
            max_sequence_length=model.seq_length,
            pre_process=layers.start == 0,
            post_process=layers.stop == model.num_layers,
            parallel_output=True,
            share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
            position_embedding_type="rope" if positions is None else "none",
            rotary_base=model.rotary_base,  # pyright: ignore[reportArgumentType]
            vp_stage=chunk if layout.virtual_pipeline > 1 else None,
        )
        decoder.carry(state_width(model.moe), token_ids=model.moe is not None and model.moe.token_mask is not None)
        assert global_layers(decoder) == list(layers)
        chunks.append(decoder)
    for name, module in hyper.shared.items():
        _register(chunks[0], name, module)
    if router_gru is not None:
        chunks[0].add_module("router_gru", router_gru)
    if isinstance(positions, RelativePositions):
        chunks[0].add_module("relative_positions", positions)
    megatron_cpu.install()  # modules that Megatron imported while it was building
    return [chunk.to(device) for chunk in chunks]


def _router_gru(model: ModelConfig, here: set[int], dtype: torch.dtype) -> RouterGRU | None:
    """The cell of a recurrent router, on ranks that have a MoE layer."""
    moe = model.moe
    if moe is None or moe.router_state is None or moe.router_state.type != "recurrent":
        return None
    users = moe_layers(model)
    return RouterGRU(state_width(moe), users, dtype) if here.intersection(users) else None


def _positions(
    model: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype
) -> RelativePositions | RotaryPositions | None:
    """What the layers share to know positions; None: Megatron's rotation of whole heads."""
    if model.position_embedding == "relative":
        return RelativePositions(model, parallel.tensor, dtype)
    if model.multi_latent_attention is not None:
        return RotaryPositions(model.multi_latent_attention, model.rotary_base)
    return None


def _register(chunk: Decoder, name: str, module: nn.Module) -> None:
    """Add a module under a dotted name whose first part may be a container that is not there yet."""
    container, _, leaf = name.rpartition(".")
    if container and not hasattr(chunk, container):
        chunk.add_module(container, nn.ModuleDict())
    chunk.get_submodule(container).add_module(leaf, module)


def transformer_config(model: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
    """Megatron's view of the model."""
    interleaved = parallel.virtual_pipeline > 1
    on_cpu = not torch.cuda.is_available()
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_dim,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm is not None,
        ffn_hidden_size=model.ffn_hidden_size,
        num_moe_experts=model.moe.num_experts if model.moe else None,
        moe_ffn_hidden_size=model.moe.ffn_hidden_size if model.moe else None,
        normalization="RMSNorm",
        layernorm_epsilon=model.layernorm_epsilon,
        gated_linear_unit=model.activation == "swiglu",
        activation_func=nn.functional.silu if model.activation == "swiglu" else nn.functional.relu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        recompute_granularity="full" if model.recompute == "full" else None,
        recompute_method="uniform" if model.recompute == "full" else None,
        recompute_num_layers=1 if model.recompute == "full" else None,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1,
        sequence_parallel=parallel.sequence,
        # Every weight is filled by `initialize`, from its global name.
        use_cpu_initialization=True,
        perform_initialization=False,
        # Batched point-to-point matches messages to one peer in posting order, and with two stages the previous and
        # the next peer are the same: interleaving would silently swap activations. Single messages do not.
        batch_p2p_comm=not interleaved,
        overlap_p2p_comm=interleaved,
        # gloo's isend may still read a tensor when the call returns; freeing it corrupts gradients now and then.
        deallocate_pipeline_outputs=not (interleaved and on_cpu),
        # Fused kernels need Transformer Engine, apex or a JIT compiler at start-up; ours are in `csrc`.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
    )


def _block_spec(
    model: ModelConfig,
    layers: range,
    groups: ParallelGroups,
    hyper: HyperModules,
    router_gru: RouterGRU | None,
    positions: RelativePositions | RotaryPositions | None,
) -> TransformerBlockSubmodules:
    dispatcher = TokenDispatcher(model.moe.num_experts, groups.expert, model.moe.dispatch) if model.moe else None
    return TransformerBlockSubmodules(
        layer_specs=[_layer_spec(model, i, groups, hyper, dispatcher, router_gru, positions) for i in layers],
        layer_norm=ParallelRMSNorm,  # pyright: ignore[reportArgumentType]
    )


def _layer_spec(
    model: ModelConfig,
    layer: int,
    groups: ParallelGroups,
    hyper: HyperModules,
    dispatcher: TokenDispatcher | None,
    router_gru: RouterGRU | None,
    positions: RelativePositions | RotaryPositions | None,
) -> ModuleSpec:
    if model.is_moe_layer(layer):
        assert model.moe is not None
        measure, teacher = model.moe.router.attention_measure, model.moe.router.attention_teacher
        params = {
            "moe": model.moe,
            "groups": groups,
            "hyper": hyper.of_layer.get(layer),
            "layer": layer,
            "dispatcher": dispatcher,
            "model": model,
            "router_gru": router_gru,
        }
        mlp = ModuleSpec(module=MoELayer if model.moe.cartesian is None else CartesianMoE, params=params)
        layer_class: type = MoETransformerLayer
    else:
        measure = teacher = None
        fc = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        mlp = ModuleSpec(module=MLP, submodules=fc)
        layer_class = TransformerLayer
    return ModuleSpec(
        module=layer_class,
        submodules=TransformerLayerSubmodules(
            input_layernorm=ParallelRMSNorm,
            self_attention=_attention_spec(model, groups, measure, teacher, positions),
            self_attn_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
            pre_mlp_layernorm=ParallelRMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
        ),
    )


def _attention_spec(
    model: ModelConfig,
    groups: ParallelGroups,
    measure: str | None,
    teacher: str | None,
    positions: RelativePositions | RotaryPositions | None,
) -> ModuleSpec:
    mask = AttnMaskType.causal if model.type == "decoder" else AttnMaskType.padding
    biases = positions if isinstance(positions, RelativePositions) else None
    core = ModuleSpec(
        module=ImportanceAttention,
        params={"measure": measure, "teacher": teacher, "positions": biases, "tensor_group": groups.tensor},
    )
    if isinstance(positions, RotaryPositions):
        params = {
            "attn_mask_type": mask,
            "settings": model.multi_latent_attention,
            "positions": positions,
            "core_attention": core,
            "tensor_group": groups.tensor,
        }
        return ModuleSpec(module=LatentAttention, params=params)
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=core,
        linear_proj=RowParallelLinear,
        q_layernorm=qk_norm(model.qk_layernorm, model.num_attention_heads, groups.tensor),
        k_layernorm=qk_norm(model.qk_layernorm, model.kv_heads, groups.tensor),
    )
    return ModuleSpec(module=SelfAttention, params={"attn_mask_type": mask}, submodules=attention)
