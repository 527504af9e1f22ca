"""Exported tokenizers against sentencepiece itself, on texts of many scripts, code and whitespace."""

from __future__ import annotations

import inspect
import io
import json
import re
import textwrap
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from moetrain.config.schema import TokenizerConfig
from moetrain.convert import tokenizer as export
from moetrain.convert.sentencepiece_fast import fast_tokenizer
from moetrain.convert.tokenizer import named_tokenizer, write_tokenizer
from moetrain.data.train_tokenizer import train_sentencepiece
from moetrain.errors import ConversionError, DataError

from .script_texts import texts_by_script

SCRIPTS = """\
The quick brown fox jumps over the lazy dog; isn't it? (Yes!) "Quoted", 'single' and ‘curly’ — dashes… 100% of 3.14
Ça va bien? Où est le naïf garçon de l'œuvre? Mañana, ¿qué? Straße, größer, Äpfel, smørrebrød, žluťoučký kůň, İstanbul
Съешь же ещё этих мягких французских булок, да выпей чаю. Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. Հայերեն ქართული
שלום עולם, מה שלומך היום? السلام عليكم ورحمة الله وبركاته، كيف حالك؟ سلام دنیا، حال شما چطور است؟
いろはにほへと ちりぬるを。東京は日本の首都です。カタカナ、ひらがな、漢字。
我能吞下玻璃而不伤身体。繁體中文測試。 안녕하세요 세계
नमस्ते दुनिया, आप कैसे हैं? வணக்கம் உலகம் สวัสดีชาวโลก ሰላም ዓለም Xin chào thế giới, tiếng Việt rất đẹp
😀 🎉 ☃ ★ ½ ² ™ © € £ ¥ ∑ ∫ √ ≤ ≠ → ⇒ ℝ 𝔸 Ａｂｃ１２３ ﬁ ﬂ Ⅳ ㎏ ①
if (x <= 0 && y != NULL) { return *p++; } // <b>bold</b> <|im_start|> </s> <s> <unk>
<0x41> [MASK] {{x}} $HOME/a_b-c.d@e.f
"""
CODE = inspect.getsource(textwrap) + inspect.getsource(json)


def corpus() -> list[str]:
    return (CODE + SCRIPTS).splitlines()


def texts() -> list[str]:
    """More than 300 texts: lines, words, slices across line ends, and every odd use of whitespace."""
    lines = [line for line in CODE.splitlines() if line.strip()][:120]
    slices = [CODE[start : start + 120] for start in range(0, 12000, 150)]
    words = SCRIPTS.split()
    runs = [left + " " * n + right for n in (1, 2, 3, 5, 8, 13, 40) for left in ("", "a") for right in ("", "b", "\n")]
    odd = [
        "",
        "\t",
        "\n",
        "\r\n",
        "a\tb",
        "\ta\t\tb\t",
        "a\n\nb\n",
        " \n \n",
        "a\u00a0b",
        "\u3000a\u3000\u3000b",
        "\x00",
        "\x7f",
    ]
    odd += ["a" * 300, "ab" * 150, "=" * 77, "0" * 50, "\N{COMBINING ACUTE ACCENT}", "e\N{COMBINING ACUTE ACCENT}"]
    return SCRIPTS.splitlines() + words + lines + slices + runs + odd


def train(folder: Path, kind: str, rule: str, vocabulary: int = 1100, sentences=None, **options) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus() if sentences is None else sentences),
        model_writer=model,
        vocab_size=vocabulary,
        model_type=kind,
        normalization_rule_name=rule,
        num_threads=1,
        minloglevel=2,
        **({"byte_fallback": True, "character_coverage": 0.995} | options),
    )
    path = folder / "trained.model"
    path.write_bytes(model.getvalue())
    return path


MODELS = {
    "unigram-identity": {"kind": "unigram", "rule": "identity"},
    "unigram-nmt_nfkc": {"kind": "unigram", "rule": "nmt_nfkc"},
    "bpe-identity": {"kind": "bpe", "rule": "identity"},
    "bpe-nmt_nfkc": {"kind": "bpe", "rule": "nmt_nfkc"},
    "unigram-no_bytes": {"kind": "unigram", "rule": "identity", "byte_fallback": False},
    "bpe-no_bytes-pad": {"kind": "bpe", "rule": "identity", "byte_fallback": False, "pad_id": 3},
    "bpe-keeps_spaces": {"kind": "bpe", "rule": "identity", "remove_extra_whitespaces": False},
    "unigram-user_symbols": {"kind": "unigram", "rule": "identity", "user_defined_symbols": ["<sep>", "[MASK]"]},
    "unigram-nfkc_cf-no_prefix": {"kind": "unigram", "rule": "nmt_nfkc_cf", "add_dummy_prefix": False},
}


@pytest.fixture(scope="module", params=MODELS)
def trained(request, tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp(request.param), **MODELS[request.param])


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def ours(request, tmp_path_factory) -> Path:
    """A model of our own trainer."""
    folder = tmp_path_factory.mktemp(request.param)
    train_sentencepiece(corpus(), folder / "ours", 1100, request.param)
    return folder / "ours.model"


def assert_exact(path: Path, folder: Path) -> None:
    original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    facts = write_tokenizer(named_tokenizer(path), folder, 512)
    exported = AutoTokenizer.from_pretrained(folder)
    samples = texts()
    assert len(samples) >= 300
    same = fast_tokenizer(path.read_bytes(), "here").same
    wrong = [text for text in samples if not same(exported(text)["input_ids"], original.encode(text))]
    assert not wrong, f"{len(wrong)} of {len(samples)}, such as {wrong[0]!r}"
    ties = [text for text in samples if exported(text)["input_ids"] != original.encode(text)]
    assert len(ties) <= (len(samples) // 50 if path.parent.name.startswith("unigram") else 0), ties
    wrong = [
        text for text in samples if exported.decode(original.encode(text)) != original.decode(original.encode(text))
    ]
    assert not [text for text in wrong if "\ufffd" not in text and original.unk_id() not in original.encode(text)]
    assert (facts.size, facts.eos_id) == (original.vocab_size(), original.eos_id())
    assert facts.bos_id == original.bos_id() == exported.bos_token_id
    assert facts.eos_id == exported.eos_token_id
    assert facts.pad_id == exported.pad_token_id == (original.pad_id() if original.pad_id() >= 0 else original.eos_id())


def test_auto_tokenizer_gives_the_ids_of_any_sentencepiece_model(trained, tmp_path):
    assert_exact(trained, tmp_path)


def test_auto_tokenizer_gives_the_ids_of_our_own_trainer(ours, tmp_path):
    assert_exact(ours, tmp_path)


BY_SCRIPT = texts_by_script()


def train_on_scripts(folder: Path, kind: str, byte_fallback: bool) -> Path:
    """By our own trainer; without byte fallback, which that always has, by sentencepiece's with its defaults."""
    sentences = corpus() + 3 * [text for texts in BY_SCRIPT.values() for text in texts[::8]]
    if byte_fallback:
        train_sentencepiece(sentences, folder / "ours", 2000, kind, character_coverage=0.98)
        return folder / "ours.model"
    options = {"byte_fallback": False, "character_coverage": 0.98}
    # A line with one of these is dropped whole.
    lines = [" ".join(re.split("[\n\t\0\u2585]+", text)) for text in sentences]
    return train(folder, kind, "identity", 2000, lines, **options)


@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_ids_and_text_are_those_of_sentencepiece_in_every_script(kind, byte_fallback, tmp_path):
    path = train_on_scripts(tmp_path, kind, byte_fallback)
    original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    write_tokenizer(named_tokenizer(path), tmp_path, 10**6)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    same, unknown = fast_tokenizer(path.read_bytes(), "here").same, original.unk_id()
    samples = sorted({text for texts in BY_SCRIPT.values() for text in texts})
    assert len(samples) >= 1400 and min(len(set(texts)) for texts in BY_SCRIPT.values()) >= 60
    wanted, got = original.encode(samples), exported(samples)["input_ids"]
    assert [text for text, w, g in zip(samples, wanted, got, strict=True) if not same(g, w)] == []
    ties = sum(g != w for g, w in zip(got, wanted, strict=True))
    assert ties <= (len(samples) // 100 if kind == "unigram" else 0)
    assert any(unknown in ids for ids in wanted) == (not byte_fallback)
    for text, w, g in zip(samples, wanted, got, strict=True):
        # sentencepiece writes an unknown character as " \u2047 ", transformers as its piece.
        expected = original.decode(w).replace(" \u2047 ", "<unk>")
        assert exported.decode(g) == expected, text
        assert not byte_fallback or expected == text


def test_a_normalization_makes_a_difference_only_where_characters_combine(tmp_path):
    """`tokenizers` normalizes a letter and its marks together, sentencepiece the longest run that its map knows."""
    path = train(tmp_path, "bpe", "nmt_nfkc", 2000)
    original, fast = sentencepiece.SentencePieceProcessor(model_file=str(path)), fast_tokenizer(path.read_bytes(), "")
    samples = sorted({text for texts in BY_SCRIPT.values() for text in texts})
    wrong = [text for text in samples if fast.tokenizer.encode(text).ids != original.encode(text)]
    assert 0 < len(wrong) < len(samples) // 10
    assert not [text for text in wrong if not any(map(_combines, text))]


def _combines(letter: str) -> bool:
    """Marks, vowels and finals of Hangul, and the half-width marks of Kana."""
    return unicodedata.category(letter)[0] == "M" or "\u1160" <= letter <= "\u11ff" or letter in "\uff9e\uff9f"


def test_ids_are_those_of_sentencepiece_for_arbitrary_text(ours):
    original = sentencepiece.SentencePieceProcessor(model_file=str(ours))
    fast = fast_tokenizer(ours.read_bytes(), "here")
    letters = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")
    pieces = st.one_of(
        letters, st.sampled_from([*" \t\n", "  ", "    ", "def ", "self.", "return", "</s>", "<0x0A>", "aa"])
    )

    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(pieces, max_size=60).map("".join))
    def check(text: str) -> None:
        assert fast.same(fast.tokenizer.encode(text).ids, original.encode(text))

    check()


def test_control_pieces_are_never_found_in_text_even_if_their_letters_are_unknown(tmp_path):
    plain = [line for line in corpus() if not set(line) & set("<>/0x_")]
    options = {"vocab_size": 420, "model_type": "unigram", "byte_fallback": True, "num_threads": 1, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(plain), model_prefix=str(tmp_path / "plain"), character_coverage=0.98, **options
    )
    path = tmp_path / "plain.model"
    original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    fast = fast_tokenizer(path.read_bytes(), "here").tokenizer
    assert original.piece_to_id("<") == original.unk_id()
    for text in ("</s>", "a</s> b", "<0x0A>", "<s><unk> <0x41>", "<", "x</s"):
        assert fast.encode(text).ids == original.encode(text), text


def test_only_equal_scores_excuse_other_ids_and_only_in_unigram(ours):
    fast = fast_tokenizer(ours.read_bytes(), "here")
    whole, parts = fast.tokenizer.encode("return").ids, [fast.tokenizer.token_to_id(letter) for letter in "return"]
    assert len(whole) < len(parts)
    assert not fast.same(whole, parts)
    assert not fast.same(whole, [])
    assert fast.same(parts, parts[::-1]) == (fast.scores is not None)


def test_two_prompts_are_padded_on_the_left(ours, tmp_path):
    write_tokenizer(named_tokenizer(ours), tmp_path, 512)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    batch = exported(["return x", "return x + y + z"], padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert (batch["attention_mask"][0][0], batch["attention_mask"][0][-1]) == (0, 1)
    assert exported.model_max_length == 512


def _edited(path: Path, folder: Path, change) -> Path:
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(path.read_bytes())
    change(model)
    (folder / "edited.model").write_bytes(model.SerializeToString())
    return folder / "edited.model"


def _symbol(model) -> None:
    model.pieces[-1].type = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED


def _unused(model) -> None:
    model.pieces[-1].type = sentencepiece_model_pb2.ModelProto.SentencePiece.UNUSED


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: setattr(m.trainer_spec, "model_type", sentencepiece_model_pb2.TrainerSpec.WORD),
            "neither unigram nor",
        ),
        (lambda m: setattr(m.trainer_spec, "treat_whitespace_as_suffix", True), "treat_whitespace_as_suffix"),
        (lambda m: setattr(m.normalizer_spec, "escape_whitespaces", False), "escape_whitespaces"),
        (_unused, "unused pieces"),
    ],
)
def test_a_feature_that_cannot_be_exact_is_refused(ours, tmp_path, change, message):
    with pytest.raises(ConversionError, match=message):
        fast_tokenizer(_edited(ours, tmp_path, change).read_bytes(), "here")


def test_user_symbols_in_bpe_are_refused(tmp_path):
    train_sentencepiece(corpus(), tmp_path / "bpe", 900, "bpe")
    with pytest.raises(ConversionError, match="user-defined symbols"):
        fast_tokenizer(_edited(tmp_path / "bpe.model", tmp_path, _symbol).read_bytes(), "here")


def test_a_tokenizer_that_gives_other_ids_is_caught_before_it_counts(ours, tmp_path, monkeypatch):
    build = export.fast_tokenizer

    def off_by_a_normalizer(model: bytes, where: str):
        fast = build(model, where)
        fast.tokenizer.normalizer = None
        return fast

    monkeypatch.setattr(export, "fast_tokenizer", off_by_a_normalizer)
    with pytest.raises(ConversionError, match="other ids for"):
        write_tokenizer(named_tokenizer(ours), tmp_path, 64)


def test_an_absent_or_damaged_tokenizer_is_an_error_with_its_path(tmp_path):
    with pytest.raises(ConversionError, match=r"gone\.model.*--tokenizer"):
        write_tokenizer(named_tokenizer(tmp_path / "gone.model"), tmp_path, 64)
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match=r"bad\.model"):
        write_tokenizer(named_tokenizer(tmp_path / "bad.model"), tmp_path, 64)


@pytest.fixture
def json_tokenizer(tmp_path) -> Path:
    """A byte-level BPE of the `tokenizers` package, as GPT-2's."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>", "<bos>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(corpus(), trainer)
    folder = tmp_path / "source"
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("with_config", [False, True])
@pytest.mark.parametrize("by_folder", [False, True])
def test_a_hugging_face_tokenizer_is_copied_byte_for_byte(json_tokenizer, tmp_path, with_config, by_folder):
    if with_config:
        named = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "bos_token": "<bos>"}
        named["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", None]}
        (json_tokenizer / "tokenizer_config.json").write_text(json.dumps(named))
    out = tmp_path / "out"
    out.mkdir()
    path = json_tokenizer if by_folder else json_tokenizer / "tokenizer.json"
    facts = write_tokenizer(TokenizerConfig(type="huggingface", path=str(path)), out, 128)
    assert (out / "tokenizer.json").read_bytes() == (json_tokenizer / "tokenizer.json").read_bytes()
    assert "auto_map" not in json.loads((out / "tokenizer_config.json").read_text())
    exported, original = AutoTokenizer.from_pretrained(out), Tokenizer.from_file(str(json_tokenizer / "tokenizer.json"))
    for text in texts():
        assert exported.encode(text, add_special_tokens=False) == original.encode(text, add_special_tokens=False).ids
    assert (facts.eos_id, facts.bos_id, facts.pad_id) == (0, 1 if with_config else None, 0)
    assert exported.eos_token_id == 0
    assert unicodedata.normalize("NFC", exported.decode(exported.encode("é x"))) == "é x"
