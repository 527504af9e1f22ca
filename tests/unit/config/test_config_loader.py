"""Layers, overrides, and the one error that names everything wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from moetrain.config.da_moe import DAMoERouterConfig
from moetrain.config.loader import (
    PATH_SETTINGS,
    config_from_dict,
    config_to_dict,
    dump_yaml,
    fingerprint,
    json_schema,
    load_config,
)
from moetrain.config.registry import FAMILIAR_NAMES, edit_distance, nearest_setting, setting_paths, variant_paths
from moetrain.config.routers import BUILT_IN, TopKRouterConfig
from moetrain.config.schema import RunConfig
from moetrain.errors import ConfigError

Write = Callable[..., Path]


@pytest.fixture
def base(write: Write, tree: dict[str, Any]) -> Path:
    return write("base.yaml", tree)


def _complaint(paths: list[Path], overrides: list[str] | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(paths, overrides or [])
    return str(error.value)


# --- layers ---------------------------------------------------------------------------------------------------------


def test_later_files_win_key_by_key_and_lists_are_replaced(base: Path, write: Write) -> None:
    upper = write("upper.yaml", "model: {num_layers: 8}\ndata: {train: [{path: c}]}\n")
    config = load_config([base, upper])
    assert config.model.num_layers == 8 and config.model.hidden_size == 64
    assert [entry.path for entry in config.data.train] == ["c"]


def test_null_in_a_later_file_removes_a_section(base: Path, write: Write) -> None:
    assert load_config([base, write("dense.yaml", "model: {moe: null}")]).model.moe is None


def test_overrides_beat_files_and_reach_into_lists(base: Path) -> None:
    config = load_config([base], ["data.train.1.weight=2", "optimizer.betas=[0.8, 0.9]", "optimizer.lr=1e-4"])
    assert [entry.weight for entry in config.data.train] == [1.0, 2.0]
    assert config.optimizer.betas == (0.8, 0.9) and config.optimizer.lr == 1e-4


def test_an_override_keeps_equal_signs_of_its_value_and_the_last_one_wins(base: Path) -> None:
    assert load_config([base], ["run.name=a", "run.name=b=c"]).run.name == "b=c"


@pytest.mark.parametrize("by_file", [True, False])
def test_another_router_type_replaces_the_router_instead_of_mixing_settings(
    base: Path, write: Write, by_file: bool
) -> None:
    upper = write("router.yaml", "model: {moe: {router: {type: da_moe}}}")
    config = load_config([base, upper]) if by_file else load_config([base], ["model.moe.router.type=da_moe"])
    assert config.model.moe is not None and config.model.moe.router == DAMoERouterConfig()


def test_the_same_router_type_keeps_the_settings_below(base: Path, write: Write) -> None:
    upper = write("router.yaml", "model: {moe: {router: {type: top_k, gates: renormalized}}}")
    config = load_config([base, upper], ["model.moe.router.type=top_k"])
    assert config.model.moe is not None
    assert config.model.moe.router == TopKRouterConfig(top_k=2, gates="renormalized")


def test_optimizer_type_is_a_plain_setting_and_keeps_its_siblings(base: Path) -> None:
    config = load_config([base], ["optimizer.lr=1e-2", "optimizer.type=adamw"])
    assert (config.optimizer.lr, config.optimizer.type) == (1e-2, "adamw")


def test_base_files_are_found_beside_the_file_and_lie_below_it(base: Path, write: Write) -> None:
    write("sub/middle.yaml", "base: ../base.yaml\nmodel: {num_layers: 8}\nrun: {name: middle}\n")
    write("sub/other.yaml", "training: {seed: 7}")
    top = write("sub/top.yaml", "base: [middle.yaml, other.yaml]\nrun: {name: top}\n")
    config = load_config([top])
    assert (config.model.num_layers, config.run.name, config.training.seed) == (8, "top", 7)


def test_a_cycle_of_base_files_is_refused(write: Write) -> None:
    first = write("a.yaml", "base: b.yaml")
    write("b.yaml", "base: a.yaml")
    assert "cycle" in _complaint([first])


def test_the_same_base_under_two_files_is_no_cycle(base: Path, write: Write) -> None:
    write("x.yaml", "base: base.yaml")
    write("y.yaml", "base: base.yaml")
    assert load_config([write("top.yaml", "base: [x.yaml, y.yaml]")]) == load_config([base])


@pytest.mark.parametrize("value", ["3", "[]", "[1]", "{a: b}", "''"])
def test_base_must_name_files(write: Write, value: str) -> None:
    assert "file name" in _complaint([write("a.yaml", f"base: {value}")])


# --- environment ----------------------------------------------------------------------------------------------------


def test_variables_are_expanded_in_paths(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOETRAIN_TEST_ROOT", "/scratch")
    config = load_config([base], ["run.dir=${MOETRAIN_TEST_ROOT}/run", "data.train.1.path=${MOETRAIN_TEST_ROOT}/b"])
    assert (config.run.dir, config.data.train[1].path) == ("/scratch/run", "/scratch/b")


def test_a_missing_variable_and_a_variable_outside_paths_are_errors(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MOETRAIN_NOWHERE", raising=False)
    text = _complaint([base], ["run.dir=${MOETRAIN_NOWHERE}/x", "run.name=${HOME}", "checkpoint.load=${a-b}"])
    assert "run.dir: '${MOETRAIN_NOWHERE}/x' needs the environment variable MOETRAIN_NOWHERE" in text
    assert "run.name: '${HOME}': environment variables are expanded only in paths" in text
    assert "checkpoint.load: '${a-b}' must name variables as ${NAME}" in text


def test_every_setting_that_names_a_place_expands_variables() -> None:
    places = {p for p in setting_paths() if p.rpartition(".")[2] in ("path", "dir", "cache_dir", "load")}
    assert places == PATH_SETTINGS


# --- complaints -----------------------------------------------------------------------------------------------------


def test_all_problems_come_in_one_error_each_with_value_rule_and_place(base: Path, write: Write) -> None:
    bad = write("bad.yaml", "model:\n  num_layers: 0\n  hiden_size: 3\ntraining:\n  precision: fp8\n")
    text = _complaint([base, bad], ["parallel.tensor=two"])
    assert text.splitlines()[0] == "4 problems in the configuration:"
    assert f"model.num_layers: 0 must be greater than or equal to 1 [{bad}:2:3]" in text
    assert f"model.hiden_size: unknown setting; did you mean model.hidden_size? [{bad}:3:3]" in text
    assert f"training.precision: \"fp8\" must be 'fp32' or 'bf16' [{bad}:5:3]" in text
    assert "parallel.tensor: \"two\" must be a whole number [override 'parallel.tensor=two']" in text


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.moe.router.topk=3", "model.moe.router.topk: unknown setting; did you mean model.moe.router.top_k?"),
        ("model.moe.top_k=3", "did you mean model.moe.router.top_k?"),
        ("data.train.1.wieght=3", "data.train.1.wieght: unknown setting; did you mean data.train.1.weight?"),
        ("parallel.expert_model_parallel_size=2", "did you mean parallel.expert?"),
        ("zzz=1", "zzz: unknown setting; known here: run, model, parallel"),
        ("model.moe.router.mean_k=3", "model.moe.router.mean_k: unknown setting"),
        ("model.moe.router.top_k=0", "model.moe.router.top_k: 0 must be greater"),
        ("model.moe.router={type: da_moe, mean_k: 1, min_k: 4}", "model.moe.router: mean_k (1.0) must lie between"),
        ("model.moe.router={top_k: 2}", "model.moe.router.type: required in this section; legal: top_k, da_moe"),
        ("model.moe.router.type=da_mo", 'model.moe.router.type: "da_mo" must be one of top_k, da_moe'),
        ("model.moe.layer_freq=[0,1,2,1]", "model.moe.layer_freq.2: 2 must be 0 or 1"),
        ("model.moe.layer_freq=often", 'model.moe.layer_freq: "often" must be a whole number or a list'),
        ("model.moe.layer_freq={a: 1}", 'model.moe.layer_freq: {"a": 1} must be a whole number or a list'),
        ("model.moe.layer_freq=[true,0,0,1]", "model.moe.layer_freq.0: true must be a number"),
        ("model.moe.dispatch.max_rows=0", "model.moe.dispatch.max_rows: 0 must be greater than or equal to 1"),
        ("model.moe.dispatch.overlap=7", "model.moe.dispatch.overlap: 7 must be a valid boolean"),
        ("zero.stage=true", "zero.stage: true must be a number"),
        ("parallel.tensor=true", "parallel.tensor: true must be a whole number"),
        ("parallel.sequence=yes", 'parallel.sequence: "yes" must be a valid boolean'),
        ("run.name=7", "run.name: 7 must be a valid string; write it in quotes"),
        ("data.train=[]", "data.train: [] must have at least 1 item"),
        ("data.split='1,2'", 'data.split: "1,2" must be three non-negative numbers'),
        ("optimizer=3", "optimizer: 3 must be a mapping of settings"),
        ("optimizer.betas=[0.9]", "optimizer.betas.1: required"),
        ("optimizer.lr=.inf", 'optimizer.lr: ".inf" must be a valid number'),
        ("data.train.7.weight=1", "data.train is a list"),
        ("data.train.-1.weight=1", "data.train is a list"),
        ("run.dir.x=1", "run.dir is a string"),
        ("noequals", "override 'noequals': must read path.to.setting=value"),
        ("a..b=1", "override 'a..b=1': must read path.to.setting=value"),
        ("run.name=[", "override 'run.name=[': not valid YAML"),
    ],
)
def test_each_kind_of_mistake_is_named_by_the_path_that_the_user_wrote(base: Path, override: str, words: str) -> None:
    text = _complaint([base], [override])
    assert words in text
    assert text.startswith("1 problem "), text
    assert f"override {override!r}" in text or "override '" in text


def test_missing_settings_say_where_to_set_them(base: Path, write: Write, tree: dict[str, Any]) -> None:
    del tree["training"]["train_iters"], tree["data"]
    path = write("partial.yaml", tree)
    text = _complaint([path])
    assert (
        "training.train_iters: required, but set nowhere; set it in section training of a YAML file or as override"
        in text
    )
    assert "data: required section (settings: tokenizer, train, valid, split, cache_dir)" in text


def test_a_rule_between_settings_cites_where_each_was_set(base: Path) -> None:
    text = _complaint([base], ["model.moe.router.top_k=9"])
    assert "model.moe: router.top_k (9) must not exceed num_experts (8)" in text
    assert "router.top_k: override 'model.moe.router.top_k=9'" in text and f"num_experts: {base}:" in text


def test_rules_across_sections_are_reported_with_places(base: Path) -> None:
    text = _complaint([base], ["parallel.expert=3"])
    assert "parallel.expert (3) must divide model.moe.num_experts (8)" in text and "legal: 1, 2, 4, 8" in text
    assert "parallel.expert: override 'parallel.expert=3'" in text


def test_unreadable_files_are_all_named(tmp_path: Path, write: Write) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"a: \xff")
    text = _complaint([tmp_path / "absent.yaml", tmp_path, latin, write("list.yaml", "- a")])
    assert text.startswith("4 problems")
    assert "absent.yaml: cannot be read: No such file" in text
    assert "latin.yaml: is not UTF-8" in text
    assert "list.yaml: must be a mapping of settings at the top, not a list" in text


# --- what comes out -------------------------------------------------------------------------------------------------


def test_a_dumped_config_loads_back_equal(base: Path, write: Write) -> None:
    config = load_config([base], ["run.name='1e-4'", "run.dir='yes'", "optimizer.eps=1e-08", "model.moe.hyper={}"])
    assert load_config([write("dumped.yaml", dump_yaml(config))]) == config


def test_a_config_survives_json(base: Path) -> None:
    config = load_config([base])
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config))), "manifest.json") == config


def test_a_damaged_manifest_is_named_as_the_place(base: Path) -> None:
    stored = config_to_dict(load_config([base]))
    stored["model"]["num_layers"] = -1
    with pytest.raises(ConfigError, match=r"model.num_layers: -1 must be .* \[manifest.json\]"):
        config_from_dict(stored, "manifest.json")


def test_the_fingerprint_sees_values_and_nothing_else(base: Path, write: Write, tree: dict[str, Any]) -> None:
    config = load_config([base])
    shuffled = dict(reversed(tree.items()))
    shuffled["optimizer"] = {"lr": 3e-4}  # the default, written out
    same = load_config([write("same.yaml", shuffled)])
    other = load_config([base], ["training.seed=1"])
    assert fingerprint(config) == fingerprint(same) != fingerprint(other)
    assert fingerprint(config.model) == fingerprint(other.model)
    assert fingerprint(config.model) != fingerprint(load_config([base], ["model.num_layers=8"]).model)


def test_the_json_schema_documents_every_section() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == set(RunConfig.model_fields)
    assert schema["additionalProperties"] is False


# --- the registry ---------------------------------------------------------------------------------------------------


def test_the_registry_knows_exactly_the_settings_that_a_full_config_has(tree: dict[str, Any]) -> None:
    def walk(section: BaseModel, prefix: str) -> set[str]:
        found: set[str] = set()
        for name in type(section).model_fields:
            value = getattr(section, name)
            found.add(f"{prefix}{name}")
            if isinstance(value, BaseModel):
                found |= walk(value, f"{prefix}{name}.")
            if isinstance(value, list) and value and isinstance(value[0], BaseModel):
                found |= {f"{prefix}{name}.*"} | walk(value[0], f"{prefix}{name}.*.")
        return found

    tree["data"]["valid"] = [{"path": "v"}]
    tree["model"]["moe"]["hyper"] = {}
    known = set()
    for kind in BUILT_IN:
        tree["model"]["moe"]["router"] = {"type": kind.model_fields["type"].default}
        known |= walk(config_from_dict(tree, "test"), "")
    tree["model"] |= {"type": "encoder", "head": {"outputs": 2}}
    tree["training"]["objective"] = {"type": "classify", "classes": ["0", "1"]}
    known |= walk(config_from_dict(tree, "test"), "")
    tree["model"]["head"] = None
    tree["training"]["objective"] = {"type": "masked_lm"}
    known |= walk(config_from_dict(tree, "test"), "")
    moe = tree["model"]["moe"]
    moe |= {"computation_free": {"zero_experts": 1}, "capacity": {"factor": 1.0}}
    known |= walk(config_from_dict(tree, "test"), "")
    del moe["computation_free"], moe["hyper"]
    mask = {"frequent_ids": 1, "frequent_experts": 2}
    moe |= {"router": {"type": "top_k"}, "token_mask": mask, "router_state": {"type": "recurrent"}, "cartesian": {}}
    known |= walk(config_from_dict(tree, "test"), "")
    yarn = {"factor": 2.0, "original_max_position_embeddings": 16}
    widths = {"kv_lora_rank": 8, "qk_head_dim": 8, "qk_pos_emb_head_dim": 8, "v_head_dim": 8}
    tree["model"] |= {"type": "decoder", "num_query_groups": None, "multi_latent_attention": widths | {"yarn": yarn}}
    tree["training"]["objective"] = {"type": "causal_lm"}
    known |= walk(config_from_dict(tree, "test"), "")
    assert set(setting_paths()) == known


def test_the_router_and_the_objective_come_in_kinds() -> None:
    assert variant_paths() == {("model", "moe", "router"), ("training", "objective")}


def test_familiar_names_lead_to_settings_that_exist() -> None:
    assert set(FAMILIAR_NAMES.values()) <= set(setting_paths())


def test_far_names_get_no_suggestion() -> None:
    assert nearest_setting("completely.unrelated") is None


@pytest.mark.parametrize(
    ("left", "right", "cost"), [("", "ab", 2), ("kitten", "sitting", 3), ("topk", "top_k", 1), ("x", "x", 0)]
)
def test_edit_distance_counts_single_changes(left: str, right: str, cost: int) -> None:
    assert edit_distance(left, right) == edit_distance(right, left) == cost
