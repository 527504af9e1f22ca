"""Megatron-core on a machine without CUDA. The only file that patches another project; with CUDA it does nothing.

Megatron-core 0.16 writes `device="cuda"` and `torch.cuda.*` in its schedules, point-to-point communication, tensor
mappings and random-state tracker. Rather than change torch for everybody, each Megatron module gets a proxy under its
global name `torch`: the proxy sends CUDA devices to the CPU and hands every other attribute through. Other libraries
(DeepSpeed asks the true torch what hardware there is) notice nothing.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch

_CPU = torch.device("cpu")
_FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "full", "full_like", "ones", "ones_like"),
    *("rand", "randint", "randn", "tensor", "zeros", "zeros_like"),
)


def _on_cpu(device: Any) -> Any:
    """The same device, with CUDA (by name, ordinal or object) replaced by the CPU."""
    is_cuda = (
        isinstance(device, int)
        or (isinstance(device, str) and device.startswith("cuda"))
        or (isinstance(device, torch.device) and device.type == "cuda")
    )
    return _CPU if is_cuda else device


def _factory_on_cpu(factory: Any) -> Any:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return factory(*args, **kwargs)

    return make


class _Stream:
    """A stream that is always idle: CPU work is done when the call returns."""

    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...


class _CudaProxy(types.ModuleType):
    """What a Megatron module sees as `torch.cuda`: the parts that its CPU paths call."""

    def __init__(self) -> None:
        super().__init__("torch.cuda")
        self._stream = _Stream()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def is_available(self) -> bool:
        return False

    def current_device(self) -> torch.device:
        return _CPU

    def synchronize(self, device: Any = None) -> None: ...

    def current_stream(self, device: Any = None) -> _Stream:
        return self._stream

    def stream(self, stream: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)


class _TorchProxy(types.ModuleType):
    """What a Megatron module sees as `torch`."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CudaProxy()
        for name in _FACTORIES:
            setattr(self, name, _factory_on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def install() -> list[str]:
    """Make Megatron-core usable on this machine; call it before building groups or models, as often as you like.

    Returns the names of the Megatron modules that were changed by this call: none when CUDA is there.
    """
    if torch.cuda.is_available():
        return []
    # jit_fuser is torch.compile, and on a CPU that means a C++ compilation inside the first training step.
    torch._dynamo.config.disable = True  # pyright: ignore[reportPrivateImportUsage]
    import megatron.core.models.gpt.gpt_model
    import megatron.core.pipeline_parallel.p2p_communication
    import megatron.core.pipeline_parallel.schedules  # noqa: F401 - loaded here so that it is patched below
    import megatron.core.tensor_parallel.random as megatron_random

    changed = []
    proxy = _TorchProxy()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and vars(module).get("torch") is torch:
            vars(module)["torch"] = proxy
            changed.append(name)
    if changed:
        _install_rng(megatron_random)
    return changed


def _install_rng(megatron_random: Any) -> None:
    """One generator, the CPU's, behind Megatron's tracker of named CUDA random states."""

    class CpuRngTracker(megatron_random.CudaRNGStatesTracker):
        @contextlib.contextmanager
        def fork(self, name: str = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            if name not in self.states_:
                raise KeyError(f"random state {name!r} was never added")
            outer = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer)

    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    megatron_random.CudaRNGStatesTracker = CpuRngTracker
    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state
