"""The one file that patches Megatron: what it changes, and what it leaves alone."""

from __future__ import annotations

import sys

import pytest
import torch

from moetrain.runtime import megatron_cpu


@pytest.fixture(scope="module")
def installed() -> list[str]:
    if torch.cuda.is_available():
        pytest.skip("with CUDA nothing is patched; see the test below")
    megatron_cpu.install()
    megatron = {name: module for name, module in sys.modules.items() if name.startswith("megatron.core")}
    return [name for name, module in megatron.items() if getattr(module, "torch", None) is not None]


def test_nothing_is_touched_where_cuda_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert megatron_cpu.install() == []


def test_every_loaded_megatron_module_sees_the_proxy(installed: list[str]) -> None:
    assert "megatron.core.pipeline_parallel.schedules" in installed
    for name in installed:
        assert sys.modules[name].torch is not torch, name


def test_installing_again_changes_nothing_more(installed: list[str]) -> None:
    assert megatron_cpu.install() == []


def test_torch_itself_is_untouched(installed: list[str]) -> None:
    assert torch.zeros.__module__ != megatron_cpu.__name__
    assert torch.cuda.current_device.__module__ == "torch.cuda"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


@pytest.mark.parametrize("device", ["cuda", "cuda:1", 0, torch.device("cuda", 0)])
def test_the_proxy_puts_cuda_tensors_on_the_cpu(installed: list[str], device: object) -> None:
    proxy = sys.modules["megatron.core.pipeline_parallel.schedules"].torch
    assert proxy.zeros(2, device=device).device.type == "cpu"
    assert proxy.empty_like(torch.ones(2), device=device).device.type == "cpu"


def test_the_proxy_hands_everything_else_through(installed: list[str]) -> None:
    proxy = sys.modules["megatron.core.pipeline_parallel.schedules"].torch
    assert proxy.Tensor is torch.Tensor
    assert proxy.nn is torch.nn
    assert proxy.zeros(2, device="meta").device.type == "meta"
    assert proxy.cuda.is_available() is False
    assert proxy.cuda.current_device() == torch.device("cpu")


def test_named_random_states_fork_and_come_back(installed: list[str]) -> None:
    import megatron.core.tensor_parallel.random as megatron_random

    tracker = megatron_random.CudaRNGStatesTracker()
    torch.manual_seed(1)
    tracker.add("mine", 7)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with tracker.fork("mine"):
        first = torch.rand(2)
    assert torch.equal(torch.rand(3), expected)
    with tracker.fork("mine"):
        assert not torch.equal(torch.rand(2), first)
