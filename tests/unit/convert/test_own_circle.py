"""Our own exports come back: import, and export again to the same files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moetrain.checkpoint import CheckpointReader
from moetrain.cli.convert import app
from moetrain.config.loader import config_from_dict, load_config
from moetrain.config.model import ModelConfig
from moetrain.convert.from_hf import import_hf
from moetrain.convert.hf import export_hf
from moetrain.data.tokenizers import load_tokenizer
from moetrain.errors import ConversionError
from moetrain.model.reference_logits import megatron_logits

from .conftest import DA, KINDS, make_model

QUIET: Callable[[str], None] = lambda _: None  # noqa: E731
TRAINING = {"aux_loss": "global_batch", "aux_loss_coeff": 0.02, "z_loss_coeff": 1e-3}
BOTH = "da_moe-hyper"
STATE = ("thresholds", "quartiles", "offsets", "visits", "threshold")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def exported(
    write_run: Callable[[ModelConfig, str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
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


def test_what_comes_back_is_the_model_and_the_state_of_its_controllers(
    write_run: Callable[[ModelConfig, str], Path], tmp_path: Path
) -> None:
    """With every setting of a training away from its default, bit for bit, into a config that starts a run."""
    tree = make_model(BOTH).model_dump()
    router = DA | {"importance": "predicted", "debias": "position", "direction": "low", "teacher": "received"}
    router |= {"max_k": None, "mean_k": 1.7, "controller_rate": 0.1, "predictor_loss_coeff": 0.5}
    tree["moe"] |= TRAINING | {"router": router}
    model = ModelConfig.model_validate(tree)
    with CheckpointReader(write_run(model, "trained") / "checkpoints" / "step-00000020") as trained:
        export_hf(trained, tmp_path / "hf", announce=QUIET)
        report = import_hf(tmp_path / "hf", tmp_path / "imported", announce=QUIET)
        expected = model.model_copy(update={"vocab_size": 304}).model_dump() | {"num_query_groups": 2}
        expected["moe"]["layer_freq"] = [0, 1, 0]
        assert report.model.model_dump() == expected
        assert report.notes == ()
        with CheckpointReader(tmp_path / "imported") as reader:
            kept = {name for name in trained.names() if name.startswith(("weight.", "controller."))}
            loads = {f"controller.decoder.layers.{i}.mlp.losses.load" for i in (1,)}
            assert set(reader.names()) == kept | loads
            assert {name.rpartition(".")[2] for name in kept if name.startswith("controller.")} == set(STATE)
            assert all(torch.equal(reader.read(name), trained.read(name)) for name in kept)
            for name in loads:
                assert torch.equal(reader.read(name), torch.full((5,), 1.7 / 5))
            assert (reader.step, reader.consumed_samples) == (0, 0)
    run = load_config([tmp_path / "imported" / "config.yaml"], ["data.train.0.path=here"])
    assert run.model == report.model and run.checkpoint.load_weights_only


def test_the_tokenizer_of_an_import_gives_the_ids_of_sentencepiece(
    exported: Callable[..., Path], sentencepiece_model: Path
) -> None:
    """Reserved pieces in a text, too, are text and no ends of documents."""
    import_hf(exported("dense"), (target := exported("dense").parent / "imported"), announce=QUIET)
    here = load_config([target / "config.yaml"], ["data.train.0.path=here"]).data.tokenizer
    original = load_tokenizer(here.model_copy(update={"type": "sentencepiece", "path": str(sentencepiece_model)}))
    again = load_tokenizer(here)
    for text in ("the quick brown fox", "a</s> b <s>", "  x\n\ty <unk> <0x41> é", ""):
        assert again.encode(text) == original.encode(text), text
    assert (again.eod, again.bos, again.pad or again.eod) == (original.eod, original.bos, original.pad or original.eod)


def test_a_model_that_transformers_trained_on_comes_back(exported: Callable[..., Path]) -> None:
    """Loaded with the folder's code, changed and saved by transformers: all but the record is there."""
    folder = exported(BOTH)
    network = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        network.model.norm.weight.mul_(1.5)
    network.save_pretrained(folder.parent / "tuned")
    report = import_hf(folder.parent / "tuned", folder.parent / "imported", announce=QUIET)
    tokens = torch.arange(40).view(2, 20)
    with CheckpointReader(folder.parent / "imported") as reader, torch.no_grad():
        assert (megatron_logits(reader, tokens) - network.eval()(tokens, use_cache=False).logits).abs().max() < 5e-5
        stored = load_file(folder / "model.safetensors")
        for name in STATE:
            theirs = stored[f"model.layers.1.mlp.gate.{name}"]
            assert torch.equal(reader.read(f"controller.decoder.layers.1.mlp.router.{name}"), theirs)
    assert report.model.moe.router.mean_k == 2.0 and "set data.tokenizer" in report.notes[0]


def test_the_command_imports_and_verifies_without_the_folders_code(exported: Callable[..., Path]) -> None:
    folder = exported("da_moe-predicted-debiased-low")
    ran = folder.parent / "ran"
    for name in ("modeling_moetrain.py", "configuration_moetrain.py"):
        (folder / name).write_text(f"open({str(ran)!r}, 'w')\n" + (folder / name).read_text())
    words = ["from-hf", str(folder), str(folder.parent / "imported"), "--verify"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0 and "verified: 128 positions" in result.output
    assert result.output.count("is not this version's own; it was not run") == 2
    assert not ran.exists()


@pytest.mark.parametrize(
    "kind", ["dense-tied", "top_k-sigmoid-shared", "expert_bias-groups-hyper", "da_moe-row_entropy-mean_k", BOTH]
)
def test_logits_survive_the_circle(kind: str, exported: Callable[..., Path]) -> None:
    folder = exported(kind)
    report = import_hf(folder, folder.parent / "imported", verify=True, announce=QUIET)
    assert report.proof is not None and report.proof.max_abs < 5e-5


# --- what is refused ------------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (BOTH, {"format_version": 2}, "format_version is 2.*legal: 1"),
    (BOTH, {"format_version": None}, "format_version is null"),
    (BOTH, {"architectures": ["MoetrainModel"]}, "architectures is .*legal: MoetrainForCausalLM"),
    (BOTH, {"quantization_config": {"bits": 4}}, "quantization_config"),
    (BOTH, {"moe_layers": [0, 1]}, r"moe\.layer_freq has 2 entries; num_layers is 3"),
    (BOTH, {"moe_layers": [0, 2, 0]}, r"moe_layers is \[0, 2, 0\].*a 0 or a 1"),
    (BOTH, {"moe_layers": [0, True, 0]}, "moe_layers is .*a 0 or a 1"),
    (BOTH, {"moe_layers": 10**9}, "moe_layers is 1000000000"),
    (BOTH, {"moe_layers": [0, 0, 0]}, r"hyper\.aggregation is .*legal: no such field here"),
    (BOTH, {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000.*1 to 4096"),
    (BOTH, {"num_experts": 10**6}, "num_experts is 1000000.*1 to 4096"),
    (BOTH, {"num_experts": "5"}, 'num_experts is "5".*type int'),
    (BOTH, {"hidden_size": 25}, r"embed_tokens\.weight has shape \[304, 24\].*says \[304, 25\]"),
    (BOTH, {"moe_intermediate_size": 2**31}, "moe_intermediate_size is .*1 to 2147483647"),
    (BOTH, {"head_dim": 7}, r"kv_channels \(7\) must be even"),
    (BOTH, {"qk_norm": "batch"}, r"model\.qk_layernorm: Input should be"),
    (BOTH, {"rope_theta": 0.0}, r"model\.rotary_base: .*greater than 0"),
    (BOTH, {"rope_theta": [1.0]}, "rope_theta is .*type float"),
    (BOTH, {"router_type": "hash"}, 'router_type is "hash".*legal: "top_k", "expert_bias", "da_moe"'),
    (BOTH, {"router_gates": ["raw"]}, "router_gates is"),
    (BOTH, {"importance": "col_max"}, 'importance is "col_max".*legal: "self_weight"'),
    (BOTH, {"budget": None}, "budget is null"),
    (BOTH, {"min_k": 0}, "min_k is 0.*1 to"),
    (BOTH, {"min_k": 2}, r"max_k is 3.*legal: 2, which the other fields make it"),
    (BOTH, {"max_k": 5}, r"max_k is 5.*legal: 3, which the other fields make it"),
    (BOTH, {"max_k": None}, "max_k is null"),
    (BOTH, {"position_buckets": 2**40}, "position_buckets is 1099511627776.*legal: 1, which"),
    (BOTH, {"first_k": 2}, "first_k is 2.*legal: None, which"),
    ("da_moe-debiased", {"first_k": None}, "first_k is null.*legal: 3, which"),
    ("da_moe-debiased", {"pretraining.debias": "none"}, "position_buckets is 16.*legal: 1"),
    (BOTH, {"pretraining": [1]}, "pretraining is .*legal: an object, or null"),
    (BOTH, {"pretraining": None}, r"lacks pretraining\.aux_loss"),
    (BOTH, {"pretraining.mean_k": 1e300}, r"mean_k \(1e\+300\) must lie between"),
    (BOTH, {"pretraining.mean_k": 2.5}, r"max_k is 3.*legal: 4, which"),
    (BOTH, {"pretraining.controller_rate": 0.0}, r"controller_rate: .*greater than 0"),
    (BOTH, {"pretraining.z_loss_coeff": -1.0}, r"z_loss_coeff: .*greater than or equal to 0"),
    (BOTH, {"pretraining.aux_loss": "none"}, r"aux_loss: Input should be"),
    (BOTH, {"pretraining.surprise": 1}, r"pretraining\.surprise is 1.*no such field"),
    (BOTH, {"hyper": "big"}, 'hyper is "big".*an object, or null'),
    (BOTH, {"hyper": None}, r"has more than the model's config tells"),
    (BOTH, {"hyper.bottleneck": 2**40}, r"hyper\.bottleneck is .*1 to 2147483647"),
    (BOTH, {"hyper.bottleneck": 2**30}, r"has shape"),
    (BOTH, {"hyper.layer_embedding": -1}, r"hyper\.layer_embedding is -1.*0 to"),
    (BOTH, {"hyper.condition_on": "random_fixed"}, r"hyper\.condition_on is \"random_fixed\".*legal: \"unselected\""),
    (BOTH, {"hyper.sharing": "stage"}, r"stages \(a number\) and sharing: stage need each other"),
    (BOTH, {"hyper.surprise": 1}, r"hyper\.surprise is 1.*no such field"),
    ("top_k-groups", {"expert_groups": 4}, r"router\.groups \(4\) must divide num_experts \(6\)"),
    ("top_k-groups", {"top_groups": 4}, r"router\.top_groups \(4\) must not exceed router\.groups \(3\)"),
    ("top_k-groups", {"router_scores": "tanh"}, 'router_scores is "tanh".*legal: "softmax", "sigmoid"'),
    ("top_k-groups", {"shared_expert_intermediate_size": 8}, r"lacks 9 tensor\(s\): .*shared_experts"),
    ("top_k", {"num_experts_per_tok": 6}, r"router\.top_k \(6\) must not exceed num_experts \(5\)"),
    ("top_k", {"vocab_size": 305}, r"embed_tokens\.weight has shape \[304, 24\].*says \[305, 24\]"),
]


@pytest.fixture(scope="module")
def saved(exported: Callable[..., Path]) -> Callable[[str], Path]:
    """Exports, made once."""
    return cache(exported)


@pytest.mark.parametrize(("kind", "changes", "message"), REFUSED)
def test_a_config_that_contradicts_itself_is_refused_by_its_field(
    saved: Callable[[str], Path], kind: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(saved(kind), tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    for path, value in changes.items():
        group, _, name = path.rpartition(".")
        (config[group] if group else config)[name] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=message):
        import_hf(folder, tmp_path / "out", announce=QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("name", "value", "legal"),
    [
        *(("thresholds", value, False) for value in (torch.nan, torch.inf)),
        *((name, value, False) for name in ("quartiles", "visits") for value in (torch.nan, -torch.inf)),
        ("offsets", -torch.inf, True),
    ],
)
def test_a_controller_that_could_never_move_again_is_refused(
    name: str, value: float, legal: bool, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(saved(BOTH), tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.layers.1.mlp.gate.{name}"].view(-1)[0] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if legal:
        import_hf(folder, tmp_path / "out", announce=QUIET)
        return
    with pytest.raises(ConversionError, match=rf"gate\.{name} holds .*; a controller must be finite"):
        import_hf(folder, tmp_path / "out", announce=QUIET)


def test_an_export_without_the_controllers_state_is_refused_by_its_tensors(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(saved(BOTH), tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(("quartiles", "visits"))}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"lacks 2 tensor\(s\): model\.layers\.1\.mlp\.gate\.quartiles"):
        import_hf(folder, tmp_path / "out", announce=QUIET)
