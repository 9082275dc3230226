"""What glibc does with freed memory, which decides how fast a step on a CPU is."""

from __future__ import annotations

import ctypes
import importlib.util
import os

# Parameters of glibc's mallopt, from malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_GIB = 1 << 30
# However much is free. Given a size, glibc gives all of it back as soon as more is free than that.
_NEVER = -1
_PLUGINS = ("jax_plugins", "libtpu")


def keep_freed_memory() -> bool:
    """Has glibc keep freed blocks for whoever asks next; whether it will.

    By default it gives blocks of many megabytes back to the kernel. XLA asks for a step's
    temporaries as one such block on CPUs, and each step then takes a page fault for every 4 KiB of
    it: a quarter to a third of the time of a small model's. To be called before JAX starts its
    threads, which else get heaps of their own that hold no such block. Where JAX has accelerators
    nothing is done, as their memory is not malloc's.
    """
    accelerated = any(importlib.util.find_spec(name) for name in _PLUGINS)
    if accelerated and os.environ.get("JAX_PLATFORMS") != "cpu":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_MMAP_THRESHOLD, _GIB), (_TRIM_THRESHOLD, _NEVER), (_ARENA_MAX, 1))
    return all(mallopt(*setting) for setting in settings)
