"""moetrain: distributed pretraining of HyperMoE and DA-MoE language models."""

__version__ = "0.1.0"
