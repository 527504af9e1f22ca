"""Auxiliary losses by hand, and their independence of how sequences are batched."""

from __future__ import annotations

import torch

from moetrain.moe.losses import load_balance_loss, router_z_loss


class _Alone:
    """A group of one rank."""

    def size(self) -> int:
        return 1


def inputs(sequences: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sequences)
    logits = torch.randn(10, sequences, 4, generator=generator)
    probs = logits.softmax(-1)
    return logits, probs, (probs > 0.25).float()  # a variable number of experts per token


def test_balanced_routing_with_uniform_probabilities_costs_exactly_one() -> None:
    probs = torch.full((8, 3, 4), 0.25)
    selected = torch.zeros(8, 3, 4)
    selected[torch.arange(8), :, torch.arange(8) % 4] = 1.0
    assert load_balance_loss(probs, selected, 8, _Alone()).item() == 1.0


def test_the_balance_loss_is_experts_times_load_share_times_mean_probability() -> None:
    _, probs, selected = inputs(2)
    expected = []
    for b in range(2):
        share = selected[:, b].sum(0) / selected[:, b].sum()
        expected.append(4 * (share * probs[:, b].mean(0)).sum())
    torch.testing.assert_close(load_balance_loss(probs, selected, 10, _Alone()), torch.stack(expected).mean())


def test_losses_of_a_micro_batch_are_the_mean_over_its_sequences() -> None:
    logits, probs, selected = inputs(6)
    one_by_one = [load_balance_loss(probs[:, i : i + 1], selected[:, i : i + 1], 10, _Alone()) for i in range(6)]
    torch.testing.assert_close(load_balance_loss(probs, selected, 10, _Alone()), torch.stack(one_by_one).mean())
    torch.testing.assert_close(router_z_loss(logits, 10), logits.logsumexp(-1).square().mean())


def test_sending_everything_to_one_expert_costs_more_than_balance() -> None:
    probs = torch.tensor([0.7, 0.1, 0.1, 0.1]).expand(8, 1, 4)
    one = torch.zeros(8, 1, 4)
    one[..., 0] = 1.0
    assert load_balance_loss(probs, one, 8, _Alone()).item() > 2.5


def test_padding_counts_in_no_auxiliary_loss() -> None:
    logits, probs, selected = inputs(2)
    lengths = torch.tensor([4, 10])
    valid = torch.arange(10)[:, None] < lengths
    masked_probs, masked_selected = probs * valid[..., None], selected * valid[..., None]
    short = [(logits[:n, i : i + 1], probs[:n, i : i + 1], selected[:n, i : i + 1]) for i, n in enumerate((4, 10))]
    balance = torch.stack([load_balance_loss(p, s, len(p), _Alone()) for _, p, s in short]).mean()
    z_loss = torch.stack([router_z_loss(x, len(x)) for x, _, _ in short]).mean()
    torch.testing.assert_close(load_balance_loss(masked_probs, masked_selected, lengths, _Alone()), balance)
    torch.testing.assert_close(router_z_loss(logits, lengths, valid), z_loss)


def test_a_sequence_of_padding_alone_costs_nothing() -> None:
    nothing = torch.zeros(10, 1, 4)
    assert load_balance_loss(nothing, nothing, torch.tensor([1]), _Alone()).item() == 0.0
    assert router_z_loss(nothing, torch.tensor([1]), torch.zeros(10, 1, dtype=torch.bool)).item() == 0.0
