"""Checkpoints in other people's formats.

`mapping` is the table of names, `hf` writes Hugging Face folders, `verify` compares their logits with ours.
"""
