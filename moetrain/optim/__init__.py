"""Optimizer state under DeepSpeed ZeRO, and the learning-rate schedules."""
