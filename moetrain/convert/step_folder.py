"""A checkpoint of weights and controllers alone, as `checkpoint.load` with `load_weights_only` takes it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moetrain.checkpoint.files import OS_FILES, write_synced
from moetrain.checkpoint.manifest import MANIFEST_NAME, Manifest, ShardRecord, merge_records
from moetrain.checkpoint.store import Piece, save_shard
from moetrain.config.loader import config_to_dict
from moetrain.config.schema import RunConfig

BATCH_BYTES = 256 * 2**20


def write_step_folder(
    folder: Path, pieces: Iterable[Piece], config: RunConfig, description: str, extra: dict[str, Any]
) -> None:
    """Fill `folder` with a committed checkpoint of step 0. Memory holds `BATCH_BYTES` of pieces, or one larger one."""
    record = _write_shards(folder, pieces)
    manifest = Manifest(0, 0, config_to_dict(config), {"description": description}, extra, record)
    write_synced(folder / MANIFEST_NAME, manifest.to_bytes())
    OS_FILES.sync_folder(folder)


def _write_shards(folder: Path, pieces: Iterable[Piece]) -> ShardRecord:
    """Files of up to `BATCH_BYTES`, or of one larger piece, named as those of so many ranks."""
    records: list[ShardRecord] = []
    batch: list[Piece] = []
    for piece in pieces:
        if batch and sum(p.tensor.nbytes for p in batch) + piece.tensor.nbytes > BATCH_BYTES:
            records.append(save_shard(folder, len(records), batch))
            batch = []
        batch.append(piece)
    records.append(save_shard(folder, len(records), batch))
    return merge_records(records)
