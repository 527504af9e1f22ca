"""One table per architecture that checkpoints are converted to or from.

`STOCK` lists those of `transformers` that are read and written; `READ` has also one that is only read, and our own,
whose modelling files travel with an export.
"""

from __future__ import annotations

from moetrain.convert.architectures.base import Architecture, Config
from moetrain.convert.architectures.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from moetrain.convert.architectures.dots1 import DOTS1
from moetrain.convert.architectures.llama import LLAMA
from moetrain.convert.architectures.mixtral import MIXTRAL
from moetrain.convert.architectures.moetrain import MOETRAIN
from moetrain.convert.architectures.olmoe import OLMOE
from moetrain.convert.architectures.qwen2 import QWEN2
from moetrain.convert.architectures.qwen3 import QWEN3
from moetrain.convert.architectures.qwen3_moe import QWEN3_MOE
from moetrain.convert.architectures.switch import SWITCH
from moetrain.errors import ConversionError

__all__ = ["READ", "STOCK", "Architecture", "architecture_of"]

STOCK: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (MIXTRAL, QWEN3_MOE, OLMOE, DOTS1, DEEPSEEK_V3, DEEPSEEK_V2, LLAMA, QWEN2, QWEN3)
}
READ: dict[str, Architecture] = STOCK | {architecture.name: architecture for architecture in (SWITCH, MOETRAIN)}

_KNOWN_OTHERS = {
    "deepseek_v32": "its attention chooses keys by an indexer",
    "qwen2_moe": "its shared expert has a gate of its own",
    "glm4_moe": "its rotary positions cover half of each head",
}


def architecture_of(config: Config) -> Architecture:
    """The architecture that a config.json names. ConversionError for one that we cannot compute."""
    name = config.get("model_type")
    if isinstance(name, str) and name in READ:
        return READ[name]
    reason = f" ({_KNOWN_OTHERS[name]})" if isinstance(name, str) and name in _KNOWN_OTHERS else ""
    raise ConversionError(
        f"config.json: model_type is {name!r}, which we do not read{reason}; legal: {', '.join(READ)}"
    )
