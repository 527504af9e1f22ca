"""A larger model that starts where a smaller one stands: the same logits, and new parts that learn."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import moetrain.convert.upcycle as module
from moetrain.checkpoint import CheckpointReader, Manifest, Piece, save_shard
from moetrain.cli.upcycle import app
from moetrain.config.loader import config_to_dict, dump_yaml
from moetrain.config.schema import ParallelConfig, RunConfig
from moetrain.config.size import parameter_shapes
from moetrain.convert import step_folder
from moetrain.convert.upcycle import upcycle
from moetrain.errors import ConversionError
from moetrain.model import reference_logits
from moetrain.model.build import build_chunks
from moetrain.model.decoder import Decoder
from moetrain.model.parameters import (
    describe_parameters,
    initial_controllers,
    initialize,
    named_controllers,
    named_parameters,
)
from moetrain.model.reference_logits import megatron_logits, reference_model

HYPER = {"bottleneck": 3, "hidden": 7, "expert_embedding": 5, "process": 6, "condition": 4, "layer_embedding": 2}
TOP_K = {"type": "top_k", "top_k": 2, "gates": "renormalized"}
DA = {"type": "da_moe", "mean_k": 2.0, "max_k": 4, "gates": "renormalized"}
MOE = {"num_experts": 5, "ffn_hidden_size": 20, "router": TOP_K}
TOKENS = torch.randint(50, (2, 24), generator=torch.Generator().manual_seed(3))
STEP = 70


def config(moe: dict[str, Any] | None = None, **model: Any) -> RunConfig:
    sizes = {"num_layers": 3, "hidden_size": 24, "num_attention_heads": 4, "num_query_groups": 2}
    sizes |= {"ffn_hidden_size": 20, "vocab_size": 50, "seq_length": 32}
    tree = {
        "run": {"dir": "x"},
        "model": {**sizes, **model, "moe": moe},
        "data": {"tokenizer": {"path": "x"}, "train": [{"path": "x"}]},
        "training": {"train_iters": 1, "global_batch_size": 1, "seed": 7},
    }
    if model.get("type") == "encoder":
        tree["training"]["objective"] = {"type": "masked_lm"}
    if "head" in model:
        tree["training"] |= {"objective": {"type": "classify", "classes": ["a", "b", "c"]}, "eval_iters": 0}
    return RunConfig.model_validate(tree)


Save = Callable[[RunConfig], CheckpointReader]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """A checkpoint with random weights, large enough that every part of the model shows in the logits."""

    def write(run: RunConfig) -> CheckpointReader:
        folder = tmp_path / "source"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        generator = torch.Generator().manual_seed(0)
        pieces = []
        for name, shape in parameter_shapes(run.model):
            noise = torch.randn(shape, generator=generator)
            tensor = 1 + 0.2 * noise if "layernorm" in name else noise * 1.3 / shape[-1] ** 0.5
            pieces.append(Piece.whole(f"weight.{name}", tensor))
        for name, value in initial_controllers(run.model):
            noise = torch.rand(value.shape, generator=generator)
            pieces.append(Piece.whole(f"controller.{name}", value + 0.1 * noise))
        manifest = Manifest(STEP, 4, config_to_dict(run), {}, {"tokenizer": "ab"}, save_shard(folder, 0, pieces))
        (folder / "manifest.json").write_bytes(manifest.to_bytes())
        return CheckpointReader(folder)

    return write


CASES: dict[str, tuple[RunConfig, RunConfig]] = {
    "dense to MoE": (config(), config(MOE)),
    "dense to MoE, tied, every other layer": (
        config(share_embeddings_and_output_weights=True),
        config(MOE | {"layer_freq": 2}, share_embeddings_and_output_weights=True),
    ),
    "dense to sigmoid gates in groups": (
        config(),
        config(MOE | {"num_experts": 6, "router": TOP_K | {"scores": "sigmoid", "groups": 2, "top_groups": 1}}),
    ),
    "dense to biases of experts": (config(), config(MOE | {"router": TOP_K | {"type": "expert_bias"}})),
    "dense to HyperMoE": (config(), config(MOE | {"hyper": HYPER})),
    "dense to DA-MoE": (config(), config(MOE | {"router": DA})),
    "dense to the paper's DA-MoE": (config(), config(MOE | {"router": {**DA, "budget": "paper", "mean_k": 2.0}})),
    "dense to both": (
        config(),
        config(MOE | {"router": DA, "hyper": HYPER | {"sharing": "layer"}, "layer_freq": [1, 0, 1]}),
    ),
    "dense to neighbors": (
        config(),
        config(
            MOE
            | {
                "shared_expert_ffn_hidden_size": 8,
                "router_state": {"type": "recurrent", "width": 6},
                "token_mask": {"frequent_ids": 20, "frequent_experts": 3},
                "aux_loss": "global_batch",
            }
        ),
    ),
    "encoder to MoE": (
        config(type="encoder"),
        config(MOE | {"router": DA | {"importance": "col_max"}}, type="encoder"),
    ),
    "classifier to MoE": (
        config(type="encoder", head={"outputs": 3}),
        config(MOE, type="encoder", head={"outputs": 3}),
    ),
    "MoE to HyperMoE": (
        config(MOE | {"ffn_hidden_size": 9, "router": {"type": "top_k"}}),
        config(MOE | {"ffn_hidden_size": 9, "router": {"type": "top_k"}, "hyper": HYPER}),
    ),
    "MoE to stages and a shared expert": (
        config(MOE | {"layer_freq": [1, 1, 1]}),
        config(
            MOE
            | {
                "layer_freq": 1,
                "shared_expert_ffn_hidden_size": 8,
                "hyper": HYPER | {"sharing": "stage", "stages": 3, "coefficient": "selected_probability"},
            }
        ),
    ),
    "DA-MoE to a static branch": (
        config(MOE | {"router": {"type": "da_moe", "mean_k": 2.0}}),
        config(MOE | {"router": {"type": "da_moe", "mean_k": 2.0}, "hyper": HYPER | {"condition_on": "static"}}),
    ),
    "some MoE layers to all": (config(MOE | {"layer_freq": [0, 1, 0]}), config(MOE)),
    "diverse experts to a shared one": (
        config(MOE | {"num_experts": 4, "expert_widths": [10, 30, 15, 25]}),
        config(MOE | {"num_experts": 4, "expert_widths": [10, 30, 15, 25], "shared_expert_ffn_hidden_size": 8}),
    ),
    "cartesian layers to a shared expert": (
        config(MOE | {"cartesian": {}}),
        config(MOE | {"cartesian": {}, "shared_expert_ffn_hidden_size": 8}),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_logits_stay(case: str, save: Save, tmp_path: Path) -> None:
    before, after = CASES[case]
    source = save(before)
    report = upcycle(source, after, tmp_path / "out", announce=lambda _: None)
    with CheckpointReader(tmp_path / "out") as target:
        assert {name: target.shape(f"weight.{name}") for name, _ in parameter_shapes(after.model)} == dict(
            parameter_shapes(after.model)
        )
        old, new = megatron_logits(source, TOKENS), megatron_logits(target, TOKENS)
    assert old.std() > 0.1
    assert (old - new).abs().max() <= 1e-5
    assert report.changes == () and report.difference is not None and report.difference.max_abs <= 1e-5
    assert report.parameters == sum(torch.Size(shape).numel() for _, shape in parameter_shapes(after.model))


def test_a_branch_that_starts_at_zero_changes_no_bit(save: Save, tmp_path: Path) -> None:
    before, after = CASES["MoE to HyperMoE"]
    report = upcycle(save(before), after, tmp_path / "out", announce=lambda _: None)
    assert report.difference is not None and report.difference.max_abs == 0.0


@contextmanager
def fresh(run: RunConfig) -> Any:
    """The model that a new run starts with."""
    with reference_logits._single_process() as groups:
        chunks = build_chunks(run.model, ParallelConfig(), groups, torch.float32, torch.device("cpu"))
        initialize(chunks, describe_parameters(chunks, groups, False), run.model, run.training.seed)
        yield chunks


@pytest.mark.parametrize("case", ["dense to both", "dense to neighbors", "MoE to stages and a shared expert"])
def test_new_parts_start_as_in_a_new_run_except_the_last_of_a_branch(case: str, save: Save, tmp_path: Path) -> None:
    before, after = CASES[case]
    source = save(before)
    upcycle(source, after, tmp_path / "out", verify=False, announce=lambda _: None)
    old = {name for name in source.names() if name.startswith("weight.")}
    zero, drawn = set(), 0
    with CheckpointReader(tmp_path / "out") as target, fresh(after) as chunks:
        controllers = dict(named_controllers(chunks))
        assert {f"controller.{name}" for name in controllers} == {n for n in target.names() if n.startswith("contr")}
        for name, value in controllers.items():
            key = f"controller.{name}"
            expected = source.read(key) if key in source.names() else value
            assert torch.equal(target.read(key), expected)
        for name, value in named_parameters(chunks):
            stored = target.read(f"weight.{name}")
            if f"weight.{name}" in old:
                assert torch.equal(stored, source.read(f"weight.{name}"))
            elif ".experts.fc" in name and f"weight.{name}" not in old:
                prefix, part = name.split(".experts.")
                mlp = source.read(f"weight.{prefix}.linear_{part}.weight")
                assert all(torch.equal(expert, mlp) for expert in stored)
            elif not stored.any() and value.any():
                zero.add(name)
            else:
                assert torch.equal(stored, value), name
                drawn += 1
    assert drawn > 5
    assert zero and all(".up" in name or name.endswith("shared_expert.fc2") for name in zero)


def gradients_of(decoder: Decoder, parameters: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a cross entropy on fixed tokens, without any auxiliary loss."""
    positions = torch.arange(TOKENS.shape[1])[None].expand(len(TOKENS), -1)
    with torch.enable_grad():
        logits = decoder(TOKENS, positions, None)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS.flatten())
        return torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize("condition_on", ["unselected", "static"])
def test_a_branch_of_zeros_learns_in_the_first_step(condition_on: str, save: Save, tmp_path: Path) -> None:
    """Its last weights get a gradient, so the second step reaches all that lie before them."""
    hyper = HYPER | {"condition_on": condition_on}
    upcycle(save(config(MOE)), config(MOE | {"hyper": hyper}), tmp_path / "out", announce=lambda _: None)
    with CheckpointReader(tmp_path / "out") as target, reference_model(target) as decoder:
        named = {n: p for n, p in named_parameters([decoder]) if "hyper" in n}
        last = {n: p for n, p in named.items() if n.split(".")[-2] in ("up", "up_bias")}

        def gradients() -> dict[str, bool]:
            grads = gradients_of(decoder, list(named.values()))
            for parameter, grad in zip(named.values(), grads, strict=True):
                parameter -= 1e-2 * grad.sign()  # the size of Adam's first step
            return {name: bool(grad.any()) for name, grad in zip(named, grads, strict=True)}

        first, second = gradients(), gradients()
    assert {name for name, reached in first.items() if reached} == set(last)
    assert all(second.values()), [name for name, reached in second.items() if not reached]


def test_equal_experts_give_the_router_no_gradient_and_grow_apart_in_a_step(save: Save, tmp_path: Path) -> None:
    upcycle(save(config()), config(MOE), tmp_path / "out", announce=lambda _: None)
    with CheckpointReader(tmp_path / "out") as target, reference_model(target) as decoder:
        named = {n: p for n, p in named_parameters([decoder]) if ".router." in n or ".experts." in n}

        def router_gradient() -> float:
            grads = dict(zip(named, gradients_of(decoder, list(named.values())), strict=True))
            for name, parameter in named.items():
                parameter -= 1e-2 * grads[name].sign() * (".experts." in name)
            return max(float(grads[name].abs().max()) for name in named if ".router." in name)

        first, second = router_gradient(), router_gradient()
    assert first < 1e-6 < 1e-4 < second


def test_noise_and_another_router_are_told_and_measured(save: Save, tmp_path: Path) -> None:
    report = upcycle(save(config()), config(MOE), tmp_path / "noisy", noise=0.05, announce=lambda _: None)
    assert report.difference is not None and report.difference.max_abs > 1e-3 and "noise of 0.05" in report.changes[0]
    with CheckpointReader(tmp_path / "noisy") as target:
        experts = target.read("weight.decoder.layers.0.mlp.experts.fc1")
    assert (experts - experts.mean(0)).std() == pytest.approx(0.05 * 0.8**0.5, rel=0.1)
    after = config(MOE | {"router": DA | {"importance": "predicted", "mean_k": 3.0}})
    report = upcycle(save(config(MOE)), after, tmp_path / "predicted", allow_change=True, announce=lambda _: None)
    assert "model.moe.router.type" in report.changes[0]
    assert report.difference is not None and report.difference.max_abs > 1e-3
    raw = config(MOE | {"router": {"type": "top_k"}})
    report = upcycle(save(config()), raw, tmp_path / "raw", allow_change=True, announce=lambda _: None)
    assert "gates (raw) would scale" in report.changes[0]


REFUSALS: dict[str, tuple[RunConfig, RunConfig, str]] = {
    "a dense target": (config(), config(), "nothing to upcycle to"),
    "nothing new": (config(MOE), config(MOE | {"aux_loss_coeff": 0.1}), "adds nothing to the source"),
    "other sizes": (
        config(),
        config(MOE, num_layers=4, num_query_groups=4, rotary_base=5.0, vocab_size=51),
        r"model.num_layers: 3 in the source, 4 in the target(.|\n)*num_query_groups: 2 .* 4(.|\n)*rotary(.|\n)*vocab",
    ),
    "another width": (config(), config(MOE | {"ffn_hidden_size": 10}), r"ffn_hidden_size \(10\) must be .* \(20\)"),
    "raw gates": (config(), config(MOE | {"router": {"type": "top_k"}}), r"gates \(raw\) would scale .*renormalized"),
    "scaled gates": (
        config(),
        config(MOE | {"router": TOP_K | {"scaling_factor": 2.5}}),
        r"scaling_factor \(2.5\) would scale",
    ),
    "gates of unknown sum": (config(), config(MOE | {"router": {"type": "top_p"}}), r"type \(top_p\) does not give"),
    "a capacity": (config(), config(MOE | {"capacity": {"factor": 1.0}}), "model.moe.capacity must be absent"),
    "free choices": (config(), config(MOE | {"computation_free": {"zero_experts": 1}}), "computation_free must be abs"),
    "cartesian layers": (config(), config(MOE | {"cartesian": {}}), "cartesian must be absent"),
    "diverse widths": (config(), config(MOE | {"expert_widths": [10, 30, 20, 20, 20]}), "expert_widths must be abs"),
    "lost experts": (config(MOE), config(MOE | {"layer_freq": 2, "hyper": HYPER}), "layers 0, 2 have experts"),
    "another router": (config(MOE), config(MOE | {"router": DA}), "another router decides(.|\n)*--allow-change"),
    "sequences that change capacities": (
        config(MOE | {"capacity": {"factor": 1.0}}),
        config(MOE | {"capacity": {"factor": 1.0}, "hyper": HYPER}, seq_length=64),
        r"model.seq_length \(64; 32 in the source\) gives .* other places(.|\n)*--allow-change",
    ),
    "more experts": (config(MOE), config(MOE | {"num_experts": 6, "hyper": HYPER}), "num_experts: 5 .* 6"),
    "another hypernetwork": (
        config(MOE | {"hyper": HYPER}),
        config(MOE | {"hyper": HYPER | {"bottleneck": 4}}),
        "model.moe.hyper.bottleneck: 3 in the source, 4",
    ),
    "no hypernetwork": (config(MOE | {"hyper": HYPER}), config(MOE), "model.moe.hyper: .* null in the target"),
    "a trained hypernetwork in a new layer": (
        config(MOE | {"hyper": HYPER, "layer_freq": [0, 1, 1]}),
        config(MOE | {"hyper": HYPER}),
        "source's hypernetwork is trained",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_fit_is_refused_before_anything_is_written(case: str, save: Save, tmp_path: Path) -> None:
    before, after, message = REFUSALS[case]
    with pytest.raises(ConversionError, match=message):
        upcycle(save(before), after, tmp_path / "out", announce=lambda _: None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_options_and_folders_that_cannot_work_are_refused(save: Save, tmp_path: Path, monkeypatch: Any) -> None:
    source = save(config())
    for noise in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConversionError, match="--noise is"):
            upcycle(source, config(MOE), tmp_path / "out", noise=noise)
    with pytest.raises(ConversionError, match="nothing is overwritten"):
        upcycle(source, config(MOE), tmp_path / "source")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(ConversionError, match="free"):
        upcycle(source, config(MOE), tmp_path / "out")
    with pytest.raises(ConversionError, match="no layer becomes MoE"):
        upcycle(save(config(MOE)), config(MOE | {"hyper": HYPER}), tmp_path / "out", noise=0.1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_logits_that_differ_or_a_full_disk_leave_nothing_behind(save: Save, tmp_path: Path, monkeypatch: Any) -> None:
    source = save(config())
    with monkeypatch.context() as patch:
        patch.setattr(module, "_DENSE_MLP", {"experts.fc1": "linear_fc1.weight", "experts.fc2": "linear_fc2.weight"})
        patch.setattr(module, "_expert", lambda source, _t, weight, *_: source.read(f"weight.{weight.stored}") * 1.01)
        with pytest.raises(ConversionError, match="logits differ from the source's by up to"):
            upcycle(source, config(MOE), tmp_path / "out", announce=lambda _: None)

    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(step_folder, "write_synced", full)
    with pytest.raises(ConversionError, match="No space left on device"):
        upcycle(source, config(MOE), tmp_path / "out", announce=lambda _: None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_memory_holds_a_block_of_weights_at_a_time(save: Save, tmp_path: Path, monkeypatch: Any) -> None:
    largest = []
    monkeypatch.setattr(step_folder, "BATCH_BYTES", 4096)
    monkeypatch.setattr(
        step_folder,
        "save_shard",
        lambda folder, rank, batch: (
            largest.append((len(batch), sum(p.tensor.nbytes for p in batch))) or save_shard(folder, rank, batch)
        ),
    )
    upcycle(save(config()), config(MOE), tmp_path / "out", announce=lambda _: None)
    assert len(largest) > 20
    assert all(size <= 4096 or pieces == 1 for pieces, size in largest)
    assert max(size for _, size in largest) == 4 * 50 * 24  # the embedding; an expert's fc1 has 3840 bytes


def test_the_command_reads_layers_of_settings_and_tells_what_it_did(save: Save, tmp_path: Path) -> None:
    source = save(config())
    settings = tmp_path / "run.yaml"
    settings.write_text(dump_yaml(config(MOE)))
    words = [str(source.folder), str(settings), "model.moe.num_experts=4", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "largest difference of a logit" in result.output and "6 copied" in result.output
    with CheckpointReader(tmp_path / "out") as target:
        assert target.step == target.consumed_samples == 0
        assert target.extra["tokenizer"] == "ab" and target.extra["upcycled_from"]["step"] == STEP
        assert target.shape("weight.decoder.layers.2.mlp.experts.fc2") == (4, 24, 20)
    refused = CliRunner().invoke(app, words)
    assert isinstance(refused.exception, ConversionError) and "nothing is overwritten" in str(refused.exception)
