"""A Hugging Face model folder as a checkpoint of ours: weights, routers' biases, and a config to start from.

Streams: memory holds one block of weights at a time, an expert or another tensor, and up to 256 MB of them.
"""

from __future__ import annotations

import logging
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetrain.checkpoint.files import OS_FILES
from moetrain.checkpoint.reader import CheckpointReader
from moetrain.checkpoint.store import Piece
from moetrain.config.loader import config_from_dict
from moetrain.config.schema import ModelConfig, RunConfig, TokenizerConfig
from moetrain.config.size import parameter_shapes
from moetrain.config.yaml_tree import write_yaml
from moetrain.convert.architectures import Architecture, architecture_of
from moetrain.convert.hf_folder import HFFolder
from moetrain.convert.mapping import ParamMap, Shape, check_tensors, read_whole
from moetrain.convert.step_folder import write_step_folder
from moetrain.convert.tokenizer import COPIED
from moetrain.convert.verify import LogitsReport, compare_logits, hf_logits
from moetrain.convert.whole_folder import appearing_whole, refuse_full_disk, refuse_nonempty
from moetrain.data.tokenizers import load_tokenizer
from moetrain.errors import ConversionError, DataError

CONFIG = "config.yaml"
TOLERANCE = 1e-4
"""Largest difference of a logit that counts as equal, both sides in fp32."""
MAX_ELEMENTS = 2**40

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImportReport:
    """What was written. `tokenizer` is None where the folder has none that we can use; `notes` say why."""

    folder: Path
    architecture: str
    model: ModelConfig
    tensors: int
    parameters: int
    tokenizer: Path | None
    notes: tuple[str, ...]
    logits: LogitsReport | None


def import_hf(
    folder: Path,
    out: Path,
    seq_length: int | None = None,
    verify: bool = False,
    announce: Callable[[str], None] = log.info,
) -> ImportReport:
    """Write `out`: a step folder from which `checkpoint.load` with `load_weights_only` starts on any layout, with
    `config.yaml` and the tokenizer's files beside the weights.

    Args:
        seq_length: tokens of a training sequence; default: the longest that config.json allows.
        verify: compare the logits of both models on random tokens, in fp32 on CPU; both must fit in memory, and there
            must be no process group yet.
        announce: gets one line with the size before any weight is read.

    `out` appears whole or not at all. ConversionError for a folder that cannot be read, a config that we do not
    compute, tensors that are not those of the config, a non-empty `out`, too little disk, or logits that differ.
    """
    refuse_nonempty(out)
    if seq_length is not None and seq_length < 1:
        raise ConversionError(f"seq_length is {seq_length}; must be 1 or more")
    source = HFFolder(folder)
    architecture = architecture_of(source.config)
    model = architecture.read_config(source.config)
    _refuse_absurd_sizes(model)
    weights = _Weights(source, architecture, model)
    param_map = _param_map(weights, architecture, model)
    if seq_length is not None:
        model = model.model_copy(update={"seq_length": seq_length})
    parameters = sum(math.prod(shape) for _, shape in parameter_shapes(model))
    refuse_full_disk(out, 4 * parameters)
    announce(
        f"importing {folder} ({architecture.name}) to {out}: {parameters:,} parameters, {4 * parameters / 1e9:.3f} GB"
    )
    try:
        with appearing_whole(out) as draft:
            tokenizer, fingerprint, notes = _copy_tokenizer(source, draft / "tokenizer", out.absolute() / "tokenizer")
            run = _start_config(model, folder.resolve().name, out.absolute(), tokenizer)
            (draft / CONFIG).write_text(_yaml(run), encoding="utf-8")
            extra: dict[str, Any] = {"imported_from": {"folder": str(folder), "architecture": architecture.name}}
            if fingerprint is not None:
                extra["tokenizer"] = fingerprint
            write_step_folder(draft, _pieces(param_map, weights, model), run, "imported", extra)
            logits = _compare(folder, draft, model) if verify else None
        OS_FILES.sync_folder(out.absolute().parent)
    except OSError as error:
        raise ConversionError(f"importing to {out} failed: {error}") from error
    where = None if tokenizer is None else Path(tokenizer.path)
    return ImportReport(out, architecture.name, model, len(param_map.theirs()), parameters, where, tuple(notes), logits)


class _Weights:
    """The folder's tensors without those that say nothing: buffers of old versions, and a tied output layer's copy."""

    def __init__(self, source: HFFolder, architecture: Architecture, model: ModelConfig) -> None:
        self._source = source
        if model.num_layers > len(list(source.names())):
            raise ConversionError(
                f"config.json: num_hidden_layers is {model.num_layers}; the folder has only "
                f"{len(list(source.names()))} tensors"
            )
        ignored = [re.compile(re.escape(p).replace(r"\{i\}", r"\d+")) for p in architecture.ignored]
        self._names = [name for name in source.names() if not any(p.fullmatch(name) for p in ignored)]
        embedding, head = "model.embed_tokens.weight", "lm_head.weight"
        if model.share_embeddings_and_output_weights and {embedding, head} <= set(self._names):
            if not torch.equal(read_whole(source, embedding), read_whole(source, head)):
                raise ConversionError(f"config.json ties the embeddings, but {head} is not {embedding}")
            self._names.remove(head)

    def names(self) -> Iterable[str]:
        return self._names

    def shape(self, name: str) -> Shape:
        return self._source.shape(name)

    def read(self, name: str, offset: Shape, shape: Shape) -> Tensor:
        """In fp32, as masters are."""
        return self._source.read(name, offset, shape).float()


def _refuse_absurd_sizes(model: ModelConfig) -> None:
    """Before anything is made of these shapes, if only to be compared with those of the files."""
    for name, shape in parameter_shapes(model):
        if math.prod(shape) >= MAX_ELEMENTS:
            raise ConversionError(
                f"config.json: {name} would have shape {list(shape)}; at most {MAX_ELEMENTS} elements"
            )


def _param_map(weights: _Weights, architecture: Architecture, model: ModelConfig) -> ParamMap:
    """The table in the spelling that fits the folder's names best. ConversionError where even that one does not fit."""
    there = set(weights.names())
    maps = [ParamMap(model, rules) for rules in architecture.spellings]
    best = max(maps, key=lambda m: len(m.theirs().keys() & there))
    check_tensors(weights, {name: target.shape for name, target in best.theirs().items()})
    return best


def _pieces(param_map: ParamMap, weights: _Weights, model: ModelConfig) -> Iterator[Piece]:
    parameters = {name for name, _ in parameter_shapes(model)}
    for link, block in param_map.blocks(weights):
        prefix = "weight." if link.ours in parameters else "controller."
        yield Piece(prefix + link.ours, link.full_shape, link.offset, block.contiguous())


# --- the run to come ------------------------------------------------------------------------------------------------


def _copy_tokenizer(source: HFFolder, draft: Path, final: Path) -> tuple[TokenizerConfig | None, str | None, list[str]]:
    """What a run may name as its tokenizer (None: nothing), its fingerprint, and what is to be said about it."""
    if source.has("tokenizer.json"):
        kind, name, files = "huggingface", "", (*COPIED, "tokenizer_config.json")
    elif source.has("tokenizer.model"):
        kind, name, files = "sentencepiece", "tokenizer.model", ("tokenizer.model",)
    else:
        return None, None, ["the folder has no tokenizer.json and no tokenizer.model; set data.tokenizer"]
    draft.mkdir()
    for file in files:
        if source.has(file):
            shutil.copyfile(source.folder / file, draft / file)
    try:
        fingerprint = load_tokenizer(TokenizerConfig(type=kind, path=str(draft / name))).fingerprint
    except DataError as error:
        shutil.rmtree(draft)
        return None, None, [f"set data.tokenizer: {str(error).replace(str(draft), str(source.folder))}"]
    return TokenizerConfig(type=kind, path=str(final / name)), fingerprint, []


def _start_config(model: ModelConfig, name: str, out: Path, tokenizer: TokenizerConfig | None) -> RunConfig:
    """A complete run. What only the user can know, data and sizes of steps, has values to replace."""
    named = tokenizer or TokenizerConfig(type="huggingface", path="path/to/tokenizer.json")
    tree = {
        "run": {"dir": f"runs/{name}", "name": name},
        "model": _settings(model),
        "data": {"tokenizer": named.model_dump(), "train": [{"path": "path/to/corpus_text"}]},
        "training": {"train_iters": 1000, "global_batch_size": 8},
        "checkpoint": {"load": str(out), "load_weights_only": True},
    }
    return config_from_dict(tree, "the imported model")


def _settings(model: ModelConfig) -> dict[str, Any]:
    """The settings that are no defaults; and the router's type, which decides what its defaults are."""
    tree = model.model_dump(mode="json", exclude_defaults=True)
    if model.moe is not None:
        tree["moe"]["router"] = {"type": model.moe.router.type} | tree["moe"].get("router", {})
    return tree


def _yaml(run: RunConfig) -> str:
    tree = {
        "run": run.run.model_dump(),
        "model": _settings(run.model),
        "data": run.data.model_dump(mode="json", include={"tokenizer": True, "train": {0: {"path"}}}),
        "training": run.training.model_dump(include={"train_iters", "global_batch_size"}),
        "checkpoint": run.checkpoint.model_dump(include={"load", "load_weights_only"}),
    }
    return "# Replace data.train, and run.dir and training as you like.\n" + write_yaml(tree)


# --- the proof ------------------------------------------------------------------------------------------------------


def _compare(folder: Path, draft: Path, model: ModelConfig, sequences: int = 2) -> LogitsReport:
    from moetrain.model.reference_logits import megatron_logits  # imports Megatron: seconds that others need not pay

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.vocab_size, (sequences, min(128, model.seq_length)), generator=generator)
    theirs = hf_logits(folder, tokens, trust_remote_code=False)
    with CheckpointReader(draft) as reader:
        return compare_logits(megatron_logits(reader, tokens), theirs, TOLERANCE)
