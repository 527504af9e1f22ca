"""The callbacks of every run; a caller may append its own."""

from __future__ import annotations

from moetrain.train.callback import Callback
from moetrain.train.callbacks.config import ConfigCallback
from moetrain.train.callbacks.console import ConsoleCallback
from moetrain.train.callbacks.garbage import GarbageCallback
from moetrain.train.callbacks.jsonl import JsonlCallback
from moetrain.train.callbacks.summary import SummaryCallback
from moetrain.train.callbacks.tensorboard import TensorBoardCallback

__all__ = [
    "ConfigCallback",
    "ConsoleCallback",
    "GarbageCallback",
    "JsonlCallback",
    "SummaryCallback",
    "TensorBoardCallback",
    "standard_callbacks",
]


def standard_callbacks() -> list[Callback]:
    """config.yaml, console, metrics.jsonl, TensorBoard, summary.json, and the garbage collector's."""
    return [
        ConfigCallback(),
        ConsoleCallback(),
        JsonlCallback(),
        TensorBoardCallback(),
        SummaryCallback(),
        GarbageCallback(),
    ]
