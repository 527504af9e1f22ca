"""Import of stock models, and their way back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from stock_models import KINDS, save_stock, stock_model
from typer.testing import CliRunner

from moetrain.checkpoint import CheckpointReader
from moetrain.cli.convert import app
from moetrain.config.loader import config_from_dict, load_config
from moetrain.config.model import ModelConfig
from moetrain.config.size import parameter_count
from moetrain.convert.architectures import STOCK
from moetrain.convert.from_hf import import_hf
from moetrain.convert.hf import export_hf
from moetrain.convert.hf_config import hf_config
from moetrain.convert.hf_folder import INDEX, WHOLE
from moetrain.convert.verify import hf_logits
from moetrain.errors import ConversionError
from moetrain.model.reference_logits import megatron_logits

ORDER = ("first", "second")
QUIET: Callable[[str], None] = lambda _: None  # noqa: E731


def logits_of(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    with CheckpointReader(folder) as reader:
        return megatron_logits(reader, tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_an_imported_model_has_the_logits_of_transformers(kind: str, tmp_path: Path) -> None:
    theirs = save_stock(kind, tmp_path / "hf")
    report = import_hf(tmp_path / "hf", tmp_path / "out", announce=QUIET)
    tokens = torch.randint(96, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens, use_cache=False).logits
    difference = (logits_of(tmp_path / "out", tokens) - expected).abs().max().item()
    assert expected.std() > 0.1
    assert difference < 1e-5
    assert report.parameters == parameter_count(report.model).total == sum(p.numel() for p in theirs.parameters())


def test_both_spellings_of_experts_are_read(tmp_path: Path) -> None:
    """transformers 5 writes one tensor per expert, unless it is asked for what it holds in memory."""
    for kind in ("mixtral", "qwen3_moe-dense-layers", "olmoe", "dots1", "deepseek_v2", "deepseek_v3"):
        here = tmp_path / kind
        save_stock(kind, here / "per expert")
        save_stock(kind, here / "fused", save_original_format=False)
        names = load_file(here / "fused" / "model.safetensors").keys()
        assert any(name.endswith("mlp.experts.gate_up_proj") for name in names)
        weights = []
        for spelling in ("per expert", "fused"):
            import_hf(here / spelling, here / f"{spelling} imported", announce=QUIET)
            with CheckpointReader(here / f"{spelling} imported") as reader:
                weights.append({name: reader.read(name) for name in reader.names()})
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(("kind", "name"), [("dots1", "dots1"), ("deepseek_v3-yarn", "deepseek_v3")])
def test_what_lies_beside_the_weights_starts_a_run(kind: str, name: str, tokenizer: Path, tmp_path: Path) -> None:
    save_stock(kind, tmp_path / "hf", max_shard_size="20KB")
    for file in tokenizer.iterdir():
        (tmp_path / "hf" / file.name).write_bytes(file.read_bytes())
    report = import_hf(tmp_path / "hf", tmp_path / "out", seq_length=32, announce=QUIET)
    run = load_config([tmp_path / "out" / "config.yaml"], ["data.train.0.path=here"])
    with CheckpointReader(tmp_path / "out") as reader:
        assert config_from_dict(reader.config, "manifest").model == run.model == report.model
        assert reader.step == 0 and reader.extra["imported_from"]["architecture"] == name
        assert len(reader.extra["tokenizer"]) == 64
        assert not any(name.startswith("optimizer.") for name in reader.names())
        assert "controller.decoder.layers.1.mlp.router.bias" in reader.names()
    assert run.checkpoint.load == str(tmp_path / "out") and run.checkpoint.load_weights_only
    assert run.model.seq_length == 32
    assert Path(run.data.tokenizer.path, "tokenizer.json").is_file()
    assert report.notes == ()


def test_a_length_of_nothing_is_refused(saved: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="seq_length is 0; must be 1 or more"):
        import_hf(saved("llama"), tmp_path / "out", seq_length=0)


def test_weights_in_bf16_are_read_exactly(tmp_path: Path) -> None:
    model = stock_model("mixtral").bfloat16()
    model.save_pretrained(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "out", announce=QUIET)
    with CheckpointReader(tmp_path / "out") as reader:
        found = reader.read("weight.embedding.word_embeddings.weight")
    assert found.dtype == torch.float32
    assert torch.equal(found, model.get_input_embeddings().weight.float())


def test_layers_that_predict_tokens_further_on_stay_behind(tmp_path: Path) -> None:
    """As DeepSeek-V3 has them: numbered on, behind the last layer."""
    save_stock("deepseek_v3", tmp_path / "hf")
    expected = import_hf(tmp_path / "hf", tmp_path / "plain", announce=QUIET)
    tensors = load_file(tmp_path / "hf" / WHOLE)
    more = {name.replace(".layers.2.", ".layers.3."): t.clone() for name, t in tensors.items() if ".layers.2." in name}
    save_file(tensors | more | {"model.layers.3.eh_proj.weight": torch.zeros(32, 64)}, tmp_path / "hf" / WHOLE)
    report = import_hf(tmp_path / "hf", tmp_path / "out", announce=QUIET)
    assert report.notes[-1] == f"{len(more) + 1} tensors stay behind: model.layers.3.*"
    assert report.parameters == expected.parameters
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    with pytest.raises(ConversionError, match=r"has more than the model's config tells: .*model\.layers\.3\."):
        import_hf(tmp_path / "hf", tmp_path / "none", announce=QUIET)


# --- there and back -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of 96 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary = {"</s>": 2, "<unk>": 0, "<s>": 1} | {chr(0x21 + n): 3 + n for n in range(93)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    model.add_special_tokens(["</s>", "<s>", "<unk>"])
    model.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_exports_are_stock_and_come_back_byte_for_byte(kind: str, tokenizer: Path, tmp_path: Path) -> None:
    """Import, export, import, export: the exports are the same files, and transformers computes them by itself."""
    source = tmp_path / "stock" / "model"
    theirs = save_stock(kind, source)
    for time in ORDER:
        import_hf(source, tmp_path / time / "model", announce=QUIET)
        with CheckpointReader(tmp_path / time / "model") as reader:
            report = export_hf(
                reader,
                tmp_path / f"{time}-export" / "model",
                tokenizer=tokenizer,
                max_shard_size="30KB",
                announce=QUIET,
            )
        source = tmp_path / f"{time}-export" / "model"
    assert report.architecture == KINDS[kind][0]
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / f"{t}-export" / "model").iterdir()} for t in ORDER)
    assert first.keys() == second.keys() and not any(name.endswith(".py") for name in first)
    assert [name for name in first if first[name] != second[name]] == []
    tokens = torch.randint(96, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = theirs(tokens, use_cache=False).logits
    torch.testing.assert_close(hf_logits(source, tokens, trust_remote_code=False), logits, atol=1e-6, rtol=0)


def test_auto_takes_a_stock_architecture_only_where_it_fits_exactly(of_kind: Callable[[str], ModelConfig]) -> None:
    def fitting(model: ModelConfig) -> list[str]:
        return [name for name in STOCK if _fits(name, model)]

    assert fitting(of_kind("dense")) == ["llama"]
    assert fitting(of_kind("top_k-renormalized")) == ["mixtral"]
    for kind in ("top_k", "top_k-hyper", "da_moe-hyper", "dense-biased-wide-heads"):
        assert fitting(of_kind(kind)) == [], kind
    normed = of_kind("top_k").model_copy(update={"qk_layernorm": "head"})
    assert fitting(normed) == ["qwen3_moe"]
    assert fitting(normed.model_copy(update={"type": "encoder"})) == []


def test_latent_attention_is_exported_as_deepseeks_or_not_at_all(of_kind: Callable[[str], ModelConfig]) -> None:
    widths = {"kv_lora_rank": 8, "qk_head_dim": 6, "qk_pos_emb_head_dim": 4, "v_head_dim": 5}
    latent = {"num_query_groups": None, "multi_latent_attention": widths}

    def with_latents(kind: str, **router: object) -> ModelConfig:
        tree = of_kind(kind).model_dump() | latent
        if router:
            tree["moe"] |= {"router": router, "shared_expert_ffn_hidden_size": 18, "layer_freq": [0, 1, 1]}
        return ModelConfig.model_validate(tree)

    fits = {
        name: [stock for stock in STOCK if _fits(stock, model)]
        for name, model in {
            "V3": with_latents("top_k", type="expert_bias"),
            "V2": with_latents("top_k", type="top_k"),
            "renormalized": with_latents("top_k", type="top_k", gates="renormalized"),
            "experts of ours": with_latents("da_moe-hyper"),
        }.items()
    }
    assert fits == {"V3": ["deepseek_v3"], "V2": ["deepseek_v2"], "renormalized": [], "experts of ours": []}
    with pytest.raises(
        ConversionError, match=r"model\.multi_latent_attention: the exported modelling code has ordinary"
    ):
        hf_config(with_latents("da_moe-hyper"))


@pytest.mark.parametrize("name", STOCK)
def test_relu_and_relative_positions_have_no_stock_architecture(
    of_kind: Callable[[str], ModelConfig], name: str
) -> None:
    """Where positions do not rotate, heads may be odd, which no stock config could say."""
    others = {
        "activation": {"activation": "relu"},
        "position_embedding": {"position_embedding": "relative", "rotary_base": 10000.0, "kv_channels": 7},
    }
    for kind in ("dense", "top_k-renormalized"):
        for setting, changes in others.items():
            model = ModelConfig.model_validate(of_kind(kind).model_dump() | changes)
            words = rf"^{name} does not fit this model: model\.{setting} is {changes[setting]}, not"
            with pytest.raises(ConversionError, match=words):
                STOCK[name].write_config(model)


def _fits(name: str, model: ModelConfig) -> bool:
    try:
        STOCK[name].write_config(model)
    except ConversionError:
        return False
    return True


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("mixtral", "top_k", r"model\.moe\.(layer_freq|router\.gates) is"),
        ("mixtral", "da_moe-hyper", r"which has no model\.moe\.router\.top_k"),
        ("mixtral", "hyper", r"model\.moe\.hyper is .*, and null in mixtral"),
        ("llama", "dense-biased-wide-heads", r"model\.add_qkv_bias is true, and false in llama"),
        ("olmoe", "dense", r"which has no model\.moe"),
    ],
)
def test_a_wish_that_does_not_fit_is_refused_with_the_setting(
    of_kind: Callable[[str], ModelConfig], name: str, kind: str, message: str
) -> None:
    model = of_kind("top_k-renormalized" if kind == "hyper" else kind)
    if kind == "hyper":
        model = model.model_copy(
            update={"moe": model.moe.model_copy(update={"hyper": of_kind("top_k-hyper").moe.hyper})}
        )
    with pytest.raises(ConversionError, match=message):
        STOCK[name].write_config(model)


def test_the_command_imports_and_verifies(tmp_path: Path) -> None:
    save_stock("mixtral", tmp_path / "hf")
    result = CliRunner().invoke(
        app, ["from-hf", str(tmp_path / "hf"), str(tmp_path / "out"), "--verify"], catch_exceptions=False
    )
    assert result.exit_code == 0
    assert "verified: 128 positions" in result.output and "note: set data.tokenizer: " in result.output


# --- what is refused ------------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, dict, str]] = [
    ("mixtral", {"sliding_window": 32}, r"sliding_window is 32.*legal: null"),
    ("mixtral", {"hidden_act": "gelu"}, r'hidden_act is "gelu".*legal: "silu"'),
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
    ("mixtral", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters is .*yarn.*legal: none"),
    ("llama", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is .*linear"),
    ("llama", {"attention_bias": True}, "attention_bias is true.*legal: false"),
    ("llama", {"mlp_bias": True}, "mlp_bias is true"),
    ("llama", {"num_hidden_layers": 10**30}, r"num_hidden_layers is 10+, .*legal: 1 to 4096"),
    ("llama", {"num_hidden_layers": 4000}, "tells of 4000 layers; the folder has only"),
    ("llama", {"num_hidden_layers": "3"}, 'num_hidden_layers is "3".*type int'),
    ("llama", {"num_hidden_layers": True}, "num_hidden_layers is true.*type int"),
    (
        "llama",
        {"head_dim": 2**30, "num_attention_heads": 32, "num_key_value_heads": 32},
        r"would have shape \[.*at most",
    ),
    ("llama", {"intermediate_size": 2**30}, r"linear_fc1\.weight would have|gate_proj\.weight has shape"),
    ("mixtral", {"num_local_experts": 4096}, r"lacks \d+ tensor"),
    ("llama", {"hidden_size": 33}, "hidden_size is 33.*multiple"),
    ("llama", {"vocab_size": 97}, r"embed_tokens\.weight has shape \[96, 32\].*says \[97, 32\]"),
    ("llama", {"num_key_value_heads": 3}, r"num_attention_heads \(4\) must be divisible"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map names Python code"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures is .*legal: LlamaForCausalLM"),
    ("llama", {"model_type": "deepseek_v32"}, "model_type is 'deepseek_v32'.*chooses keys by an indexer"),
    ("llama", {"model_type": "gpt2"}, "model_type is 'gpt2', which we do not read; legal: mixtral, qwen3_moe"),
    ("llama", {"model_type": ["llama"]}, "model_type is"),
    ("llama", {"tie_word_embeddings": True}, "ties the embeddings, but lm_head.weight is not"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window is true"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types is"),
    ("qwen3_moe", {"mlp_only_layers": [7]}, r"mlp_only_layers is \[7\].*0 to 2"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
    ("qwen3_moe", {"num_experts": 5, "num_local_experts": 5}, "lacks 9 tensor"),
    ("qwen3_moe", {"num_experts": 5, "num_local_experts": 4}, "num_experts is 5 and num_local_experts is 4"),
    ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob is 1.*legal: true, false"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
    ("dots1", {"first_k_dense_replace": 3}, "first_k_dense_replace is 3"),
    ("dots1", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("dots1", {"n_shared_experts": None}, "n_shared_experts is null"),
    ("deepseek_v3", {"attention_bias": True}, "attention_bias is true"),
    ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads is 2.*legal: 4"),
    ("deepseek_v3", {"head_dim": 8}, "head_dim is 8.*legal: 6"),
    ("deepseek_v3", {"qk_head_dim": 17}, "qk_head_dim is 17.*legal: 16"),
    (
        "deepseek_v3",
        {"qk_rope_head_dim": 5, "head_dim": 5, "qk_head_dim": 15},
        r"qk_pos_emb_head_dim \(5\) must be even",
    ),
    ("deepseek_v3", {"kv_lora_rank": None}, "kv_lora_rank is null.*type int"),
    ("deepseek_v3", {"kv_lora_rank": 2**31 - 1, "num_attention_heads": 512, "num_key_value_heads": 512}, "at most"),
    ("deepseek_v3", {"kv_lora_rank": 17}, r"has shape \[24, 32\]; the model's config says \[23, 32\]"),
    ("deepseek_v3", {"q_lora_rank": None}, r"lacks 3 tensor.*q_proj\.weight"),
    ("deepseek_v3", {"scoring_func": "softmax"}, 'scoring_func is "softmax".*legal: "sigmoid"'),
    ("deepseek_v3", {"topk_method": "greedy"}, 'topk_method is "greedy".*legal: "noaux_tc"'),
    ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
    ("deepseek_v3", {"num_nextn_predict_layers": -1}, "num_nextn_predict_layers is -1.*legal: 0 to 64"),
    ("deepseek_v3", {"rope_interleave": 1}, "rope_interleave is 1.*type bool"),
    ("deepseek_v3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "linear.*rope_type default, yarn"),
    ("deepseek_v3", {"rope_parameters": {"rope_type": "yarn"}}, "lacks factor"),
    ("deepseek_v3-yarn", {"rope_parameters": {"factor": 0.5}}, "yarn.factor"),
    ("deepseek_v3-yarn", {"rope_parameters": {"factor": 1e300}}, "yarn.factor"),
    ("deepseek_v3-yarn", {"rope_parameters": {"beta_fast": 1e-300}}, "yarn.beta_fast"),
    ("deepseek_v3-yarn", {"rope_parameters": {"attention_factor": 1.1}}, "attention_factor is 1.1"),
    ("deepseek_v3-yarn", {"rope_parameters": {"truncate": False}}, "truncate is false"),
    ("deepseek_v3-yarn", {"rope_parameters": {"original_max_position_embeddings": 0}}, "legal: 1 to"),
    ("deepseek_v3-yarn", {"rope_parameters": {"rope_theta": 1.0}}, r"rope_theta|rotary_base \(1\) must exceed 1"),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is true"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, 'topk_method is "noaux_tc".*legal: "greedy"'),
    ("deepseek_v2", {"n_group": None}, "n_group is null.*a number"),
    ("deepseek_v2", {"n_group": 3}, r"router.groups \(3\) must divide num_experts"),
    ("dots1", {"layer_types": None, "sliding_window": 16, "max_window_layers": 1}, "max_window_layers is 1"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of models, made once."""
    root = tmp_path_factory.mktemp("saved")

    def folder(kind: str) -> Path:
        if not (root / kind).exists():
            save_stock(kind, root / kind)
        return root / kind

    return folder


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


@pytest.mark.parametrize(("kind", "changes", "message"), REFUSED)
def test_a_config_that_we_do_not_compute_is_refused_by_its_field(
    saved: Callable[[str], Path], kind: str, changes: dict, message: str, tmp_path: Path
) -> None:
    folder = copied(saved(kind), tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        if value is None and name in ("rope_parameters", "layer_types"):
            config.pop(name, None)
        elif name == "rope_parameters":
            config[name] = config[name] | value
        else:
            config[name] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=message):
        import_hf(folder, tmp_path / "out", announce=QUIET)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def header_of(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(path: Path, header: dict | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _first(header: dict) -> dict:
    return next(value for name, value in header.items() if name != "__metadata__")


def _swapped(header: dict) -> dict:
    names = [name for name in header if name != "__metadata__"]
    shifted = {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]}
    return header | {names[0]: shifted}


EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
HEADERS: list[tuple[str, Callable[[dict, bytes], tuple[dict | bytes, bytes]], str]] = [
    ("absurd shape", lambda h, d: (_first(h).update(shape=[2**40, 2**40]) or h, d), "the shape needs other"),
    ("negative shape", lambda h, d: (_first(h).update(shape=[-1, -32]) or h, d), "whole numbers"),
    ("offsets beyond the file", lambda h, d: (_first(h).update(data_offsets=[0, 2**50]) or h, d), "other data_offsets"),
    ("overlap", lambda h, d: (_swapped(h), d), "starts at byte"),
    ("hole at the end", lambda h, d: (h, d + b"more"), "its tensors end at byte"),
    ("short file", lambda h, d: (h, d[:-4]), "its tensors end at byte"),
    ("quantized", lambda h, d: (_first(h).update(dtype="F8_E5M2") or h, d), "a dtype that is not read"),
    ("no object", lambda h, d: (b"[1]", d), "must hold a JSON object"),
    ("deep", lambda h, d: (b'{"a":' * 100_000, d), "damaged, not valid JSON"),
    ("a name twice", lambda h, d: (json.dumps(h).encode()[:-1] + b',"lm_head.weight":{}}', d), "stands there twice"),
    ("no fields", lambda h, d: (h | {"x": 3}, d), "must have dtype, shape and data_offsets"),
    (
        "unknown tensor",
        lambda h, d: (h | {"x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, d),
        "more than",
    ),
]


@pytest.mark.parametrize(("change", "message"), [row[1:] for row in HEADERS], ids=[row[0] for row in HEADERS])
def test_a_dishonest_header_is_refused(
    saved: Callable[[str], Path], change: Callable, message: str, tmp_path: Path
) -> None:
    folder = copied(saved("llama"), tmp_path / "hf")
    write_header(folder / WHOLE, *change(*header_of(folder / WHOLE)))
    with pytest.raises(ConversionError, match=message):
        import_hf(folder, tmp_path / "out", announce=QUIET)
    assert not (tmp_path / "out").exists()


def test_a_header_that_is_longer_than_its_file_is_refused(saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied(saved("llama"), tmp_path / "hf")
    (folder / WHOLE).write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(ConversionError, match="no safetensors file: its header would have"):
        import_hf(folder, tmp_path / "out", announce=QUIET)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "model.bin", 7, ".."])
def test_an_index_may_name_files_of_its_folder_only(name: object, tmp_path: Path) -> None:
    save_stock("llama", tmp_path / "hf", max_shard_size="20KB")
    index = json.loads((tmp_path / "hf" / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = name
    (tmp_path / "hf" / INDEX).write_text(json.dumps(index))
    with pytest.raises(ConversionError, match=r"must be a \.safetensors file of this very folder"):
        import_hf(tmp_path / "hf", tmp_path / "out", announce=QUIET)


def test_an_index_must_say_what_its_files_hold(tmp_path: Path) -> None:
    save_stock("llama", tmp_path / "hf", max_shard_size="20KB")
    path = tmp_path / "hf" / INDEX
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))

    def refused(message: str) -> None:
        with pytest.raises(ConversionError, match=message):
            import_hf(tmp_path / "hf", tmp_path / "out", announce=QUIET)

    other = {name: files[0] if file != files[0] else files[1] for name, file in index["weight_map"].items()}
    path.write_text(json.dumps({"weight_map": other}))
    refused("is not in .*, where the index says it is")
    shared = next(n for n, file in index["weight_map"].items() if [*index["weight_map"].values()].count(file) > 1)
    path.write_text(json.dumps({"weight_map": {k: v for k, v in index["weight_map"].items() if k != shared}}))
    refused(f"'{shared}' is in a file and not in the index")
    path.write_text(json.dumps(index))
    tensors = load_file(tmp_path / "hf" / files[0])
    save_file(tensors | {"lm_head.weight": torch.zeros(96, 32)}, tmp_path / "hf" / files[0])
    refused("'lm_head.weight' is in 2 files")
    (tmp_path / "hf" / files[0]).unlink()
    refused("is not there, or no file")


def test_links_may_not_lead_out_but_for_the_cache_of_the_hub(saved: Callable[[str], Path], tmp_path: Path) -> None:
    weights = saved("llama") / WHOLE
    for place, wanted in (("plain", False), ("models--x--y/snapshots/abc", True)):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        blobs = tmp_path / "models--x--y" / "blobs"
        blobs.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(weights, blobs / "sum")
        shutil.copyfile(saved("llama") / "config.json", folder / "config.json")
        (folder / WHOLE).symlink_to(blobs / "sum")
        if wanted:
            import_hf(folder, tmp_path / "out", announce=QUIET)
        else:
            with pytest.raises(ConversionError, match="is a link out of the folder"):
                import_hf(folder, tmp_path / "out", announce=QUIET)


def test_pickles_are_refused_with_the_reason(saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied(saved("llama"), tmp_path / "hf")
    (folder / WHOLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(ConversionError, match=r"pytorch_model\.bin only: a pickle, which can run code"):
        import_hf(folder, tmp_path / "out", announce=QUIET)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ConversionError, match=r"neither model\.safetensors nor"):
        import_hf(folder, tmp_path / "out", announce=QUIET)
