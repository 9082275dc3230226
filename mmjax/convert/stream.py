"""Writing a model folder in units: several at a time, journaled, read back and checked."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from mmjax.convert.errors import CheckpointError

# A unit is the least that is redone after a kill; its bytes are in memory while it is on its way.
UNIT_BYTES = 128 * 2**20
WORKERS = 8
JOURNAL = ".mmjax-convert"


class Unit(NamedTuple):
    """Bytes `offset` to `offset + size` of a file, made part by part."""

    file: str
    offset: int
    size: int
    parts: tuple[Callable[[], np.ndarray | bytes], ...]


@dataclasses.dataclass(frozen=True)
class Output:
    """All that a model folder will hold.

    Attributes:
      units: The weights.
      texts: Small files, by name.
      prepare: Fills the folder with what units lie in, anew each time it is called.
      largest: Bytes of the largest part of a unit.
    """

    units: Sequence[Unit]
    texts: Mapping[str, str]
    prepare: Callable[[Path], None]
    largest: int

    @property
    def size(self) -> int:
        """Bytes of weights."""
        return sum(unit.size for unit in self.units)

    @property
    def fingerprint(self) -> str:
        """Of what goes where."""
        told = [(unit.file, unit.offset, unit.size) for unit in self.units]
        return hashlib.sha256(json.dumps([told, dict(self.texts)]).encode()).hexdigest()


def even_step(count: int, size: int) -> int:
    """How many of `count` things of `size` bytes a unit takes, all units about alike, one least."""
    most = max(UNIT_BYTES // max(size, 1), 1)
    return -(-count // -(-count // most))


class Report(NamedTuple):
    """Bytes of a model folder, of those the ones written now, and the seconds it took."""

    size: int
    written: int
    seconds: float


class Journal:
    """Which units lie on the disk, and the CRC-32 of each.

    One line a unit, appended when the unit has been synced and read back; a line that a kill cut
    short does not count.

    Args:
      folder: An existing folder.
      of: Of what is written there; another conversion's journal is refused.

    Raises:
      CheckpointError: another process is at it, or the folder holds another conversion.
    """

    def __init__(self, folder: Path, of: str) -> None:
        self._file: IO[str] = (folder / JOURNAL).open("a+", encoding="ascii")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise CheckpointError(folder, ["another process is converting to it"]) from None
        self._file.seek(0)
        text = self._file.read()
        whole = text[: text.rfind("\n") + 1]
        self._file.truncate(len(whole))
        told, *lines = whole.splitlines() or [of]
        self.began = bool(whole)
        self.done: dict[int, int] = {}
        for number, crc in map(str.split, lines):
            self.done[int(number)] = int(crc, 16)
        if told != of:
            self._file.close()
            raise CheckpointError(
                folder,
                ["holds the beginning of another conversion; delete it, or name another target"],
            )
        self._of = of

    def begin(self) -> None:
        """Notes that the folder is prepared."""
        self.began = True
        self._append(self._of)

    def note(self, number: int, crc: int) -> None:
        """Notes a unit."""
        self.done[number] = crc
        self._append(f"{number} {crc:x}")

    def _append(self, line: str) -> None:
        self._file.write(f"{line}\n")
        self._file.flush()

    def close(self) -> None:
        """Lets others at the folder."""
        self._file.close()


def write_all(output: Output, folder: Path, *, workers: int = WORKERS) -> None:
    """Fills a new folder, unchecked: for a caller who deletes it if that fails."""
    output.prepare(folder)
    with progress() as start, _pool(workers) as pool:
        advance = start("writing", output.size)
        for unit, _ in pool(lambda unit: _write(folder, unit, sync=False), output.units):
            advance(unit.size)
    _write_texts(output, folder)


@contextlib.contextmanager
def resumable(output: Output, path: Path, source: str) -> Iterator[tuple[Path, Journal]]:
    """A hidden folder beside `path`, with its journal, which is there again after a kill.

    It becomes `path` once the block ends well. On an error it stays too, unless nothing has been
    written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.with_name(f".{path.name}.partial")
    folder.mkdir(exist_ok=True)
    of = hashlib.sha256(f"{source}\n{output.fingerprint}".encode()).hexdigest()
    journal = Journal(folder, of)
    try:
        if not journal.began:
            _clear(folder)
            output.prepare(folder)
            journal.begin()
        yield folder, journal
        (folder / JOURNAL).unlink()
        folder.rename(path)
    except BaseException:
        if not journal.done:
            shutil.rmtree(folder)
        raise
    finally:
        journal.close()


def write_checked(output: Output, folder: Path, journal: Journal, *, workers: int) -> Report:
    """Writes every unit and reads it back from the disk at once, while others are on their way.

    Units in the journal are read back too, and written again where the disk holds something else.

    Raises:
      CheckpointError: what was read is not what was written; the next attempt writes these units
        again.
    """
    start_time = time.perf_counter()
    wrong = []
    written = 0

    def bring(item: tuple[int, Unit]) -> tuple[int, bool]:
        """CRC-32 of a unit, -1 if the disk has not what was written; whether it was written."""
        number, unit = item
        if number in journal.done and _read_back(folder, unit) == journal.done[number]:
            return journal.done[number], False
        crc = _write(folder, unit, sync=True)
        return crc if _read_back(folder, unit) == crc else -1, True

    with progress() as start, _pool(workers) as pool:
        advance = start("writing and checking", output.size)
        for (number, unit), (crc, new) in pool(bring, [*enumerate(output.units)]):
            written += unit.size * new
            if crc < 0:
                wrong.append(unit)
            elif new:
                journal.note(number, crc)
            advance(unit.size)
    if wrong:
        what = "bytes {} to {} differ from what was written; run the same command again"
        raise CheckpointError(
            folder, [f"{u.file}: {what.format(u.offset, u.offset + u.size)}" for u in wrong]
        )
    _write_texts(output, folder)
    return Report(output.size, written, time.perf_counter() - start_time)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Bars on a terminal's stderr: `start(what, bytes)` gives `advance(bytes)`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:

        def start(what: str, total: int) -> Callable[[int], None]:
            task = bars.add_task(what, total=total)
            return lambda done: bars.advance(task, done)

        yield start


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[Callable[..., Iterator[tuple[Any, Any]]]]:
    """`run(work, items)` gives (item, result) pairs in order; an error stops what has not begun."""
    pool = ThreadPoolExecutor(workers)
    try:
        yield lambda work, items: zip(items, pool.map(work, items), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _write(folder: Path, unit: Unit, *, sync: bool) -> int:
    """Writes a unit; its CRC-32."""
    target = os.open(folder / unit.file, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        at, crc = unit.offset, 0
        for part in unit.parts:
            made = part()
            data = memoryview(made if isinstance(made, bytes) else made.reshape(-1).view(np.uint8))
            crc = zlib.crc32(data, crc)
            while data:
                count = os.pwrite(target, data, at)
                at, data = at + count, data[count:]
        assert at == unit.offset + unit.size, unit.file
        if sync:
            os.fsync(target)
            _forget(target, unit)
        return crc
    finally:
        os.close(target)


def _read_back(folder: Path, unit: Unit) -> int:
    """The CRC-32 of a unit as it lies on the disk."""
    try:
        with (folder / unit.file).open("rb", buffering=0) as file:
            file.seek(unit.offset)
            crc, left, block = 0, unit.size, memoryview(bytearray(min(unit.size, 1 << 24)))
            while left and (count := file.readinto(block[:left])):
                crc = zlib.crc32(block[:count], crc)
                left -= count
            _forget(file.fileno(), unit)
            return -1 if left else crc
    except FileNotFoundError:
        return -1


def _forget(file: int, unit: Unit) -> None:
    """Lets the system drop its copy: what is read back is then what the disk holds."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, unit.offset, unit.size, os.POSIX_FADV_DONTNEED)


def _write_texts(output: Output, folder: Path) -> None:
    for name, text in output.texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name != JOURNAL:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
