"""DeepSeek's models as they were published: their config.json, and weights in fp8 with scales of blocks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stock_models import stock_model

from moetrain.checkpoint import CheckpointReader
from moetrain.config.size import parameter_count
from moetrain.convert.architectures import architecture_of
from moetrain.convert.from_hf import import_hf
from moetrain.convert.hf_folder import WHOLE
from moetrain.errors import ConversionError

QUIET: Callable[[str], None] = lambda _: None  # noqa: E731
COMMON = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_layer_freq": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
}
YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


def auto_map(version: str) -> dict[str, str]:
    return {
        "AutoConfig": f"configuration_deepseek.Deepseek{version}Config",
        "AutoModel": f"modeling_deepseek.Deepseek{version}Model",
        "AutoModelForCausalLM": f"modeling_deepseek.Deepseek{version}ForCausalLM",
    }


V3: dict[str, Any] = COMMON | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": auto_map("V3"),
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "quantization_config": FP8,
    "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "vocab_size": 129280,
}
V2_LITE: dict[str, Any] = COMMON | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "auto_map": auto_map("V2"),
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "first_k_dense_replace": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "vocab_size": 102400,
}


def test_the_published_configs_are_read_and_have_the_published_sizes() -> None:
    """671 B of which 36.6 B act on a token, and 15.7 B with 2.4 B, neither with the embedding (DeepSeek-V3's
    README_WEIGHTS.md; arXiv 2405.04434 appendix B)."""
    v3, lite = (architecture_of(config).read_config(config) for config in (V3, V2_LITE))
    for model, total, active in ((v3, 671.0e9, 36.6e9), (lite, 15.7e9, 2.45e9)):
        count = parameter_count(model)
        assert count.total == pytest.approx(total, rel=1e-3)
        assert count.active_per_token - model.vocab_size * model.hidden_size == pytest.approx(active, rel=2e-3)
    latent = v3.multi_latent_attention
    assert latent is not None and latent.yarn is not None
    assert (latent.yarn.factor, latent.yarn.rotated_factor, latent.rotary_interleaved) == (40.0, 1.0, True)


def test_code_that_may_compute_something_else_is_refused() -> None:
    foreign = V3 | {"auto_map": auto_map("V3") | {"AutoModelForCausalLM": "modeling_mine.DeepseekV3ForCausalLM"}}
    with pytest.raises(ConversionError, match="auto_map names Python code"):
        architecture_of(foreign).read_config(foreign)


# --- fp8 ------------------------------------------------------------------------------------------------------------

BLOCK = 128


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(fp8, scales, what both stand for), block by block."""
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // BLOCK), -(-columns // BLOCK))
    small, meant = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(weight.shape)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            here = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
            scales[i, j] = weight[here].abs().max() / 448
            small[here] = (weight[here] / scales[i, j]).to(torch.float8_e4m3fn)
            meant[here] = small[here].float() * scales[i, j]
    return small, scales, meant


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model in fp8 as DeepSeek-V3 is, of whole and cut blocks, and the weights that it stands for."""
    root = tmp_path_factory.mktemp("fp8")
    sizes = {"hidden_size": 136, "intermediate_size": 300, "moe_intermediate_size": 140, "v_head_dim": 40}
    stock_model("deepseek_v3", **sizes).save_pretrained(root / "meant")
    tensors = load_file(root / "meant" / WHOLE)
    in_fp8, meant = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if "_proj" in name:
            in_fp8[name], in_fp8[name + "_scale_inv"], meant[name] = quantized(weight)
    shutil.copytree(root / "meant", root / "fp8")
    config = json.loads((root / "fp8" / "config.json").read_text())
    (root / "fp8" / "config.json").write_text(json.dumps(config | {"quantization_config": FP8}))
    save_file(in_fp8, root / "fp8" / WHOLE)
    save_file(meant, root / "meant" / WHOLE)
    return root / "fp8", root / "meant"


def test_fp8_weights_become_what_their_scales_say(folders: tuple[Path, Path], tmp_path: Path) -> None:
    weights = []
    for folder in folders:
        report = import_hf(folder, tmp_path / folder.name, announce=QUIET)
        with CheckpointReader(tmp_path / folder.name) as reader:
            weights.append({name: reader.read(name) for name in reader.names()})
        assert any("tensors were fp8 with scales of blocks" in note for note in report.notes) == (folder == folders[0])
    assert weights[0].keys() == weights[1].keys()
    assert [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, _: t.pop("model.layers.0.mlp.up_proj.weight_scale_inv"), "is in fp8 without model"),
        (lambda t, _: t.update({"model.norm.weight_scale_inv": torch.ones(1, 1)}), "_scale_inv and is not in fp8"),
        (
            lambda t, _: t.update({"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(2, 2)}),
            r"must be float32 \[3, 2",
        ),
        (
            lambda t, _: t.update({"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(3, 2).bfloat16()}),
            r"is bfloat16 \[3, 2\]",
        ),
        (lambda _, c: c.pop("quantization_config"), "is in fp8, and config.json has no quantization_config"),
        (lambda _, c: c["quantization_config"].update(weight_block_size=[64, 64]), r"weight_block_size \[128, 128\]"),
        (lambda _, c: c["quantization_config"].update(quant_method="awq"), "quantized like this are not read"),
    ],
)
def test_fp8_and_scales_that_do_not_go_together_are_refused(
    folders: tuple[Path, Path], change: Callable[[dict, dict], object], message: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(folders[0], tmp_path / "hf")
    tensors, config = load_file(folder / WHOLE), json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / WHOLE)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=message):
        import_hf(folder, tmp_path / "out", announce=QUIET)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_a_proof_that_cannot_be_one_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="verify: transformers rounds fp8 weights anew"):
        import_hf(folders[0], tmp_path / "out", verify=True, announce=QUIET)
