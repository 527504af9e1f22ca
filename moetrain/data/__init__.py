"""From text to batches: tokenizers, corpora, Megatron .bin/.idx files, datasets and the loader.

`dataset` and `prepare` import Megatron (about ten seconds); the other modules stay light, so that encoding processes
and the command line start quickly.
"""
