"""Writes a checkpoint as a Hugging Face folder: no process group, no GPU, one block of weights in memory.

The folder is complete or absent. It grows beside its final place under a hidden name, and is renamed at the end.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from torch import Tensor
from transformers import GenerationConfig

from moetrain.config.model import ModelConfig
from moetrain.config.schema import RunConfig
from moetrain.convert import hf_modeling
from moetrain.convert.architectures import STOCK
from moetrain.convert.architectures.moetrain import MOETRAIN, RULES
from moetrain.convert.hf_config import own_config, run_config
from moetrain.convert.mapping import TRAINING_ONLY, ParamMap, Rule, Shape, check_tensors
from moetrain.convert.model_card import model_card
from moetrain.convert.resumable_folder import Draft, draft_of, growing_folder
from moetrain.convert.tokenizer import TokenizerFacts, named_tokenizer, write_tokenizer
from moetrain.convert.training_record import FILE as RECORD
from moetrain.convert.training_record import record_of
from moetrain.convert.weight_file import Entry, write_weight_file
from moetrain.convert.whole_folder import refuse_full_disk, refuse_nonempty
from moetrain.errors import ConversionError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODELING_FILES = ("configuration_moetrain.py", "modeling_moetrain.py")
INDEX = "model.safetensors.index.json"
AUTO, OWN = "auto", MOETRAIN.name
ARCHITECTURES = (AUTO, OWN, *STOCK)
BUFFERS = 64_000_000

log = logging.getLogger(__name__)


class Checkpoint(Protocol):
    """What an export reads; `moetrain.checkpoint`'s reader is one. Tensors are named as in the manifest."""

    @property
    def config(self) -> dict[str, Any]: ...

    @property
    def step(self) -> int: ...

    @property
    def consumed_samples(self) -> int: ...

    @property
    def layout(self) -> dict[str, Any]: ...

    @property
    def extra(self) -> dict[str, Any]: ...

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> Shape: ...

    def read(self, name: str, offset: Shape, shape: Shape) -> Tensor: ...


class ModelWeights:
    """A checkpoint's parameters and routers' controllers under their own names.

    Left out are optimizer and random states, and the loads that a balance loss remembers.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._stored = {
            name.removeprefix(prefix): name
            for name in checkpoint.names()
            for prefix in ("weight.", "controller.")
            if name.startswith(prefix) and not (prefix == "controller." and name.endswith(TRAINING_ONLY))
        }

    def names(self) -> Iterable[str]:
        return self._stored

    def shape(self, name: str) -> Shape:
        return tuple(self._checkpoint.shape(self._stored[name]))

    def read(self, name: str, offset: Shape, shape: Shape) -> Tensor:
        return self._checkpoint.read(self._stored[name], offset, shape)

    def release(self) -> None:
        """Let go of mapped files, whose pages would count as this process's memory until the kernel wants them."""
        close = getattr(self._checkpoint, "close", None)
        if close is not None:
            close()


@dataclass(frozen=True)
class ExportReport:
    """What was written. `parameters` counts a tied embedding once."""

    folder: Path
    architecture: str
    step: int
    dtype: str
    tensors: int
    parameters: int
    weight_bytes: int
    weight_files: tuple[str, ...]


def export_hf(
    checkpoint: Checkpoint,
    out: Path,
    dtype: str = "float32",
    max_shard_size: str = "2GB",
    tokenizer: Path | None = None,
    architecture: str = AUTO,
    check: Callable[[Path], None] | None = None,
    announce: Callable[[str], None] = log.info,
) -> ExportReport:
    """Write `out`: weights, config, tokenizer, model card, the training's facts, and modelling files where the
    architecture is our own.

    `dtype` is "float32" or "bfloat16" (thresholds and biases of a router stay fp32); `max_shard_size` is like "500MB";
    only a tensor that alone is larger may exceed it. `tokenizer` is a SentencePiece .model, a tokenizer.json or its
    folder; by default the one that the run's config names. `architecture` is a name of `ARCHITECTURES`; "auto" takes
    the first stock one that computes exactly this model, else our own. `check` sees the finished folder before it gets
    its final name, and vetoes it by raising. `announce` gets one line with size and memory before any weight is read.

    An export that is killed, or whose disk is full, goes on when it is repeated: finished weight files are kept.

    Errors: ConversionError for a non-empty `out`, an unfinished export of something else in its place, too little disk,
    a bad option, a checkpoint whose tensors are not those of its config, or a tokenizer that cannot be expressed
    exactly. Nothing stays behind then, but finished files where the disk failed.
    """
    refuse_nonempty(out)
    plan = _plan(checkpoint, dtype, max_shard_size, architecture)
    weights = ModelWeights(checkpoint)
    check_tensors(weights, plan.map.ours())
    refuse_full_disk(out, plan.bytes - _bytes_there(out))
    announce(
        f"exporting step {checkpoint.step} to {out} as {plan.form.name}: {plan.parameters:,} parameters, "
        f"{plan.bytes / 1e9:.3f} GB as {dtype} in {len(plan.files)} file(s); memory: about "
        f"{plan.memory / 1e6:.0f} MB above the program itself"
    )
    with growing_folder(out, _identity(checkpoint, plan, dtype, max_shard_size)) as draft:
        if draft.finished:
            announce(f"going on: {len(draft.finished)} of {len(plan.files)} file(s) are there, whole")
        chosen = plan.run.data.tokenizer if tokenizer is None else named_tokenizer(tokenizer)
        facts = write_tokenizer(chosen, draft.folder, plan.run.model.seq_length)
        _refuse_large_vocabulary(facts, plan.run)
        _write_weights(plan, weights, draft)
        _write_configs(plan, dtype, facts, draft.folder)
        _write_history(checkpoint, plan, dtype, draft.folder)
        if check is not None:
            check(draft.folder)
    return ExportReport(
        folder=out,
        architecture=plan.form.name,
        step=checkpoint.step,
        dtype=dtype,
        tensors=len(plan.dtypes),
        parameters=plan.parameters,
        weight_bytes=plan.bytes,
        weight_files=tuple(plan.files),
    )


# --- the plan -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Form:
    """The architecture of an export. `config` is its config.json without tokenizer ids and dtype."""

    name: str
    rules: tuple[Rule, ...]
    config: dict[str, Any]

    @property
    def own_code(self) -> bool:
        """Whether modelling files must travel with it."""
        return self.name == OWN


@dataclass(frozen=True)
class _Plan:
    """Everything about the weights that is known before the first one is read."""

    run: RunConfig
    form: _Form
    map: ParamMap
    dtypes: dict[str, torch.dtype]
    shapes: dict[str, Shape]
    parameters: int
    split: StateDictSplit

    @property
    def bytes(self) -> int:
        return self.split.metadata["total_size"]

    @property
    def files(self) -> dict[str, list[str]]:
        """Names of the tensors of each weight file."""
        return self.split.filename_to_tensors

    @property
    def memory(self) -> int:
        """Expected peak: the largest block and its parts, or its mapped file's pages."""
        return 2 * 4 * max(math.prod(link.block) for link in self.map.links) + BUFFERS


def _plan(checkpoint: Checkpoint, dtype: str, max_shard_size: str, architecture: str) -> _Plan:
    if dtype not in DTYPES:
        raise ConversionError(f"dtype is {dtype!r}; legal: {', '.join(DTYPES)}")
    if architecture not in ARCHITECTURES:
        raise ConversionError(f"architecture is {architecture!r}; legal: {', '.join(ARCHITECTURES)}")
    run = run_config(checkpoint.config)
    _refuse_all_but_causal_models(run)
    form = _form(run.model, architecture)
    param_map = ParamMap(run.model, form.rules)
    targets = param_map.theirs()
    dtypes = {name: torch.float32 if target.keep_fp32 else DTYPES[dtype] for name, target in targets.items()}
    sketch = {name: torch.empty(target.shape, dtype=dtypes[name], device="meta") for name, target in targets.items()}
    split = split_torch_state_dict_into_shards(sketch, max_shard_size=_size(max_shard_size))
    parameters = sum(math.prod(target.shape) for target in targets.values() if not target.keep_fp32)
    return _Plan(run, form, param_map, dtypes, {n: t.shape for n, t in targets.items()}, parameters, split)


def _form(model: ModelConfig, wanted: str) -> _Form:
    """The wanted architecture; of several, the first that fits."""
    candidates = STOCK if wanted == AUTO else {wanted: STOCK[wanted]} if wanted in STOCK else {}
    for name, architecture in candidates.items():
        try:
            return _Form(name, architecture.spellings[0], architecture.write_config(model))
        except ConversionError:
            if wanted == name:
                raise
    return _Form(OWN, RULES, own_config(model))


def _size(text: str) -> int:
    """Bytes in "500MB". The library reads such texts too, but takes "0GB" and fails with its own words."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])B", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * 1000 ** ("KMGT".index(match[2].upper()) + 1)) if match else 0
    if size < 1:
        raise ConversionError(
            f"max_shard_size is {text!r}; must be a number above 0 and KB, MB, GB or TB, such as 500MB"
        )
    return size


def _identity(checkpoint: Checkpoint, plan: _Plan, dtype: str, max_shard_size: str) -> dict[str, Any]:
    """What makes two exports the same, file by file: the manifest holds the sums of all weights."""
    manifest = getattr(checkpoint, "manifest", None)
    content = json.dumps(checkpoint.config, sort_keys=True) if manifest is None else manifest.fingerprint()
    return {
        "checkpoint": hashlib.sha256(f"{content}/{checkpoint.step}".encode()).hexdigest(),
        "architecture": plan.form.name,
        "dtype": dtype,
        "max_shard_size": _size(max_shard_size),
        "files": len(plan.files),
    }


def _bytes_there(out: Path) -> int:
    """What an unfinished export has written already."""
    draft = draft_of(out)
    return sum(path.stat().st_size for path in draft.glob("*.safetensors")) if draft.is_dir() else 0


# --- writing --------------------------------------------------------------------------------------------------------


def _write_weights(plan: _Plan, weights: ModelWeights, draft: Draft) -> None:
    """File by file, and in each tensor by tensor."""
    for file, names in plan.files.items():
        if file not in draft.finished:
            entries = sorted(
                (Entry(name, plan.dtypes[name], plan.shapes[name]) for name in names), key=lambda e: -e.dtype.itemsize
            )
            draft.record(file, write_weight_file(draft.folder / file, entries, _tensors(plan.map, weights, entries)))
    if plan.split.is_sharded:
        index = {"metadata": plan.split.metadata, "weight_map": dict(sorted(plan.split.tensor_to_filename.items()))}
        (draft.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _tensors(param_map: ParamMap, weights: ModelWeights, entries: list[Entry]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file, in the order of `entries`. A block of ours is read once for all its parts there."""
    wanted = [(entry.name, param_map.link_of[entry.name]) for entry in entries]
    for link, group in itertools.groupby(wanted, key=lambda pair: pair[1]):
        block = weights.read(link.ours, link.offset, link.block)
        weights.release()
        parts = dict(zip(link.theirs, param_map.split(link, block), strict=True))
        for name, _ in group:
            yield name, parts[name]
        del block, parts


def _write_configs(plan: _Plan, dtype: str, facts: TokenizerFacts, folder: Path) -> None:
    ids = {"bos_token_id": facts.bos_id, "eos_token_id": facts.eos_id, "pad_token_id": facts.pad_id}
    config = plan.form.config | ids | {"torch_dtype": dtype, "use_cache": True}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if plan.form.own_code:
        for name in MODELING_FILES:
            shutil.copyfile(Path(hf_modeling.__path__[0]) / name, folder / name)
    GenerationConfig(**ids).save_pretrained(folder)


def _write_history(checkpoint: Checkpoint, plan: _Plan, dtype: str, folder: Path) -> None:
    record = record_of(plan.run, checkpoint.step, checkpoint.consumed_samples, checkpoint.layout, checkpoint.extra)
    if record is not None:
        (folder / RECORD).write_text(record.to_json(), encoding="utf-8")
    name = plan.run.run.name if record is None else record.name
    card = model_card(name, plan.run.model, record, dtype, plan.form.own_code)
    (folder / "README.md").write_text(card, encoding="utf-8")


# --- refusals -------------------------------------------------------------------------------------------------------


def _refuse_all_but_causal_models(run: RunConfig) -> None:
    """The modelling files are those of a causal language model; they would compute something else in silence."""
    if run.model.type != "decoder":
        raise ConversionError(f"model.type is {run.model.type}; only decoders can be exported to Hugging Face so far")
    if run.model.head is not None:
        raise ConversionError(
            f"the model has a head (model.head.outputs: {run.model.head.outputs}); only language models can be "
            "exported to Hugging Face so far"
        )


def _refuse_large_vocabulary(facts: TokenizerFacts, run: RunConfig) -> None:
    if facts.size > run.model.vocab_size:
        raise ConversionError(
            f"the tokenizer has {facts.size} tokens; the model's embedding has {run.model.vocab_size} rows: "
            "it is not the tokenizer that the model was trained with"
        )
