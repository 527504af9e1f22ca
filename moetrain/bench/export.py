"""Export of a large checkpoint to Hugging Face: memory, time, and the rate beside that of copying the same files.

The checkpoint is made of files with holes: a real manifest, real headers, zeros for weights that take no room. Memory
is what Linux calls resident (VmHWM), in a process of its own, above what the program takes before it begins.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetrain.config.loader import config_from_dict, config_to_dict
from moetrain.config.model import ModelConfig
from moetrain.config.schema import RunConfig
from moetrain.config.size import parameter_count, parameter_shapes
from moetrain.errors import MoetrainError

ALLOWED = 500_000_000
"""Bytes above twice the largest block of weights that an export may take."""

_CHUNK = 8 * 2**20


@dataclass(frozen=True)
class ExportResult:
    """Sizes in bytes, times of the wall and of all threads' CPU. `peak` is the most resident memory of the export above
    `program`, what the process had before."""

    parameters: int
    read: int
    written: int
    largest_block: int
    program: int
    peak: int
    seconds: float
    cpu_seconds: float
    copy_seconds: float
    copy_cpu_seconds: float

    @property
    def allowed(self) -> int:
        """The bound on `peak`."""
        return 2 * self.largest_block + ALLOWED

    @property
    def rate(self) -> float:
        """Bytes written per second."""
        return self.written / self.seconds

    @property
    def copy_rate(self) -> float:
        """The same of a plain copy."""
        return self.written / self.copy_seconds


def measure_export(size: int, folder: Path, dtype: str = "float32") -> ExportResult:
    """Export a checkpoint of about `size` bytes of fp32 weights within `folder`, and copy what was written.

    MoetrainError where the disk is too small, or memory exceeds `ExportResult.allowed`. Leaves nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < 1.1 * size:
        raise MoetrainError(f"{folder} needs {1.1 * size / 1e9:.1f} GB; its disk has {free / 1e9:.1f} GB free")
    with tempfile.TemporaryDirectory(prefix="export-", dir=folder) as name:
        work = Path(name)
        run = config_of(size, work / "tokenizer")
        _write_tokenizer(work / "tokenizer")
        write_sparse_checkpoint(run, work / "checkpoint")
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as child:
            seen = child.submit(_export, work / "checkpoint", work / "out", dtype).result()
        files = sorted((work / "out").glob("*.safetensors"))
        written = sum(path.stat().st_size for path in files)
        start, cpu_start = time.perf_counter(), time.process_time()
        for path in files:
            _copy(path, work / "copy")
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        parameters = parameter_count(run.model).total
        result = ExportResult(
            parameters, 4 * parameters, written, copy_seconds=seconds, copy_cpu_seconds=cpu_seconds, **seen
        )
    if result.peak > result.allowed:
        raise MoetrainError(f"the export took {result.peak / 1e6:.0f} MB; allowed: {result.allowed / 1e6:.0f} MB")
    return result


def config_of(size: int, tokenizer: Path) -> RunConfig:
    """A Mixtral of about `size` bytes, of which the embeddings are the largest blocks."""
    wide = size > 4e9
    d, layers, vocabulary = (4096, 7, 32768) if wide else (1024, 4, 8192)
    per_unit = layers * 8 * 3 * d
    ffn = max(64, round((size / 4 - 2 * vocabulary * d - layers * 2.5 * d * d) / per_unit / 64) * 64)
    tree = {
        "run": {"dir": "unused", "name": "export benchmark"},
        "model": {
            "num_layers": layers,
            "hidden_size": d,
            "num_attention_heads": d // 128,
            "num_query_groups": d // 512,
            "ffn_hidden_size": ffn,
            "vocab_size": vocabulary,
            "seq_length": 4096,
            "moe": {"num_experts": 8, "ffn_hidden_size": ffn, "router": {"type": "top_k", "gates": "renormalized"}},
        },
        "data": {"tokenizer": {"type": "huggingface", "path": str(tokenizer)}, "train": [{"path": "unused"}]},
        "training": {"train_iters": 1, "global_batch_size": 1},
    }
    return config_from_dict(tree, "the benchmark")


def write_sparse_checkpoint(run: RunConfig, folder: Path) -> None:
    """A committed checkpoint of zeros; each file is a header and a hole."""
    from moetrain.checkpoint import Manifest, ShardRecord
    from moetrain.checkpoint.manifest import MANIFEST_NAME, FileEntry, ShardEntry, TensorEntry
    from moetrain.checkpoint.rectangles import Rect

    folder.mkdir()
    tensors, files = {}, {}
    for number, (name, shape) in enumerate(parameter_shapes(run.model)):
        rect = Rect((0,) * len(shape), shape)
        key, file = f"weight.{name}@{','.join('0' * len(shape))}", f"shard-{number:05d}.safetensors"
        header = {key: {"dtype": "F32", "shape": list(shape), "data_offsets": [0, 4 * rect.numel]}}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            opened.truncate(8 + len(text) + 4 * rect.numel)
        with (folder / file).open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        files[file] = FileEntry((folder / file).stat().st_size, digest)
        tensors[f"weight.{name}"] = TensorEntry("float32", shape, (ShardEntry(file, key, rect),))
    manifest = Manifest(1, 1, config_to_dict(run), {}, {}, ShardRecord(tensors, files))
    (folder / MANIFEST_NAME).write_bytes(manifest.to_bytes())


def _export(checkpoint: Path, out: Path, dtype: str) -> dict[str, Any]:
    """In a process of its own."""
    from moetrain.checkpoint import CheckpointReader
    from moetrain.convert.hf import export_hf

    said: list[str] = []
    with CheckpointReader(checkpoint, verify="size") as reader:
        model = config_from_dict(reader.config, "the benchmark").model
        program = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark starts anew
        start, cpu_start = time.perf_counter(), time.process_time()
        export_hf(reader, out, dtype=dtype, announce=said.append)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return {
        "largest_block": _largest_block(model),
        "program": program,
        "peak": _status("VmHWM") - program,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
    }


def _largest_block(model: ModelConfig) -> int:
    """Of fp32: an expert's matrix, or another tensor."""
    shapes = (shape[1:] if ".experts." in name else shape for name, shape in parameter_shapes(model))
    return max(4 * math.prod(shape) for shape in shapes)


def _status(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _copy(source: Path, target: Path) -> None:
    """Copy a file, have it on disk, and delete it."""
    with source.open("rb", buffering=0) as read, target.open("wb", buffering=0) as write:
        while block := read.read(_CHUNK):
            write.write(block)
        os.fsync(write.fileno())
    target.unlink()


def _write_tokenizer(folder: Path) -> None:
    import tokenizers

    folder.mkdir()
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    model.add_special_tokens(["<unk>", "<s>", "</s>"])
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}), encoding="utf-8")


# --- as text --------------------------------------------------------------------------------------------------------


def rows(result: ExportResult, dtype: str) -> list[tuple[str, str]]:
    """What was measured, line by line."""
    return [
        ("parameters", f"{result.parameters:,}"),
        (f"written as {dtype}", f"{result.written / 1e9:.2f} GB"),
        ("largest block of weights (fp32)", f"{result.largest_block / 1e6:.0f} MB"),
        ("memory before the export (libraries)", f"{result.program / 1e6:.0f} MB"),
        ("peak above that", f"{result.peak / 1e6:.0f} MB"),
        ("allowed: 2 x largest block + 500 MB", f"{result.allowed / 1e6:.0f} MB"),
        ("time of the export, with sha256 and fsync", f"{result.seconds:.1f} s"),
        ("rate", f"{result.rate / 1e9:.2f} GB/s"),
        ("CPU time of the export", f"{result.cpu_seconds:.1f} s"),
        ("time of copying its files, with fsync", f"{result.copy_seconds:.1f} s"),
        ("rate of the copy", f"{result.copy_rate / 1e9:.2f} GB/s"),
        ("CPU time of the copy", f"{result.copy_cpu_seconds:.1f} s"),
    ]


def page(result: ExportResult, dtype: str) -> str:
    """A page of documentation."""
    table = "\n".join(f"| {name} | {value} |" for name, value in rows(result, dtype))
    return f"""# Export to Hugging Face

Written by `moetrain bench export`: a Mixtral of zeros, whose checkpoint is files with holes, exported by one process
without a GPU, on {machine()}. Memory is resident memory (VmHWM of Linux, set back before the export).
Times are of one run beside whatever else the machine was doing.

| | |
|---|---|
{table}
"""


def machine() -> str:
    """Processor and cores."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return f"{names[0] if names else 'unknown processor'}, {len(os.sched_getaffinity(0))} cores"
