"""Puts a run's tokenizer into an export so that `AutoTokenizer` gives the ids that the model was trained on."""

from __future__ import annotations

import json
import operator
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moetrain.config.schema import TokenizerConfig
from moetrain.convert.sentencepiece_fast import FastTokenizer, fast_tokenizer
from moetrain.data.tokenizers import Tokenizer, load_tokenizer
from moetrain.errors import ConversionError

CLASS = "PreTrainedTokenizerFast"
"""Runs a tokenizer.json as it stands. This is the name that both transformers 4 and 5 know it by."""

COPIED = ("tokenizer.json", "special_tokens_map.json", "chat_template.jinja")

PROBES = (
    "",
    " ",
    "Hello world.",
    "  two  spaces, a\ttab\r\nand\n\n    four, then three   ",
    "def f(x: int) -> str:\n    return {'a': [1, 2.5e-3]}  # <s> </s> <unk> <pad> <0x0A>\n",
    "naïve café, Straße, Ελληνικά, русский, עברית, العربية, 日本語テキスト, 中文, 한국어, ไทย",
    "\N{SNOWMAN}\N{GRINNING FACE}\N{NO-BREAK SPACE}\N{IDEOGRAPHIC SPACE}\N{REPLACEMENT CHARACTER}\x00\x7f",
    "a" * 40 + " " * 40 + "\n" * 9 + "=" * 20,
)
"""Texts that a fresh export is tried on before it counts."""


@dataclass(frozen=True)
class TokenizerFacts:
    """`size` is one more than the largest id; `pad_id` is the end of a document where the tokenizer has no padding."""

    size: int
    bos_id: int | None
    eos_id: int
    pad_id: int


def named_tokenizer(path: Path) -> TokenizerConfig:
    """A tokenizer given by path alone: a .model file is sentencepiece's, all else is Hugging Face's."""
    return TokenizerConfig(type="sentencepiece" if path.suffix == ".model" else "huggingface", path=str(path))


def write_tokenizer(config: TokenizerConfig, folder: Path, max_length: int) -> TokenizerFacts:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json into `folder`, and try them.

    Errors: ConversionError when the tokenizer is absent, cannot be expressed exactly, or gives other ids on `PROBES`
    than the original; DataError when its file is damaged.
    """
    path = Path(config.path)
    if not path.exists():
        raise ConversionError(
            f"tokenizer {path}: not here; name a copy of it with --tokenizer (data.tokenizer.path of the run)"
        )
    original = load_tokenizer(config)
    pad = original.pad if original.pad is not None else original.eod
    if config.type == "sentencepiece":
        fast = fast_tokenizer(path.read_bytes(), str(path))
        _save_sentencepiece(fast, original, pad, folder, max_length)
        _try(original, folder, path, fast.same)
    else:
        _save_huggingface(path, original, folder, max_length)
        _try(original, folder, path, operator.eq)
    return TokenizerFacts(original.vocab_size, original.bos, original.eod, pad)


def _save_sentencepiece(fast: FastTokenizer, original: Tokenizer, pad: int, folder: Path, max_length: int) -> None:
    def text(token_id: int | None) -> str | None:
        return None if token_id is None else fast.tokenizer.id_to_token(token_id)

    named = {"unk_token": fast.unknown, "bos_token": text(original.bos)}
    named |= {"eos_token": text(original.eod), "pad_token": text(pad)}
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=fast.tokenizer,
        model_max_length=max_length,
        padding_side="left",  # so that a batch of prompts ends where generation starts
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        model_input_names=["input_ids", "attention_mask"],
        **{role: token for role, token in named.items() if token is not None},
    )
    wrapped.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    _write_json(folder / "tokenizer_config.json", settings | {"tokenizer_class": CLASS})
    _write_json(folder / "special_tokens_map.json", {role: token for role, token in named.items() if token is not None})


def _save_huggingface(path: Path, original: Tokenizer, folder: Path, max_length: int) -> None:
    """Copy the files. The class is set to the one that runs tokenizer.json as it stands, whatever made it."""
    source = path if path.is_dir() else path.parent
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if path.is_file():
        shutil.copyfile(path, folder / "tokenizer.json")
    given = source / "tokenizer_config.json"
    settings = json.loads(given.read_text(encoding="utf-8")) if given.is_file() else {}
    settings.pop("auto_map", None)
    if "eos_token" not in settings:
        vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        settings["eos_token"] = _token_text(vocabulary, original.eod)
    settings |= {"tokenizer_class": CLASS, "model_max_length": max_length}
    _write_json(folder / "tokenizer_config.json", settings)


def _token_text(tokenizer_json: dict, token_id: int) -> str:
    """Content of a token. `load_tokenizer` found `token_id` in this same vocabulary."""
    for token in tokenizer_json.get("added_tokens", []):
        if token["id"] == token_id:
            return token["content"]
    return next(text for text, i in tokenizer_json["model"]["vocab"].items() if i == token_id)


def _try(original: Tokenizer, folder: Path, path: Path, same: Callable[[list[int], list[int]], bool]) -> None:
    exported = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    exported.model_max_length = sys.maxsize  # probes may be longer than a context; nobody needs to be warned of that
    for probe in PROBES:
        wanted, got = original.encode(probe), exported.encode(probe, add_special_tokens=False)
        if not same(got, wanted):
            raise ConversionError(
                f"tokenizer {path}: as a Hugging Face tokenizer it gives other ids for {probe!r}: {got[:20]}; "
                f"the original gives {wanted[:20]}"
            )


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
