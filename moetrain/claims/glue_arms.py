"""What `moetrain claims glue` compares: a pretrained model, and the same with one of the papers' methods added.

An arm starts where the model stands. A hyper-expert starts at zero, so its arm begins with the model's own function, as
the near-zero initial values of HyperMoE's released code nearly do; another router changes the function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moetrain.checkpoint import CheckpointReader, find_step_folder
from moetrain.checkpoint.manifest import MANIFEST_NAME
from moetrain.config.loader import config_from_dict, config_to_dict
from moetrain.config.schema import RunConfig
from moetrain.convert.from_hf import Dropped, import_hf
from moetrain.convert.upcycle import upcycle
from moetrain.errors import ConfigError

PLAIN = "plain"
ARMS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    # The published sizes, which are the defaults, and the sum of the released code (`docs/concepts/hypermoe.md`).
    "hypermoe": {"hyper": {"aggregation": "sum"}},
    # Both readings of the paper's maximum (`docs/concepts/da-moe.md`): of what a token receives, and of what it gives.
    "damoe-col": {"router": {"type": "da_moe", "importance": "col_max", "budget": "paper"}},
    "damoe-row": {"router": {"type": "da_moe", "importance": "row_max", "budget": "paper"}},
    # The paper's K is 1 where importance stays below 1 / num_experts; this one is 2 on average, whatever the texts.
    "damoe-mean-k": {"router": {"type": "da_moe", "importance": "col_max", "mean_k": 2.0}},
}
"""Name of an arm, and the settings under `model.moe` that it changes."""


def checkpoint_of(model: Path, out: Path, dropped: Dropped | None, announce: Callable[[str], None]) -> Path:
    """The step folder of `model`; a folder of Hugging Face is imported into `out` first, once, and proved."""
    if not (model / "config.json").is_file():
        if dropped is not None:
            raise ConfigError(f"--dropped ({dropped}) is of an import; {model} is no Hugging Face folder")
        return find_step_folder(model)
    imported = out / "imported"
    if not (imported / MANIFEST_NAME).is_file():
        return import_hf(model, imported, verify=True, dropped=dropped, announce=announce).folder
    with CheckpointReader(imported, verify="size") as reader:
        source = reader.extra.get("imported_from", {}).get("folder")
        capacity = (reader.config["model"].get("moe") or {}).get("capacity") or {}
    then, now = capacity.get("dropped"), dropped or ("zero" if capacity else None)
    if source != str(model) or then != now:
        raise ConfigError(
            f"{imported} was imported from {source} with --dropped {then}; choose another --out, or delete it"
        )
    return imported


def start_of(arm: str, model: Path, out: Path, seed: int, announce: Callable[[str], None]) -> Path:
    """The step folder that an arm starts from, made in `out` where it is not the model's own. New weights are functions
    of `seed`."""
    if not ARMS[arm]:
        return model
    with CheckpointReader(model) as reader:
        target = arm_config(arm, reader.config, seed)
        folder = out / "starts" / arm
        if not (folder / MANIFEST_NAME).is_file():
            upcycle(reader, target, folder, allow_change=True, verify=False, announce=announce)
    with CheckpointReader(folder, verify="size") as reader:
        if reader.extra["upcycled_from"]["folder"] != str(model) or reader.config != config_to_dict(target):
            raise ConfigError(f"{folder} was made of another model or seed; choose another --out, or delete it")
    return folder


def arm_config(arm: str, base: dict[str, Any], seed: int) -> RunConfig:
    """The settings of the arm's start, from those of the model's checkpoint. ConfigError where the model cannot have
    the arm."""
    moe = base["model"].get("moe")
    if moe is None:
        raise ConfigError(f"--arm {arm} adds to MoE layers, and the model has none; legal: {PLAIN}")
    if arm == "hypermoe" and moe.get("hyper") is not None:
        raise ConfigError("--arm hypermoe: the model has a hyper-expert already; it is arm plain")
    if "router" in ARMS[arm] and moe["router"]["type"] == "da_moe":
        raise ConfigError(f"--arm {arm}: the model has a DA-MoE router already; it is arm plain")
    model = {**base["model"], "moe": {**moe, **ARMS[arm]}}
    tree = {**base, "model": model, "training": {**base["training"], "seed": seed}}
    return config_from_dict(tree, f"--arm {arm}")


def check_arms(arms: Sequence[str]) -> None:
    """ConfigError for a name that is none, or one that comes twice."""
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise ConfigError(f"--arm ({', '.join(unknown)}) is unknown; legal: {', '.join(ARMS)}")
    if len(set(arms)) != len(arms):
        raise ConfigError(f"--arm: {', '.join(arms)} has one twice")
