"""The encoder of a Switch Transformer (arXiv 2101.03961) from a Hugging Face folder, as a checkpoint.

The correspondence is data (`RULES`). Two things are not taken as they stand: Switch, like T5, does not scale
attention's scores, and we divide them by the root of the head's width, so queries are multiplied by it (exactly, where
it is a power of two: 8 for the published 64); and the decoder stays behind, because `moetrain` has no encoder-decoders.
Streams: memory holds one tensor at a time, and up to `upcycle.BATCH_BYTES` of them while they are written.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from sentencepiece import sentencepiece_model_pb2
from torch import Tensor
from transformers import SwitchTransformersConfig, SwitchTransformersEncoderModel

from moetrain.checkpoint.files import OS_FILES
from moetrain.checkpoint.reader import CheckpointReader
from moetrain.checkpoint.store import Piece
from moetrain.config.loader import config_from_dict
from moetrain.config.schema import ModelConfig, RunConfig
from moetrain.config.size import parameter_shapes
from moetrain.convert.mapping import TRANSFORMS, Shape
from moetrain.convert.step_folder import write_step_folder
from moetrain.convert.whole_folder import appearing_whole, refuse_full_disk, refuse_nonempty
from moetrain.data.tokenizers import load_tokenizer
from moetrain.errors import ConversionError
from moetrain.model.parameters import initial_controllers
from moetrain.model.reference_logits import encoder_states

MODEL_TYPE = "switch_transformers"
SENTINELS = 100
"""Pieces <extra_id_99> to <extra_id_0>, which transformers puts behind those of a T5 sentencepiece model."""
TOLERANCE = 1e-3
"""Largest difference of a final hidden state, over the largest one, that counts as equal in fp32. Sharp attention makes
more of rounding than a logit's: with a random model of switch-base-8's size both models are 4e-5 apart, and each is as
far from float64. One misplaced tensor moves states by far more."""

_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.safetensors")
_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")

Dropped = Literal["zero", "input"]
Part = Literal["model", "layer", "dense", "moe"]

log = logging.getLogger(__name__)


# --- the table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """One of our tensors and theirs: `{i}` is a layer, `{e}` an expert, which ours stacks. `shapes` of theirs are in
    symbols of `_sizes`."""

    part: Part
    ours: str
    theirs: tuple[str, ...]
    shapes: tuple[str, ...]
    transform: Callable[[tuple[Tensor, ...], ModelConfig], Tensor] = lambda parts, _: parts[0]


def _join_qkv(parts: tuple[Tensor, ...], model: ModelConfig) -> Tensor:
    """Our scores are divided by the root of the head's width; theirs are not."""
    query, key, value = parts
    return TRANSFORMS["split_qkv"].join((query * math.sqrt(model.head_dim), key, value), model)


_OURS, _SELF, _FF = "decoder.layers.{i}.", "encoder.block.{i}.layer.0.", "encoder.block.{i}.layer.1."
RULES = (
    Rule("model", "embedding.word_embeddings.weight", ("shared.weight",), ("V", "d")),
    Rule(
        "model",
        "relative_positions.weight",
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",),
        ("buckets", "heads"),
    ),
    Rule("layer", _OURS + "input_layernorm.weight", (_SELF + "layer_norm.weight",), ("d",)),
    Rule(
        "layer",
        _OURS + "self_attention.linear_qkv.weight",
        tuple(_SELF + f"SelfAttention.{x}.weight" for x in "qkv"),
        ("q", "d"),
        _join_qkv,
    ),
    Rule("layer", _OURS + "self_attention.linear_proj.weight", (_SELF + "SelfAttention.o.weight",), ("d", "q")),
    Rule("layer", _OURS + "pre_mlp_layernorm.weight", (_FF + "layer_norm.weight",), ("d",)),
    Rule("dense", _OURS + "mlp.linear_fc1.weight", (_FF + "mlp.wi.weight",), ("f", "d")),
    Rule("dense", _OURS + "mlp.linear_fc2.weight", (_FF + "mlp.wo.weight",), ("d", "f")),
    Rule("moe", _OURS + "mlp.router.weight", (_FF + "mlp.router.classifier.weight",), ("E", "d")),
    Rule("moe", _OURS + "mlp.experts.fc1", (_FF + "mlp.experts.expert_{e}.wi.weight",), ("f", "d")),
    Rule("moe", _OURS + "mlp.experts.fc2", (_FF + "mlp.experts.expert_{e}.wo.weight",), ("d", "f")),
    Rule("model", "decoder.final_layernorm.weight", ("encoder.final_layer_norm.weight",), ("d",)),
)
_UNUSED = ("decoder.", "lm_head.")


# --- their folder ---------------------------------------------------------------------------------------------------


class SwitchFolder:
    """A Hugging Face folder of a Switch Transformer: its config, and its tensors by name, each read when asked for.

    Raises ConversionError for a folder of something else, one whose weights are pickles, and a damaged one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tree = _json(folder / "config.json")
        if tree.get("model_type") != MODEL_TYPE:
            raise ConversionError(
                f"{folder}: config.json has model_type {tree.get('model_type')!r}; this importer takes {MODEL_TYPE}"
            )
        self.config = SwitchTransformersConfig.from_dict(tree)
        self._file_of = self._find_tensors()

    def names(self) -> Iterable[str]:
        return self._file_of

    def shape(self, name: str) -> Shape:
        with safe_open(self._file_of[name], "pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """A whole tensor in fp32."""
        with safe_open(self._file_of[name], "pt") as file:
            return file.get_tensor(name).float()

    def _find_tensors(self) -> dict[str, Path]:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            named = _json(index).get("weight_map")
            files = sorted(set(named.values())) if isinstance(named, dict) else []
            if not files or not all(isinstance(name, str) and _SHARD.fullmatch(name) for name in files):
                raise ConversionError(f"{index}: weight_map must name .safetensors files of this folder")
        else:
            files = ["model.safetensors"]
        found: dict[str, Path] = {}
        for name in files:
            path = self.folder / name
            if not path.is_file():
                raise ConversionError(f"{self.folder}: {name} is missing{self._pickle_hint()}")
            try:
                with safe_open(path, "pt") as file:
                    found |= dict.fromkeys(file.keys(), path)
            except SafetensorError as error:
                raise ConversionError(f"{path}: not a safetensors file, or a damaged one ({error})") from error
        return found

    def _pickle_hint(self) -> str:
        if not any(self.folder.glob("pytorch_model*.bin")):
            return ""
        return (
            "; pytorch_model.bin is a pickle, which can run code of its author and is never read: load it once with "
            "transformers where that is safe, and save it with save_pretrained(..., safe_serialization=True)"
        )


def is_switch_folder(path: Path) -> bool:
    """Whether `path` is a Hugging Face folder that says to be a Switch Transformer."""
    file = path / "config.json"
    return file.is_file() and _json(file).get("model_type") == MODEL_TYPE


def _json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(tree, dict):
        raise ConversionError(f"{path}: must hold a JSON object")
    return tree


# --- the settings ---------------------------------------------------------------------------------------------------


def switch_model(config: SwitchTransformersConfig, seq_length: int, dropped: Dropped) -> dict[str, Any]:
    """The settings under `model` of the encoder. ConversionError for a value that we do not compute."""
    legal = {"dense_act_fn": "relu", "router_bias": False, "router_dtype": "float32"}
    for name, value in legal.items():
        if getattr(config, name) != value:
            raise ConversionError(f"config.json: {name} is {getattr(config, name)!r}; this importer takes {value!r}")
    step = config.encoder_sparse_step
    sparse = [int(step > 0 and (step == 1 or i % step == 1)) for i in range(config.num_layers)]
    model: dict[str, Any] = {
        "type": "encoder",
        "num_layers": config.num_layers,
        "hidden_size": config.d_model,
        "num_attention_heads": config.num_heads,
        "kv_channels": config.d_kv,
        "ffn_hidden_size": config.d_ff,
        "activation": "relu",
        "position_embedding": "relative",
        "relative_buckets": config.relative_attention_num_buckets,
        "relative_max_distance": config.relative_attention_max_distance,
        "layernorm_epsilon": config.layer_norm_epsilon,
        "vocab_size": config.vocab_size,
        "seq_length": seq_length,
        "share_embeddings_and_output_weights": True,
    }
    if any(sparse):
        model["moe"] = {
            "num_experts": config.num_experts,
            "ffn_hidden_size": config.d_ff,
            "layer_freq": sparse,
            "router": {"type": "top_k", "top_k": 1},
            "capacity": {"tokens": config.expert_capacity, "dropped": dropped},
            "aux_loss_coeff": config.router_aux_loss_coef,
            "z_loss_coeff": config.router_z_loss_coef,
        }
    return model


def left_out(config: SwitchTransformersConfig) -> list[str]:
    """What of the config has no counterpart here, in sentences; none of it acts in evaluation."""
    notes = []
    if config.router_jitter_noise:
        notes.append(f"router_jitter_noise ({config.router_jitter_noise:g}): routers here have no noise in training")
    if config.dropout_rate:
        notes.append(f"dropout_rate ({config.dropout_rate:g}): there is no dropout here")
    return notes


def _run(model: dict[str, Any], out: Path, tokenizer: dict[str, Any]) -> dict[str, Any]:
    """A run to start from: the masked language model that the encoder is, on data that the user names."""
    return {
        "run": {"dir": "runs/switch"},
        "model": model,
        "data": {"tokenizer": tokenizer, "train": [{"path": "data/train"}], "split": "98,2,0"},
        "training": {
            "train_iters": 1000,
            "global_batch_size": 32,
            "micro_batch_size": 8,
            "objective": {"type": "masked_lm"},
        },
        "checkpoint": {"load": str(out.absolute()), "load_weights_only": True},
    }


# --- the import -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImportReport:
    """What was written. `notes`: what of their config has no counterpart; `unused`: tensors that stayed behind;
    `difference`: largest of a final hidden state, over the largest one; None without verification."""

    folder: Path
    parameters: int
    unused: int
    notes: tuple[str, ...]
    difference: float | None


def import_switch(
    source: Path,
    out: Path,
    seq_length: int = 512,
    dropped: Dropped = "zero",
    verify: bool = True,
    announce: Callable[[str], None] = log.info,
) -> ImportReport:
    """Write `out`: a step folder of weights, the tokenizer, and config.yaml, a run to start from.

    `dropped` is `model.moe.capacity.dropped`. With `verify` the final hidden states of both models are compared in this
    process, in fp32, both with the `zero` that transformers computes; there must be no process group yet.

    Raises:
        ConversionError: the source is no such model or has tensors too many or too few, `out` is not empty, its disk is
            too small, the states differ by more than `TOLERANCE`, or a file cannot be read or written.
    """
    refuse_nonempty(out)
    theirs = SwitchFolder(source)
    tree = switch_model(theirs.config, seq_length, dropped)
    try:
        model = ModelConfig.model_validate(tree)
    except ValidationError as error:
        raise ConversionError(f"{source}: config.json does not describe a model that works here: {error}") from error
    unused = check_names(theirs, model)
    parameters = sum(math.prod(shape) for _, shape in parameter_shapes(model))
    refuse_full_disk(out, 4 * parameters)
    announce(f"importing {source} to {out}: {parameters:,} parameters, {4 * parameters / 1e9:.3f} GB")
    try:
        with appearing_whole(out) as folder:
            run = _run(tree, out, write_tokenizer(source, folder, out, model.vocab_size))
            config = config_from_dict(run, "the imported model's config")
            _write(folder, pieces(theirs, model), config, theirs)
            (folder / "config.yaml").write_text(yaml.safe_dump(run, sort_keys=False), encoding="utf-8")
            difference = _compare(theirs, folder) if verify else None
        OS_FILES.sync_folder(out.absolute().parent)
    except OSError as error:
        raise ConversionError(f"importing to {out} failed: {error}") from error
    return ImportReport(out, parameters, unused, tuple(left_out(theirs.config)), difference)


def check_names(source: SwitchFolder, model: ModelConfig) -> int:
    """ConversionError unless the source has every tensor of the encoder, with its shape, and beside them only those of
    the decoder, whose number is returned."""
    sizes, there = _sizes(model), set(source.names())
    expected = {
        _stored(name, there): tuple(sizes[symbol] for symbol in rule.shapes)
        for rule, _, names in expand(model)
        for name in names
    }
    if missing := sorted(expected.keys() - there):
        raise ConversionError(f"{source.folder}: lacks {_some(missing)}")
    left = there - expected.keys() - set(_EMBEDDINGS)
    if strange := sorted(name for name in left if not name.startswith(_UNUSED)):
        raise ConversionError(f"{source.folder}: the config leaves no place for {_some(strange)}")
    for name, shape in expected.items():
        if source.shape(name) != shape:
            raise ConversionError(
                f"{source.folder}: {name} has shape {list(source.shape(name))}; config.json says {list(shape)}"
            )
    return len(left)


def expand(model: ModelConfig) -> Iterator[tuple[Rule, str, tuple[str, ...]]]:
    """Each rule for each layer that has it, and their names; experts one after another."""
    experts = model.moe.num_experts if model.moe is not None else 0
    for rule in RULES:
        if rule.part == "model":
            yield rule, rule.ours, rule.theirs
            continue
        for i in range(model.num_layers):
            kind = "moe" if model.is_moe_layer(i) else "dense"
            if rule.part not in ("layer", kind):
                continue
            each = range(experts) if "{e}" in rule.theirs[0] else (None,)
            theirs = tuple(name.format(i=i, e=e) for e in each for name in rule.theirs)
            yield rule, rule.ours.format(i=i), theirs


def pieces(source: SwitchFolder, model: ModelConfig) -> Iterator[Piece]:
    """Weights and controllers of our checkpoint."""
    there, shapes = set(source.names()), dict(parameter_shapes(model))
    for rule, ours, theirs in expand(model):
        shape = shapes.pop(ours)
        names = [_stored(name, there) for name in theirs]
        if "{e}" in rule.theirs[0]:
            for e, name in enumerate(names):
                yield Piece(f"weight.{ours}", shape, (e, 0, 0), source.read(name)[None])
            continue
        tensor = rule.transform(tuple(source.read(name) for name in names), model)
        assert tuple(tensor.shape) == shape, f"{ours}: {list(tensor.shape)} is not {list(shape)}"
        yield Piece.whole(f"weight.{ours}", tensor.contiguous())
    assert not shapes, f"no rule fills {sorted(shapes)}"
    for name, value in initial_controllers(model):
        yield Piece.whole(f"controller.{name}", value)


def _stored(name: str, there: set[str]) -> str:
    """The embedding has two names, of which a file holds one or both."""
    if name in _EMBEDDINGS:
        return next((known for known in _EMBEDDINGS if known in there), name)
    return name


def _sizes(model: ModelConfig) -> dict[str, int]:
    sizes = {"V": model.vocab_size, "d": model.hidden_size, "f": model.ffn_hidden_size}
    sizes |= {"q": model.num_attention_heads * model.head_dim, "heads": model.num_attention_heads}
    return sizes | {"buckets": model.relative_buckets, "E": model.moe.num_experts if model.moe is not None else 0}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{len(names)} tensor(s): {', '.join(names[:5])}{more}"


def _write(folder: Path, parts: Iterator[Piece], config: RunConfig, source: SwitchFolder) -> None:
    extra: dict[str, Any] = {"imported_from": {"folder": str(source.folder), "model_type": MODEL_TYPE}}
    tokenizer = config.data.tokenizer
    inside = tokenizer.model_copy(update={"path": str(folder / Path(tokenizer.path).name)})
    extra["tokenizer"] = load_tokenizer(inside).fingerprint
    write_step_folder(folder, parts, config, "imported", extra)


# --- the tokenizer --------------------------------------------------------------------------------------------------


def write_tokenizer(source: Path, folder: Path, out: Path, vocab_size: int) -> dict[str, Any]:
    """Put the tokenizer into `folder`, which will be `out`, and return its settings.

    A tokenizer.json is taken as it is: it is what transformers runs. A spiece.model gets the sentinels, which the file
    lacks, as pieces of their own with the ids that transformers gives them.
    """
    if (source / "tokenizer.json").is_file():
        shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
        if (source / "tokenizer_config.json").is_file():
            shutil.copyfile(source / "tokenizer_config.json", folder / "tokenizer_config.json")
        kind, name = "huggingface", "tokenizer.json"
    elif (source / "spiece.model").is_file():
        kind, name = "sentencepiece", "tokenizer.model"
        (folder / name).write_bytes(with_sentinels((source / "spiece.model").read_bytes(), vocab_size))
    else:
        raise ConversionError(f"{source}: has neither tokenizer.json nor spiece.model")
    return {"type": kind, "path": str(out.absolute() / name)}


def with_sentinels(model: bytes, vocab_size: int) -> bytes:
    """A T5 sentencepiece model with its sentinels behind the other pieces, the last first. A vocabulary with less room
    gets none."""
    parsed: Any = getattr(sentencepiece_model_pb2, "ModelProto")()  # noqa: B009  (made at run time)
    parsed.ParseFromString(model)
    known = {piece.piece for piece in parsed.pieces}
    if "<extra_id_0>" not in known and len(parsed.pieces) + SENTINELS <= vocab_size:
        for i in reversed(range(SENTINELS)):
            parsed.pieces.add(piece=f"<extra_id_{i}>", score=0.0, type=parsed.SentencePiece.USER_DEFINED)
    return parsed.SerializeToString()


# --- the proof ------------------------------------------------------------------------------------------------------


class _AsTransformers:
    """A checkpoint whose dropped tokens get nothing, as in transformers, whatever its config says."""

    def __init__(self, reader: CheckpointReader) -> None:
        self.read = reader.read
        self.config = copy.deepcopy(reader.config)
        moe = self.config["model"]["moe"]
        if moe is not None:
            moe["capacity"]["dropped"] = "zero"


@torch.no_grad()
def _compare(source: SwitchFolder, folder: Path, sequences: int = 2, length: int = 96) -> float:
    """Of the final hidden states of random tokens, the second sequence padded."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(source.config.vocab_size, (sequences, length), generator=generator)
    valid = torch.arange(length) < torch.tensor([length, length - 7])[:, None]
    with CheckpointReader(folder) as reader:
        ours = encoder_states(_AsTransformers(reader), tokens, valid)
    theirs_model = SwitchTransformersEncoderModel.from_pretrained(source.folder, dtype=torch.float32).eval()
    theirs = theirs_model(input_ids=tokens, attention_mask=valid.long()).last_hidden_state
    difference = ((ours - theirs)[valid].abs().max() / theirs[valid].abs().max()).item()
    if not difference <= TOLERANCE:
        raise ConversionError(
            f"hidden states differ from transformers' by up to {difference:.3g} of the largest one, tolerance "
            f"{TOLERANCE:g}; nothing was written"
        )
    return difference
