"""A checkpoint of real width to another layout and back: memory, rate, a kill on the way.

    python -m benchmarks.convert --layers 8 --experts 19 --dir /a/disk/new

Writes a synthetic M1 of so many layers and experts (these: 60.3 GB), converts it to Orbax, kills
that with SIGKILL when half is written, runs it again, deletes the source, converts back, and
compares every file with the CRC-32 of the source's. Two copies are the most that are on the disk;
whether there is room is checked first. In the same run, on the same disk: one stream written, read
and copied, synced and uncached. Prints a table, row by row, with

- GB/s: bytes of the checkpoint, converted, written, read back and checked, a second;
- of sequential: the seconds in which one stream reads the source, writes as much and reads it back
  at the rates measured, over the seconds taken;
- of cp: the first over the rate of `cp`, which checks nothing;
- peak memory: the most that was resident, from the operating system.

Seconds are of whole commands, Python's start included. When the benchmark is ended before its end,
the same command goes on with the step that was not finished.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmjax.convert import write
from mmjax.convert.params import param_specs
from mmjax.convert.synth import preset

_BLOCK = 1 << 24
_PLAIN = 8 * 10**9
_HEAD = ("step", "seconds", "GB/s", "of sequential", "of cp", "peak memory, GiB")


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True, help="a new folder on the disk; deleted")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--to", default="orbax", choices=("orbax", "hf-native"))
    parser.add_argument("--workers", type=int, help="threads of a conversion (its default)")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    same = Run(args).everything()
    shutil.rmtree(args.dir)
    sys.exit(0 if same else 1)


class Run:
    """The steps, each of which is done once; what they found is in a file after each."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.source, self.there, self.back = (args.dir / n for n in ("source", "there", "back"))
        self.size = _size(args.layers, args.experts)
        self.state: dict[str, Any] = {"done": {}, "of": [args.layers, args.experts, args.to]}
        args.dir.mkdir(parents=True, exist_ok=True)
        self._file = args.dir / "state.json"
        if self._file.exists():
            found = json.loads(self._file.read_text())
            if found["of"] != self.state["of"]:
                sys.exit(f"{args.dir} holds another run, of {found['of']}; delete it")
            self.state = found
        self._check_room()

    def _check_room(self) -> None:
        here = sum(f.stat().st_blocks * 512 for f in self.args.dir.rglob("*") if f.is_file())
        free = shutil.disk_usage(self.args.dir).free
        # Two copies; at first one and two plain files.
        needed = self.size + max(self.size, 2 * _PLAIN) + 10**9
        if needed > here + free:
            sys.exit(f"needs {needed / 1e9:.1f} GB on the disk, {(here + free) / 1e9:.1f} are free")

    def everything(self) -> bool:
        """All steps; whether what came back is what there was."""
        _print_row(_HEAD)
        _print_row(["---"] * len(_HEAD))
        self._step("synth", self._synth)
        self._step("plain", self._plain)
        self._step("checksums", lambda: self._checksums(self.source))
        self._step("killed", self._killed)
        self._step("there", lambda: self._convert(self.source, self.there, self.args.to))
        self._in_all()
        shutil.rmtree(self.source, ignore_errors=True)
        self._step("back", lambda: self._convert(self.there, self.back, "hf"))
        self._step("again", lambda: self._checksums(self.back))
        found = [self.state["done"][name]["crc"] for name in ("checksums", "again")]
        files = self.state["done"]["checksums"]["crc"]
        print(
            f"\n{self.size / 1e9:.2f} GB in {len(files)} files, {self.args.layers} layers of",
            end="",
        )
        print(f" {self.args.experts} experts. Bit-identical: {found[0] == found[1]}", flush=True)
        return bool(found[0] == found[1])

    def _step(self, name: str, work: Any) -> None:
        if name not in self.state["done"]:
            self.state["done"][name] = work()
            self._file.write_text(json.dumps(self.state))
        for row in self.state["done"][name]["rows"]:
            _print_row(row)

    def _synth(self) -> dict[str, Any]:
        shutil.rmtree(self.source, ignore_errors=True)
        sizes = ["--layers", str(self.args.layers), "--experts", str(self.args.experts)]
        took = _mmjax("synth", str(self.source), *sizes)
        return {"rows": [_row("mmjax synth", took.seconds, self.size, memory=took.memory)]}

    def _plain(self) -> dict[str, Any]:
        size = min(self.size, _PLAIN) // _BLOCK * _BLOCK
        rates = {name: size / s for name, s in _sequential(self.args.dir / "plain", size).items()}
        rows = [
            _row(f"{name}, one stream, {size / 1e9:.1f} GB", size / rate, size)
            for name, rate in rates.items()
        ]
        return {"rows": rows, "rates": rates}

    def _checksums(self, folder: Path) -> dict[str, Any]:
        _uncache(folder)
        start = time.perf_counter()
        files = sorted(folder.glob("*.safetensors"))
        with ThreadPoolExecutor(8) as pool:
            crc = dict(zip((p.name for p in files), pool.map(_crc, files), strict=True))
        row = _row(f"CRC-32 of {folder.name}", time.perf_counter() - start, self.size)
        return {"rows": [row], "crc": crc}

    def _killed(self) -> dict[str, Any]:
        _uncache(self.source)
        partial = self.there.with_name(f".{self.there.name}.partial")
        took = self._mmjax_convert(self.source, self.there, self.args.to, (partial, self.size / 2))
        row = _row(f"to {self.args.to}, SIGKILL half way", took.seconds, 0, memory=took.memory)
        return {"rows": [row], "seconds": took.seconds}

    def _convert(self, source: Path, target: Path, layout: str) -> dict[str, Any]:
        _uncache(self.args.dir)
        took = self._mmjax_convert(source, target, layout)
        told = re.search(r"([\d.]+) of ([\d.]+) GB", took.output)
        assert told, took.output
        written, size = (float(x) * 1e9 for x in told.groups())
        ideal = self._ideal(written, size)
        gone_on = f": the other {written / 1e9:.1f} GB, and all checked" if written < size else ""
        rate = self.state["done"]["plain"]["rates"]["cp"]
        row = _row(
            f"{'to ' if layout != 'hf' else 'back to '}{layout}{gone_on}",
            took.seconds,
            int(written),
            ideal,
            rate,
            took.memory,
        )
        return {"rows": [row], "seconds": took.seconds, "ideal": ideal}

    def _ideal(self, written: float, size: float) -> float:
        """Seconds of one stream that reads the source's part, writes it, and reads all back."""
        rates = self.state["done"]["plain"]["rates"]
        return written / rates["read"] + written / rates["written"] + size / rates["read"]

    def _in_all(self) -> None:
        seconds = sum(self.state["done"][name]["seconds"] for name in ("killed", "there"))
        rate = self.state["done"]["plain"]["rates"]["cp"]
        name = f"to {self.args.to} in all, kill and start included"
        _print_row(_row(name, seconds, self.size, self._ideal(self.size, self.size), rate))

    def _mmjax_convert(
        self, source: Path, target: Path, layout: str, kill: tuple[Path, float] | None = None
    ) -> _Took:
        how = ["--workers", str(self.args.workers)] if self.args.workers else []
        return _mmjax("convert", str(source), str(target), "--to", layout, *how, kill=kill)


class _Took:
    """Of a command: seconds, most resident memory in bytes, what it printed."""

    def __init__(self, seconds: float, memory: int, output: str) -> None:
        self.seconds, self.memory, self.output = seconds, memory, output


def _mmjax(*argv: str, kill: tuple[Path, float] | None = None) -> _Took:
    """Runs `mmjax`; kills it with SIGKILL once a folder holds so many bytes."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "mmjax.cli", *argv]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while kill and process.poll() is None:
        time.sleep(0.5)
        if _on_disk(kill[0]) >= kill[1]:
            process.send_signal(signal.SIGKILL)
            break
    assert process.stdout
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != (-signal.SIGKILL if kill else 0):
        sys.exit(f"mmjax {' '.join(argv)} ended with {process.returncode}")
    return _Took(time.perf_counter() - start, usage.ru_maxrss * 1024, output)


def _row(
    name: str, seconds: float, size: int, ideal: float = 0, cp: float = 0, memory: int = 0
) -> list[str]:
    return [
        name,
        f"{seconds:.1f}",
        f"{size / seconds / 1e9:.2f}" if size else "",
        f"{ideal / seconds:.0%}" if ideal else "",
        f"{size / seconds / cp:.0%}" if cp else "",
        f"{memory / 2**30:.2f}" if memory else "",
    ]


def _print_row(row: list[str] | tuple[str, ...]) -> None:
    print("|", " | ".join(row), "|", flush=True)


def _size(layers: int, experts: int) -> int:
    """Bytes of the checkpoint."""
    cfg = preset("minimax_m1", layers=layers, experts=experts, vocab=None)
    specs = param_specs(cfg)
    return write.safetensors_output(
        cfg, specs, "hf", write.SHARD_BYTES, lambda *_: np.empty(0)
    ).size


def _on_disk(folder: Path) -> int:
    """Bytes that files take."""
    files = [p for p in folder.rglob("*") if p.is_file()] if folder.exists() else []
    return sum(p.stat().st_blocks * 512 for p in files)


def _sequential(path: Path, size: int) -> dict[str, float]:
    """Seconds of one stream: written and synced, read uncached, both at a time and synced."""
    block = np.random.default_rng(0).integers(0, 256, _BLOCK, np.uint8)
    took = {}
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(size // _BLOCK):
            file.write(block)
        os.fsync(file.fileno())
    took["written"] = time.perf_counter() - start
    _uncache(path.parent)
    start = time.perf_counter()
    for _ in _blocks(path):
        pass
    took["read"] = time.perf_counter() - start
    _uncache(path.parent)
    copy = path.with_suffix(".copy")
    start = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", str(path), str(copy)], check=True)
    with copy.open("rb") as file:
        os.fsync(file.fileno())
    took["cp"] = time.perf_counter() - start
    path.unlink()
    copy.unlink()
    return took


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
