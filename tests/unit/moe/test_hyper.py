"""HyperMoE's generated expert against its equations, token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moetrain.config.schema import HyperConfig
from moetrain.moe.hyper import HyperExperts, HyperNetwork, distinct_sets, prefer_grouped

D, E, LAYERS, LAYER = 12, 5, 3, 2
CONFIG = HyperConfig(
    bottleneck=3, hidden=7, expert_embedding=4, process=6, condition=5, layer_embedding=2, aggregation="mean"
)
# Variable K, a repeated set in another order, a token with every expert, and one with a single expert.
IDS = torch.tensor([[0, 2, -1, -1, -1], [2, 0, -1, -1, -1], [4, -1, -1, -1, -1], [0, 1, 2, 3, 4], [3, 1, 2, -1, -1]])


def build(config: HyperConfig, seed: int = 0) -> tuple[HyperExperts, HyperNetwork]:
    network = HyperNetwork(config, LAYERS, D, torch.float32)
    experts = HyperExperts(config, E, range(1, E + 1), LAYER, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in [*network.parameters(), *experts.parameters()]:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return experts, network


def by_the_equations(x_TD: Tensor, ids_TK: Tensor, experts: HyperExperts, network: HyperNetwork) -> Tensor:
    """methods (2)-(5), one token at a time, in float64, with a weight matrix per token."""
    outputs = []
    for x, ids in zip(x_TD.double(), ids_TK, strict=True):
        unselected = [e for e in range(E) if e not in ids.tolist()]
        v = experts.expert_embedding.double()[unselected].sum(dim=0)
        if experts.aggregation == "mean" and unselected:
            v = v / len(unselected)
        inner = torch.relu(experts.process_in.weight.double() @ v + experts.process_in.bias.double())
        p = experts.process_out.weight.double() @ inner + experts.process_out.bias.double()
        u = torch.cat([p, network.layer_embedding.double()[LAYER]])
        e = torch.relu(network.input.weight.double() @ u + network.input.bias.double())
        r, d = network.bottleneck, network.hidden_size
        down = (network.down.weight.double() @ e + network.down.bias.double()).view(r, d)
        up = (network.up.weight.double() @ e + network.up.bias.double()).view(d, r)
        down_bias = network.down_bias.weight.double() @ e + network.down_bias.bias.double()
        up_bias = network.up_bias.weight.double() @ e + network.up_bias.bias.double()
        outputs.append(up @ torch.relu(down @ x + down_bias) + up_bias)
    return torch.stack(outputs)


def gradients(output: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [g.double() for g in torch.autograd.grad((output * weights).sum(), tensors)]


@pytest.mark.parametrize("aggregation", ["sum", "mean"])
@pytest.mark.parametrize("form", ["grouped", "factorized"])
def test_output_and_every_gradient_follow_the_equations(form: str, aggregation: str) -> None:
    experts, network = build(CONFIG.model_copy(update={"form": form, "aggregation": aggregation}))
    x = torch.randn(len(IDS), D, generator=torch.Generator().manual_seed(1)).requires_grad_()
    tensors = [x, *experts.parameters(), *network.parameters()]
    output, expected = experts(x, IDS, network), by_the_equations(x, IDS, experts, network)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    for mine, reference in zip(gradients(output, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["grouped", "factorized"])
def test_no_token_is_a_legal_batch(form: str) -> None:
    experts, network = build(CONFIG.model_copy(update={"form": form}))
    x = torch.empty(0, D, requires_grad=True)
    output = experts(x, torch.empty(0, E, dtype=torch.int64), network)
    assert output.shape == (0, D)
    output.sum().backward()
    for parameter in network.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_the_order_of_the_selected_experts_does_not_matter() -> None:
    selected, set_of_token = distinct_sets(IDS, E)
    assert selected.shape == (4, E)
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


def test_the_automatic_form_depends_on_the_number_of_tokens_and_not_on_their_routing(monkeypatch) -> None:
    experts, network = build(CONFIG.model_copy(update={"form": "auto"}))
    assert experts.possible_sets == 2**E - 1
    seen = []
    monkeypatch.setattr("moetrain.moe.hyper.prefer_grouped", lambda *sizes: seen.append(sizes) or True)
    for ids in (torch.zeros(40, 1, dtype=torch.int64), torch.randint(0, E, (40, 1))):
        experts(torch.randn(40, D), ids, network)
    assert seen == [(40, 31, 7)] * 2
