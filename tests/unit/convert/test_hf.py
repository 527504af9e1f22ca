"""Export of a checkpoint to a folder, and what transformers makes of it."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import signal
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import moetrain.convert.hf as hf
from moetrain.checkpoint import CheckpointReader
from moetrain.cli.convert import app
from moetrain.convert.architectures.moetrain import RULES
from moetrain.convert.hf import export_hf
from moetrain.convert.mapping import TRANSFORMS, ParamMap, Transform
from moetrain.convert.resumable_folder import JOURNAL, LOCK
from moetrain.convert.verify import compare_logits, hf_logits, verify_export
from moetrain.convert.weight_file import write_weight_file
from moetrain.data.train_tokenizer import train_sentencepiece
from moetrain.errors import ConversionError

KIND = "da_moe-hyper"


@pytest.fixture(scope="module")
def run(of_kind, write_run):
    """Write a run folder of a kind of model."""
    return lambda kind: write_run(of_kind(kind), f"tiny {kind}")


@pytest.fixture(scope="module")
def reader(run) -> CheckpointReader:
    return CheckpointReader(run(KIND) / "checkpoints" / "step-00000020")


def load(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


@pytest.mark.parametrize("kind", ["dense-tied", KIND, "top_k-hyper"])
def test_an_export_loads_has_the_same_logits_and_generates(run, build, weights, kind, tmp_path):
    reader = CheckpointReader(run(kind) / "checkpoints" / "step-00000020")
    said: list[str] = []
    report = export_hf(reader, tmp_path / "out", architecture="moetrain", announce=said.append)
    network, names = load(tmp_path / "out"), {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "README.md", "training.json"),
        *("configuration_moetrain.py", "modeling_moetrain.py"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    }
    model = hf.run_config(reader.config).model
    prompt = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)("the quick", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(
            network(**prompt).logits, build(model, weights(model, seed=20))(**prompt).logits, atol=0, rtol=0
        )
    assert network.generate(**prompt, max_new_tokens=4, min_new_tokens=4).shape[1] == prompt["input_ids"].shape[1] + 4
    assert report.parameters == sum(p.numel() for p in network.parameters())
    assert report.weight_bytes == 4 * report.parameters + sum(b.nbytes for b in network.buffers())
    assert len(said) == 1 and f"{report.parameters:,} parameters" in said[0] and "GB" in said[0]


def test_save_pretrained_and_from_pretrained_are_a_round_trip(reader, tmp_path):
    export_hf(reader, tmp_path / "out")
    network = load(tmp_path / "out")
    network.save_pretrained(tmp_path / "again")
    again, tokens = load(tmp_path / "again"), torch.arange(9)[None]
    assert {"configuration_moetrain.py", "modeling_moetrain.py"} <= {p.name for p in (tmp_path / "again").iterdir()}
    with torch.no_grad():
        assert torch.equal(network(tokens).logits, again(tokens).logits)


def test_tied_embeddings_are_stored_once_and_stay_tied(run, tmp_path):
    export_hf(CheckpointReader(run("dense-tied") / "checkpoints" / "step-00000010"), tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    network = load(tmp_path / "out")
    assert network.lm_head.weight is network.model.embed_tokens.weight
    network.save_pretrained(tmp_path / "again")
    assert "lm_head.weight" not in load_file(tmp_path / "again" / "model.safetensors")


def test_bfloat16_rounds_weights_and_leaves_thresholds_alone(reader, tmp_path):
    report = export_hf(reader, tmp_path / "out", dtype="bfloat16")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    exact = dict(ParamMap(hf.run_config(reader.config).model, RULES).export(hf.ModelWeights(reader)))
    assert report.dtype == json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    network = load(tmp_path / "out")
    controllers = {name for name, _ in network.named_buffers()}
    assert any(name.endswith("thresholds") for name in controllers)
    for name, tensor in exact.items():
        wanted = tensor if name in controllers else tensor.bfloat16()
        assert stored[name].dtype == wanted.dtype and torch.equal(stored[name], wanted), name
    assert network.dtype == torch.bfloat16
    assert all(torch.equal(buffer, exact[name]) for name, buffer in network.named_buffers())
    assert network.generate(torch.arange(5)[None], max_new_tokens=3, min_new_tokens=3).shape == (1, 8)


def test_no_file_exceeds_the_shard_limit_and_the_index_names_every_tensor(reader, tmp_path):
    report = export_hf(reader, tmp_path / "out", max_shard_size="30KB")
    assert len(report.weight_files) > 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = {}
    for number, file in enumerate(report.weight_files, start=1):
        assert file == f"model-{number:05d}-of-{len(report.weight_files):05d}.safetensors"
        tensors = load_file(tmp_path / "out" / file)
        assert sum(t.nbytes for t in tensors.values()) <= 30_000
        with safe_open(tmp_path / "out" / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        found |= dict.fromkeys(tensors, file)
    assert found == index["weight_map"] and len(found) == report.tensors
    assert index["metadata"]["total_size"] == report.weight_bytes
    export_hf(reader, tmp_path / "whole")
    tokens = torch.arange(9)[None]
    assert torch.equal(hf_logits(tmp_path / "out", tokens), hf_logits(tmp_path / "whole", tokens))


def test_a_file_is_written_before_the_next_one_is_read(reader, tmp_path, monkeypatch):
    """And within a file each block is read when it is due, once; otherwise a file would be in memory."""
    reads, reads_after_file, held = [], [], []
    write, read = hf.write_weight_file, CheckpointReader.read

    def counting_write(path, entries, tensors):
        def watched():
            for name, tensor in tensors:
                held.append(len(reads))
                yield name, tensor

        written = write(path, entries, watched())
        reads_after_file.append(len(reads))
        return written

    def counting_read(self, name, *block):
        reads.append((name, *block))
        return read(self, name, *block)

    monkeypatch.setattr(hf, "write_weight_file", counting_write)
    monkeypatch.setattr(CheckpointReader, "read", counting_read)
    report = export_hf(reader, tmp_path / "out", max_shard_size="30KB")
    assert len(reads_after_file) == len(report.weight_files)
    assert reads_after_file == sorted(set(reads_after_file))
    assert held == sorted(held) and held[0] == 1
    assert len(reads) <= len(set(reads)) + len(report.weight_files)  # a block's parts may lie in two files


@pytest.mark.parametrize("there", ["file", "folder with a file"])
def test_what_exists_is_not_overwritten(reader, tmp_path, there):
    out = tmp_path / "out"
    if there == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    with pytest.raises(ConversionError, match="nothing is overwritten"):
        export_hf(reader, out)
    assert (out if out.is_file() else out / "notes.txt").read_text() == "mine"


def test_an_empty_folder_may_be_filled_and_others_may_read_it(reader, tmp_path):
    (tmp_path / "out").mkdir()
    mask = os.umask(0o022)
    try:
        export_hf(reader, tmp_path / "out")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755


def test_a_failed_export_leaves_nothing(reader, tmp_path, monkeypatch):
    def disk_full(*_args, **_options):
        raise OSError("no space left on device")

    monkeypatch.setattr(hf, "write_weight_file", disk_full)
    with pytest.raises(ConversionError, match=r"no space left.*nothing was left"):
        export_hf(reader, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_nothing_under_its_name(reader, tmp_path, monkeypatch):
    def save_and_die(*words):
        write_weight_file(*words)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(hf, "write_weight_file", save_and_die)
    # A fork has everything imported, so it dies in milliseconds.
    child = multiprocessing.get_context("fork").Process(target=export_hf, args=(reader, tmp_path / "out"))
    child.start()
    child.join(timeout=60)
    assert child.exitcode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name == ".out.partial"
    assert (left / "model.safetensors").is_file()
    monkeypatch.undo()
    export_hf(reader, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_check_that_refuses_leaves_nothing(reader, tmp_path):
    def refuse(folder: Path) -> None:
        assert (folder / "config.json").is_file()
        raise ConversionError("not good enough")

    with pytest.raises(ConversionError, match="not good enough"):
        export_hf(reader, tmp_path / "out", check=refuse)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int4"}, "int4.*float32, bfloat16"),
        ({"max_shard_size": "many"}, "many.*KB, MB, GB"),
        ({"max_shard_size": "0GB"}, "0GB.*KB, MB, GB"),
        ({"tokenizer": Path("/nowhere/tok.model")}, "/nowhere/tok.model"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(reader, tmp_path, options, message):
    with pytest.raises(ConversionError, match=message):
        export_hf(reader, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_larger_than_the_embedding_is_refused(reader, tmp_path):
    train_sentencepiece([f"w{n} {n * n}" for n in range(3000)], tmp_path / "large", 400, "bpe")
    with pytest.raises(ConversionError, match=r"400 tokens.*304 rows"):
        export_hf(reader, tmp_path / "out", tokenizer=tmp_path / "large.model")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_noticed_before_anything_is_written(reader, tmp_path, monkeypatch):
    monkeypatch.setattr(hf.shutil, "disk_usage", lambda _path: SimpleNamespace(free=10))
    with pytest.raises(ConversionError, match="GB free"):
        export_hf(reader, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_from_another_version_is_refused_with_the_reason(reader, tmp_path):
    class Other:
        def __getattr__(self, name):
            return getattr(reader, name)

        @property
        def config(self):
            return reader.config | {"model": reader.config["model"] | {"flux_capacitor": 1}}

    with pytest.raises(ConversionError, match="flux_capacitor"):
        export_hf(Other(), tmp_path / "out")


def test_a_difference_between_logits_is_reported_with_its_place(reader, tmp_path):
    export_hf(reader, tmp_path / "out")
    tokens = torch.arange(24).view(2, 12)
    theirs = hf_logits(tmp_path / "out", tokens)
    assert theirs.dtype == torch.float32 and theirs.shape == (2, 12, 304)
    report = compare_logits(theirs.clone(), theirs)
    assert (report.max_abs, report.argmax_agreement, report.positions) == (0.0, 1.0, 24)
    changed = theirs.clone()
    changed[1, 3, 7] += 0.5
    assert compare_logits(changed, theirs, tolerance=0.6).max_abs == pytest.approx(0.5, abs=1e-5)
    with pytest.raises(ConversionError, match=r"0\.5 \(at \[sequence, position, token\] \[1, 3, 7\]\)"):
        compare_logits(changed, theirs)
    with pytest.raises(ConversionError, match="not all finite"):
        compare_logits(theirs / 0, theirs)
    with pytest.raises(ConversionError, match="shape"):
        compare_logits(theirs[:1], theirs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_has_the_logits_of_the_training_model_and_a_damaged_one_has_not(reader, tmp_path, dtype):
    out = tmp_path / "out"
    export_hf(reader, out, dtype=dtype)
    report = verify_export(reader, out)
    assert report.max_abs < 1e-4
    assert report.argmax_agreement == 1.0
    stored = load_file(out / "model.safetensors")
    gate, up = (f"model.layers.1.mlp.experts.2.{name}_proj.weight" for name in ("gate", "up"))
    stored[gate], stored[up] = stored[up], stored[gate]
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match="differ from ours"):
        verify_export(reader, out)


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_exports_and_verifies(run, tmp_path):
    words = [
        "to-hf",
        str(run(KIND)),
        str(tmp_path / "out"),
        "--dtype",
        "bfloat16",
        "--max-shard-size",
        "30KB",
        "--verify",
    ]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0
    assert "step 20" in result.output and "verified: 128 positions" in result.output
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert config.model_type == "moetrain" and config.dtype == torch.bfloat16


def test_a_stock_export_is_verified_too(run, tmp_path):
    words = ["to-hf", str(run("top_k-renormalized")), str(tmp_path / "out"), "--architecture", "mixtral", "--verify"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0
    assert "verified: 128 positions" in result.output and "as mixtral" in result.output
    assert not list((tmp_path / "out").glob("*.py"))
    assert "trust_remote_code" not in (tmp_path / "out" / "README.md").read_text()


def test_the_command_leaves_no_export_that_failed_its_verification(run, tmp_path, monkeypatch):
    right = TRANSFORMS["split_qkv"]
    wrong = Transform(lambda qkv, model: (lambda q, k, v: (q, v, k))(*right.split(qkv, model)), right.join)
    monkeypatch.setitem(TRANSFORMS, "split_qkv", wrong)
    result = CliRunner().invoke(app, ["to-hf", str(run(KIND)), str(tmp_path / "out"), "--verify"])
    assert isinstance(result.exception, ConversionError)
    assert "differ from ours" in str(result.exception)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({"type": "da_moe", "importance": "random"}, r"router\.importance \(random\).*it has: self_weight"),
        *(
            ({"type": kind}, rf"router\.type \({kind}\).*it has: top_k, expert_bias, da_moe")
            for kind in ("top_p", "relu", "bias_threshold")
        ),
    ],
)
def test_a_router_that_the_exported_code_lacks_is_refused_before_anything_is_written(reader, tmp_path, router, message):
    class Other:
        def __getattr__(self, name):
            return getattr(reader, name)

        @property
        def config(self):
            model = reader.config["model"]
            return reader.config | {"model": model | {"moe": model["moe"] | {"router": router}}}

    with pytest.raises(ConversionError, match=message):
        export_hf(Other(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_a_balance_loss_remembers_is_no_part_of_an_export():
    names = [
        "weight.a",
        "controller.decoder.layers.0.mlp.router.thresholds",
        "controller.decoder.layers.0.mlp.losses.load",
    ]
    checkpoint = SimpleNamespace(names=lambda: names)
    assert set(hf.ModelWeights(checkpoint).names()) == {"a", "decoder.layers.0.mlp.router.thresholds"}


# --- exports that go on ---------------------------------------------------------------------------------------------


@pytest.fixture
def unfinished(reader, tmp_path, monkeypatch) -> Path:
    """What an export leaves that was stopped by a full disk after three files."""
    with monkeypatch.context() as patch:
        patch.setattr(hf, "write_weight_file", _stopping(after=3))
        with pytest.raises(ConversionError, match=r"no space left.*keeps 3 finished file\(s\): repeat the command"):
            export_hf(reader, tmp_path / "out", max_shard_size="30KB")
    return tmp_path / ".out.partial"


def _stopping(after: int):
    written = []

    def write(path, *words):
        if len(written) == after:
            path.write_bytes(b"half")
            raise OSError("no space left on device")
        written.append(path.name)
        return write_weight_file(path, *words)

    return write


def _counting(written: list[str]):
    return lambda path, *words: written.append(path.name) or write_weight_file(path, *words)


def test_an_export_goes_on_with_the_files_that_are_whole(reader, unfinished, tmp_path, monkeypatch):
    damaged = unfinished / "model-00002-of-00004.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    written, said = [], []
    monkeypatch.setattr(hf, "write_weight_file", _counting(written))
    report = export_hf(reader, tmp_path / "out", max_shard_size="30KB", announce=said.append)
    kept = {"model-00001-of-00004.safetensors", "model-00003-of-00004.safetensors"}
    assert set(written) == set(report.weight_files) - kept
    assert "2 of 4 file(s) are there, whole" in said[1]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    export_hf(reader, tmp_path / "at once" / "out", max_shard_size="30KB")
    for path in (tmp_path / "at once" / "out").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "at once" / "out").iterdir()}


def test_another_export_does_not_go_on_where_one_was_stopped(reader, unfinished, tmp_path, run):
    before = sorted(p.name for p in unfinished.iterdir())
    for options, message in (
        ({"dtype": "bfloat16"}, "dtype: float32 there, bfloat16 now"),
        ({"max_shard_size": "40KB"}, "max_shard_size: 30000 there, 40000 now"),
    ):
        with pytest.raises(ConversionError, match=f"an unfinished export of something else .*{message}"):
            export_hf(reader, tmp_path / "out", **({"max_shard_size": "30KB"} | options))
    with pytest.raises(ConversionError, match="checkpoint: "):
        export_hf(
            CheckpointReader(run(KIND) / "checkpoints" / "step-00000010"), tmp_path / "out", max_shard_size="30KB"
        )
    assert sorted(p.name for p in unfinished.iterdir()) == before


def test_a_hidden_folder_that_is_no_unfinished_export_is_not_touched(reader, tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "notes.txt").write_text("mine")
    with pytest.raises(ConversionError, match="no unfinished export"):
        export_hf(reader, tmp_path / "out")
    assert (tmp_path / ".out.partial" / "notes.txt").read_text() == "mine"


def test_a_damaged_journal_means_that_nothing_is_finished(reader, unfinished, tmp_path, monkeypatch):
    journal = json.loads((unfinished / JOURNAL).read_text())
    (unfinished / JOURNAL).write_text(json.dumps(journal | {"files": ["what?"]}))
    written: list[str] = []
    monkeypatch.setattr(hf, "write_weight_file", _counting(written))
    report = export_hf(reader, tmp_path / "out", max_shard_size="30KB")
    assert sorted(written) == sorted(report.weight_files)


def test_two_exports_do_not_write_the_same_folder_at_once(reader, unfinished, tmp_path):
    with (unfinished / LOCK).open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConversionError, match="another process is exporting there"):
            export_hf(reader, tmp_path / "out", max_shard_size="30KB")


def test_an_unknown_architecture_is_refused(reader, tmp_path):
    with pytest.raises(ConversionError, match=r"architecture is 'gpt2'; legal: auto, moetrain, mixtral"):
        export_hf(reader, tmp_path / "out", architecture="gpt2")
