"""A checkpoint of real width to another layout and back: memory, rate, a kill on the way.

    python -m benchmarks.convert --layers 2 --dir /a/disk

Writes a synthetic M1 of so many layers, converts it to Orbax, kills that once with SIGKILL, runs it
again, deletes the source, converts back, and compares every file with the CRC-32 of the source's.
In the same run, on the same disk: a plain sequential write, read and copy, synced and uncached.
Peak memory is read from /proc every 20 ms, anonymous and file pages apart. Prints a table.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

_BLOCK = 1 << 24


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True, help="a folder on the disk; emptied")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--to", default="orbax", choices=("orbax", "hf-native"))
    args = parser.parse_args()
    args.dir.mkdir(parents=True)
    try:
        _run(args)
    finally:
        shutil.rmtree(args.dir)


def _run(args: argparse.Namespace) -> None:
    source, there, back = (args.dir / name for name in ("source", "there", "back"))
    free = shutil.disk_usage(args.dir).free
    rows = [("step", "s", "GB/s", "peak anonymous GiB", "peak resident GiB")]

    def step(name: str, size: int, argv: list[str], **how: object) -> None:
        seconds, anonymous, resident = _watched(argv, **how)
        rate = f"{size / seconds / 1e9:.2f}" if size else ""
        memory = [f"{x / 2**30:.2f}" for x in (anonymous, resident)]
        rows.append((name, f"{seconds:.0f}", rate, *memory))
        print(*rows[-1], sep=" | ", flush=True)

    sizes = ["--layers", str(args.layers), "--experts", str(args.experts)]
    step("synth", 0, ["synth", str(source), *sizes])
    size = sum(p.stat().st_size for p in source.glob("*.safetensors"))
    print(f"{size / 1e9:.1f} GB in {len(list(source.glob('*.safetensors')))} files", flush=True)
    sequential = _sequential(args.dir / "plain", min(size, 8 * 10**9))
    for name, rate in sequential.items():
        print(f"{name}: {rate / 1e9:.2f} GB/s", flush=True)
    checksums = {p.name: _crc(p) for p in sorted(source.glob("*.safetensors"))}
    _uncache(source)
    convert = ["convert", str(source), str(there), "--to", args.to]
    journal = args.dir / ".there.partial" / ".mmjax-convert"
    step("there, killed half way", 0, convert, kill_when=lambda: _written(journal) >= size / 2)
    print(f"{_written(journal) / 1e9:.1f} GB there after the kill", flush=True)
    step("there, gone on and checked", 0, convert)
    shutil.rmtree(source)
    _uncache(there)
    step("back", size, ["convert", str(there), str(back), "--to", "hf"])
    again = {p.name: _crc(p) for p in sorted(back.glob("*.safetensors"))}
    same = again == checksums
    print(f"bit-identical: {same}; most of the disk in use: {(free - _LOWEST[0]) / 1e9:.1f} GB")
    print("\n".join(" | ".join(row) for row in rows))
    if not same:
        sys.exit(1)


_LOWEST = [1 << 62]


def _watched(
    argv: list[str], kill_when: Callable[[], bool] | None = None
) -> tuple[float, int, int]:
    """Runs `mmjax`: seconds, most anonymous memory, most resident memory."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "mmjax.cli", *argv]
    process = subprocess.Popen(command)
    anonymous = resident = 0
    folder = Path(argv[1]).parent
    checked = start
    while process.poll() is None:
        memory = _memory(process.pid)
        anonymous, resident = max(anonymous, memory[0]), max(resident, memory[1])
        if time.perf_counter() - checked > 1:
            checked = time.perf_counter()
            _LOWEST[0] = min(_LOWEST[0], shutil.disk_usage(folder).free)
            if kill_when and kill_when():
                process.send_signal(signal.SIGKILL)
        time.sleep(0.02)
    if process.returncode != (-signal.SIGKILL if kill_when else 0):
        sys.exit(f"{' '.join(argv)} ended with {process.returncode}")
    return time.perf_counter() - start, anonymous, resident


def _memory(pid: int) -> tuple[int, int]:
    """Anonymous and resident bytes of a process."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    parts = [int(found.get(name, 0)) * 1024 for name in ("RssAnon", "RssFile", "RssShmem")]
    return parts[0], sum(parts)


def _written(journal: Path) -> int:
    """Bytes that a conversion has finished with, about."""
    folder = journal.parent
    files = [p for p in folder.rglob("*") if p.is_file()] if folder.exists() else []
    return sum(p.stat().st_blocks * 512 for p in files)


def _sequential(path: Path, size: int) -> dict[str, float]:
    """Bytes a second of one stream: written and synced, read uncached, and both at a time."""
    block = np.random.default_rng(0).integers(0, 256, _BLOCK, np.uint8)
    rates = {}
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(size // _BLOCK):
            file.write(block)
        os.fsync(file.fileno())
    rates["sequential write"] = size / (time.perf_counter() - start)
    _uncache(path.parent)
    start = time.perf_counter()
    for _ in _blocks(path):
        pass
    rates["sequential read"] = size / (time.perf_counter() - start)
    _uncache(path.parent)
    copy = path.with_suffix(".copy")
    start = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", str(path), str(copy)], check=True)
    with copy.open("rb") as file:
        os.fsync(file.fileno())
    rates["cp, synced"] = size / (time.perf_counter() - start)
    path.unlink()
    copy.unlink()
    return rates


def _uncache(folder: Path) -> None:
    """Lets the system forget what it holds of the files."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _blocks(path: Path) -> Iterator[memoryview]:
    block = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            yield block[:count]


def _crc(path: Path) -> int:
    crc = 0
    for block in _blocks(path):
        crc = zlib.crc32(block, crc)
    return crc


if __name__ == "__main__":
    main()
