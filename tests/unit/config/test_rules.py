from __future__ import annotations

from typing import Any

import pytest

from moetrain.config.loader import config_from_dict
from moetrain.errors import ConfigError


def complaint(tree: dict[str, Any], changes: dict[str, Any]) -> str:
    """What is wrong with `tree` when the settings at these paths are changed."""
    for path, value in changes.items():
        *sections, name = path.split(".")
        section = tree
        for key in sections:
            section = section.setdefault(key, {})
        section[name] = value
    with pytest.raises(ConfigError) as caught:
        config_from_dict(tree, "test")
    return str(caught.value)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ({"warmup_iters": 11}, "warmup_iters (11) must not exceed training.train_iters (10)"),
        ({"min_lr": 1.0}, "min_lr (1) must not exceed optimizer.lr (0.0003)"),
        ({"type": "constant", "decay_iters": 5}, "decay_iters (5) means nothing with type constant"),
        ({"type": "constant", "min_lr": 1e-5}, "min_lr (1e-05) means nothing with type constant"),
        ({"type": "cosine", "warmup_iters": 4, "decay_iters": 4}, "decay_iters (4) is the iteration where cosine"),
        ({"type": "linear", "warmup_iters": 4, "decay_iters": 3}, "it must exceed warmup_iters (4)"),
        ({"type": "wsd", "warmup_iters": 6, "decay_iters": 5}, "(6 + 5) must not exceed training.train_iters (10)"),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_refused_by_name(tree: dict[str, Any], schedule, words: str) -> None:
    text = complaint(tree, {"optimizer.schedule": schedule})
    assert text.startswith("1 problem") and words in text


@pytest.mark.parametrize("split", ["inf,1,1", "nan,1,1", "1,nan,0", "98,-1,3", "0,1,1", "1,2", "a,b,c"])
def test_a_split_that_is_no_three_shares_is_refused(tree: dict[str, Any], split: str) -> None:
    assert f'data.split: "{split}" must be three non-negative numbers' in complaint(tree, {"data.split": split})


def test_every_broken_rule_between_sections_has_a_line_of_its_own(tree: dict[str, Any]) -> None:
    text = complaint(tree, {"parallel.expert": 3, "zero.stage": 3, "training.micro_batch_size": 3})
    assert len(text.splitlines()) == 4
    assert text.startswith("3 problems in the configuration:\n")
    for line, setting in zip(
        text.splitlines()[1:], ("parallel.expert (3)", "zero.stage (3)", "training.micro_batch_size (3)"), strict=True
    ):
        assert line.startswith(f"  {setting}")


@pytest.mark.parametrize(
    ("hyper", "words"),
    [
        ({"sharing": "stage"}, "stages (a number) and sharing: stage need each other; they are unset and stage"),
        ({"stages": 2}, "they are 2 and model"),
        ({"sharing": "stage", "stages": 3}, "moe.hyper.stages (3) must divide num_layers (4)"),
        ({"sharing": "stage", "stages": 4}, "moe.hyper.stages (4) leaves layers 0 to 0 with a hypernetwork and no MoE"),
        ({"aggregation": "prob", "form": "grouped"}, "form (grouped) generates an expert for each set"),
        (
            {"condition_on": "constant", "aggregation": "sum"},
            "aggregation (sum) means nothing with condition_on",
        ),
        ({"condition_on": "static", "sharing": "layer"}, "sharing (layer) means nothing with condition_on static"),
        (
            {"condition_on": "static", "embeddings": "model"},
            "embeddings (model) means nothing with condition_on",
        ),
        ({"condition_on": "static", "form": "grouped"}, "form (grouped) means nothing with condition_on static"),
    ],
)
def test_hypermoe_settings_that_cannot_work_together_are_refused(
    tree: dict[str, Any], hyper: dict[str, Any], words: str
) -> None:
    text = complaint(tree, {"model.moe.hyper": hyper})
    assert text.startswith("1 problem") and words in text


TASK = {
    "model.head": {"outputs": 2},
    "training.objective": {"type": "classify", "classes": ["no", "yes"]},
    "data.valid": [{"path": "dev.jsonl"}],
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.type": "encoder"}, "training.objective.type (causal_lm) with model.type (encoder)"),
        (
            {"training.objective": {"type": "masked_lm"}},
            "objective.type (masked_lm) with model.type (decoder)",
        ),
        ({"model.head": {"outputs": 2}}, "model.head stands where training.objective.type (causal_lm) needs"),
        (TASK | {"model.head": None}, "needs model.head.outputs: 2; there is no model.head"),
        (TASK | {"model.head": {"outputs": 3}}, "needs model.head.outputs: 2; there is 3"),
        (TASK | {"model.head": {"outputs": 2, "pooling": "first"}}, "head.pooling (first) in a decoder"),
        (TASK | {"training.objective": {"type": "regress"}}, "(regress) needs model.head.outputs: 1; there is 2"),
        (TASK | {"data.valid": []}, "(classify) never cuts data.train; name data.valid, or set training.eval_iters: 0"),
        (TASK | {"data.split": "90,10,0"}, "data.split (90,10,0) means nothing to training.objective.type (classify)"),
        (TASK | {"data.train": [{"path": "a", "weight": 2.0}]}, "weights other than 1 mean nothing"),
        (TASK | {"training.objective": {"type": "classify", "classes": ["a", "a"]}}, "classes (a, a) must all be"),
        ({"checkpoint.load_weights_only": True}, "checkpoint.load_weights_only: true needs checkpoint.load"),
        (
            {"model.moe.router": {"type": "da_moe", "importance": "col_sum"}},
            "moe.router.importance (col_sum) looks at later tokens",
        ),
        (
            {"model.moe.router": {"type": "da_moe", "importance": "col_sum", "budget": "paper"}},
            "legal with it: budget mean_k",
        ),
    ],
)
def test_an_objective_that_the_model_or_the_data_cannot_serve_is_refused(
    tree: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    assert words in complaint(tree, changes)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_task_on_whole_texts_is_legal_for_both_kinds_of_model(tree: dict[str, Any], kind: str) -> None:
    tree["model"] |= {"type": kind, "head": {"outputs": 2}}
    tree["data"]["valid"] = TASK["data.valid"]
    tree["training"]["objective"] = TASK["training.objective"]
    assert config_from_dict(tree, "test").training.objective.type == "classify"
