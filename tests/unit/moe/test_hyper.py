"""HyperMoE's generated expert: every variant against its equations in NumPy float64, token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moetrain.config.moe import HyperConfig
from moetrain.moe.hyper import FORMS, HyperExperts, StaticExpert, distinct_sets, prefer_grouped
from moetrain.moe.hyper_network import HyperNetwork, SelectionEmbedding, fixed_embedding

Arrays = dict[str, np.ndarray]

D, E, LAYERS, LAYER = 6, 5, 3, 2
SIZES = {"bottleneck": 3, "hidden": 7, "expert_embedding": 4, "process": 5, "condition": 3, "layer_embedding": 2}
# Variable K, a repeated set in another order, a token with every expert, one with a single expert, one with none.
IDS = torch.tensor(
    [[0, 2, -1, -1, -1], [2, 0, -1, -1, -1], [4, -1, -1, -1, -1], [0, 1, 2, 3, 4], [3, 1, 2, -1, -1], [-1] * 5]
)
VARIANTS: list[dict[str, Any]] = [
    *(
        {"condition_on": on, "aggregation": how, "form": form}
        for on in ("unselected", "selected")
        for how in ("sum", "mean")
        for form in ("grouped", "factorized", "per_token")
    ),
    {"condition_on": "unselected", "aggregation": "prob"},
    {"condition_on": "selected", "aggregation": "prob"},
    {"condition_on": "random_fixed", "form": "grouped"},
    {"condition_on": "random_fixed", "aggregation": "prob"},
    {"condition_on": "constant", "form": "grouped"},
    {"condition_on": "constant", "form": "factorized", "layer_embedding": 0},
    {"condition_on": "static"},
    {"condition_on": "static", "coefficient": "selected_probability", "recompute": True},
    {"coefficient": "selected_probability", "form": "grouped"},
    {"coefficient": "selected_probability", "aggregation": "prob", "recompute": True},
    {"layer_embedding": 0, "form": "grouped", "recompute": True},
]


def config_of(**changes: Any) -> HyperConfig:
    return HyperConfig(**(SIZES | {"aggregation": "mean"} | changes))


def build(config: HyperConfig, seed: int = 0) -> tuple[HyperExperts | StaticExpert, dict[str, Tensor]]:
    """A layer's module, and its parameters by their last names, drawn large enough that everything matters."""
    if config.condition_on == "static":
        module = StaticExpert(config, D, torch.float32)
        parameters = dict(module.named_parameters())
    else:
        network = HyperNetwork(config, range(LAYERS), (LAYER,), D, torch.float32)
        selection = SelectionEmbedding(config, E, (LAYER,), "a name", torch.float32)
        module = HyperExperts(config, E, range(E + 1), LAYER, selection, network)
        parameters = dict([*selection.named_parameters(), *network.named_parameters()])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.7)
    return module, parameters


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(IDS), D, generator=generator).requires_grad_()
    probs = torch.randn(len(IDS), E, generator=generator).softmax(dim=-1).requires_grad_()
    return x, probs


# --- the equations, in NumPy, one token at a time, with weights of its own ------------------------------------------


def relu(value: np.ndarray) -> np.ndarray:
    return np.maximum(value, 0)


def selection_embedding(w: Arrays, config: HyperConfig, ids: list[int], condition_probs: np.ndarray) -> np.ndarray:
    """p_S of equation 2. `condition_probs` enters as a constant: the product detaches it."""
    if config.condition_on == "constant":
        return w["constant"]
    selected = [e for e in range(E) if e in ids]
    used = selected if config.condition_on == "selected" else [e for e in range(E) if e not in selected]
    v = np.zeros(config.expert_embedding)
    for e in used:
        share = {"sum": 1.0, "mean": 1 / len(used), "prob": condition_probs[e] / condition_probs[used].sum()}
        v = v + share[config.aggregation] * w["expert_embedding"][e]
    return w["process_out.weight"] @ relu(w["process_in.weight"] @ v + w["process_in.bias"]) + w["process_out.bias"]


def generated_expert(
    w: Arrays, config: HyperConfig, x: np.ndarray, ids: list[int], condition_probs: np.ndarray
) -> np.ndarray:
    if config.condition_on == "static":
        return w["up.weight"] @ relu(w["down.weight"] @ x + w["down.bias"]) + w["up.bias"]
    u = selection_embedding(w, config, ids, condition_probs)
    if config.layer_embedding:
        u = np.concatenate([u, w["layer_embedding"][LAYER]])
    e = relu(w["input.weight"] @ u + w["input.bias"])

    def head(name: str) -> np.ndarray:
        return w[f"{name}.weight"] @ e + w[f"{name}.bias"]

    down, up = head("down").reshape(config.bottleneck, D), head("up").reshape(D, config.bottleneck)
    return up @ relu(down @ x + head("down_bias")) + head("up_bias")


def by_the_equations(
    w: Arrays, config: HyperConfig, x: np.ndarray, probs: np.ndarray, condition_probs: np.ndarray
) -> np.ndarray:
    """[T, D]. Two copies of the probabilities: those that get a gradient, and those that do not."""
    rows = []
    for token, ids in enumerate(IDS.tolist()):
        y = generated_expert(w, config, x[token], ids, condition_probs[token])
        gated = config.coefficient == "selected_probability"
        rows.append(y * sum(probs[token, e] for e in ids if e >= 0) if gated else y)
    return np.stack(rows)


def central_differences(function: Callable[[], float], array: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """The gradient of a function of `array`, which is changed in place and put back."""
    gradient = np.zeros_like(array)
    for index in np.ndindex(array.shape):
        value = array[index]
        array[index] = value + step
        above = function()
        array[index] = value - step
        gradient[index] = (above - function()) / (2 * step)
        array[index] = value
    return gradient


def identity(config: dict[str, Any]) -> str:
    return "-".join(f"{value}" if isinstance(value, str) else f"{name}{value}" for name, value in config.items())


@pytest.mark.parametrize("variant", VARIANTS, ids=identity)
def test_output_and_every_gradient_follow_the_equations(variant: dict[str, Any]) -> None:
    config = config_of(**variant)
    module, parameters = build(config)
    x, probs = inputs()
    w = {name: p.detach().double().numpy() for name, p in parameters.items()}
    if config.condition_on == "random_fixed":
        w["expert_embedding"] = fixed_embedding("a name", (E, config.expert_embedding)).double().numpy()
    at, p = x.detach().double().numpy(), probs.detach().double().numpy()
    frozen, seen = p.copy(), np.linspace(-1, 1, len(IDS) * D).reshape(-1, D)

    output = module(x, IDS, probs)
    np.testing.assert_allclose(
        output.detach().numpy(), by_the_equations(w, config, at, p, frozen), rtol=1e-5, atol=1e-5
    )

    (output * torch.from_numpy(seen).float()).sum().backward()
    leaves = {"x": (x, at), "probs": (probs, p), **{name: (parameters[name], w[name]) for name in parameters}}
    for name, (tensor, array) in leaves.items():
        expected = central_differences(lambda: float((by_the_equations(w, config, at, p, frozen) * seen).sum()), array)
        mine = np.zeros_like(expected) if tensor.grad is None else tensor.grad.numpy()
        np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=2e-5, err_msg=name)


# --- what follows from the equations --------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=identity)
def test_the_router_gets_a_gradient_exactly_when_the_coefficient_is_its_probability(variant: dict[str, Any]) -> None:
    config = config_of(**variant)
    module, _ = build(config)
    x, probs = inputs()
    module(x, IDS, probs).sum().backward()
    assert (probs.grad is not None) == (config.coefficient == "selected_probability")


def embeddings(module: HyperExperts) -> Tensor:
    selection, _ = module._parts
    return selection.expert_embedding


def test_the_sum_over_the_unselected_is_all_minus_the_sum_over_the_selected() -> None:
    unselected, selected = (
        build(config_of(condition_on=on, aggregation="sum"))[0] for on in ("unselected", "selected")
    )
    _, probs = inputs()
    (of_rest, set_of_token), (of_chosen, _) = (m.condition_weights(IDS, probs) for m in (unselected, selected))
    table = embeddings(unselected)
    torch.testing.assert_close(of_rest @ table, table.sum(dim=0) - of_chosen @ table)
    assert set_of_token[0] == set_of_token[1]


@pytest.mark.parametrize(("aggregation", "top_k"), [("sum", None), ("mean", 1), ("mean", 3)])
def test_conditioning_on_the_selected_set_is_a_change_of_weights(aggregation: str, top_k: int | None) -> None:
    """B1 v + b1 with v = s_tot - v_selected is -B1 v_selected + (b1 + B1 s_tot). Of means at a fixed K likewise."""
    unselected, _ = build(config_of(aggregation=aggregation))
    selected, parameters = build(config_of(aggregation=aggregation, condition_on="selected"))
    ids = IDS if top_k is None else torch.tensor([[0, 2, 4], [1, 3, 4], [0, 1, 2], [3, 2, 0]])[:, :top_k]
    k, rest = (1, 1) if top_k is None else (top_k, E - top_k)
    with torch.no_grad():
        b1, total = parameters["process_in.weight"].clone(), embeddings(unselected).sum(dim=0)
        parameters["process_in.weight"].copy_(-b1 * k / rest)
        parameters["process_in.bias"].add_(b1 @ total / rest)
    x = torch.randn(len(ids), D, generator=torch.Generator().manual_seed(3))
    probs = torch.full((len(ids), E), 1 / E)
    output = selected(x, ids, probs)
    assert output.std() > 0.1
    torch.testing.assert_close(output, unselected(x, ids, probs), rtol=1e-5, atol=1e-5)


def test_the_three_forms_are_one_function() -> None:
    x, probs = inputs()
    grouped, *others = (build(config_of(form=form))[0](x, IDS, probs) for form in FORMS)
    for other in others:
        torch.testing.assert_close(grouped, other, rtol=1e-5, atol=1e-5)


def kept_bytes(config: HyperConfig) -> tuple[int, Tensor, list[Tensor]]:
    """Bytes that autograd keeps of the module's inside, its output, and all gradients."""
    module, parameters = build(config)
    x, probs = inputs()
    known = {t.untyped_storage().data_ptr() for t in [x, probs, *parameters.values()]}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(x, IDS, probs)
    gradients = torch.autograd.grad(output.square().sum(), [x, *parameters.values()])
    return sum(kept.values()), output, list(gradients)


@pytest.mark.parametrize("variant", [{"form": "grouped"}, {"form": "factorized"}, {"aggregation": "prob"}], ids=str)
def test_recompute_keeps_nothing_but_the_selection_and_changes_no_bit(variant: dict[str, Any]) -> None:
    kept, output, gradients = kept_bytes(config_of(**variant))
    kept_again, same_output, same_gradients = kept_bytes(config_of(**variant, recompute=True))
    module, _ = build(config_of(**variant))
    assert isinstance(module, HyperExperts)
    selection_bytes = sum(t.nbytes for t in module.condition_weights(IDS, inputs()[1]))
    assert kept_again == selection_bytes < kept / 5
    assert torch.equal(output, same_output)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(gradients, same_gradients, strict=True))


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.get("condition_on") != "static"], ids=identity)
def test_no_token_is_a_legal_batch(variant: dict[str, Any]) -> None:
    module, parameters = build(config_of(**variant))
    x = torch.empty(0, D, requires_grad=True)
    output = module(x, torch.empty(0, E, dtype=torch.int64), torch.empty(0, E))
    assert output.shape == (0, D)
    output.sum().backward()
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        assert not parameter.grad.any()


def test_only_what_is_the_layers_own_is_registered_in_the_layer() -> None:
    def registered(**changes: Any) -> set[str]:
        module, _ = build(config_of(**changes))
        return {name.partition(".")[0] for name, _ in module.named_parameters()}

    assert registered() == {"selection"}
    assert registered(sharing="layer") == {"selection", "network"}
    assert registered(sharing="stage", stages=1, embeddings="model") == set()
    assert registered(sharing="layer", embeddings="model") == {"network"}


def test_fixed_embeddings_depend_on_their_name_and_are_no_parameters() -> None:
    a, again, b = (fixed_embedding(name, (E, 400)) for name in ("a", "a", "b"))
    assert torch.equal(a, again)
    assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 0.1
    assert abs(float(a.std()) - 1) < 0.05
    selection = SelectionEmbedding(config_of(condition_on="random_fixed"), E, (0,), "a", torch.float32)
    assert "expert_embedding" not in dict(selection.named_parameters())
    assert isinstance(selection, nn.Module) and "expert_embedding" not in selection.state_dict()


def test_the_order_of_the_selected_experts_does_not_matter() -> None:
    selected, set_of_token = distinct_sets(IDS, E)
    assert selected.shape == (5, E)
    assert set_of_token[0] == set_of_token[1]
    for token, ids in enumerate(IDS.tolist()):
        assert set(selected[set_of_token[token]].nonzero().flatten().tolist()) == {e for e in ids if e >= 0}


def test_sets_of_more_experts_than_an_integer_has_bits_are_told_apart() -> None:
    ids = torch.tensor([[0, 99], [99, 0], [1, 99], [0, -1]])
    selected, set_of_token = distinct_sets(ids, 100)
    assert selected.shape == (3, 100)
    assert set_of_token[0] == set_of_token[1]
    assert len(set(set_of_token.tolist())) == 3


def test_grouped_generation_is_preferred_exactly_when_sets_are_few() -> None:
    assert prefer_grouped(tokens=4096, sets=28, hidden=64)
    assert not prefer_grouped(tokens=1024, sets=801, hidden=64)


@pytest.mark.parametrize(("condition_on", "sets"), [("unselected", 32), ("selected", 32), ("constant", 1)])
def test_the_automatic_form_depends_on_the_number_of_tokens_and_not_on_their_routing(
    monkeypatch: pytest.MonkeyPatch, condition_on: str, sets: int
) -> None:
    module, _ = build(config_of(condition_on=condition_on))
    seen = []
    monkeypatch.setattr("moetrain.moe.hyper.prefer_grouped", lambda *sizes: seen.append(sizes) or True)
    for ids in (torch.zeros(40, 1, dtype=torch.int64), torch.randint(0, E, (40, 1))):
        module(torch.randn(40, D), ids, torch.full((40, E), 1 / E))
    assert seen == [(40, sets, 7)] * 2
