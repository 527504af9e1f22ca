from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from moetrain.config.schema import TokenizerConfig
from moetrain.data.tokenizers import SentencePieceTokenizer, load_tokenizer
from moetrain.data.train_tokenizer import BOS, EOS, PAD, train_sentencepiece
from moetrain.errors import DataError

NASTY = [
    "",
    " ",
    "    four, then two  then one \n",
    "\t\tif x:\n\t    mixed\t\n\n\n",
    "windows\r\nold mac\r",
    "null\0bell\x07escape\x1b[0m",
    "\ufeffbyte order mark, \x0c form feed, \x85 \u2028 \u2029 line ends",
    "e\u0301 is not \u00e9, \ufb01 is not fi, \uff21 is not A",
    "\U0001f600\u200d\U0001f680 \u0645\u0631\u062d\u0628\u0627 \u4f60\u597d",
    "<s> </s> <unk> <pad> <0x0A>",
    "\u2585 and \u2047",
]


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_a_trained_tokenizer_gives_nasty_text_back(tokenizer: SentencePieceTokenizer, text: str):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_any_text_survives_a_trained_tokenizer(tokenizer: SentencePieceTokenizer, text: str):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_mark_for_a_space_is_the_one_character_that_comes_back_as_a_space(tokenizer: SentencePieceTokenizer):
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"


def test_text_never_encodes_to_the_control_pieces(tokenizer: SentencePieceTokenizer):
    ids = tokenizer.encode("".join(NASTY))
    assert not {BOS, EOS, PAD, 0} & set(ids)
    assert (tokenizer.bos, tokenizer.eod, tokenizer.pad) == (BOS, EOS, PAD)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_twice_gives_the_same_bytes(tmp_path: Path, model_type, source_texts):
    texts = source_texts(50)
    first, second = (train_sentencepiece(texts, tmp_path / name, 300, model_type) for name in "ab")
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    assert first.vocab_size == 300
    assert first.fingerprint == second.fingerprint == hashlib.sha256((tmp_path / "a.model").read_bytes()).hexdigest()


def test_lines_with_tabs_and_nulls_take_part_in_training(tmp_path: Path):
    trained = train_sentencepiece(["\tuncommon_word\0" * 50 + "\n"] * 5, tmp_path / "t", 278)
    assert len(trained.encode("uncommon_word")) < len("uncommon_word") / 2


def test_a_corpus_too_poor_for_the_vocabulary_tells_the_largest_possible_one(tmp_path: Path, source_texts):
    with pytest.raises(DataError, match=r"size 5000 is too large for this corpus: it can give at most (\d+)") as caught:
        train_sentencepiece(source_texts(20), tmp_path / "t", 5000)
    most = int(str(caught.value).split("at most ")[1].split()[0])
    assert list(tmp_path.iterdir()) == []
    assert train_sentencepiece(source_texts(20), tmp_path / "t", most).vocab_size == most


def test_a_vocabulary_smaller_than_the_bytes_is_refused(tmp_path: Path, source_texts):
    with pytest.raises(DataError, match=r"size 100 is too small .* need 2"):
        train_sentencepiece(source_texts(20), tmp_path / "t", 100)


def test_an_empty_corpus_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="no text"):
        train_sentencepiece(["", "\n\n"], tmp_path / "t", 300)


def test_an_existing_model_is_not_overwritten(tmp_path: Path, source_texts):
    (tmp_path / "t.model").write_bytes(b"precious")
    with pytest.raises(DataError, match=r"refusing to overwrite .*t\.model"):
        train_sentencepiece(source_texts(20), tmp_path / "t", 300)
    assert (tmp_path / "t.model").read_bytes() == b"precious"


def _hugging_face(folder: Path, source_texts, special: list[str]) -> Path:
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    model.train_from_iterator(source_texts(50), trainer)
    model.save(str(folder / "tokenizer.json"))
    return folder


def test_a_hugging_face_tokenizer_loads_from_its_folder_or_its_file(tmp_path: Path, source_texts):
    folder = _hugging_face(tmp_path, source_texts, ["<|endoftext|>"])
    by_folder = load_tokenizer(TokenizerConfig(type="huggingface", path=str(folder)))
    by_file = load_tokenizer(TokenizerConfig(type="huggingface", path=str(folder / "tokenizer.json")))
    text = "def f(x):\n\treturn  x\n"
    assert by_folder.decode(by_folder.encode(text)) == text
    assert by_folder.fingerprint == by_file.fingerprint
    assert (by_folder.eod, by_folder.vocab_size, by_folder.bos, by_folder.pad) == (0, 400, None, None)


def test_a_tokenizer_config_beside_it_names_the_end_of_a_document(tmp_path: Path, source_texts):
    folder = _hugging_face(tmp_path, source_texts, ["<|endoftext|>", "<|stop|>", "<|pad|>"])
    named = {"eos_token": {"content": "<|stop|>"}, "pad_token": "<|pad|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    loaded = load_tokenizer(TokenizerConfig(type="huggingface", path=str(folder)))
    assert (loaded.eod, loaded.pad) == (1, 2)


def test_a_tokenizer_without_an_end_of_document_is_refused(tmp_path: Path, source_texts):
    folder = _hugging_face(tmp_path, source_texts, ["<|stop|>"])
    with pytest.raises(DataError, match=r"ends a document.*special tokens here: <\|stop\|>"):
        load_tokenizer(TokenizerConfig(type="huggingface", path=str(folder)))


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_a_missing_and_a_damaged_tokenizer_are_refused_by_name(tmp_path: Path, kind):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(DataError, match=r"tokenizer\.json: no such file"):
        load_tokenizer(TokenizerConfig(type=kind, path=str(path)))
    path.write_bytes(b"\x00garbage")
    with pytest.raises(DataError, match=r"tokenizer\.json: not a .* damaged"):
        load_tokenizer(TokenizerConfig(type=kind, path=str(path)))
