"""Which global tensor each local parameter is a part of, and how it starts."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn

from moetrain.config.hypernetworks import moe_layers
from moetrain.config.layout import ParallelLayout
from moetrain.config.model import ModelConfig
from moetrain.config.moe import HyperConfig
from moetrain.config.relatives import gate_width, state_width
from moetrain.model.decoder import Decoder, global_layers
from moetrain.model.qk_norm import ProjectionRMSNorm
from moetrain.model.relative_positions import RelativePositions
from moetrain.moe.controllers import Controlled
from moetrain.moe.hyper_network import HyperNetwork, SelectionEmbedding
from moetrain.moe.losses import balanced_load
from moetrain.moe.router_state import RouterGRU
from moetrain.moe.routing import build_router
from moetrain.runtime.groups import ParallelGroups
from moetrain.runtime.parameters import Block, ParameterInfo, Tie

_EMBEDDING = "embedding.word_embeddings.weight"
_OF_A_NETWORK = re.compile(r"^(hypernetworks\.\d+|decoder\.layers\.\d+\.mlp\.hyper\.network)\.")
_SHARED_BY_LAYERS = ("hypernetwork", "selection_embedding.", "router_gru.")
_WITHOUT_DECAY = ("expert_embedding", "layer_embedding", "relative_positions.weight")
# Replicated parameters that see this tensor rank's tokens only, whether sequence parallelism is on or not.
_OF_MOE_BLOCK = (".router.", ".hyper.", ".memory.", ".shared_expert.", ".computation_free.")


def named_parameters(chunks: Sequence[Decoder]) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of this rank under their global names: layers by global number, a tied output as the embedding."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            yield _global_name(chunk, name), parameter


def named_controllers(chunks: Sequence[Decoder]) -> Iterator[tuple[str, Tensor]]:
    """Live tensors of this rank's controllers, by global name: `decoder.layers.<i>.mlp.router.thresholds`."""
    for chunk in chunks:
        for name, module in chunk.named_modules():
            if isinstance(module, Controlled):
                for controller, value in module.controllers():
                    yield _global_name(chunk, f"{name}.{controller}"), value


def describe_parameters(
    chunks: Sequence[Decoder], groups: ParallelGroups, sequence_parallel: bool
) -> list[ParameterInfo]:
    """A `ParameterInfo` for every parameter of this rank, in a deterministic order."""
    tied_embeddings = {
        id(chunk.shared_embedding_or_output_weight()) for chunk in chunks if chunk.share_embeddings_and_output_weights
    }
    splits = {id(p): dim for chunk in chunks for p, dim in _split_dimensions(chunk)}
    holders = {id(p): stages for chunk in chunks for p, stages in _holders(chunk, groups.layout)}
    of_heads = {id(p) for chunk in chunks for p in _of_heads(chunk)}
    gated = chunks[0].config.gated_linear_unit

    def tied(p: nn.Parameter) -> Tie:
        if id(p) in tied_embeddings and groups.layout.pipeline > 1:
            return "embedding"
        return holders.get(id(p), "no")

    return [
        _describe(
            name,
            p,
            groups,
            partial=id(p) in of_heads or _sees_own_tokens(name, sequence_parallel),
            split_dim=splits.get(id(p)),
            tied=tied(p),
            gated=gated,
        )
        for name, p in named_parameters(chunks)
    ]


def _holders(chunk: Decoder, layout: ParallelLayout) -> Iterator[tuple[nn.Parameter, tuple[int, ...]]]:
    """Parameters that layers share and that have copies on other pipeline stages, and the stages that hold one."""
    layers = chunk.config.num_layers
    for module in chunk.modules():
        if not isinstance(module, HyperNetwork | SelectionEmbedding | RouterGRU | RelativePositions):
            continue
        stages = tuple(
            stage
            for stage in range(layout.pipeline)
            if any(
                user in layout.layers_of(layers, stage, chunk_number)
                for user in module.users
                for chunk_number in range(layout.virtual_pipeline)
            )
        )
        if len(stages) > 1:
            yield from ((parameter, stages) for parameter in module.parameters())


def _split_dimensions(chunk: Decoder) -> Iterator[tuple[nn.Parameter, int]]:
    """Weights that tensor parallelism splits, and along which dimension. Told by the modules' types: Megatron marks the
    weights too, but only where it also initializes them."""
    for module in chunk.modules():
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding) and module.weight is not None:
            yield module.weight, 0
            if isinstance(module, ColumnParallelLinear) and module.bias is not None:
                yield module.bias, 0
        elif isinstance(module, ProjectionRMSNorm):
            yield module.weight, 0
        elif isinstance(module, RowParallelLinear | RelativePositions):
            yield module.weight, 1


def _global_name(chunk: Decoder, name: str) -> str:
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(global_layers(chunk)[int(parts[2])])
    # What turns a layer's selection into a condition is a module of its own, so that several layers can share one.
    name = ".".join(parts).replace(".mlp.hyper.selection.", ".mlp.hyper.")
    if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
        return _EMBEDDING
    return name


def _describe(
    name: str,
    parameter: nn.Parameter,
    groups: ParallelGroups,
    partial: bool,
    split_dim: int | None,
    tied: Tie,
    gated: bool,
) -> ParameterInfo:
    at, layout = groups.coordinates, groups.layout
    shape = tuple(parameter.shape)
    expert = ".experts." in name
    if expert:
        global_shape = (shape[0] * layout.expert, *shape[1:])
        blocks = (Block(shape[0], (at.expert * shape[0], *(0 for _ in shape[1:]))),)
    elif split_dim is None or layout.tensor == 1:
        global_shape, blocks = shape, (Block(shape[0], (0,) * len(shape)),)
    else:
        global_shape, blocks = _tensor_split(name, shape, split_dim, at.tensor, layout.tensor, gated)
    first_copy = {"no": at.pipeline, "embedding": 0}[tied] if isinstance(tied, str) else tied[0]
    replicated_over_tensor = not expert and split_dim is None
    return ParameterInfo(
        name=name,
        parameter=parameter,
        local_shape=shape,
        global_shape=global_shape,
        blocks=blocks,
        expert=expert,
        counted=at.pipeline == first_copy and not (replicated_over_tensor and at.tensor > 0),
        sum_over_tensor=layout.tensor > 1 and replicated_over_tensor and partial,
        tied=tied,
        decay=len(shape) >= 2 and not name.endswith(_WITHOUT_DECAY),
    )


def _tensor_split(
    name: str, shape: tuple[int, ...], dim: int, rank: int, ranks: int, gated: bool
) -> tuple[tuple[int, ...], tuple[Block, ...]]:
    """Where a tensor-parallel shard lies. A SwiGLU fc1 holds this rank's gate rows, then its up rows."""
    global_shape = tuple(n * ranks if i == dim else n for i, n in enumerate(shape))
    if gated and name.endswith(".mlp.linear_fc1.weight"):
        half = shape[0] // 2
        gate = Block(half, (rank * half, 0))
        return global_shape, (gate, Block(half, (half * ranks + rank * half, 0)))
    offset = tuple(rank * n if i == dim else 0 for i, n in enumerate(shape))
    return global_shape, (Block(shape[0], offset),)


def _of_heads(chunk: Decoder) -> Iterator[nn.Parameter]:
    """Replicated parameters that see this tensor rank's heads only: norms of queries and keys. Told by the module's
    type, because the norm of a latent for queries has the same name and sees what all heads are made of."""
    for module in chunk.modules():
        if isinstance(module, SelfAttention):
            for norm in (module.q_layernorm, module.k_layernorm):
                assert norm is not None
                yield from norm.parameters()


def _sees_own_tokens(name: str, sequence_parallel: bool) -> bool:
    """Whether each tensor rank has only its own tokens' gradient of this parameter, if it is replicated."""
    own_part = any(part in name for part in _OF_MOE_BLOCK) or name.startswith(_SHARED_BY_LAYERS)
    return own_part or (sequence_parallel and not name.startswith("head."))


@torch.no_grad()
def initialize(chunks: Sequence[Decoder], infos: Sequence[ParameterInfo], model: ModelConfig, seed: int) -> None:
    """Fill every parameter as a pure function of (seed, global name, global index).

    So any layout starts from the same weights, tied copies start equal, and no seed checkpoint is needed. Experts are
    drawn one by one; other tensors (also the one that holds experts of different widths) are drawn whole on every rank
    and sliced, which costs one tensor's memory at a time.
    """
    for info in infos:
        if info.expert and info.parameter.dim() == 3:
            first = info.blocks[0].offset[0]
            for i in range(info.parameter.shape[0]):
                info.parameter[i].copy_(
                    _draw(f"{info.name}[{first + i}]", info.name, info.global_shape[1:], model, seed)
                )
            continue
        whole = initial_weight(info.name, info.global_shape, model, seed)
        row = 0
        for block in info.blocks:
            local = info.parameter[row : row + block.rows]
            index = tuple(slice(o, o + n) for o, n in zip(block.offset, local.shape, strict=True))
            local.copy_(whole[index])
            row += block.rows


def initial_weight(name: str, shape: tuple[int, ...], model: ModelConfig, seed: int) -> Tensor:
    """What `initialize` gives a parameter, whole and in fp32. Not for stacked experts, which are drawn one by one."""
    return _draw(name, name, shape, model, seed)


def initial_controllers(model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Every controller of a new model by global name (as `named_controllers`), without building the model."""
    if model.moe is None:
        return
    parts = {"mlp": 0} if model.moe.cartesian is None else {"mlp.first": 0, "mlp.second": 1}
    for layer in moe_layers(model):
        for part, sublayer in parts.items():
            number = layer if model.moe.cartesian is None else 2 * layer + sublayer
            router = build_router(model.moe, gate_width(model.moe, model.hidden_size), torch.float32, number)
            for name, value in router.controllers():
                yield f"decoder.layers.{layer}.{part}.router.{name}", value
            if model.moe.aux_loss == "global_batch":
                yield f"decoder.layers.{layer}.{part}.losses.load", balanced_load(model.moe)


def seeded_generator(seed: int, key: str) -> torch.Generator:
    """Random numbers as a pure function of (seed, key)."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _draw(key: str, name: str, shape: tuple[int, ...], model: ModelConfig, seed: int) -> Tensor:
    generator = seeded_generator(seed, key)
    distribution, scale = _initial_distribution(name, model)
    if distribution == "constant":
        return torch.full(shape, scale)
    if distribution == "normal":
        return torch.randn(shape, generator=generator) * scale
    return torch.rand(shape, generator=generator) * (2 * scale) - scale


def _initial_distribution(name: str, model: ModelConfig) -> tuple[str, float]:
    """(distribution, value | standard deviation | half width) of a parameter.

    Dense weights are Megatron's: normal(std), and std / sqrt(2 L) where a block writes to the residual stream.
    """
    std = model.init_method_std
    table: list[tuple[str, str, float]] = [
        ("*layernorm.weight", "constant", 1.0),
        ("head.bias", "constant", 0.0),
        ("*.linear_qkv.bias", "constant", 0.0),
        ("*.linear_proj.weight", "normal", std / math.sqrt(2 * model.num_layers)),
        ("*.linear_fc2.weight", "normal", std / math.sqrt(2 * model.num_layers)),
        ("*.experts.fc2", "normal", std / math.sqrt(2 * model.num_layers)),
        ("*.shared_expert.fc2", "normal", std / math.sqrt(2 * model.num_layers)),
    ]
    if model.moe is not None and (width := state_width(model.moe)) > 0:
        table.append(("router_gru.*", "uniform", width**-0.5))  # PyTorch's GRU
    if model.moe is not None and model.moe.hyper is not None:
        table += _hyper_distributions(model.moe.hyper, model.hidden_size)
        name = _OF_A_NETWORK.sub("hypernetwork.", name)
    for pattern, distribution, scale in table:
        if fnmatchcase(name, pattern):
            return distribution, scale
    return "normal", std


def _hyper_distributions(hyper: HyperConfig, d: int) -> list[tuple[str, str, float]]:
    """The hypernetwork's heads are "hyperfan-in" scaled by 1e-3, so that the generated expert starts near zero
    (official HyperMoE code, adapter_generators.py); its other linear layers are PyTorch's default, and embeddings
    normal(1), as is the constant that can stand for a condition. A static branch starts with the variance that
    generated weights have for a code of unit mean square."""
    h, r = hyper.hidden, hyper.bottleneck
    return [
        ("*_embedding", "normal", 1.0),
        ("*.constant", "normal", 1.0),
        ("hypernetwork.down.weight", "uniform", 1e-3 * math.sqrt(3 / (h * d))),
        ("hypernetwork.up.weight", "uniform", 1e-3 * math.sqrt(3 / (h * r))),
        ("hypernetwork.*_bias.weight", "uniform", 1e-3 * math.sqrt(3 / h)),
        ("hypernetwork.input.*", "uniform", (hyper.condition + hyper.layer_embedding) ** -0.5),
        ("hypernetwork.*.bias", "constant", 0.0),
        ("*.process_in.*", "uniform", hyper.expert_embedding**-0.5),
        ("*.process_out.*", "uniform", hyper.process**-0.5),
        ("*.hyper.down.weight", "uniform", 1e-3 * math.sqrt(3 / d)),
        ("*.hyper.up.weight", "uniform", 1e-3 * math.sqrt(3 / r)),
        ("*.hyper.*.bias", "constant", 0.0),
    ]
