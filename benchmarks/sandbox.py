"""Programs a second in the sandbox, and thousands in a row with nothing left behind.

    python -m benchmarks.sandbox [--programs 10000] [--seconds 270]

Prints a table for benchmarks/results/sandbox_cpu.md. The programs of the long run are a mix: most
add two numbers, one in twenty leaves a process running, dies of a signal, takes too much memory,
floods its output or forks until it may not.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from train.rewards.sandbox import Limits, Sandbox

_ADD = "print(sum(map(int, input().split())))"
_HARMFUL = [
    "import os, time\nif os.fork() == 0: time.sleep(600)",
    "import os\nos.kill(os.getpid(), 11)\nos.abort()",
    "x = bytearray(1 << 30)",
    "while True: print('x' * 1000)",
    "import os\nfor _ in range(99): os.fork()",
]
_LIMITS = Limits(seconds=10.0, memory_mb=256)


def rate(box: Sandbox, workers: int, count: int) -> float:
    """Programs a second that add two numbers."""
    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        for outcome in pool.map(lambda _: box.run(_ADD, b"20 22", _LIMITS), range(count)):
            assert outcome.output == b"42\n", outcome
    return count / (time.perf_counter() - start)


def plain_rate(box: Sandbox, count: int) -> float:
    """The same by a bare interpreter, one after the other."""
    start = time.perf_counter()
    for _ in range(count):
        command = [box.python, "-I", "-S", "-c", _ADD]
        subprocess.run(command, input=b"20 22", capture_output=True, check=True)
    return count / (time.perf_counter() - start)


def in_a_row(box: Sandbox, workers: int, count: int, seconds: float) -> tuple[Counter[str], float]:
    """What came of many programs, and how long they took; fewer if time runs out."""
    start = time.perf_counter()

    def one(i: int) -> str:
        if time.perf_counter() - start > seconds:
            return "not run"
        harm = i % 20 == 0
        source = _HARMFUL[i // 20 % len(_HARMFUL)] if harm else _ADD
        outcome = box.run(source, b"20 22", _LIMITS)
        right = outcome.status == "ok" and outcome.output == b"42\n"
        assert right != harm, (source, outcome)
        return "harmful, contained" if harm else "harmless, right"

    with ThreadPoolExecutor(workers) as pool:
        kinds = Counter(pool.map(one, range(count)))
    return kinds, time.perf_counter() - start


def state() -> dict[str, int]:
    """What a sandbox could leave behind."""
    names = [p for p in Path("/proc").iterdir() if p.name.isdigit()]
    return {
        "processes of bwrap": sum(_is_bwrap(p) for p in names),
        "mounts": Path("/proc/self/mounts").read_text().count("\n"),
        "open files": len(os.listdir("/proc/self/fd")),
        "files in /tmp": len(os.listdir("/tmp")),
    }


def _is_bwrap(process: Path) -> bool:
    try:
        return (process / "comm").read_text().startswith("bwrap")
    except OSError:
        return False


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Measure the sandbox for programs.")
    parser.add_argument("--programs", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=270.0, help="for the long run")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    box = Sandbox()
    box.run(_ADD, b"1 2")  # warm caches
    print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, Linux {platform.release()}, {box.python}\n"
    )
    print("| | programs/s |\n|---|---|")
    print(f"| bare interpreter, one at a time | {plain_rate(box, 60):.1f} |")
    for workers in sorted({1, args.workers, 2 * args.workers}):
        print(f"| sandbox, {workers} at a time | {rate(box, workers, 100):.1f} |")
    sys.stdout.flush()
    before = state()
    kinds, took = in_a_row(box, args.workers, args.programs, args.seconds)
    after = state()
    ran = sum(n for kind, n in kinds.items() if kind != "not run")
    print(
        f"\n{ran} programs in a row, {args.workers} at a time: {took:.0f} s, {ran / took:.1f} a s"
    )
    print("\n".join(f"- {kind}: {n}" for kind, n in sorted(kinds.items())))
    print("- left behind: " + ", ".join(f"{k} {after[k] - before[k]:+d}" for k in before))


if __name__ == "__main__":
    main()
