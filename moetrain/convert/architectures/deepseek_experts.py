"""DeepSeek's experts, which others have taken over: shared experts beside the routed ones, and dense layers first. The
shared experts are one MLP, which is one shared expert of ours."""

from __future__ import annotations

from typing import Any

from moetrain.config.model import ModelConfig
from moetrain.convert.architectures.base import Config, refuse
from moetrain.convert.architectures.decoder import MLP, THEIR_MLP
from moetrain.convert.mapping import Rule, same
from moetrain.errors import ConversionError

SHARED_EXPERT: tuple[Rule, ...] = (
    Rule(
        MLP + "shared_expert.fc1",
        (THEIR_MLP + "shared_experts.gate_proj.weight", THEIR_MLP + "shared_experts.up_proj.weight"),
        "split_gate_up",
    ),
    same(MLP + "shared_expert.fc2", THEIR_MLP + "shared_experts.down_proj.weight"),
)
# A rounded bias would choose other experts.
ROUTER_BIAS = same(MLP + "router.bias", THEIR_MLP + "gate.e_score_correction_bias", keep_fp32=True)


def read_layers(config: Config, tree: dict[str, Any], dense: int = 0, shared: int | None = None) -> None:
    """Which layers have experts, and the width of the shared one. `dense` and `shared`: numbers of layers and experts
    that `transformers` takes where config.json has none."""
    layers, first = tree["num_layers"], config.get("first_k_dense_replace", dense) or 0
    if type(first) is not int or not 0 <= first < layers:
        refuse("first_k_dense_replace", first, f"0 to num_hidden_layers - 1 ({layers - 1})")
    number = config.get("n_shared_experts", shared)
    if type(number) is not int or not 1 <= number <= 1024:
        refuse("n_shared_experts", number, "1 to 1024")
    tree["moe"]["shared_expert_ffn_hidden_size"] = number * tree["moe"]["ffn_hidden_size"]
    tree["moe"]["layer_freq"] = [int(i >= first) for i in range(layers)]


def write_layers(model: ModelConfig, config: dict[str, Any]) -> None:
    """The same into a config.json. ConversionError where the shared expert is no whole number of theirs."""
    assert model.moe is not None
    wide = model.moe.shared_expert_ffn_hidden_size or 0
    if wide == 0 or wide % model.moe.ffn_hidden_size:
        raise ConversionError(
            f"{config['model_type']} does not fit this model: model.moe.shared_expert_ffn_hidden_size ({wide}) must be "
            f"a multiple of model.moe.ffn_hidden_size ({model.moe.ffn_hidden_size})"
        )
    config["n_shared_experts"] = wide // model.moe.ffn_hidden_size
    config["first_k_dense_replace"] = next(i for i in range(model.num_layers) if model.is_moe_layer(i))
