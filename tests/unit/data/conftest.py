from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from moetrain.config.schema import TokenizerConfig
from moetrain.data.tokenizers import SentencePieceTokenizer
from moetrain.data.train_tokenizer import train_sentencepiece


def source_texts(count: int, seed: int = 0) -> list[str]:
    """Small functions with indentation and tabs, all different."""
    rng = random.Random(seed)
    words = ["alpha", "beta", "gamma", "delta", "value", "index", "total", "result"]
    texts = []
    for number in range(count):
        body = "".join(f"    {rng.choice(words)} = {rng.choice(words)} + {rng.randrange(1000)}\n" for _ in range(6))
        texts.append(f"def function_{number}({', '.join(rng.sample(words, 2))}):\n{body}\treturn {rng.choice(words)}\n")
    return texts


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="session", name="source_texts")
def source_texts_fixture() -> Callable[..., list[str]]:
    return source_texts


@pytest.fixture(scope="session", name="write_jsonl")
def write_jsonl_fixture() -> Callable[[Path, list[str]], Path]:
    return write_jsonl


@pytest.fixture(scope="session")
def tokenizer_config(tmp_path_factory: pytest.TempPathFactory) -> TokenizerConfig:
    prefix = tmp_path_factory.mktemp("tokenizer") / "small"
    train_sentencepiece(source_texts(200), prefix, vocab_size=320)
    return TokenizerConfig(path=f"{prefix}.model")


@pytest.fixture(scope="session")
def tokenizer(tokenizer_config: TokenizerConfig) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(Path(tokenizer_config.path).read_bytes())


@pytest.fixture(scope="session")
def prefix(tmp_path_factory: pytest.TempPathFactory, tokenizer_config: TokenizerConfig) -> Path:
    """A prepared corpus of 60 documents. Tests must not change it."""
    from moetrain.data.prepare import prepare

    folder = tmp_path_factory.mktemp("corpus")
    prepare([write_jsonl(folder / "in.jsonl", source_texts(60))], folder / "small", tokenizer_config)
    return folder / "small"


@pytest.fixture
def private_prefix(tmp_path: Path, prefix: Path) -> Path:
    """A copy of `prefix` that a test may damage."""
    for path in prefix.parent.glob("small.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path / "small"
