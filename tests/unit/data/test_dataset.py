from __future__ import annotations

import datetime
import multiprocessing
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed as dist

from moetrain.config.schema import BlendEntry, DataConfig, TokenizerConfig
from moetrain.data.dataset import Datasets, build_datasets, epochs_needed
from moetrain.data.index import read_index
from moetrain.data.loader import BatchLoader, SampleDataset
from moetrain.data.prepare import prepare
from moetrain.errors import DataError

SEQ = 16


Blend = Sequence[tuple[Path, float]]


def _config(tokenizer_config: TokenizerConfig, train: Blend, valid: Blend = (), **more: str) -> DataConfig:
    entries = [[BlendEntry(path=str(path), weight=weight) for path, weight in blend] for blend in (train, valid)]
    return DataConfig(tokenizer=tokenizer_config, train=entries[0], valid=entries[1], **more)


@pytest.fixture
def build(tokenizer_config, tokenizer, tmp_path: Path):
    def build_it(train, valid=(), sizes=(40, 0, 0), seed=1, seq=SEQ, vocab_size=320, cache="cache", **more) -> Datasets:
        config = _config(tokenizer_config, train, valid, **{"split": "1,0,0", **more})
        return build_datasets(config, seq, sizes, seed, tokenizer, vocab_size, tmp_path / cache)

    return build_it


@pytest.fixture(scope="session")
def second(tmp_path_factory: pytest.TempPathFactory, tokenizer_config, source_texts, write_jsonl) -> Path:
    folder = tmp_path_factory.mktemp("second")
    prepare([write_jsonl(folder / "in.jsonl", source_texts(40, seed=9))], folder / "second", tokenizer_config)
    return folder / "second"


def _samples(dataset: SampleDataset | None, count: int | None = None) -> list[list[int]]:
    assert dataset is not None
    return [dataset[i]["tokens"].tolist() for i in range(len(dataset) if count is None else count)]


def test_labels_are_the_tokens_one_ahead(build, prefix: Path):
    train = build([(prefix, 1.0)]).train
    sample = train[3]
    assert sample["tokens"].dtype == sample["labels"].dtype == torch.int64
    assert sample["tokens"].shape == sample["labels"].shape == (SEQ,)
    assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])


def test_an_epoch_reads_every_token_of_the_corpus_once(build, prefix: Path):
    index = read_index(prefix)
    per_epoch = (index.tokens - 1) // SEQ
    samples = _samples(build([(prefix, 1.0)], sizes=(per_epoch, 0, 0)).train)
    assert len(samples) == per_epoch
    corpus = Counter(numpy.fromfile(f"{prefix}.bin", numpy.uint16).tolist())
    read = Counter(token for sample in samples for token in sample)
    left_out = corpus - read
    assert not read - corpus
    assert left_out.total() == index.tokens - per_epoch * SEQ <= SEQ + 1


def test_pad_and_control_tokens_in_a_corpus_are_read_as_they_are(tmp_path: Path, build):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=numpy.int32)
    builder.add_document(numpy.arange(50), [50])  # holds the ids of unk, bos, eos and pad
    builder.finalize(str(tmp_path / "m.idx"))
    assert sorted(_samples(build([(tmp_path / "m", 1.0)], sizes=(3, 0, 0)).train, 3))[0] == list(range(16))


@pytest.mark.parametrize("blended", [False, True])
def test_asking_for_more_samples_moves_none(build, prefix: Path, second: Path, blended: bool):
    train = [(prefix, 3.0), (second, 1.0)] if blended else [(prefix, 1.0)]
    one_epoch = (read_index(prefix).tokens - 1) // SEQ
    few = _samples(build(train, sizes=(one_epoch // 2, 0, 0)).train)
    many = _samples(build(train, sizes=(one_epoch * 3 + 5, 0, 0)).train)
    assert many[: len(few)] == few
    again = _samples(build(train, sizes=(one_epoch * 4, 0, 0)).train, one_epoch * 3 + 5)
    assert again == many[: one_epoch * 3 + 5]


def test_each_epoch_and_each_seed_has_its_own_order(build, prefix: Path):
    one_epoch = (read_index(prefix).tokens - 1) // SEQ
    two = _samples(build([(prefix, 1.0)], sizes=(2 * one_epoch, 0, 0)).train)
    first, then = two[:one_epoch], two[one_epoch : 2 * one_epoch]
    assert first != then
    other_seed = _samples(build([(prefix, 1.0)], sizes=(2 * one_epoch, 0, 0), seed=2).train, one_epoch)
    assert first != other_seed


def test_the_order_is_the_one_it_has_always_been(build, tmp_path: Path):
    """A change here breaks the resumption of every run that was started before it."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=numpy.int32)
    for first in range(0, 200, 10):
        builder.add_document(numpy.arange(first, first + 10), [10])
    builder.finalize(str(tmp_path / "m.idx"))
    train = build([(tmp_path / "m", 1.0)], sizes=(20, 0, 0), seed=1234).train
    expected = [4, 132, 26, 170, 18, 156, 44, 56, 190, 30, 112, 78, 194, 116, 166, 18, 142, 28, 102, 80]
    assert [sample[0] for sample in _samples(train, 20)] == expected


def test_a_blend_has_the_shares_of_its_weights(build, prefix: Path, second: Path):
    only = [{tuple(s) for s in _samples(build([(p, 1.0)], sizes=(200, 0, 0)).train)} for p in (prefix, second)]
    mixed = _samples(build([(prefix, 3.0), (second, 1.0)], sizes=(80, 0, 0)).train, 80)
    from_second = sum(tuple(s) in only[1] and tuple(s) not in only[0] for s in mixed)
    assert 18 <= from_second <= 22


def _functions(samples: list[list[int]], tokenizer) -> set[str]:
    """Names of the functions that begin in some samples; each document has its own."""
    text = "\n".join(tokenizer.decode(sample) for sample in samples)
    return {word.split("(")[0] for word in text.split("def ")[1:] if "(" in word}


def test_a_split_keeps_documents_apart(build, prefix: Path, tokenizer):
    built = build([(prefix, 1.0)], sizes=(300, 40, 20), split="60,20,20", seq=64)
    train, valid, test = (_functions(_samples(d), tokenizer) for d in (built.train, built.valid, built.test))
    assert len(train) > 25 and len(valid) > 5 and len(test) > 5
    assert not train & valid and not train & test and not valid & test


def test_own_validation_corpora_leave_all_of_train_for_training(build, prefix: Path, second: Path):
    per_epoch = (read_index(prefix).tokens - 1) // SEQ
    built = build([(prefix, 1.0)], [(second, 1.0)], sizes=(per_epoch, 10, 0))
    assert len(built.train) == per_epoch
    assert _samples(built.valid, 10) == _samples(build([(second, 1.0)], sizes=(10, 0, 0)).train, 10)
    assert built.test is None


def test_a_split_of_which_nothing_is_asked_needs_no_room(build, prefix: Path):
    built = build([(prefix, 1.0)], sizes=(10, 0, 0), split="99,1,0", seq=200)
    assert (built.valid, built.test) == (None, None)
    with pytest.raises(
        DataError, match=r"its valid share, 1 of 60 documents, holds \d+ tokens; one sequence needs .* 201"
    ):
        build([(prefix, 1.0)], sizes=(10, 1, 0), split="99,1,0", seq=200)


def test_samples_of_a_split_without_a_share_are_refused(build, prefix: Path, second: Path):
    with pytest.raises(DataError, match=r"test samples are asked for, but data.split is '98,2,0'"):
        build([(prefix, 1.0)], sizes=(10, 0, 5), split="98,2,0")
    with pytest.raises(DataError, match=r"test samples are asked for, but data.valid is given"):
        build([(prefix, 1.0)], [(second, 1.0)], sizes=(10, 0, 5))


def test_nothing_asked_is_nothing_built(build, prefix: Path, second: Path):
    assert build([(prefix, 1.0)], [(second, 1.0)], sizes=(0, 0, 0)) == Datasets(None, None, None)


def test_a_corpus_in_both_train_and_valid_is_refused(build, prefix: Path):
    detour = prefix.parent / ".." / prefix.parent.name / prefix.name
    with pytest.raises(DataError, match="both hold"):
        build([(prefix, 1.0)], [(detour, 1.0)], sizes=(10, 10, 0))


def test_a_corpus_too_small_for_one_sequence_is_refused(build, prefix: Path):
    with pytest.raises(DataError, match=r"one sequence needs model.seq_length \+ 1 = 100001"):
        build([(prefix, 1.0)], seq=100_000)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(build, prefix: Path):
    with pytest.raises(DataError, match=r"model.vocab_size \(319\) must be at least .* \(320\)"):
        build([(prefix, 1.0)], vocab_size=319)


def test_a_corpus_of_another_tokenizer_is_refused(build, private_prefix: Path):
    sidecar = private_prefix.with_name("small.json")
    text = sidecar.read_text()
    fingerprint = text.split('"tokenizer_fingerprint": "')[1][:64]
    sidecar.write_text(text.replace(fingerprint, "0" * 64))
    with pytest.raises(DataError, match="was made with tokenizer 000000000000"):
        build([(private_prefix, 1.0)])


def test_a_truncated_corpus_is_refused(build, private_prefix: Path):
    path = private_prefix.with_name("small.bin")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="truncated"):
        build([(private_prefix, 1.0)])


def test_a_cached_order_is_read_again_and_not_for_another_corpus(
    build, private_prefix: Path, second: Path, tmp_path: Path
):
    fresh = _samples(build([(private_prefix, 1.0)]).train)
    folders = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert len(folders) == 1
    assert _samples(build([(private_prefix, 1.0)]).train) == fresh
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == folders
    for suffix in ("bin", "idx", "json"):  # the corpus is made anew under the same name
        private_prefix.with_name(f"small.{suffix}").write_bytes(second.with_name(f"second.{suffix}").read_bytes())
    changed = _samples(build([(private_prefix, 1.0)]).train)
    assert changed == _samples(build([(second, 1.0)], cache="other").train)


def test_a_damaged_cache_is_named(build, prefix: Path, tmp_path: Path):
    build([(prefix, 1.0)])
    (array,) = (tmp_path / "cache").glob("*/sample.npy")
    array.write_bytes(array.read_bytes()[:150])
    with pytest.raises(DataError, match=r"data cache .* is damaged .* delete it"):
        build([(prefix, 1.0)])


def test_a_cache_that_cannot_be_made_is_named(build, prefix: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data.cache_dir .*file/cache: cannot be made"):
        build([(prefix, 1.0)], cache="file/cache")


@pytest.mark.parametrize(("samples", "tokens", "epochs"), [(0, 5, 1), (1, 17, 1), (1, 16, 2), (2, 33, 1), (2, 32, 2)])
def test_epochs_are_as_many_as_the_samples_and_one_token_need(samples: int, tokens: int, epochs: int):
    assert epochs_needed(samples, SEQ, tokens) == epochs


def _on_rank(rank: int, config: DataConfig, tokenizer, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    built = build_datasets(config, SEQ, (40, 8, 0), 1, tokenizer, 320, folder / "shared-cache")
    loader = BatchLoader(built.train, 4, 2, rank, 2)
    torch.save([[micro.tokens for micro in next(loader)] for _ in range(5)], folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def test_two_gloo_ranks_read_what_one_process_reads(build, prefix, second, tokenizer_config, tokenizer, tmp_path: Path):
    blend = [(prefix, 2.0), (second, 1.0)]
    config = _config(tokenizer_config, blend, split="90,10,0")
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_on_rank, args=(rank, config, tokenizer, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    parts = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    alone = BatchLoader(build(blend, sizes=(40, 8, 0), split="90,10,0", cache="alone").train, 4, 2, 0, 1)
    for step in range(5):
        assert all(map(torch.equal, [parts[0][step][0], parts[1][step][0]], [m.tokens for m in next(alone)]))
