"""Block sizes of kernels: what was tuned on the device for a shape, else the kernel's own default.

`tuned/<device>.json` ships with the package and is written by `python -m kernels_pallas.tune`.
It maps op, implementation and shape to the fields of that kernel's `Blocks`.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

FOLDER = Path(__file__).parent / "tuned"

type Entries = dict[str, dict[str, dict[str, dict[str, int]]]]


def file_of(kind: str) -> Path:
    """The file of a device kind, as the device calls itself."""
    return FOLDER / (re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_") + ".json")


@functools.cache
def load(kind: str) -> Entries:
    """All that was tuned on a device kind; empty where nothing was."""
    file = file_of(kind)
    return json.loads(file.read_text()) if file.exists() else {}


def shape_key(**dims: int | str) -> str:
    """The name of a shape in the files, such as "T 65536, H 8"."""
    return ", ".join(f"{name} {value}" for name, value in dims.items())


def tuned(kind: str, op: str, implementation: str, key: str) -> dict[str, int] | None:
    """Fields of the tuned `Blocks`, or None where this shape was not tuned on this device."""
    return load(kind).get(op, {}).get(implementation, {}).get(key)


def store(kind: str, op: str, implementation: str, key: str, blocks: dict[str, int]) -> Path:
    """Adds an entry to the file of the device kind and returns the file."""
    entries = load(kind)
    entries.setdefault(op, {}).setdefault(implementation, {})[key] = blocks
    file = file_of(kind)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n")
    return file
