"""Which hypernetworks a model has, from its config alone. Read by those that count, build, store and export them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moetrain.config.model import ModelConfig


def hypernetworks(model: ModelConfig) -> dict[str, range]:
    """Every hypernetwork by the prefix of its parameters' global names, and the layers that it serves.

    The range holds dense layers too: each layer in it has a row in the network's table of layer embeddings.
    """
    hyper = model.moe.hyper if model.moe is not None else None
    if hyper is None or hyper.condition_on == "static":
        return {}
    if hyper.sharing == "model":
        return {"hypernetwork": range(model.num_layers)}
    if hyper.sharing == "layer":
        return {f"decoder.layers.{i}.mlp.hyper.network": range(i, i + 1) for i in moe_layers(model)}
    assert hyper.stages is not None
    size = model.num_layers // hyper.stages
    return {f"hypernetworks.{n}": range(n * size, (n + 1) * size) for n in range(hyper.stages)}


def moe_layers(model: ModelConfig) -> tuple[int, ...]:
    """Global numbers of the layers with experts."""
    return tuple(i for i in range(model.num_layers) if model.is_moe_layer(i))
