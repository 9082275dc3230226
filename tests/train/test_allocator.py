"""Memory that a step frees is there for the next, without page faults."""

import importlib.util
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from train import allocator

ROOT = Path(__file__).parents[2]
# Blocks from a thread, as XLA's are; glibc's own heaps of threads hold 64 MiB at most. More than
# 1 GiB in all: told to keep so much, glibc gives everything back once more than that is free.
FAULTS = """
import ctypes, resource, sys, threading
from train.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
faults = []
def steps():
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = []
        for _ in range(12):
            blocks.append(ctypes.c_void_p(libc.malloc(ctypes.c_size_t(100 << 20))))
            ctypes.memset(blocks[-1], 1, 100 << 20)
        for block in blocks:
            libc.free(block)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=steps)
thread.start()
thread.join()
print(faults[-1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_blocks_are_used_again():
    faults = {}
    for what in ("keep", "default"):
        command = [sys.executable, "-c", FAULTS, what]
        environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        faults[what] = int(done.stdout)
    assert faults["keep"] < 100 < 100_000 < faults["default"]


def test_nothing_is_done_beside_an_accelerator(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "libtpu")
    assert not allocator.keep_freed_memory()
