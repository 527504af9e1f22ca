"""Writes a checkpoint as a Hugging Face folder: no process group, no GPU, at most one shard in memory.

The folder is complete or absent. It is written beside its final place under a hidden name, and renamed at the end.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig

from moetrain.config.schema import RunConfig
from moetrain.convert import hf_modeling
from moetrain.convert.hf_config import hf_config, refuse_inexpressible, run_config
from moetrain.convert.mapping import TRAINING_ONLY, ParamMap, Shape, check_tensors
from moetrain.convert.model_card import model_card
from moetrain.convert.tokenizer import TokenizerFacts, named_tokenizer, write_tokenizer
from moetrain.convert.whole_folder import appearing_whole, refuse_full_disk, refuse_nonempty
from moetrain.errors import ConversionError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODELING_FILES = ("configuration_moetrain.py", "modeling_moetrain.py")
INDEX = "model.safetensors.index.json"

log = logging.getLogger(__name__)


class Checkpoint(Protocol):
    """What an export reads; `moetrain.checkpoint`'s reader is one. Tensors are named as in the manifest."""

    @property
    def config(self) -> dict[str, Any]: ...

    @property
    def step(self) -> int: ...

    @property
    def consumed_samples(self) -> int: ...

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> Shape: ...

    def read(self, name: str, offset: Shape, shape: Shape) -> Tensor: ...


class ModelWeights:
    """A checkpoint's parameters and routers' controllers under their own names.

    Left out is what only training needs: optimizer and random states, what only moves a controller, and the loads that
    a balance loss remembers.
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


@dataclass(frozen=True)
class ExportReport:
    """What was written. `parameters` counts a tied embedding once."""

    folder: Path
    step: int
    dtype: str
    tensors: int
    parameters: int
    weight_bytes: int
    weight_files: tuple[str, ...]


@dataclass(frozen=True)
class _Plan:
    """Everything about the weights that is known before the first one is read."""

    run: RunConfig
    map: ParamMap
    dtypes: dict[str, torch.dtype]
    parameters: int
    split: StateDictSplit

    @property
    def bytes(self) -> int:
        return self.split.metadata["total_size"]


def export_hf(
    checkpoint: Checkpoint,
    out: Path,
    dtype: str = "float32",
    max_shard_size: str = "2GB",
    tokenizer: Path | None = None,
    check: Callable[[Path], None] | None = None,
    announce: Callable[[str], None] = log.info,
) -> ExportReport:
    """Write `out`: weights, config, tokenizer, modelling files, model card.

    `dtype` is "float32" or "bfloat16" (thresholds of a router stay fp32); `max_shard_size` is like "500MB"; only a
    tensor that alone is larger may exceed it. `tokenizer` is a SentencePiece .model, a tokenizer.json or its folder;
    by default the one that the run's config names. `check` sees the finished folder before it gets its final name, and
    vetoes it by raising. `announce` gets one line with the size before any weight is read.

    Errors: ConversionError for a non-empty `out`, too little disk, a bad option, a checkpoint whose tensors are not
    those of its config, or a tokenizer that cannot be expressed exactly. Nothing stays behind then.
    """
    refuse_nonempty(out)
    plan = _plan(checkpoint, dtype, max_shard_size)
    weights = ModelWeights(checkpoint)
    check_tensors(weights, plan.map.ours())
    refuse_full_disk(out, plan.bytes)
    announce(
        f"exporting step {checkpoint.step} to {out}: {plan.parameters:,} parameters, {plan.bytes / 1e9:.3f} GB "
        f"as {dtype} in {len(plan.split.filename_to_tensors)} file(s)"
    )
    with appearing_whole(out) as folder:
        chosen = plan.run.data.tokenizer if tokenizer is None else named_tokenizer(tokenizer)
        facts = write_tokenizer(chosen, folder, plan.run.model.seq_length)
        _refuse_large_vocabulary(facts, plan.run)
        _write_weights(plan, weights, folder)
        _write_configs(plan.run, dtype, facts, folder)
        for name in MODELING_FILES:
            shutil.copyfile(Path(hf_modeling.__path__[0]) / name, folder / name)
        card = model_card(plan.run, checkpoint.step, checkpoint.consumed_samples, plan.parameters, dtype)
        (folder / "README.md").write_text(card, encoding="utf-8")
        if check is not None:
            check(folder)
    return ExportReport(
        folder=out,
        step=checkpoint.step,
        dtype=dtype,
        tensors=len(plan.dtypes),
        parameters=plan.parameters,
        weight_bytes=plan.bytes,
        weight_files=tuple(plan.split.filename_to_tensors),
    )


def _plan(checkpoint: Checkpoint, dtype: str, max_shard_size: str) -> _Plan:
    if dtype not in DTYPES:
        raise ConversionError(f"dtype is {dtype!r}; legal: {', '.join(DTYPES)}")
    run = run_config(checkpoint.config)
    _refuse_all_but_causal_models(run)
    refuse_inexpressible(run.model)
    hf_config(run.model)  # refuses what the modelling code does not compute
    param_map = ParamMap(run.model)
    targets = param_map.theirs()
    dtypes = {name: torch.float32 if target.keep_fp32 else DTYPES[dtype] for name, target in targets.items()}
    sketch = {name: torch.empty(target.shape, dtype=dtypes[name], device="meta") for name, target in targets.items()}
    split = split_torch_state_dict_into_shards(sketch, max_shard_size=_size(max_shard_size))
    parameters = sum(math.prod(target.shape) for target in targets.values() if not target.keep_fp32)
    return _Plan(run, param_map, dtypes, parameters, split)


def _size(text: str) -> int:
    """Bytes in "500MB". The library reads such texts too, but takes "0GB" and fails with its own words."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])B", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * 1000 ** ("KMGT".index(match[2].upper()) + 1)) if match else 0
    if size < 1:
        raise ConversionError(
            f"max_shard_size is {text!r}; must be a number above 0 and KB, MB, GB or TB, such as 500MB"
        )
    return size


def _write_weights(plan: _Plan, weights: ModelWeights, folder: Path) -> None:
    """Stream tensors into their files; a file is written, and its tensors forgotten, as soon as it has them all."""
    files = plan.split.filename_to_tensors
    waiting: dict[str, dict[str, Tensor]] = {file: {} for file in files}
    for name, tensor in plan.map.export(weights):
        file = plan.split.tensor_to_filename[name]
        # A copy of its own: parts of a fused tensor share memory, which safetensors refuses and which would stay alive.
        waiting[file][name] = tensor.to(plan.dtypes[name], copy=True, memory_format=torch.contiguous_format)
        if len(waiting[file]) == len(files[file]):
            save_file(waiting.pop(file), folder / file, metadata={"format": "pt"})
    assert not waiting, f"files without all their tensors: {sorted(waiting)}"
    if plan.split.is_sharded:
        index = {"metadata": plan.split.metadata, "weight_map": dict(sorted(plan.split.tensor_to_filename.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_configs(run: RunConfig, dtype: str, facts: TokenizerFacts, folder: Path) -> None:
    config = hf_config(run.model)
    config.dtype = dtype
    ids = {"bos_token_id": facts.bos_id, "eos_token_id": facts.eos_id, "pad_token_id": facts.pad_id}
    for name, value in ids.items():
        setattr(config, name, value)
    config.to_json_file(folder / "config.json")
    GenerationConfig(**ids).save_pretrained(folder)


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
