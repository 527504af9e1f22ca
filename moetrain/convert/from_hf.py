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
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moetrain.checkpoint.files import OS_FILES
from moetrain.checkpoint.reader import CheckpointReader
from moetrain.checkpoint.store import Piece
from moetrain.config.hypernetworks import moe_layers
from moetrain.config.loader import config_from_dict
from moetrain.config.model import ModelConfig
from moetrain.config.schema import RunConfig, TokenizerConfig
from moetrain.config.size import parameter_shapes
from moetrain.config.yaml_tree import write_yaml
from moetrain.convert import hf_modeling
from moetrain.convert.architectures import Architecture, architecture_of
from moetrain.convert.architectures.moetrain import MOETRAIN
from moetrain.convert.block_scales import BlockScaledWeights
from moetrain.convert.hf import MODELING_FILES
from moetrain.convert.hf_folder import HFFolder
from moetrain.convert.hf_modeling.modeling_moetrain import MoetrainForCausalLM
from moetrain.convert.hidden_states import StatesReport, compare_states
from moetrain.convert.mapping import Link, ParamMap, Shape, check_tensors, read_whole
from moetrain.convert.step_folder import write_step_folder
from moetrain.convert.t5_tokenizer import FILE as T5_FILE
from moetrain.convert.t5_tokenizer import with_sentinels
from moetrain.convert.tokenizer import COPIED
from moetrain.convert.training_record import KEY, read_record
from moetrain.convert.verify import LogitsReport, compare_logits, hf_logits
from moetrain.convert.whole_folder import appearing_whole, refuse_full_disk, refuse_nonempty
from moetrain.data.tokenizers import load_tokenizer
from moetrain.errors import ConversionError, DataError
from moetrain.moe.losses import balanced_load

CONFIG = "config.yaml"
SENTENCEPIECE = "tokenizer.model"
TOLERANCE = 1e-4
"""Largest difference of a logit that counts as equal, both sides in fp32."""
MAX_ELEMENTS = 2**40

Dropped = Literal["zero", "input"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImportReport:
    """What was written. `tokenizer` is None where the folder has none that we can use; `notes` say why, and what of the
    model stayed behind. `proof` is None without verification."""

    folder: Path
    architecture: str
    model: ModelConfig
    tensors: int
    parameters: int
    tokenizer: Path | None
    notes: tuple[str, ...]
    proof: LogitsReport | StatesReport | None


def import_hf(
    folder: Path,
    out: Path,
    seq_length: int | None = None,
    verify: bool = False,
    dropped: Dropped | None = None,
    announce: Callable[[str], None] = log.info,
) -> ImportReport:
    """Write `out`: a step folder from which `checkpoint.load` with `load_weights_only` starts on any layout, with
    `config.yaml` and the tokenizer's files beside the weights.

    Args:
        seq_length: tokens of a training sequence; default: the longest that config.json allows, or 512 where it sets
            no limit.
        verify: compare the logits of both models, or the final hidden states of encoders, on random tokens, in fp32 on
            CPU; both must fit in memory, and there must be no process group yet.
        dropped: `model.moe.capacity.dropped` of a Switch Transformer, default zero, as transformers has it.
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
    record, unread = read_record(source)
    notes = [*architecture.notes(source.config), *_foreign_code(source, architecture), *unread]
    if dropped is not None:
        model = _with_dropped(model, architecture, dropped)
    _refuse_absurd_sizes(model)
    weights = _Weights(source, architecture, model)
    if weights.scaled:
        notes.append(f"{weights.scaled} tensors were fp8 with scales of blocks; the masters are what they stand for")
        if verify:
            raise ConversionError("verify: transformers rounds fp8 weights anew when it loads them; import without")
    if weights.unused:
        behind = ", ".join(prefix + "*" for prefix in architecture.unused(source.config))
        notes.append(f"{weights.unused} tensors stay behind: {behind}")
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
            tokenizer, fingerprint, missing = _copy_tokenizer(source, draft, out.absolute(), model)
            run = _start_config(model, folder.resolve().name, out.absolute(), tokenizer)
            (draft / CONFIG).write_text(_yaml(run), encoding="utf-8")
            extra: dict[str, Any] = {"imported_from": {"folder": str(folder), "architecture": architecture.name}}
            if fingerprint is not None:
                extra["tokenizer"] = fingerprint
            if record is not None:
                extra[KEY] = record.model_dump()
            write_step_folder(draft, _pieces(param_map, weights, model), run, "imported", extra)
            proof = _compare(folder, draft, architecture, model) if verify else None
        OS_FILES.sync_folder(out.absolute().parent)
    except OSError as error:
        raise ConversionError(f"importing to {out} failed: {error}") from error
    where = None if tokenizer is None else Path(tokenizer.path)
    notes = [*missing, *notes]
    return ImportReport(out, architecture.name, model, len(param_map.theirs()), parameters, where, tuple(notes), proof)


def _with_dropped(model: ModelConfig, architecture: Architecture, dropped: Dropped) -> ModelConfig:
    if model.moe is None or model.moe.capacity is None:
        raise ConversionError(
            f"dropped ({dropped}) is for experts with a capacity, those of Switch Transformers; this model "
            f"({architecture.name}) drops no token: remove it"
        )
    capacity = model.moe.capacity.model_copy(update={"dropped": dropped})
    return model.model_copy(update={"moe": model.moe.model_copy(update={"capacity": capacity})})


def _foreign_code(source: HFFolder, architecture: Architecture) -> Iterator[str]:
    """A note for each modelling file that is not this version's own."""
    for name in MODELING_FILES if architecture is MOETRAIN else ():
        if source.has(name) and (source.folder / name).read_bytes() != Path(hf_modeling.__path__[0], name).read_bytes():
            yield f"{name} is not this version's own; it was not run, and the model is taken for one of ours"


class _Weights:
    """The folder's tensors without those that stay behind (`unused` in number), and those that say nothing: buffers of
    old versions, and the second one of tied embeddings."""

    def __init__(self, source: HFFolder, architecture: Architecture, model: ModelConfig) -> None:
        self._source = BlockScaledWeights(source)
        self.scaled = len(self._source.scaled)
        number = len(list(source.names()))
        if model.num_layers > number:
            raise ConversionError(
                f"config.json tells of {model.num_layers} layers; the folder has only {number} tensors"
            )
        ignored = [re.compile(re.escape(p).replace(r"\{i\}", r"\d+")) for p in architecture.ignored]
        there = [name for name in self._source.names() if not any(p.fullmatch(name) for p in ignored)]
        self._names = [name for name in there if not name.startswith(architecture.unused(source.config))]
        self.unused = len(there) - len(self._names)
        if model.share_embeddings_and_output_weights and set(architecture.tied) <= set(self._names):
            embedding, copy = architecture.tied
            if not torch.equal(read_whole(self._source, embedding), read_whole(self._source, copy)):
                raise ConversionError(f"the model ties the embeddings, but {copy} is not {embedding}")
            self._names.remove(copy)

    def names(self) -> Iterable[str]:
        return self._names

    def shape(self, name: str) -> Shape:
        return self._source.shape(name)

    def read(self, name: str, offset: Shape, shape: Shape) -> Tensor:
        return self._source.read(name, offset, shape)


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
        if prefix == "controller.":
            _refuse_stuck(link, block)
        yield Piece(prefix + link.ours, link.full_shape, link.offset, block.contiguous())
    if model.moe is not None and model.moe.aux_loss == "global_batch":  # what a new run begins with
        for layer in moe_layers(model):
            yield Piece.whole(f"controller.decoder.layers.{layer}.mlp.losses.load", balanced_load(model.moe))


def _refuse_stuck(link: Link, controller: Tensor) -> None:
    """A controller moves by what it is, so one that is no number would stay that for ever, and no loss would tell.

    A threshold of minus infinity is one that every token exceeds, as all do where `mean_k` is `max_k`.
    """
    legal = controller.isfinite()
    if link.ours.endswith((".thresholds", ".offsets")):
        legal |= controller == -math.inf
    if not legal.all():
        raise ConversionError(f"{link.theirs[0]} holds {controller[~legal][0].item()}; a controller must be finite")


# --- the run to come ------------------------------------------------------------------------------------------------


def _copy_tokenizer(
    source: HFFolder, draft: Path, out: Path, model: ModelConfig
) -> tuple[TokenizerConfig | None, str | None, list[str]]:
    """What a run may name as its tokenizer (None: nothing), its fingerprint, and what is to be said about it.

    ConversionError where an encoder has none that works: which token hides another is nobody's free choice.
    """
    folder = draft / "tokenizer"
    folder.mkdir()
    try:
        kind, name = _copy_files(source, folder, model.vocab_size)
        fingerprint = load_tokenizer(TokenizerConfig(type=kind, path=str(folder / name))).fingerprint
    except DataError as error:
        told = str(error).replace(str(folder), str(source.folder))
        if model.type == "encoder":
            raise ConversionError(f"an encoder needs the tokenizer that it was trained with: {told}") from error
        shutil.rmtree(folder)
        return None, None, [f"set data.tokenizer: {told}"]
    return TokenizerConfig(type=kind, path=str(out / "tokenizer" / name)), fingerprint, []


def _copy_files(source: HFFolder, folder: Path, vocab_size: int) -> tuple[Literal["huggingface", "sentencepiece"], str]:
    """The kind of tokenizer that is then in `folder`, and its file's name, or none where it is the folder itself. A
    tokenizer.json is preferred: it is what transformers runs."""
    if source.has("tokenizer.json"):
        for file in (*COPIED, "tokenizer_config.json"):
            if source.has(file):
                shutil.copyfile(source.folder / file, folder / file)
        return "huggingface", ""
    if source.has(SENTENCEPIECE):
        shutil.copyfile(source.folder / SENTENCEPIECE, folder / SENTENCEPIECE)
    elif source.has(T5_FILE):
        path = source.folder / T5_FILE
        (folder / SENTENCEPIECE).write_bytes(with_sentinels(path.read_bytes(), vocab_size, str(path)))
    else:
        raise DataError(f"{source.folder} has no tokenizer.json, {SENTENCEPIECE} or {T5_FILE}")
    return "sentencepiece", SENTENCEPIECE


def _start_config(model: ModelConfig, name: str, out: Path, tokenizer: TokenizerConfig | None) -> RunConfig:
    """A complete run. What only the user can know, data and sizes of steps, has values to replace."""
    named = tokenizer or TokenizerConfig(type="huggingface", path="path/to/tokenizer.json")
    objective = "masked_lm" if model.type == "encoder" else "causal_lm"
    tree = {
        "run": {"dir": f"runs/{name}", "name": name},
        "model": _settings(model),
        "data": {"tokenizer": named.model_dump(), "train": [{"path": "path/to/corpus_text"}]},
        "training": {"train_iters": 1000, "global_batch_size": 8, "objective": {"type": objective}},
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
        "training": run.training.model_dump(
            include={"train_iters": True, "global_batch_size": True, "objective": {"type"}}
        ),
        "checkpoint": run.checkpoint.model_dump(include={"load", "load_weights_only"}),
    }
    return "# Replace data.train, and run.dir and training as you like.\n" + write_yaml(tree)


# --- the proof ------------------------------------------------------------------------------------------------------


def _compare(
    folder: Path, draft: Path, architecture: Architecture, model: ModelConfig, sequences: int = 2
) -> LogitsReport | StatesReport:
    if model.type == "encoder":
        return compare_states(folder, draft)
    from moetrain.model.reference_logits import megatron_logits  # imports Megatron: seconds that others need not pay

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.vocab_size, (sequences, min(128, model.seq_length)), generator=generator)
    # Our own architecture by the modelling code of this installation, never by that of the folder.
    loader = MoetrainForCausalLM if architecture is MOETRAIN else AutoModelForCausalLM
    theirs = hf_logits(folder, tokens, trust_remote_code=False, loader=loader)
    with CheckpointReader(draft) as reader:
        return compare_logits(megatron_logits(reader, tokens), theirs, TOLERANCE)
