"""What padding and later tokens may change, what a head adds to the parameters, and guesses over a split vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from encoders import assert_same, classifier_config, encoder_config, train
from parity import LAYOUTS, SINGLE, layout_of, whole_weights

from moetrain.config.schema import RunConfig
from moetrain.config.size import parameter_shapes
from moetrain.model.build import build_chunks
from moetrain.model.decoder import Decoder
from moetrain.model.parameters import describe_parameters, initialize
from moetrain.runtime.groups import create_groups
from moetrain.testing import run_distributed
from moetrain.train.objectives import best_tokens
from moetrain.train.setup import build_step

BY_NAME = {layout.name: layout for layout in LAYOUTS}
LENGTH, CHANGED = 48, 29
CAUSAL = {"type": "da_moe", "importance": "self_weight"}


def build(config: RunConfig) -> Decoder:
    groups = create_groups(layout_of(config), seed=1)
    chunks = build_chunks(config.model, config.parallel, groups, torch.float32, torch.device("cpu"))
    initialize(chunks, describe_parameters(chunks, groups, False), config.model, 3)
    return chunks[0].eval()


@torch.no_grad()
def states(model: Decoder, tokens: torch.Tensor, valid: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Final hidden states [S, B, d], and what the model returns."""
    kept: list[torch.Tensor] = []
    handle = model.decoder.final_layernorm.register_forward_hook(lambda _, __, out: kept.append(out))  # pyright: ignore
    output = model(tokens, torch.arange(tokens.shape[1])[None].expand(len(tokens), -1), valid)
    handle.remove()
    return kept[0], output


def random_tokens(seed: int) -> torch.Tensor:
    return torch.randint(0, 60, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


def padded_variations(config: RunConfig) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """States and outputs of two texts of 29 and 40 tokens, with this and with other padding behind them; and with the
    first text's last token replaced."""
    model = build(config)
    valid = torch.arange(LENGTH) < torch.tensor([[CHANGED], [40]])
    tokens = random_tokens(0)
    other_padding = torch.where(valid, tokens, random_tokens(1))
    other_text = tokens.clone()
    other_text[0, CHANGED - 1] = (tokens[0, CHANGED - 1] + 1) % 60
    return [states(model, t, valid) for t in (tokens, other_padding, other_text)]


@pytest.mark.parametrize("make", [encoder_config, classifier_config])
def test_padding_changes_no_bit_of_a_text_and_a_text_none_of_its_neighbor(make: Any) -> None:
    run = run_distributed(padded_variations, 1, make(model__seq_length=LENGTH))[0]
    (hidden, output), (same_hidden, same_output), (other_hidden, other_output) = run
    assert torch.equal(hidden[:CHANGED, 0], same_hidden[:CHANGED, 0])
    assert torch.equal(hidden[:40, 1], same_hidden[:40, 1])
    assert torch.equal(hidden[:40, 1], other_hidden[:40, 1])
    assert not torch.equal(hidden[0, 0], other_hidden[0, 0])  # an encoder's first token sees the last one
    if output.dim() == 2:
        assert torch.equal(output, same_output)
        assert torch.equal(output[1], other_output[1])
        assert not torch.equal(output[0], other_output[0])


def lengths_of_a_decoder(config: RunConfig) -> list[torch.Tensor]:
    """States of a decoder with a head: of a text, of one with another end, and of one whose end is padding."""
    model = build(config)
    tokens, everything = random_tokens(0), torch.ones(2, LENGTH, dtype=torch.bool)
    other = torch.where(torch.arange(LENGTH) < CHANGED, tokens, random_tokens(1))
    short = everything & (torch.arange(LENGTH) < CHANGED)
    return [states(model, t, valid)[0] for t, valid in ((tokens, everything), (other, everything), (other, short))]


@pytest.mark.parametrize("budget", ["mean_k", "paper"])
def test_in_a_decoder_with_a_mask_of_padding_the_past_keeps_its_bits_whatever_comes(budget: str) -> None:
    router = CAUSAL | {"budget": budget}
    head = {"outputs": 3, "pooling": "last"}
    config = classifier_config(
        model__seq_length=LENGTH, model__type="decoder", model__moe__router=router, model__head=head
    )
    hidden, other, short = run_distributed(lengths_of_a_decoder, 1, config)[0]
    assert torch.equal(hidden[:CHANGED], other[:CHANGED])
    assert torch.equal(hidden[:CHANGED], short[:CHANGED])
    assert not torch.equal(hidden[CHANGED:], other[CHANGED:])


def shapes(config: RunConfig) -> dict[str, tuple[int, ...]]:
    step = build_step(config, create_groups(layout_of(config), seed=1), torch.device("cpu"))
    return {name: tuple(weight.shape) for name, weight in whole_weights(step).items()}


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_stands_in_the_place_of_the_output_layer(tied: bool) -> None:
    for layout in (SINGLE, BY_NAME["tp2+sp x pp2 interleaved x ep2"]):
        config = classifier_config(layout, tied=tied)
        found = run_distributed(shapes, layout.world, config)[0]
        assert found == dict(parameter_shapes(config.model))
        assert found["head.weight"] == (3, 32)
        assert "output_layer.weight" not in found


def split_guesses(logits: torch.Tensor) -> torch.Tensor:
    group = dist.group.WORLD
    assert group is not None
    return best_tokens(logits.chunk(group.size(), dim=-1)[group.rank()], group)


def test_the_best_token_of_a_split_vocabulary_is_that_of_the_whole_and_the_lowest_of_equals() -> None:
    logits = torch.randint(0, 5, (3, 7, 12), generator=torch.Generator().manual_seed(0)).float()  # many ties
    for guesses in run_distributed(split_guesses, 2, logits):
        assert torch.equal(guesses, logits.argmax(dim=-1))
    assert (logits == logits.max(-1, keepdim=True).values).sum(-1).max() > 1


@pytest.mark.parametrize("zero", [1, 3])
def test_a_dense_encoder_keeps_parity_with_every_stage_of_zero(zero: int) -> None:
    single = run_distributed(train, 1, [encoder_config(model__moe=None)])[0][0]
    split = run_distributed(train, 2, [encoder_config(BY_NAME["dp2"], zero, model__moe=None)])[0][0]
    assert_same(split, single)
