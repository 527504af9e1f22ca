"""Whichever Adam updates the masters, the trajectory is that of torch's AdamW."""

from __future__ import annotations

import pytest
import torch
from parity import LAYOUTS, SINGLE, differences, tiny_config, train_all

from moetrain.config.schema import OptimizerConfig
from moetrain.errors import DependencyError
from moetrain.optim.adam import cpu_adam_is_built, create_adam
from moetrain.testing import run_distributed


@pytest.mark.skipif(not cpu_adam_is_built(), reason="DeepSpeed was installed without its compiled CPU Adam")
def test_deepspeeds_cpu_adam_keeps_the_trajectory_of_torchs() -> None:
    layout = next(layout for layout in LAYOUTS if layout.name == "pp2 x ep2")
    torchs = run_distributed(train_all, 1, [tiny_config(SINGLE, optimizer__type="adamw")])[0][0]
    deepspeeds = run_distributed(train_all, layout.world, [tiny_config(layout, optimizer__type="cpu_adam")])[0][0]
    assert max(differences(deepspeeds, torchs)) <= 1e-5


@pytest.mark.skipif(torch.cuda.is_available(), reason="apex may be legal here")
def test_an_adam_that_is_not_there_is_refused_with_the_legal_ones() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(DependencyError, match="legal here: auto, adamw"):
        create_adam([{"params": [parameter]}], OptimizerConfig(type="apex_fused_adam"), torch.device("cpu"))
