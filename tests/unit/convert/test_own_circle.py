"""Our own exports come back: import, and export again to the same files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moetrain.checkpoint import CheckpointReader
from moetrain.config.loader import config_from_dict
from moetrain.config.schema import ModelConfig
from moetrain.convert.from_hf import import_hf
from moetrain.convert.hf import export_hf

from .conftest import KINDS, make_model

QUIET: Callable[[str], None] = lambda _: None  # noqa: E731
TRAINING = {"aux_loss": "global_batch", "aux_loss_coeff": 0.02, "z_loss_coeff": 1e-3}
BOTH = "da_moe-hyper"
STATE = ("thresholds", "quartiles", "offsets", "visits", "threshold")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def exported(write_run: Callable[[ModelConfig], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """An export in our own format, as a run of that kind makes it, in a folder of its own."""

    def export(kind: str, **options: Any) -> Path:
        root = tmp_path_factory.mktemp("circle")
        with CheckpointReader(write_run(make_model(kind), f"own {kind}") / "checkpoints" / "step-00000020") as reader:
            export_hf(reader, root / "hf", architecture="moetrain", announce=QUIET, **options)
        return root / "hf"

    return export


def circle(folder: Path, **options: Any) -> tuple[ModelConfig, Path]:
    """The imported model, and the folder that it is exported to again."""
    import_hf(folder, folder.parent / "imported", announce=QUIET)
    with CheckpointReader(folder.parent / "imported") as reader:
        export_hf(reader, folder.parent / "again", architecture="moetrain", announce=QUIET, **options)
        return config_from_dict(reader.config, "manifest").model, folder.parent / "again"


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_comes_back_byte_for_byte(kind: str, exported: Callable[..., Path]) -> None:
    first = exported(kind)
    _, second = circle(first)
    before, after = contents(first), contents(second)
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == []


def test_shards_and_bf16_come_back_byte_for_byte(exported: Callable[..., Path]) -> None:
    options = {"dtype": "bfloat16", "max_shard_size": "20KB"}
    first = exported(BOTH, **options)
    _, second = circle(first, **options)
    assert len(contents(first)) > 10 and contents(first) == contents(second)
