"""Several processes that JAX joins to one job, on virtual CPU devices."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start(program, *, processes, devices, cache, **streams):
    """Starts the processes of a job.

    Args:
      program: What Python is to run, with its flags.
      processes: How many.
      devices: Of all of them together.
      cache: Folder of compiled programs.
      streams: For Popen.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices // processes),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    if processes > 1:
        env |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    return [
        subprocess.Popen(
            [sys.executable, *program],
            cwd=ROOT,
            env=env | ({"JAX_PROCESS_ID": str(i)} if processes > 1 else {}),
            text=True,
            **streams,
        )
        for i in range(processes)
    ]


def end(running):
    """Exit codes, and what the processes said on each stream that is piped."""
    try:
        said = [process.communicate(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
    return [process.returncode for process in running], said
