"""Random Switch Transformers, made by transformers, as checkpoints: the same hidden states, gradients and token ids."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import yaml
from safetensors.torch import load_file, save_file
from stock_models import save_stock
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
from moetrain.cli.upcycle import app as upcycle
from moetrain.config.loader import load_config
from moetrain.config.schema import TokenizerConfig
from moetrain.config.size import parameter_shapes
from moetrain.convert.from_hf import import_hf
from moetrain.convert.hf import ARCHITECTURES, export_hf
from moetrain.convert.hf_folder import HFFolder
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
QUIET: Callable[[str], None] = lambda _: None  # noqa: E731
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
    import_hf(source, out, announce=QUIET, **options)
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
    words = ["from-hf", str(source), str(out)]
    result = CliRunner().invoke(app, [*words, "--seq-length", "48", "--dropped", "input", "--verify"])
    assert result.exit_code == 0, result.output
    left = sum(name.startswith(("decoder.", "lm_head.")) for name in HFFolder(source).names())
    assert left > 20 and f"note: {left} tensors stay behind: decoder.*, lm_head.*" in result.output
    assert "note: router_jitter_noise (0.01) is left out" in result.output
    assert "note: dropout_rate (0.1) is left out" in result.output
    assert "verified: 185 positions, largest difference of a hidden state" in result.output
    run = load_config([out / "config.yaml"])
    assert run.model.type == "encoder" and run.training.objective.type == "masked_lm"
    assert (
        run.model.moe is not None and run.model.moe.capacity is not None and run.model.moe.capacity.dropped == "input"
    )
    assert run.checkpoint.load == str(out) and run.checkpoint.load_weights_only
    assert (run.model.seq_length, run.model.head_dim, run.model.layernorm_epsilon) == (48, 16, 1e-6)
    with CheckpointReader(out) as reader:
        shapes = {name.removeprefix("weight."): reader.shape(name) for name in reader.names()}
        assert shapes == dict(parameter_shapes(run.model))
        assert reader.extra["tokenizer"] == load_tokenizer(run.data.tokenizer).fingerprint
        with pytest.raises(ConversionError, match="only decoders can be exported"):
            export_hf(reader, tmp_path / "back")
        assert reader.extra["imported_from"] == {"folder": str(source), "architecture": "switch_transformers"}
    assert "switch_transformers" not in ARCHITECTURES
    again = CliRunner().invoke(app, words)
    assert "not an empty folder" in str(again.exception)


def test_token_ids_are_those_of_the_t5_tokenizer_sentinels_included(tiny: Path, tmp_path: Path) -> None:
    import_hf(tiny, tmp_path / "out", announce=QUIET)
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
    import_hf(source, tmp_path / "out", announce=QUIET)
    config = load_config([tmp_path / "out" / "config.yaml"]).data.tokenizer
    assert config == TokenizerConfig(type="huggingface", path=str(tmp_path / "out" / "tokenizer"))
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
        ({"dense_act_fn": "gated-gelu"}, 'dense_act_fn is "gated-gelu", which we do not compute; legal: "relu"'),
        ({"router_bias": True}, "router_bias is true"),
        ({"router_dtype": "bfloat16"}, 'router_dtype is "bfloat16"'),
        ({"model_type": "t5"}, "model_type is 't5', which we do not read; legal: .*switch_transformers"),
        ({"architectures": ["SwitchTransformersTop1Router"]}, "legal: SwitchTransformersForConditionalGeneration, "),
        ({"architectures": 7}, "architectures is 7"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map names Python code"),
        ({"num_experts": 4}, "has more than the model's config tells: 4 tensor"),
        ({"num_experts": 6}, "lacks 4 tensor"),
        ({"num_experts": 10**9}, "num_experts is 1000000000.*legal: 1 to 4096"),
        ({"num_layers": 5}, "lacks"),
        ({"num_layers": 4000}, "tells of 4000 layers; the folder has only"),
        ({"num_sparse_encoder_layers": -1}, "num_sparse_encoder_layers is -1"),
        ({"encoder_sparse_step": "2"}, 'encoder_sparse_step is "2"'),
        ({"encoder_sparse_step": 3}, "lacks"),
        ({"d_ff": 21}, "says \\[21, 24\\]"),
        ({"relative_attention_num_buckets": 11}, r"relative_buckets \(11\) must be an even number"),
        ({"router_jitter_noise": "much"}, 'router_jitter_noise is "much".*type float'),
    ],
)
def test_a_folder_that_is_no_such_model_is_refused_and_nothing_stays(
    tiny: Path, tmp_path: Path, config: dict, words: str
) -> None:
    with pytest.raises(ConversionError, match=words):
        import_hf(broken(tiny, tmp_path / "source", **config), tmp_path / "out", announce=QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_either_name_of_the_embedding_will_do_and_both_must_agree(tiny: Path, tmp_path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(tiny / "model.safetensors").items()}
    table = tensors.pop("shared.weight")
    tensors.pop("encoder.embed_tokens.weight", None)
    both_names = {"shared.weight": table, "encoder.embed_tokens.weight": table.clone()}
    for number, name in enumerate(both_names):
        source = broken(tiny, tmp_path / f"source {number}")
        save_file(tensors | {name: table}, source / "model.safetensors")
        import_hf(source, tmp_path / f"out {number}", announce=QUIET)
        with CheckpointReader(tmp_path / f"out {number}") as reader:
            assert torch.equal(reader.read("weight.embedding.word_embeddings.weight"), table)
    source = broken(tiny, tmp_path / "source")
    save_file(tensors | both_names, source / "model.safetensors")
    import_hf(source, tmp_path / "both", announce=QUIET)
    save_file(tensors | both_names | {"shared.weight": table + 1}, source / "model.safetensors")
    with pytest.raises(ConversionError, match=r"encoder\.embed_tokens\.weight is not shared\.weight"):
        import_hf(source, tmp_path / "out", announce=QUIET)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ConversionError, match=r"lacks 1 tensor\(s\): shared\.weight"):
        import_hf(source, tmp_path / "out", announce=QUIET)


def test_strange_tensors_and_tokenizers_are_refused(tiny: Path, tmp_path: Path) -> None:
    source = broken(tiny, tmp_path / "source")
    tensors = {name: tensor.clone() for name, tensor in load_file(tiny / "model.safetensors").items()}

    def refused(words: str) -> None:
        with pytest.raises(ConversionError, match=words):
            import_hf(source, tmp_path / "out", announce=QUIET)

    save_file({**tensors, "encoder.pooler.weight": torch.zeros(2)}, source / "model.safetensors")
    refused(r"more than the model's config tells: 1 tensor\(s\): encoder\.pooler\.weight")
    save_file(tensors, source / "model.safetensors")
    (source / "spiece.model").write_bytes(b"\xff" * 40)
    refused(r"an encoder needs the tokenizer.*spiece\.model: not a sentencepiece model")
    (source / "spiece.model").unlink()
    refused(r"an encoder needs the tokenizer.*no tokenizer\.json, tokenizer\.model or spiece\.model")
    (source / "spiece.model").symlink_to(tiny / "spiece.model")
    refused("an encoder needs the tokenizer")  # a link out of the folder is no file of it
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_dropped_is_refused_where_no_token_is_dropped(place: Path, tmp_path: Path) -> None:
    source = make(place / "dense", num_layers=2, num_sparse_encoder_layers=0, encoder_sparse_step=0)
    assert import_hf(source, tmp_path / "dense", announce=QUIET).model.moe is None
    save_stock("mixtral", place / "mixtral")
    for folder, name in ((source, "switch_transformers"), (place / "mixtral", "mixtral")):
        with pytest.raises(ConversionError, match=rf"dropped \(input\) is for experts with a capacity.*{name}"):
            import_hf(folder, tmp_path / "out", dropped="input", announce=QUIET)


def test_the_folder_starts_a_hypermoe_model_with_the_same_logits(tiny: Path, tmp_path: Path) -> None:
    import_hf(tiny, tmp_path / "imported", announce=QUIET)
    config = yaml.safe_load((tmp_path / "imported" / "config.yaml").read_text())
    config["model"]["moe"]["hyper"] = {"aggregation": "sum", "bottleneck": 2, "hidden": 4}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    words = [str(tiny), str(tmp_path / "run.yaml"), "--out", str(tmp_path / "hyper")]
    result = CliRunner().invoke(upcycle, words, catch_exceptions=False)
    assert result.exit_code == 0 and "compared: 256 positions" in result.output
    with CheckpointReader(tmp_path / "hyper") as reader:
        assert any(".hyper." in name for name in reader.names())


def test_a_wrong_import_is_vetoed_by_its_proof(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = HFFolder.read
    monkeypatch.setattr(HFFolder, "read", lambda self, *block: read(self, *block) * 1.01)
    with pytest.raises(ConversionError, match="hidden states differ from transformers'"):
        import_hf(tiny, tmp_path / "out", verify=True, announce=QUIET)
    assert not (tmp_path / "out").exists()
