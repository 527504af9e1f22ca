"""Everything under configs/ loads, in the combinations that its README documents."""

from __future__ import annotations

import shlex
from itertools import product
from pathlib import Path

import pytest

from moetrain.cli.arguments import split_words
from moetrain.config.da_moe import DAMoERouterConfig
from moetrain.config.layout import check_layout, smallest_world
from moetrain.config.loader import load_config
from moetrain.config.size import parameter_count
from moetrain.config.yaml_tree import read_yaml

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = ROOT / "configs"
PREFIX = "moetrain config check "
DOCUMENTED = [line for line in (CONFIGS / "README.md").read_text().splitlines() if line.startswith(PREFIX)]
MODELS = sorted((CONFIGS / "models").glob("*.yaml"))
PARALLEL = sorted((CONFIGS / "parallel").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("line", DOCUMENTED, ids=lambda line: " ".join(Path(w).stem for w in shlex.split(line)[3:]))
def test_each_documented_command_is_a_legal_run(line: str) -> None:
    words, _, world_size = line.removeprefix(PREFIX).partition(" --world-size ")
    config = load_config(*split_words(shlex.split(words)))
    check_layout(config, int(world_size))


@pytest.mark.parametrize(("model", "parallel"), list(product(MODELS, PARALLEL)), ids=lambda path: path.stem)
def test_each_model_runs_on_the_smallest_world_of_each_parallel_file(model: Path, parallel: Path) -> None:
    config = load_config([CONFIGS / "base.yaml", CONFIGS / "data" / "stdlib.yaml", model, parallel])
    check_layout(config, smallest_world(config.parallel))


def test_the_readme_documents_every_file_that_is_no_base_of_another() -> None:
    text = "\n".join(DOCUMENTED)
    files = {path: read_yaml(path).plain() for path in CONFIGS.rglob("*.yaml")}
    bases = {(path.parent / tree["base"]).resolve() for path, tree in files.items() if "base" in tree}
    names = [path.relative_to(ROOT).as_posix() for path in files if path.resolve() not in bases]
    assert [name for name in names if name not in text] == []


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_runs_of_different_models_never_share_a_folder(path: Path) -> None:
    run = read_yaml(path).plain()["run"]
    assert run == {"name": path.stem, "dir": f"runs/{path.stem}"}


def test_model_names_tell_their_active_size() -> None:
    names = {"hypermoe-160m": 160e6, "damoe-160m": 160e6, "hyper-damoe-1b": 1.2e9}
    for name, active in names.items():
        layers = [CONFIGS / "base.yaml", CONFIGS / "data/stdlib.yaml", CONFIGS / f"models/{name}.yaml"]
        assert parameter_count(load_config(layers).model).active_per_token == pytest.approx(active, rel=0.1)


def test_the_official_preset_is_the_released_code() -> None:
    """Sizes of every released script, and 12,806,456 parameters of the shared hypernetwork: counted from that code."""
    layers = [CONFIGS / "base.yaml", CONFIGS / "data/stdlib.yaml", CONFIGS / "models/hypermoe-official.yaml"]
    model = load_config(layers).model
    assert model.moe is not None and model.moe.hyper is not None
    hyper = model.moe.hyper
    sizes = (hyper.expert_embedding, hyper.process, hyper.condition, hyper.layer_embedding, hyper.hidden)
    assert (*sizes, hyper.bottleneck) == (128, 128, 128, 10, 128, 64)
    assert (hyper.aggregation, hyper.condition_on, hyper.coefficient) == ("sum", "unselected", "one")
    assert parameter_count(model).hyper == 12_806_456 + 12 * (1_024 + 33_024)


def test_the_demo_shows_both_methods_on_a_pipeline_with_experts_apart() -> None:
    config = load_config([CONFIGS / "demo.yaml"])
    moe = config.model.moe
    assert moe is not None and moe.hyper is not None and isinstance(moe.router, DAMoERouterConfig)
    assert moe.router.budget == "mean_k"
    assert (config.parallel.pipeline, config.parallel.expert, config.training.precision) == (2, 2, "fp32")
