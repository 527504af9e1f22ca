"""The router that docs/concepts/routers.md shows is a whole plug-in: the contract holds, an installed one is legal in a
config, and trains."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from moetrain.testing import check_router

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "concepts" / "routers.md").read_text(encoding="utf-8")
ROUTER = {"type": "min_p", "mean_k": 1.5, "rate": 0.2}
CONFIG = {
    "run": {"dir": "unused"},
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "ffn_hidden_size": 64,
        "vocab_size": 64,
        "seq_length": 16,
        "moe": {"num_experts": 4, "ffn_hidden_size": 16, "router": ROUTER},
    },
    "data": {"tokenizer": {"path": "unused"}, "train": [{"path": "unused"}]},
    "training": {"train_iters": 2, "global_batch_size": 4},
}


def blocks(word: str) -> list[str]:
    """The page's fenced blocks of a language."""
    return [part.split("```")[0].strip() + "\n" for part in PAGE.split(f"```{word}\n")[1:]]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as pip leaves it: the module, and its metadata with the entry point that the page tells to write."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "moetrain_min_p.py").write_text(blocks("python")[0], encoding="utf-8")
    info = folder / "moetrain_min_p-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: moetrain-min-p\nVersion: 1.0\n", encoding="utf-8")
    header, entry = blocks("toml")[0].splitlines()
    assert header == '[project.entry-points."moetrain.routers"]'
    name, _, value = entry.partition(" = ")
    (info / "entry_points.txt").write_text(f"[moetrain.routers]\n{name} = {value.strip(chr(34))}\n", encoding="utf-8")
    return folder


def python(site: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in the folder, which finds the plug-in and this checkout."""
    path = os.pathsep.join([str(site), str(ROOT), str(ROOT / "tests" / "distributed")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *words], cwd=site, env=environment, capture_output=True, text=True, timeout=300
    )


def load(site: Path) -> ModuleType:
    """The plug-in's module under its name, as the contract finds it."""
    spec = importlib.util.spec_from_file_location("moetrain_min_p", site / "moetrain_min_p.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["moetrain_min_p"] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_s_router_keeps_the_contract_without_being_installed(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "moetrain_min_p", load(site))
    exec(compile(blocks("python")[1], "docs/concepts/routers.md", "exec"), {})
    check_router(sys.modules["moetrain_min_p"].MinPRouterConfig(), num_experts=4, hidden_size=512)


def test_the_page_s_settings_of_deepseek_v3_are_legal() -> None:
    from moetrain.config.moe import MoEConfig

    router = yaml.safe_load(blocks("yaml")[0])["router"]
    moe = MoEConfig.model_validate({"num_experts": 256, "ffn_hidden_size": 2048, "router": router})
    assert moe.router.describe(256) == "top 8 by sigmoid of the best 4 of 8 groups, balanced by biases"


def test_an_installed_router_is_legal_described_and_checked(site: Path) -> None:
    (site / "run.yaml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    done = python(site, "-m", "moetrain", "config", "check", "run.yaml")
    assert done.returncode == 0, done.stderr
    assert "those near the best, 1.5 on average per token" in done.stdout
    wrong = python(site, "-m", "moetrain", "config", "check", "run.yaml", "model.moe.router.mean_k=5")
    assert wrong.returncode != 0
    assert "router.mean_k (5.0) must not exceed num_experts (4)" in wrong.stderr


def test_a_training_step_runs_with_it_and_moves_its_controller(site: Path) -> None:
    script = f"""
import torch.distributed as dist
from parity import SINGLE, tiny_config, train_all

dist.init_process_group("gloo", init_method="file://{site}/meeting", rank=0, world_size=1)
(run,) = train_all([tiny_config(SINGLE, model__moe__router={ROUTER!r})])
assert run.losses[-1] < run.losses[0], run.losses
assert len(run.controllers) == 3 and all(value != -1.0 for value in run.controllers.values()), run.controllers
print("trained", sorted(run.controllers))
"""
    done = python(site, "-c", script)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "decoder.layers.0.mlp.router.log_fraction" in done.stdout
