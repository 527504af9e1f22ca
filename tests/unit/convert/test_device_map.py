"""A model whose parts lie on several devices, by accelerate: its hooks must meet every module that is used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moetrain.convert.hf_modeling.modeling_moetrain import MoetrainForCausalLM

KINDS = ("top_k", "da_moe-predicted", "da_moe-hyper", "hyper-stage-embeddings", "hyper-prob-gated", "hyper-constant")
PLACES = ("model.embed_tokens", "model.layers.1")


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_fit_in_memory_lies_on_the_disk_and_changes_no_logit(
    kind: str, of_kind, weights, build, tmp_path: Path
) -> None:
    model = of_kind(kind)
    whole = build(model, weights(model))
    whole.save_pretrained(tmp_path / "model")
    sizes = {name: sum(p.nbytes for p in whole.get_submodule(name).parameters()) for name in PLACES}
    memory = {"cpu": 2 * sizes["model.layers.1"] + 2 * sizes["model.embed_tokens"]}
    spread = MoetrainForCausalLM.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory=memory, offload_folder=str(tmp_path / "disk")
    ).eval()
    assert set(spread.hf_device_map.values()) == {"cpu", "disk"}, spread.hf_device_map
    shared = [name for name in spread.hf_device_map if "hypernetwork" in name or "selection" in name]
    assert all(spread.hf_device_map[name] == "disk" for name in shared)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(spread(tokens).logits, whole(tokens).logits)
