"""A save is cut at every single operation that it does to the disk, in every way in which disks and processes fail."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from moetrain.checkpoint import CheckpointManager, Comm, Piece, SingleProcess
from moetrain.checkpoint.files import OS_FILES, Files
from moetrain.checkpoint.folders import find_step_folder
from moetrain.errors import CheckpointError

from .faults import (
    KILLED,
    OPERATIONS,
    Disk,
    WatchedFiles,
    failing_files,
    flip_bit,
    full_disk,
    input_output_error,
    kill,
    lose_half,
    sound_files,
    write_short_and_kill,
)

FAULTS = {
    "killed": (kill, False),
    "half a write, killed": (write_short_and_kill, False),
    "disk full once": (full_disk, False),
    "disk full from then on": (full_disk, True),
    "input/output error once": (input_output_error, False),
    "input/output errors from then on": (input_output_error, True),
}
SAVED, ERROR, LOST_PEER = 0, 10, 11


class PipeComm:
    """Two processes and a pipe. When one dies, the other's next collective raises EOFError or a broken pipe."""

    world_size = 2

    def __init__(self, rank: int, peer: Connection) -> None:
        self.rank, self._peer = rank, peer

    def gather_objects(self, value: Any) -> list[Any] | None:
        if self.rank == 1:
            self._peer.send_bytes(json.dumps(value).encode())
            return None
        return [json.loads(json.dumps(value)), json.loads(self._peer.recv_bytes())]

    def broadcast_object(self, value: Any) -> Any:
        if self.rank == 1:
            return json.loads(self._peer.recv_bytes())
        self._peer.send_bytes(json.dumps(value).encode())
        return value


def save(root: Path, step: int, files: Files = OS_FILES, comm: Comm | None = None, checksum: bool = False) -> None:
    """Keeps two and the best, which is step 1: old ones have to go. Rows of `w` belong to ranks in turn."""
    comm = comm or SingleProcess()
    rows = range(comm.rank, 4, comm.world_size)
    pieces = [Piece("w", (4, 3), (row, 0), torch.full((1, 3), float(step))) for row in rows]
    loss = {"iteration": step, "loss": 1.0 if step == 1 else 10.0 - step}
    manager = CheckpointManager(root, 2, comm, keep_best=1, checksum_after_write=checksum, files=files)
    manager.save(step, step, pieces, {}, {}, {"evaluation": loss})


def exit_code(action: Callable[[], None]) -> int:
    try:
        action()
    except CheckpointError:
        return ERROR
    except (EOFError, OSError):
        return LOST_PEER
    return SAVED


def in_children(actions: list[Callable[[], None]], once_forked: Callable[[], None] = lambda: None) -> list[int]:
    """Forked, so that torch need not be imported again; a child does its action and nothing of pytest's."""
    children = []
    for action in actions:
        child = os.fork()
        if child == 0:
            code = 99
            try:
                code = exit_code(action)
            finally:
                os._exit(code)
        children.append(child)
    once_forked()
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def save_alone(root: Path, step: int, files: Files, survives: bool) -> list[int]:
    """In this process if it will not be killed."""
    action = partial(save, root, step, files)
    return [exit_code(action)] if survives else in_children([action])


def save_by_two(root: Path, step: int, failing: int, files: Files) -> list[int]:
    """Both ranks in processes of their own; rank `failing` has the faulty disk."""
    ends = Pipe()

    def run(rank: int) -> None:
        ends[1 - rank].close()
        save(root, step, files if rank == failing else OS_FILES, PipeComm(rank, ends[rank]))

    def let_go() -> None:
        for end in ends:
            end.close()

    return in_children([partial(run, 0), partial(run, 1)], let_go)


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    """A folder in memory where there is one: the tests ask for thousands of syncs, and none of them is for a disk."""
    shared = Path("/dev/shm")
    place = shared if shared.is_dir() and os.access(shared, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="moetrain-faults-", dir=place) as folder:
        yield Path(folder)


@pytest.fixture
def folder(memory: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def before(memory: Path) -> Path:
    """Steps 1 (the best) to 3, and what a dead save left. Saving step 4 removes step 2."""
    root = memory / "before"
    for step in (1, 2, 3):
        save(root, step)
    dead = root / ".tmp-step-00000004-0badf00d"
    dead.mkdir()
    (dead / "shard-00000.safetensors").write_bytes(b"half")
    return root


def entries(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name != ".lock")


def committed(root: Path) -> list[str]:
    return [name for name in entries(root) if not name.startswith(".tmp-")]


def opened_step(root: Path) -> int:
    """The step that a resume would take, every byte of it checked. Nothing damaged may be under a step's name."""
    manager = CheckpointManager(root, 2, SingleProcess())
    reader = manager.open()
    assert reader is not None and manager.skipped == []
    with reader:
        assert (reader.read("w") == float(reader.step)).all()
    assert manager.latest() == reader.folder
    return reader.step


def require_whole(root: Path, codes: list[int], before: Path, forever: bool) -> None:
    """The newest checkpoint is whole: the new one if the save said so, the old one if it raised, and then all is as it
    was; `latest` names a whole one; the next save works and leaves nothing behind."""
    step = opened_step(root)
    assert 99 not in codes, "something else than a CheckpointError came out of the save"
    if KILLED not in codes:
        assert set(codes) in ({SAVED}, {ERROR}), "the ranks do not agree, or an error is not a CheckpointError"
    if SAVED in codes:
        assert step == 4
    elif KILLED not in codes and not forever:
        assert committed(root) == committed(before)
    assert find_step_folder(root).name in ("step-00000003", "step-00000004")
    save(root, 5)
    assert opened_step(root) == 5
    assert entries(root) == ["best", "latest", "step-00000001", f"step-0000000{step}", "step-00000005"]


def every_point(before: Path, folder: Path, run: Callable[[Path, Files], list[int]], fault: str) -> int:
    """Fail at operation 1, 2, ... until a save gets through without meeting the fault; how many there were."""
    what, forever = FAULTS[fault]
    reached = folder / "reached"
    for number in count(1):
        root = folder / f"{number}"
        shutil.copytree(before, root)
        codes = run(root, failing_files(number, partial(_noting, what, reached), forever))
        if not reached.exists():
            assert set(codes) == {SAVED}
            return number - 1
        reached.unlink()
        require_whole(root, codes, before, forever)
        shutil.rmtree(root)
    raise AssertionError


def _noting(what: Callable, reached: Path, *arguments: Any) -> Any:
    reached.touch()
    return what(*arguments)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_save_that_fails_at_any_operation_leaves_a_whole_checkpoint(before, folder, fault):
    survives = "killed" not in fault
    points = every_point(before, folder, lambda root, files: save_alone(root, 4, files, survives), fault)
    print(f"{points} points, one process: {fault}")
    assert points >= 30


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_save_of_two_ranks_that_fails_at_any_operation_of_either_leaves_a_whole_checkpoint(
    before, folder, fault, failing
):
    points = every_point(before, folder, lambda root, files: save_by_two(root, 4, failing, files), fault)
    print(f"{points} points, rank {failing} of two: {fault}")
    assert points >= (30 if failing == 0 else 4)


@pytest.mark.parametrize("fault", ["killed", "disk full from then on", "input/output error once"])
def test_a_damaged_checkpoint_in_the_way_is_never_lost_wherever_the_save_fails(before, folder, fault):
    base, reached = folder / "base", folder / "reached"
    shutil.copytree(before, base)
    save(base, 4)
    (base / "step-00000004" / "shard-00000.safetensors").write_bytes(b"")
    what, forever = FAULTS[fault]
    for number in count(1):
        root = folder / f"{number}"
        shutil.copytree(base, root)
        files = failing_files(number, partial(_noting, what, reached), forever)
        codes = save_alone(root, 4, files, survives=fault != "killed")
        reader = CheckpointManager(root, 2, SingleProcess()).open()
        assert reader is not None and (reader.read("w") == float(reader.step)).all()
        assert reader.step == 4 if codes == [SAVED] else reader.step in (3, 4)
        damaged = [path for path in root.iterdir() if "step-00000004" in path.name and not path.name.startswith(".tmp")]
        assert any((path / "shard-00000.safetensors").read_bytes() == b"" for path in damaged)
        save(root, 5)
        assert opened_step(root) == 5
        if not reached.exists():
            break
        reached.unlink()
        shutil.rmtree(root)
    print(f"{number - 1} points with a damaged checkpoint in the way: {fault}")
    assert number > 25


def recorded(root: Path, watch: Callable[[str, tuple, Any], None]) -> WatchedFiles:
    def call_and_tell(number: int, name: str, arguments: tuple, call: Callable[[], Any]) -> Any:
        result = call()
        watch(name, arguments, result)
        return result

    return WatchedFiles(call_and_tell)


def after_power_cuts(root: Path, folder: Path, ignored: tuple[str, ...] = ()) -> Iterator[Path]:
    """What the disk may hold if the power goes after each operation of saving step 4; operations in `ignored` do
    nothing for durability."""
    disk, images, number = Disk(root), [], count()

    def watch(name: str, arguments: tuple, result: Any) -> None:
        if name not in ignored:
            disk.apply(name, arguments, result)
        for kind in (disk.synced, disk.named):
            images.append(folder / f"image-{next(number)}")
            kind(images[-1])

    save(root, 4, recorded(root, watch))
    yield from images


def test_a_loss_of_power_at_any_operation_leaves_a_whole_checkpoint(before, folder):
    root = folder / "root"
    shutil.copytree(before, root)
    steps = []
    for image in after_power_cuts(root, folder):
        steps.append(opened_step(image))
        assert find_step_folder(image).name in ("step-00000003", "step-00000004")
        assert find_step_folder(image).is_dir()
    print(f"{len(steps)} points: loss of power")
    assert len(steps) >= 70
    assert steps[0] == 3 and steps[-2:] == [4, 4], "a save that returned must outlive the power"


@pytest.mark.parametrize("forgotten", ["sync", "sync_folder"])
def test_a_save_that_did_not_sync_would_be_caught(before, folder, forgotten):
    root = folder / "root"
    shutil.copytree(before, root)
    images = list(after_power_cuts(root, folder, ignored=(forgotten,)))
    with pytest.raises((AssertionError, CheckpointError)):
        assert [opened_step(image) for image in images][-2:] == [4, 4]


def test_the_first_save_of_a_run_outlives_the_power_with_its_folder(folder):
    base = folder / "base"
    base.mkdir()
    disk = Disk(base)
    save(base / "run" / "checkpoints", 1, recorded(base, disk.apply))
    disk.synced(folder / "image")
    assert opened_step(folder / "image" / "run" / "checkpoints") == 1


@pytest.mark.parametrize(("lie", "checksum"), [(lose_half, False), (lose_half, True), (flip_bit, True)])
def test_a_disk_that_lies_about_any_write_is_found_out_before_the_commit(before, folder, lie, checksum):
    found = 0
    for number in count(1):
        root = folder / f"{number}"
        shutil.copytree(before, root)
        files = failing_files(number, lie)
        told: list[str] = []
        files.watch = _telling(files.watch, told)
        try:
            save(root, 4, files, checksum=checksum)
        except CheckpointError:
            assert opened_step(root) == 3
            found += 1
        else:
            if number > len(told):
                break
            assert told[number - 1] != "write" or "write" not in told[number:], f"operation {number} lied unnoticed"
            assert opened_step(root) == 4
            # the last write is of `best`, which follows the commit: it fails with a warning, and the old one stays
            assert (root / "best").read_text() == "step-00000001\n"
        shutil.rmtree(root)
    print(f"{found} lies found out")
    assert found == 7  # header, four tensors, manifest, latest


def _telling(watch: Callable, told: list[str]) -> Callable:
    def both(number: int, name: str, arguments: tuple, call: Callable[[], Any]) -> Any:
        told.append(name)
        return watch(number, name, arguments, call)

    return both


def test_every_operation_is_tried(before, folder):
    root = folder / "root"
    shutil.copytree(before, root)
    files = sound_files()
    told: list[str] = []
    files.watch = _telling(files.watch, told)
    save(root, 4, files, checksum=True)
    assert set(told) == set(OPERATIONS)
