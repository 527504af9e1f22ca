"""Sharded, layout-free checkpoints: any number of ranks writes, any other number reads. Knows torch and safetensors,
and nothing of Megatron or DeepSpeed."""

from moetrain.checkpoint.background import BackgroundSaver, SaveOutcome, Snapshot
from moetrain.checkpoint.comm import Comm, SingleProcess, TorchDistributed
from moetrain.checkpoint.compatibility import check_config, model_differences
from moetrain.checkpoint.folders import find_step_folder
from moetrain.checkpoint.manager import CheckpointManager
from moetrain.checkpoint.manifest import Manifest, ShardRecord, merge_records
from moetrain.checkpoint.reader import CheckpointReader
from moetrain.checkpoint.rectangles import Rect, flat_range_to_rects, intersect
from moetrain.checkpoint.retention import Retention
from moetrain.checkpoint.staging import StagedShare, StagingBuffer
from moetrain.checkpoint.state import ParameterShard, fill_from, pieces_of, read_rng, rng_piece
from moetrain.checkpoint.store import Piece, save_shard

__all__ = [
    "BackgroundSaver",
    "CheckpointManager",
    "CheckpointReader",
    "Comm",
    "Manifest",
    "ParameterShard",
    "Piece",
    "Rect",
    "Retention",
    "SaveOutcome",
    "ShardRecord",
    "SingleProcess",
    "Snapshot",
    "StagedShare",
    "StagingBuffer",
    "TorchDistributed",
    "check_config",
    "fill_from",
    "find_step_folder",
    "flat_range_to_rects",
    "intersect",
    "merge_records",
    "model_differences",
    "pieces_of",
    "read_rng",
    "rng_piece",
    "save_shard",
]
