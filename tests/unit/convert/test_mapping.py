"""The table read in both directions."""

from __future__ import annotations

import pytest
import torch

from moetrain.convert.architectures.moetrain import RULES
from moetrain.convert.hf_config import hf_config
from moetrain.convert.mapping import TRANSFORMS, ParamMap, read_whole
from moetrain.errors import ConversionError


def test_there_and_back_every_tensor_is_byte_identical(model, weights, source):
    ours = weights(model)
    theirs = dict(ParamMap(model, RULES).export(source(ours)))
    back = dict(ParamMap(model, RULES).invert(source(theirs)))
    assert back.keys() == ours.keys()
    for name, tensor in ours.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        assert torch.equal(back[name].view(torch.int32), tensor.view(torch.int32)), name


def test_announced_shapes_and_order_are_those_of_the_tensors(model, weights, source):
    mapping = ParamMap(model, RULES)
    exported = list(mapping.export(source(weights(model))))
    assert [name for name, _ in exported] == list(mapping.theirs())
    assert {name: tuple(t.shape) for name, t in exported} == {n: t.shape for n, t in mapping.theirs().items()}


def test_targets_are_exactly_the_state_of_the_modelling_file(model, build, weights):
    state = build(model, weights(model)).state_dict()
    if model.share_embeddings_and_output_weights:
        del state["lm_head.weight"]
    assert {name: tuple(t.shape) for name, t in state.items()} == {
        name: target.shape for name, target in ParamMap(model, RULES).theirs().items()
    }


def test_query_groups_are_taken_apart_head_by_head(of_kind, weights, source):
    model = of_kind("dense")
    ours = weights(model)
    theirs = dict(ParamMap(model, RULES).export(source(ours)))
    fused, width = ours["decoder.layers.1.self_attention.linear_qkv.weight"], model.head_dim
    heads = list(fused.split(width))  # two groups of: query, query, key, value
    for projection, order in {"q": (0, 1, 4, 5), "k": (2, 6), "v": (3, 7)}.items():
        expected = torch.cat([heads[n] for n in order])
        assert torch.equal(theirs[f"model.layers.1.self_attn.{projection}_proj.weight"], expected)


def test_queries_for_scores_without_a_scale_are_divided_by_ours_and_multiplied_back(of_kind, weights):
    model = of_kind("dense")
    fused = weights(model)["decoder.layers.1.self_attention.linear_qkv.weight"]
    scaled, plain = (TRANSFORMS[name] for name in ("split_unscaled_qkv", "split_qkv"))
    query, key, value = scaled.split(fused, model)
    torch.testing.assert_close(query * model.head_dim**0.5, plain.split(fused, model)[0])
    assert all(
        torch.equal(mine, other) for mine, other in zip((key, value), plain.split(fused, model)[1:], strict=True)
    )
    torch.testing.assert_close(scaled.join((query, key, value), model), fused)


def test_experts_are_read_one_at_a_time(of_kind, weights, source):
    model = of_kind("top_k-renormalized")
    reader = source(weights(model))
    names = [name for name in reader.names() if ".mlp.experts." in name]
    seen = []
    original = reader.read
    reader.read = lambda name, offset, shape: seen.append((name, shape[0])) or original(name, offset, shape)
    list(ParamMap(model, RULES).export(reader))
    assert sorted(seen_name for seen_name, rows in seen if rows == 1 and seen_name in names) == sorted(
        name for name in names for _ in range(model.moe.num_experts)
    )


@pytest.mark.parametrize("direction", ["export", "invert"])
def test_missing_left_over_and_misshaped_tensors_are_errors_with_their_names(of_kind, weights, source, direction):
    model = of_kind("da_moe-hyper")
    mapping, tensors = ParamMap(model, RULES), weights(model)
    if direction == "invert":
        tensors = dict(mapping.export(source(tensors)))
    name = next(n for n in tensors if n.endswith(("experts.fc2", "experts.3.down_proj.weight")))
    convert = getattr(mapping, direction)

    missing = {n: t for n, t in tensors.items() if n != name}
    with pytest.raises(ConversionError, match=f"lacks 1 tensor.*{name}"):
        next(convert(source(missing)))
    with pytest.raises(ConversionError, match=r"has more than.*decoder\.stray"):
        next(convert(source(tensors | {"decoder.stray": torch.zeros(1)})))
    with pytest.raises(ConversionError, match=f"{name} has shape"):
        next(convert(source(tensors | {name: tensors[name][..., :-1]})))


def test_a_controller_without_a_config_for_it_is_left_over(of_kind, weights, source):
    tensors = weights(of_kind("da_moe-self_weight-mean_k"))
    with pytest.raises(ConversionError, match="thresholds"):
        next(ParamMap(of_kind("da_moe-self_weight-paper"), RULES).export(source(tensors)))


def test_a_model_that_the_export_cannot_compute_is_refused_by_its_setting(of_kind):
    model = of_kind("top_k-hyper")
    hyper = model.moe.hyper.model_copy(update={"condition_on": "random_fixed"})
    with pytest.raises(ConversionError, match=r"condition_on is random_fixed.*legal: unselected"):
        hf_config(model.model_copy(update={"moe": model.moe.model_copy(update={"hyper": hyper})}))


def test_read_whole_reads_a_scalar(source):
    assert read_whole(source({"x": torch.tensor(3.0)}), "x").item() == 3.0
