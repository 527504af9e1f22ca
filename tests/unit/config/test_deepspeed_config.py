from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from moetrain.config.deepspeed import deepspeed_config, zero_settings
from moetrain.config.layout import ParallelLayout
from moetrain.config.loader import config_from_dict
from moetrain.config.schema import RunConfig
from moetrain.errors import ConfigError


def _config(tree: dict[str, Any], **sections: Any) -> RunConfig:
    return config_from_dict({**tree, **sections}, "test")


def test_the_json_repeats_our_settings_and_satisfies_deepspeeds_batch_rule(tree: dict[str, Any]) -> None:
    config = _config(tree, zero={"stage": 2, "reduce_bucket_size": 1000}, optimizer={"clip_grad": 0.5})
    layout = ParallelLayout(8, pipeline=2)
    generated = deepspeed_config(config, layout)
    assert generated["gradient_clipping"] == 0.5
    assert generated["zero_optimization"]["stage"] == 2
    assert generated["zero_optimization"]["reduce_bucket_size"] == 1000
    assert generated["bf16"] == {"enabled": True} and generated["fp16"] == {"enabled": False}
    assert generated["data_types"] == {"grad_accum_dtype": "fp32"}
    micro, steps = generated["train_micro_batch_size_per_gpu"], generated["gradient_accumulation_steps"]
    assert steps == 1 and generated["train_batch_size"] == micro * steps * layout.data == 16


def test_the_users_section_is_merged_in(tree: dict[str, Any]) -> None:
    config = _config(
        tree, deepspeed={"zero_optimization": {"allgather_bucket_size": 77, "round_robin_gradients": True}}
    )
    zero = deepspeed_config(config, ParallelLayout(1))["zero_optimization"]
    assert (zero["allgather_bucket_size"], zero["round_robin_gradients"], zero["stage"]) == (77, True, 1)


def test_repeating_our_own_value_is_no_contradiction(tree: dict[str, Any]) -> None:
    repeated = {"bf16": {"enabled": True}, "train_batch_size": 16, "zero_optimization": {"stage": 1}}
    assert _config(tree, deepspeed=repeated).deepspeed == repeated


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"gradient_clipping": 2.0}, "deepspeed.gradient_clipping: 2.0 contradicts optimizer.clip_grad"),
        ({"zero_optimization": {"stage": 2}}, "deepspeed.zero_optimization.stage: 2 contradicts zero.stage"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage: true contradicts zero.stage"),
        ({"fp16": {"enabled": True}}, "deepspeed.fp16.enabled: true contradicts training.precision"),
        ({"optimizer": {"type": "Adam"}}, 'deepspeed.optimizer.type: "Adam" contradicts optimizer;'),
        ({"train_micro_batch_size_per_gpu": 4}, "contradicts training.micro_batch_size"),
        ({"train_batch_size": "auto"}, 'deepspeed.train_batch_size: "auto" contradicts training.global_batch_size'),
        ({"wall_clock_breakdown": True}, "deepspeed.wall_clock_breakdown: true would have no effect"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            'offload_optimizer.device: "cpu" would have no effect',
        ),
        ({"zero_optimization": {"contiguous_gradients": False}}, "would have no effect"),
        ({"zero_optimization": {"overlap_comm": True}}, "would have no effect"),
        ({"zero_optimization": {"stage3_max_live_parameters": 1}}, "would have no effect"),
        ({"zero_optimization": {"round_robin_gradients": 1}}, "must be true or false"),
        ({"zero_optimization": {"allgather_bucket_size": 0}}, "must be a whole number of at least 1"),
        ({"zero_optimization": {"allgather_bucket_size": True}}, "must be a whole number of at least 1"),
        ({"zero_optimization": {"reduce_scatter": False}}, "must be true for a model with experts"),
        ({"zero_optimization": 3}, "deepspeed.zero_optimization: 3 would have no effect"),
        ({"bf16": {}}, "deepspeed.bf16: {} would have no effect"),
    ],
)
def test_contradictions_and_keys_without_effect_are_refused(
    tree: dict[str, Any], section: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as error:
        _config(tree, deepspeed=section)
    assert words in str(error.value)


def test_each_stage_takes_its_own_settings(tree: dict[str, Any]) -> None:
    overlap = {"zero_optimization": {"overlap_comm": True}}
    assert _config(tree, zero={"stage": 2}, deepspeed=overlap).deepspeed == overlap
    tree["model"]["moe"] = None
    live = {"zero_optimization": {"stage3_max_live_parameters": 0}}
    assert _config(tree, zero={"stage": 3}, deepspeed=live).deepspeed == live
    dense = {"zero_optimization": {"reduce_scatter": False}}
    assert _config(tree, deepspeed=dense).deepspeed == dense


def _arguments_of_init(file: str, name: str) -> set[str]:
    """Arguments of a DeepSpeed class, read from its source: importing it would take seconds."""
    spec = importlib.util.find_spec("deepspeed")
    assert spec is not None and spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / file).read_text())
    cls = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    init = next(node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    return {argument.arg for argument in init.args.args}


def test_every_setting_that_is_said_to_take_effect_is_an_argument_of_deepspeeds_optimizer() -> None:
    two = _arguments_of_init("runtime/zero/stage_1_and_2.py", "DeepSpeedZeroOptimizer")
    three = _arguments_of_init("runtime/zero/stage3.py", "DeepSpeedZeroOptimizer_Stage3")
    assert two >= set(zero_settings(0)) | set(zero_settings(1)) | set(zero_settings(2)) | {"reduce_bucket_size"}
    assert three >= {key.removeprefix("stage3_") for key in zero_settings(3)}


def test_every_generated_zero_setting_is_one_that_takes_effect(tree: dict[str, Any]) -> None:
    ours = {"stage", "reduce_bucket_size"}
    arguments = _arguments_of_init("runtime/zero/stage_1_and_2.py", "DeepSpeedZeroOptimizer")
    for stage in (0, 1, 2):
        zero = deepspeed_config(_config(tree, zero={"stage": stage}), ParallelLayout(1))["zero_optimization"]
        assert set(zero) - {"stage"} <= arguments and ours <= set(zero)
