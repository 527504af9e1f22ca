"""Checkpoints in other people's formats. `mapping` is the table, `hf` writes Hugging Face folders, `verify` proves them."""
