"""`moetrain data`: make a corpus, train a tokenizer, prepare .bin/.idx files, look into them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Corpora, tokenizers and Megatron .bin/.idx files.")


class TokenizerType(StrEnum):
    """Kinds of tokenizer files."""

    sentencepiece = "sentencepiece"
    huggingface = "huggingface"


class ModelType(StrEnum):
    """Kinds of sentencepiece models."""

    bpe = "bpe"
    unigram = "unigram"


TypeOption = Annotated[TokenizerType | None, typer.Option(help="default: sentencepiece for a .model, else huggingface")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress on standard error")]


@app.command()
def corpus(
    output: Annotated[Path, typer.Argument(help=".jsonl file to write")],
    max_bytes: Annotated[int | None, typer.Option(min=1, help="stop at this many bytes of text")] = None,
    held_out: Annotated[Path | None, typer.Option(help=".jsonl file for documents kept out of training")] = None,
    held_out_fraction: Annotated[float, typer.Option(min=0.0, max=1.0, help="their share of all documents")] = 0.02,
    quiet: Quiet = False,
) -> None:
    """Write a corpus of the Python standard library's sources and documentation: no download needed."""
    from moetrain.data.corpus import standard_library_corpus

    report = standard_library_corpus(output, max_bytes, held_out, held_out_fraction, show_progress=not quiet)
    typer.echo(f"{output}: {report.documents} documents, {report.bytes} bytes of text")
    if held_out is not None:
        typer.echo(f"{held_out}: {report.held_out_documents} documents, {report.held_out_bytes} bytes of text")


@app.command()
def tokenizer(
    inputs: Annotated[list[Path], typer.Argument(help=".jsonl or .txt files")],
    output: Annotated[Path, typer.Option(help="prefix: writes <prefix>.model")],
    vocab_size: Annotated[int, typer.Option(min=1, help="number of pieces")],
    model_type: Annotated[ModelType, typer.Option(help="bpe trains faster, unigram encodes faster")] = ModelType.bpe,
    sample_bytes: Annotated[int | None, typer.Option(min=1, help="train on about this much of the input")] = None,
    json_key: Annotated[str, typer.Option(help="key of the text in a .jsonl line")] = "text",
    mask_token: Annotated[bool, typer.Option("--mask-token", help="reserve <mask>, which masked_lm needs")] = False,
) -> None:
    """Train a sentencepiece tokenizer that gives every text back exactly."""
    from moetrain.data.documents import check_inputs, read_texts, sample_texts
    from moetrain.data.train_tokenizer import train_sentencepiece

    total = check_inputs(inputs)
    texts = read_texts(inputs, json_key)
    if sample_bytes is not None:
        texts = sample_texts(texts, sample_bytes / max(total, 1))
    trained = train_sentencepiece(texts, output, vocab_size, model_type.value, mask_token=mask_token)
    typer.echo(
        f"{output}.model: {trained.vocab_size} pieces, end of document {trained.eod}, SHA-256 {trained.fingerprint}"
    )


@app.command()
def prepare(
    inputs: Annotated[list[Path], typer.Argument(help=".jsonl or .txt files")],
    output: Annotated[Path, typer.Option(help="prefix: writes <prefix>.bin, .idx and .json")],
    tokenizer: Annotated[Path, typer.Option(help="a sentencepiece .model, or a tokenizer.json or its folder")],
    tokenizer_type: TypeOption = None,
    workers: Annotated[int, typer.Option(min=1, help="encoding processes; the files do not depend on it")] = 1,
    append_eod: Annotated[bool, typer.Option(help="end each document with the end-of-document token")] = True,
    json_key: Annotated[str, typer.Option(help="key of the text in a .jsonl line")] = "text",
    paragraphs: Annotated[bool, typer.Option(help="blank lines separate the documents of a .txt file")] = False,
    quiet: Quiet = False,
) -> None:
    """Encode text into Megatron's .bin/.idx format."""
    from moetrain.data.prepare import prepare as prepare_files

    config = _tokenizer_config(tokenizer, tokenizer_type)
    done = prepare_files(inputs, output, config, workers, append_eod, json_key, paragraphs, show_progress=not quiet)
    skipped = f", {done.empty_documents} empty ones left out" if done.empty_documents else ""
    typer.echo(f"{output}: {done.documents} documents, {done.tokens} tokens ({done.dtype}){skipped}")


@app.command()
def inspect(
    prefix: Annotated[Path, typer.Argument(help="of a .bin and .idx")],
    tokenizer: Annotated[Path | None, typer.Option(help="check that it made these files, and decode with it")] = None,
    tokenizer_type: TypeOption = None,
    documents: Annotated[int, typer.Option(min=0, help="how many documents to show the beginning of")] = 3,
    checksum: Annotated[bool, typer.Option("--checksum", help="compare with the SHA-256 written by prepare")] = False,
) -> None:
    """Tell what a .bin/.idx pair holds, and refuse a damaged one."""
    from moetrain.data.index import verify_prefix
    from moetrain.data.tokenizers import load_tokenizer

    loaded = load_tokenizer(_tokenizer_config(tokenizer, tokenizer_type)) if tokenizer else None
    index, sidecar = verify_prefix(prefix, loaded, loaded.vocab_size if loaded else None, checksum=checksum)
    typer.echo(f"documents  {index.documents}")
    typer.echo(f"tokens     {index.tokens}")
    typer.echo(f"dtype      {index.dtype.name}")
    if sidecar is None:
        typer.echo("tokenizer  unknown: no sidecar, so another tool wrote these files")
    else:
        typer.echo(f"tokenizer  {sidecar.tokenizer_fingerprint} (vocabulary {sidecar.vocab_size}, end {sidecar.eod})")
    if checksum:
        typer.echo("checksum   good")
    for number in range(min(documents, len(index.lengths))):
        ids = index.sequence(number)[:64].tolist()
        text = repr(loaded.decode(ids)) if loaded else " ".join(map(str, ids))
        typer.echo(f"[{number}] {int(index.lengths[number])} tokens: {text}")


def _tokenizer_config(path: Path, kind: TokenizerType | None):
    from moetrain.config.schema import TokenizerConfig

    guess = "sentencepiece" if path.suffix == ".model" else "huggingface"
    return TokenizerConfig(type=kind.value if kind else guess, path=str(path))
