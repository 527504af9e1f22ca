"""Random Switch Transformers, made by transformers, as checkpoints: the same hidden states, gradients and token ids."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    SwitchTransformersConfig,
    SwitchTransformersEncoderModel,
    SwitchTransformersForConditionalGeneration,
    T5Tokenizer,
)
from typer.testing import CliRunner

from moetrain.checkpoint import CheckpointReader
from moetrain.cli.convert import app
from moetrain.config.loader import load_config
from moetrain.config.schema import TokenizerConfig
from moetrain.config.size import parameter_shapes
from moetrain.convert.hf import export_hf
from moetrain.convert.switch import SwitchFolder, import_switch, is_switch_folder
from moetrain.data.tokenizers import load_tokenizer
from moetrain.errors import ConversionError
from moetrain.model.parameters import named_parameters
from moetrain.model.reference_logits import final_states, reference_model

SIZES: dict[str, Any] = {
    "vocab_size": 500,
    "d_model": 24,
    "d_kv": 16,
    "d_ff": 20,
    "num_heads": 3,
    "num_layers": 4,
    "num_sparse_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_sparse_decoder_layers": 1,
    "num_experts": 5,
    "expert_capacity": 64,
    "relative_attention_num_buckets": 10,
    "relative_attention_max_distance": 14,
}
TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "  two  spaces, a\ttab\nand a line end ",
    "naïve café: £5 – 10 %? ﬁne Ａ",
    "def f(x): return {'a': [1, 2.5]}",
    "",
]


def make(folder: Path, whole: bool = False, **changes: Any) -> Path:
    """A random model's folder with weights away from their mild initial values, and a T5 tokenizer."""
    torch.manual_seed(0)
    config = SwitchTransformersConfig(**(SIZES | changes))
    kind = SwitchTransformersForConditionalGeneration if whole else SwitchTransformersEncoderModel
    model = kind(config)
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:
            torch.nn.init.normal_(parameter, std=1.0)
        if "layer_norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder, max_shard_size="40KB" if whole else "1GB")
    shutil.copy(folder.parent / "spiece.model", folder / "spiece.model")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sentencepiece model as T5's: padding, end, unknown, no beginning; unigram, NFKC."""
    folder = tmp_path_factory.mktemp("switch")
    source = Path(json.__file__).read_text() + Path(shutil.__file__).read_text()
    (folder / "text.txt").write_text("\n".join([source, *TEXTS]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "spiece"),
        vocab_size=380,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return folder


@pytest.fixture(scope="module")
def tiny(place: Path) -> Path:
    return make(place / "tiny")


def both(source: Path, out: Path, lengths: list[int], **options: Any) -> dict[str, Any]:
    """Final hidden states of real tokens, and gradients of a fixed function of them, of their model and of ours."""
    tokens = torch.randint(3, 500, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(5))
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    import_switch(source, out, verify=False, **options)
    theirs = SwitchTransformersEncoderModel.from_pretrained(source).eval()
    their_states = theirs(input_ids=tokens, attention_mask=valid.long()).last_hidden_state
    direction = torch.randn(their_states.shape, generator=torch.Generator().manual_seed(6)) * valid[..., None]
    (their_states * direction).sum().backward()
    with CheckpointReader(out) as reader, reference_model(reader) as decoder, torch.enable_grad():
        states = final_states(decoder, tokens, valid)
        (states * direction).sum().backward()
        gradients = {name: p.grad for name, p in named_parameters([decoder])}
    their_gradients = {name: p.grad for name, p in theirs.named_parameters()}
    return {"ours": states[valid], "theirs": their_states[valid], "grads": gradients, "their grads": their_gradients}


def close(ours: Tensor, theirs: Tensor, bound: float) -> None:
    assert (ours - theirs).abs().max() <= bound * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("roomy", {}),
        ("crowded", {"expert_capacity": 3}),
        ("every layer", {"num_sparse_encoder_layers": 4, "expert_capacity": 5}),
        ("odd width", {"d_kv": 7, "num_layers": 3, "num_sparse_encoder_layers": 1}),
    ],
)
def test_hidden_states_and_gradients_are_theirs(place: Path, tmp_path: Path, name: str, changes: dict) -> None:
    source = make(place / name, **changes)
    run = both(source, tmp_path / "out", [33, 20, 1])
    close(run["ours"], run["theirs"], 1e-5)
    width = SIZES["d_kv"] if "d_kv" not in changes else changes["d_kv"]
    model = load_config([tmp_path / "out" / "config.yaml"]).model
    grads, theirs = run["grads"], run["their grads"]
    close(grads["embedding.word_embeddings.weight"], theirs["shared.weight"], 1e-5)
    first = "encoder.block.0.layer.0.SelfAttention."
    close(grads["relative_positions.weight"], theirs[first + "relative_attention_bias.weight"], 1e-5)
    for i in range(model.num_layers):
        block, layer = f"encoder.block.{i}.layer", f"decoder.layers.{i}"
        qkv = grads[f"{layer}.self_attention.linear_qkv.weight"].view(3, 3, width, -1)
        for part, letter in enumerate("qkv"):
            mine = qkv[:, part].flatten(0, 1) * (math.sqrt(width) if letter == "q" else 1.0)
            close(mine, theirs[f"{block}.0.SelfAttention.{letter}.weight"], 1e-5)
        close(grads[f"{layer}.pre_mlp_layernorm.weight"], theirs[f"{block}.1.layer_norm.weight"], 1e-5)
        if not model.is_moe_layer(i):
            close(grads[f"{layer}.mlp.linear_fc1.weight"], theirs[f"{block}.1.mlp.wi.weight"], 1e-5)
            continue
        close(grads[f"{layer}.mlp.router.weight"], theirs[f"{block}.1.mlp.router.classifier.weight"], 1e-5)
        for e in range(5):
            for mine, letter in (("fc1", "wi"), ("fc2", "wo")):
                wanted = theirs[f"{block}.1.mlp.experts.expert_{e}.{letter}.weight"]
                close(grads[f"{layer}.mlp.experts.{mine}"][e], torch.zeros(()) if wanted is None else wanted, 1e-5)


def test_a_crowded_model_drops_tokens_and_their_input_may_stand_for_them(place: Path, tmp_path: Path) -> None:
    """Without this the test above would prove less than it says."""
    source = place / "crowded"
    zero, taken = (both(source, tmp_path / d, [33], dropped=d)["ours"] for d in ("zero", "input"))
    roomy = both(place / "roomy", tmp_path / "roomy", [33])["ours"]
    assert (zero - roomy).abs().max() > 0.1
    assert (zero - taken).abs().max() > 0.1


def test_a_whole_model_in_shards_gives_the_encoder_alone_and_a_config_to_start_from(
    place: Path, tmp_path: Path
) -> None:
    source, out = make(place / "whole", whole=True), tmp_path / "out"
    assert (source / "model.safetensors.index.json").is_file()
    result = CliRunner().invoke(app, ["from-switch", str(source), str(out), "--seq-length", "48", "--dropped", "input"])
    assert result.exit_code == 0, result.output
    assert "tensors of the decoder left" in result.output
    assert "left out, router_jitter_noise (0.01)" in result.output
    assert "left out, dropout_rate (0.1)" in result.output
    assert "verified: largest difference of a hidden state" in result.output
    run = load_config([out / "config.yaml"])
    assert run.checkpoint.load == str(out) and run.checkpoint.load_weights_only
    assert (run.model.seq_length, run.model.head_dim, run.model.layernorm_epsilon) == (48, 16, 1e-6)
    with CheckpointReader(out) as reader:
        shapes = {name.removeprefix("weight."): reader.shape(name) for name in reader.names()}
        assert shapes == dict(parameter_shapes(run.model))
        assert reader.extra["tokenizer"] == load_tokenizer(run.data.tokenizer).fingerprint
        with pytest.raises(ConversionError, match="only decoders can be exported"):
            export_hf(reader, tmp_path / "back")
    again = CliRunner().invoke(app, ["from-switch", str(source), str(out)])
    assert "not an empty folder" in str(again.exception)


def test_token_ids_are_those_of_the_t5_tokenizer_sentinels_included(tiny: Path, tmp_path: Path) -> None:
    import_switch(tiny, tmp_path / "out", verify=False)
    ours = load_tokenizer(load_config([tmp_path / "out" / "config.yaml"]).data.tokenizer)
    theirs = T5Tokenizer.from_pretrained(tiny)
    for text in TEXTS:
        assert [*ours.encode(text), ours.eod] == theirs(text)["input_ids"], text
    pair = [*ours.encode(TEXTS[0]), ours.eod, *ours.encode(TEXTS[3]), ours.eod]  # as `data/examples.py` joins texts
    assert pair == theirs(TEXTS[0], TEXTS[3])["input_ids"]
    assert theirs.convert_tokens_to_ids("<extra_id_0>") == 479
    for i in (0, 7, 99):
        assert ours.encode(f"<extra_id_{i}>")[-1] == theirs.convert_tokens_to_ids(f"<extra_id_{i}>")
    assert (ours.eod, ours.pad, ours.mask, ours.bos) == (1, 0, 479, None)


def test_a_tokenizer_json_is_taken_as_it_is(tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny, source)
    T5Tokenizer.from_pretrained(tiny).save_pretrained(source)
    import_switch(source, tmp_path / "out", verify=False)
    config = load_config([tmp_path / "out" / "config.yaml"]).data.tokenizer
    assert config == TokenizerConfig(type="huggingface", path=str(tmp_path / "out" / "tokenizer.json"))
    ours, theirs = load_tokenizer(config), T5Tokenizer.from_pretrained(source)
    for text in [*TEXTS, "fill <extra_id_0> in <extra_id_1>"]:
        assert [*ours.encode(text), ours.eod] == theirs(text)["input_ids"], text
    assert (ours.eod, ours.pad, ours.mask) == (1, 0, 479)


def broken(tiny: Path, folder: Path, **config: Any) -> Path:
    """A copy of the tiny model with other settings in its config.json."""
    shutil.copytree(tiny, folder)
    tree = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(tree))
    return folder


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"dense_act_fn": "gated-gelu"}, "dense_act_fn is 'gated-gelu'; this importer takes 'relu'"),
        ({"router_bias": True}, "router_bias is True"),
        ({"model_type": "t5"}, "has model_type 't5'"),
        ({"num_experts": 4}, "the config leaves no place for"),
        ({"num_experts": 6}, "lacks 4 tensor"),
        ({"num_layers": 5}, "lacks"),
        ({"d_ff": 21}, "says \\[21, 24\\]"),
    ],
)
def test_a_folder_that_is_no_such_model_is_refused_and_nothing_stays(
    tiny: Path, tmp_path: Path, config: dict, words: str
) -> None:
    with pytest.raises(ConversionError, match=words):
        import_switch(broken(tiny, tmp_path / "source", **config), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pickles_strange_shards_and_damage_are_refused(tiny: Path, tmp_path: Path) -> None:
    source = broken(tiny, tmp_path / "source")
    weights = source / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ConversionError, match="not a safetensors file, or a damaged one"):
        import_switch(source, tmp_path / "out")
    weights.unlink()
    (source / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConversionError, match="a pickle, which can run code of its author and is never read"):
        import_switch(source, tmp_path / "out")
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"shared.weight": "../tiny/model.safetensors"}}))
    with pytest.raises(ConversionError, match="files of this folder"):
        import_switch(source, tmp_path / "out")
    index.unlink()
    save_file({**tensors, "encoder.pooler.weight": torch.zeros(2)}, weights)
    with pytest.raises(ConversionError, match="the config leaves no place for 1 tensor"):
        import_switch(source, tmp_path / "out")
    save_file(tensors, weights)
    (source / "spiece.model").unlink()
    with pytest.raises(ConversionError, match="has neither tokenizer"):
        import_switch(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_wrong_import_is_vetoed_by_its_proof(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = SwitchFolder.read
    monkeypatch.setattr(SwitchFolder, "read", lambda self, name: read(self, name) * 1.01)
    with pytest.raises(ConversionError, match="hidden states differ from transformers'"):
        import_switch(tiny, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert is_switch_folder(tiny) and not is_switch_folder(tmp_path)
