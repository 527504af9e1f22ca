from __future__ import annotations

import copy

import pytest

from moetrain.checkpoint import check_config, model_differences
from moetrain.errors import CheckpointError

CONFIG = {
    "run": {"dir": "a", "name": "x"},
    "model": {
        "num_layers": 4,
        "hidden_size": 64,
        "recompute": "none",
        "share_embeddings_and_output_weights": False,
        "moe": {"num_experts": 8, "layer_freq": [0, 1, 0, 1], "router": {"type": "top_k", "top_k": 2}, "hyper": None},
    },
    "parallel": {"tensor": 2, "pipeline": 1, "expert": 1},
    "data": {"train": [{"path": "p", "weight": 1.0}]},
    "optimizer": {"lr": 1e-3},
    "zero": {"stage": 1},
    "training": {"seed": 1, "global_batch_size": 8, "precision": "bf16", "train_iters": 10, "log_interval": 5},
    "checkpoint": {"keep_last": 3},
    "runtime": {"device": "cpu"},
}


def changed(**settings):
    """CONFIG with dotted paths (double underscores here) set to other values."""
    config = copy.deepcopy(CONFIG)
    for path, value in settings.items():
        *sections, last = path.split("__")
        at = config
        for section in sections:
            at = at[section]
        at[last] = value
    return config


def test_the_same_configuration_fits_without_notes():
    assert check_config(CONFIG, copy.deepcopy(CONFIG)) == []


def test_a_part_that_is_off_fits_a_checkpoint_from_before_there_was_such_a_part():
    current = changed(model__moe__capacity=None)
    assert check_config(CONFIG, current) == check_config(current, CONFIG) == []
    with pytest.raises(CheckpointError, match=r'model.moe.capacity: absent in the checkpoint, {"factor": 1.0} in this'):
        check_config(CONFIG, changed(model__moe__capacity={"factor": 1.0}))


def test_every_contradiction_in_the_model_is_listed_with_both_values():
    current = changed(model__num_layers=6, model__moe__router={"type": "da_moe", "mean_k": 2.0}, model__hidden_size=64)
    with pytest.raises(CheckpointError) as caught:
        check_config(CONFIG, current)
    for told in (
        "model.num_layers: 4 in the checkpoint, 6 in this run",
        'model.moe.router.type: "top_k" in the checkpoint, "da_moe" in this run',
        "model.moe.router.top_k: 2 in the checkpoint, absent in this run",
        "model.moe.router.mean_k: absent in the checkpoint, 2.0 in this run",
    ):
        assert told in str(caught.value)
    assert "hidden_size" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"model__moe": None},
        {"model__moe__layer_freq": [1, 0, 1, 0]},
        {"model__moe__hyper": {"bottleneck": 4}},
        {"model__share_embeddings_and_output_weights": True},
        {"model__share_embeddings_and_output_weights": 0},
    ],
)
def test_a_different_model_is_refused(settings):
    with pytest.raises(CheckpointError, match="belongs to another model"):
        check_config(CONFIG, changed(**settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"parallel": {"tensor": 1, "pipeline": 4, "expert": 2}},
        {"zero__stage": 2},
        {"run__dir": "b"},
        {"runtime__device": "cuda"},
        {"checkpoint__keep_last": 1},
        {"training__train_iters": 20},
    ],
)
def test_layout_place_and_length_may_change_without_a_word(settings):
    assert check_config(CONFIG, changed(**settings)) == []


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"training__seed": 2}, "training.seed: 1 in the checkpoint, 2 in this run"),
        ({"training__global_batch_size": 16}, "training.global_batch_size: 8 in the checkpoint, 16 in this run"),
        ({"optimizer__lr": 0.1}, "optimizer.lr: 0.001 in the checkpoint, 0.1 in this run"),
        ({"data__train": []}, 'data.train: [{"path": "p", "weight": 1.0}] in the checkpoint, [] in this run'),
        (
            {"model__moe__dispatch": {"max_rows": 9}},
            'model.moe.dispatch: absent in the checkpoint, {"max_rows": 9} in this run',
        ),
        ({"model__recompute": "full"}, 'model.recompute: "none" in the checkpoint, "full" in this run'),
    ],
)
def test_what_changes_the_course_of_training_is_noted(settings, note):
    assert check_config(CONFIG, changed(**settings)) == [note]


def test_another_tokenizer_is_refused_and_an_unknown_one_is_not():
    with pytest.raises(CheckpointError, match="tokenizer fingerprint: aa in the checkpoint, bb in this run"):
        check_config(CONFIG, CONFIG, "aa", "bb")
    assert check_config(CONFIG, CONFIG, "aa", "aa") == check_config(CONFIG, CONFIG, None, "bb") == []


def test_a_start_from_weights_alone_may_have_another_head_and_length_and_nothing_else():
    before, head = changed(model__seq_length=64, model__head=None), {"outputs": 2, "pooling": "mean"}
    now = changed(model__seq_length=32, model__head=head, model__share_embeddings_and_output_weights=True)
    notes = check_config(before, now, weights_only=True)
    assert [note.partition(":")[0] for note in notes] == [
        "model.head",
        "model.seq_length",
        "model.share_embeddings_and_output_weights",
    ]
    with pytest.raises(CheckpointError, match=r"model\.head.*model\.seq_length"):
        check_config(before, now)
    with pytest.raises(CheckpointError, match="hidden_size"):
        check_config(before, now | {"model": now["model"] | {"hidden_size": 32}}, weights_only=True)
    with pytest.raises(CheckpointError, match="share_embeddings"):  # without a head it decides what the output is
        check_config(before, changed(model__share_embeddings_and_output_weights=True), weights_only=True)


def test_another_objective_is_told():
    before = changed(training__objective={"type": "masked_lm", "share": 0.15})
    now = changed(training__objective={"type": "masked_lm", "share": 0.3})
    assert check_config(before, now) == ["training.objective.share: 0.15 in the checkpoint, 0.3 in this run"]


def test_a_setting_that_is_off_is_no_difference_to_a_version_without_it() -> None:
    old = {"model": {"hidden_size": 8}}
    new = {"model": {"hidden_size": 8, "add_qkv_bias": False, "qk_layernorm": None, "kv_channels": None}}
    assert list(model_differences(old, new)) == list(model_differences(new, old)) == []
    biased = {"model": {"hidden_size": 8, "add_qkv_bias": True}}
    assert list(model_differences(old, biased)) == [("model.add_qkv_bias", "absent", "true")]
