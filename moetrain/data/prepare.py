"""Text files in, Megatron .bin/.idx and a sidecar out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

import moetrain
from moetrain.config.schema import TokenizerConfig
from moetrain.data.atomic import staged
from moetrain.data.documents import check_inputs, read_blocks
from moetrain.data.encode import EncodedBlock, EncodeJob, encode_blocks
from moetrain.data.index import FileRecord, Sidecar, paths_of, sha256_of
from moetrain.data.progress import Meter
from moetrain.data.tokenizers import load_tokenizer
from moetrain.errors import DataError


def prepare(
    inputs: Sequence[Path],
    output_prefix: str | Path,
    tokenizer: TokenizerConfig,
    workers: int = 1,
    append_eod: bool = True,
    json_key: str = "text",
    paragraphs: bool = False,
    show_progress: bool = False,
) -> Sidecar:
    """Encode documents (see `documents.read_blocks`) into `<output_prefix>.bin`, `.idx` and `.json`.

    The files do not depend on `workers`. They appear by rename when all is written, the .idx last, so a killed run
    leaves nothing that loads. Ids are uint16 for vocabularies below 65500, else int32. Empty documents are left out and
    counted. With `workers` above 1, the caller's main module must be importable without side effects (it is spawned).

    Errors: DataError for unreadable input (with file and line), no tokens at all, an existing output, or a full disk.
    """
    if workers < 1:
        raise DataError(f"workers ({workers}) must be at least 1")
    total = check_inputs(inputs)
    loaded = load_tokenizer(tokenizer)
    dtype = DType.optimal_dtype(loaded.vocab_size)
    # absolute, because a worker must find the same file
    located = tokenizer.model_copy(update={"path": str(Path(tokenizer.path).resolve())})
    job = EncodeJob(located, loaded.fingerprint, append_eod, json_key, dtype.__name__)
    bin_path, idx_path, sidecar_path = paths_of(Path(output_prefix).resolve())
    with staged(sidecar_path, bin_path, idx_path) as (sidecar_draft, bin_draft, idx_draft):
        with (
            closing(_Writer(bin_draft, dtype)) as writer,
            Meter(f"prepare {Path(output_prefix).name}", total, show_progress) as meter,
        ):
            for block in encode_blocks(job, read_blocks(inputs, paragraphs), workers):
                writer.add(block)
                meter.advance(block.nbytes, len(block.ids))
            writer.finish(idx_draft)
        if writer.tokens == 0:
            raise DataError(f"inputs {', '.join(map(str, inputs))}: hold no text, so there is nothing to write")
        sidecar = Sidecar(
            moetrain_version=moetrain.__version__,
            tokenizer_fingerprint=loaded.fingerprint,
            vocab_size=loaded.vocab_size,
            eod=loaded.eod,
            append_eod=append_eod,
            documents=writer.documents,
            empty_documents=writer.empty,
            tokens=writer.tokens,
            max_token=writer.max_token,
            dtype=dtype.__name__,
            bin=FileRecord(bytes=bin_draft.stat().st_size, sha256=sha256_of(bin_draft)),
            idx=FileRecord(bytes=idx_draft.stat().st_size, sha256=sha256_of(idx_draft)),
        )
        sidecar_draft.write_text(sidecar.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return sidecar


class _Writer:
    """Megatron's builder, and the counts that go into the sidecar."""

    def __init__(self, bin_draft: Path, dtype: type) -> None:
        self._builder = IndexedDatasetBuilder(str(bin_draft), dtype=dtype)
        self.documents = self.empty = self.tokens = self.max_token = 0

    def add(self, block: EncodedBlock) -> None:
        """Append the documents of a block, each one sequence."""
        start = 0
        for length in block.lengths:
            self._builder.add_document(block.ids[start : start + length], [length])  # pyright: ignore[reportArgumentType]
            start += length
        self.documents += len(block.lengths)
        self.empty += block.empty
        self.tokens += start
        self.max_token = max(self.max_token, int(block.ids.max(initial=0)))

    def finish(self, idx_draft: Path) -> None:
        """Complete the .bin and write the .idx."""
        self._builder.finalize(str(idx_draft))

    def close(self) -> None:
        """Let go of the .bin, complete or not."""
        self._builder.data_file.close()
