"""The experts of transformers' Mixtral, which are those of its other mixture models as well, on our weights.

eager: a Python loop over experts. Its backward writes a gradient of all experts' size for each expert (autograd's rule
for a selected slice), which is why it falls so far behind with many experts. grouped_mm: its call of F.grouped_mm.
"""

from __future__ import annotations

import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moetrain.bench.experts import Layer
from moetrain.bench.layer import Formulation, leaves_of


def eager(layer: Layer) -> Formulation:
    """The default of a model that is loaded without further words."""
    return _formulation(layer, "eager")


def grouped_mm(layer: Layer) -> Formulation:
    """`experts_implementation="grouped_mm"`."""
    return _formulation(layer, "grouped_mm")


def _formulation(layer: Layer, implementation: str) -> Formulation:
    point = layer.point
    config = MixtralConfig(num_local_experts=point.experts, hidden_size=point.hidden, intermediate_size=point.ffn)
    config._experts_implementation = implementation
    with torch.device("meta"):  # its own weights are never allocated
        experts = MixtralExperts(config)
    experts.gate_up_proj, experts.down_proj = layer.fc1, layer.fc2
    return Formulation(lambda: experts(layer.x_TD, layer.ids_TK, layer.weights_TK), leaves_of(layer))
