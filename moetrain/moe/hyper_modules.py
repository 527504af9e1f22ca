"""From a `ModelConfig` to the HyperMoE modules of one rank: each layer's own, and what its layers share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from moetrain.config.hypernetworks import hypernetworks, moe_layers
from moetrain.config.model import ModelConfig
from moetrain.config.moe import HyperConfig
from moetrain.moe.hyper import HyperExperts, StaticExpert
from moetrain.moe.hyper_network import HyperNetwork, SelectionEmbedding


@dataclass(frozen=True)
class HyperModules:
    """`of_layer`: by global number of the MoE layer; each registers what is its own. `shared`: by global name; the
    model registers these."""

    of_layer: Mapping[int, HyperExperts | StaticExpert]
    shared: Mapping[str, nn.Module]


def build_hyper(model: ModelConfig, layers: Collection[int], dtype: torch.dtype) -> HyperModules:
    """Modules for those of `layers` (global numbers) that have experts, uninitialized. Nothing is built that only
    layers of other ranks use; without HyperMoE nothing is built."""
    moe = model.moe
    if moe is None or moe.hyper is None:
        return HyperModules({}, {})
    config = moe.hyper
    here = [i for i in moe_layers(model) if i in layers]
    if config.condition_on == "static":
        return HyperModules({i: StaticExpert(config, model.hidden_size, dtype) for i in here}, {})
    networks = _networks(model, config, here, dtype)
    selections = {}
    for name, users in _selection_users(model, config).items():
        mine = [i for i in here if i in users]
        if mine:
            selections |= dict.fromkeys(mine, (name, SelectionEmbedding(config, moe.num_experts, users, name, dtype)))
    shared: dict[str, nn.Module] = {}
    if config.sharing != "layer":
        shared |= dict(networks.values())
    if config.embeddings == "model":
        shared |= dict(selections.values())
    of_layer = {
        i: HyperExperts(config, moe.num_experts, moe.selectable, i, selections[i][1], networks[i][1]) for i in here
    }
    return HyperModules(of_layer, shared)


def _networks(
    model: ModelConfig, config: HyperConfig, here: list[int], dtype: torch.dtype
) -> dict[int, tuple[str, HyperNetwork]]:
    """The hypernetwork of each layer, with its global name."""
    of_layer: dict[int, tuple[str, HyperNetwork]] = {}
    for name, layers in hypernetworks(model).items():
        mine = [i for i in here if i in layers]
        if mine:
            users = tuple(i for i in moe_layers(model) if i in layers)
            of_layer |= dict.fromkeys(mine, (name, HyperNetwork(config, layers, users, model.hidden_size, dtype)))
    return of_layer


def _selection_users(model: ModelConfig, config: HyperConfig) -> dict[str, tuple[int, ...]]:
    """Every selection embedding of the model by its global name, and the MoE layers that use it."""
    if config.embeddings == "model":
        return {"selection_embedding": moe_layers(model)}
    return {f"decoder.layers.{i}.mlp.hyper": (i,) for i in moe_layers(model)}
