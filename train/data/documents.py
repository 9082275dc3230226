"""Documents where they lie: files that are read a row at a time, whatever their size.

A source is every row of its files under one number. Nothing is decoded until it is asked for;
what cannot be becomes a `Record` that says why.
"""

from __future__ import annotations

import abc
import codecs
import glob
import json
import os
import sysconfig
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import grain
import numpy as np

from mmjax.config import ConfigError
from train.config import SourceConfig

_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrayrecord": "arrayrecord",
    ".array_record": "arrayrecord",
}
_PACKED = (".gz", ".tgz", ".zst", ".bz2", ".xz", ".lz4", ".zip", ".tar", ".7z", ".rar")
# The longer marks first: UTF-32's starts as UTF-16's does.
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_START = 4096  # Bytes of a .json file that tell whether it is an array.
_STRETCH = 1 << 26  # Bytes of a JSONL file that are looked through at once.
_GROUPS = 16  # Row groups of Parquet that stay in memory, for each source.


class Record(NamedTuple):
    """A row: its fields, where it stands, whether bytes of it did not decode, what is wrong."""

    row: Mapping[str, Any]
    place: str
    undecodable: bool = False
    problem: str = ""


class File(abc.ABC):
    """Rows of one file.

    Args:
      path: Of the file.
      cfg: Of its source.
      field: Of the rows, that is asked for.
    """

    def __init__(self, path: Path, cfg: SourceConfig, field: str) -> None:
        self.path, self.cfg, self.field = path, cfg, field

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Record: ...

    @property
    def blocks(self) -> Sequence[int]:
        """Rows of each part that is read as a whole; empty where each row is read alone."""
        return ()


class TextFile(File):
    """One document."""

    def __len__(self) -> int:
        return int(self.path.stat().st_size > 0)

    def __getitem__(self, index: int) -> Record:
        data = self.path.read_bytes()
        text, lost = decode(data, self.cfg.encoding)
        return Record({self.field: text}, str(self.path), lost)


class JsonlFile(File):
    """An object a line; where lines start is all that is kept in memory.

    Raises:
      ConfigError: the file is in UTF-16 or UTF-32.
    """

    def __init__(self, path: Path, cfg: SourceConfig, field: str) -> None:
        super().__init__(path, cfg, field)
        self._size = path.stat().st_size
        self._starts = _line_starts(path)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> Record:
        start, stop = int(self._starts[index]), int(self._starts[index + 1])
        with self.path.open("rb") as file:
            file.seek(start)
            line = file.read(stop - start)
        return _json_record(line, f"{self.path} at byte {start}", self.cfg.encoding)


class JsonFile(File):
    """An array of objects, all of it in memory.

    Raises:
      ConfigError: the file is no JSON.
    """

    def __init__(self, path: Path, cfg: SourceConfig, field: str) -> None:
        super().__init__(path, cfg, field)
        text, self._lost = decode(path.read_bytes(), cfg.encoding)
        try:
            self._rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is no JSON array: {error}") from None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        return _object_record(self._rows[index], f"{self.path} row {index}", self._lost)


class ArrayRecordFile(File):
    """A JSON object or plain text a record."""

    def __init__(self, path: Path, cfg: SourceConfig, field: str) -> None:
        super().__init__(path, cfg, field)
        try:
            self._records = grain.sources.ArrayRecordDataSource(str(path))
            self._count = len(self._records)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"{path} is no ArrayRecord file: {error}") from None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Record:
        place = f"{self.path} record {index}"
        data = self._records[index]
        if data.lstrip()[:1] == b"{":
            return _json_record(data, place, self.cfg.encoding)
        text, lost = decode(data, self.cfg.encoding)
        return Record({self.field: text}, place, lost)


class ParquetFile(File):
    """A row a row; the row groups that were read last stay in memory."""

    # By file and group, for all files: threads read through different groups of one file. What
    # cannot be read is the text of what is wrong.
    _groups: ClassVar[OrderedDict[tuple[Path, int], Any]] = OrderedDict()
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, path: Path, cfg: SourceConfig, field: str) -> None:
        super().__init__(path, cfg, field)
        self._columns = _columns(path, _parquet(path).schema_arrow.names, cfg)
        meta = _parquet(path).metadata
        self._rows = [meta.row_group(g).num_rows for g in range(meta.num_row_groups)]
        self._ends = np.cumsum(self._rows)

    def __len__(self) -> int:
        return sum(self._rows)

    @property
    def blocks(self) -> Sequence[int]:
        """Its row groups."""
        return self._rows

    def __getitem__(self, index: int) -> Record:
        group = int(np.searchsorted(self._ends, index, side="right"))
        row = index - (int(self._ends[group - 1]) if group else 0)
        place, table = f"{self.path} row {index}", self._group(group)
        if isinstance(table, str):
            return Record({}, place, problem=f"is in a damaged row group: {table}")
        return _table_record(table, row, place)

    def _group(self, group: int) -> Any:
        key = self.path, group
        with self._lock:
            table = self._groups.pop(key, None)
            if table is None:
                table = self._read(group)
            self._groups[key] = table
            while len(self._groups) > _GROUPS:
                self._groups.popitem(last=False)
        return table

    def _read(self, group: int) -> Any:
        import pyarrow

        try:
            return _parquet(self.path).read_row_group(group, columns=self._columns)
        except (pyarrow.ArrowException, OSError) as error:
            return str(error)


class DatasetsFolder(File):
    """A `datasets.Dataset.save_to_disk` folder, its Arrow files mapped into memory."""

    def __init__(self, path: Path, cfg: SourceConfig, field: str) -> None:
        super().__init__(path, cfg, field)
        try:
            state = json.loads((path / "state.json").read_text())
            names = [entry["filename"] for entry in state["_data_files"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}/state.json is not of `save_to_disk`: {error!r}") from None
        self._batches = [batch for name in names for batch in _arrow_batches(path / name)]
        self._ends = np.cumsum([len(batch) for batch in self._batches])
        if self._batches:
            self._columns = _columns(path, self._batches[0].schema.names, cfg)
        # What `select` and `shuffle` leave: numbers of rows.
        chosen = state.get("_indices_data_files") or []
        rows = [
            b.column(0).to_numpy() for e in chosen for b in _arrow_batches(path / e["filename"])
        ]
        self._chosen = np.concatenate(rows).astype(np.int64) if rows else None

    def __len__(self) -> int:
        if self._chosen is not None:
            return len(self._chosen)
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Record:
        number = index if self._chosen is None else int(self._chosen[index])
        batch = int(np.searchsorted(self._ends, number, side="right"))
        row = number - (int(self._ends[batch - 1]) if batch else 0)
        table = self._batches[batch].select(self._columns)
        return _table_record(table, row, f"{self.path} row {index}")


_FILES: Mapping[str, Callable[[Path, SourceConfig, str], File]] = {
    "jsonl": JsonlFile,
    "json": JsonFile,
    "text": TextFile,
    "parquet": ParquetFile,
    "arrayrecord": ArrayRecordFile,
    "datasets": DatasetsFolder,
    "stdlib": TextFile,
}


class Source:
    """All rows of a source's files, as one sequence that Grain can read from.

    Args:
      cfg: What to open.

    Raises:
      ConfigError: no such file, one that is not of its format, no rows at all, or an encoding that
        nobody knows.
    """

    def __init__(self, cfg: SourceConfig) -> None:
        self.cfg = cfg
        self.field = cfg.column
        _check_encoding(cfg)
        paths = _stdlib() if cfg.format == "stdlib" else _expand(cfg)
        with ThreadPoolExecutor(min(8, len(paths))) as pool:
            files = list(pool.map(self._open, paths))
        self.files = [file for file in files if len(file)]
        self.empty = [str(file.path) for file in files if not len(file)]
        self._ends = np.cumsum([len(file) for file in self.files])
        if not self.files:
            raise ConfigError(
                f"data source {cfg.name!r}: no rows in the {len(files)} files of "
                f"{', '.join(map(repr, cfg.paths))}"
            )

    def _open(self, path: Path) -> File:
        try:
            return _FILES[self.cfg.format or _format_of(path)](path, self.cfg, self.field)
        except OSError as error:
            raise ConfigError(f"data source {self.cfg.name!r}: {error}") from None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        file = int(np.searchsorted(self._ends, index, side="right"))
        return self.files[file][index - (int(self._ends[file - 1]) if file else 0)]

    @property
    def blocks(self) -> Sequence[int]:
        """Rows of the parts that are read as a whole, in order; empty if there are none such."""
        if not any(file.blocks for file in self.files):
            return ()
        return [size for file in self.files for size in (file.blocks or [1] * len(file))]


def decode(data: bytes, encoding: str) -> tuple[str, bool]:
    """Text of bytes, by their byte order mark or else by name; and whether some did not decode.

    Those come as U+FFFD.
    """
    for mark, named in _MARKS.items():
        if data.startswith(mark):
            data, encoding = data[len(mark) :], named
            break
    try:
        return data.decode(encoding), False
    except UnicodeDecodeError:
        return data.decode(encoding, errors="replace"), True


def _json_record(line: bytes, place: str, encoding: str) -> Record:
    text, lost = decode(line, encoding)
    if not text.strip():
        return Record({}, place, lost, "empty")
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Record({}, place, lost, f"is no JSON: {error}")
    return _object_record(row, place, lost)


def _object_record(row: Any, place: str, lost: bool) -> Record:
    if not isinstance(row, dict):
        return Record({}, place, lost, f"is no JSON object: {row!r:.40}")
    return Record(row, place, lost)


def _line_starts(path: Path) -> np.ndarray:
    """Where each line of a file that is not blank starts, and the end of the file."""
    found = [np.zeros(1, np.int64)]
    at = 0
    with path.open("rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise ConfigError(f"{path} is UTF-16 or UTF-32; JSONL files are to be UTF-8")
        file.seek(0)
        while data := file.read(_STRETCH):
            breaks = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n"))
            found.append(breaks.astype(np.int64) + at + 1)
            at += len(data)
    edges = np.concatenate([*found, [at]])
    # A line of its break alone is nothing, and so is what follows the last break.
    kept = np.diff(edges) > 1
    kept[-1] = edges[-1] > edges[-2]
    return np.append(edges[:-1][kept], at)


def _table_record(table: Any, row: int, place: str) -> Record:
    try:
        return Record({n: table.column(n)[row].as_py() for n in table.schema.names}, place)
    except UnicodeDecodeError as error:
        return Record({}, place, problem=f"is no UTF-8: {error}")


def _columns(path: Path, names: Sequence[str], cfg: SourceConfig) -> list[str]:
    needed = ("chosen", "rejected") if cfg.kind == "preference" else (cfg.column,)
    for name in needed:
        if name not in names:
            raise ConfigError(f"{path} has no column {name!r}; it has {', '.join(names)}")
    beside = ("tools", "prompt") if cfg.kind == "preference" else ("tools",)
    return [*needed, *(name for name in beside if name in names and name not in needed)]


def _parquet(path: Path) -> Any:
    """The open file, one a thread: readers are not to be shared."""
    import pyarrow
    import pyarrow.parquet

    known = _open_files.__dict__.setdefault("parquet", {})
    if path not in known:
        try:
            known[path] = pyarrow.parquet.ParquetFile(path, memory_map=True)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise ConfigError(f"{path} is no Parquet file: {error}") from None
    return known[path]


_open_files = threading.local()


def _arrow_batches(path: Path) -> list[Any]:
    import pyarrow

    try:
        reader = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
        return [batch for batch in reader if len(batch)]
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ConfigError(f"{path} is no Arrow file of `save_to_disk`: {error}") from None


def _format_of(path: Path) -> str:
    if path.is_dir():
        return "datasets"
    suffix = path.suffix.lower()
    if suffix == ".json":  # Often of an object a line.
        with path.open("rb") as file:
            start, _ = decode(file.read(_START), "utf-8")
        return "json" if start.lstrip().startswith("[") else "jsonl"
    return _SUFFIXES.get(suffix, "text")


def _check_encoding(cfg: SourceConfig) -> None:
    try:
        b"text".decode(cfg.encoding, "replace")
    except (LookupError, ValueError) as error:
        raise ConfigError(f"data source {cfg.name!r}: encoding {cfg.encoding!r}: {error}") from None


def _expand(cfg: SourceConfig) -> list[Path]:
    """Files and folders of `save_to_disk` that the patterns match, each once, in sorted order."""
    if not cfg.paths:
        raise ConfigError(f"data source {cfg.name!r} names no paths")
    found: dict[str, Path] = {}
    for pattern in cfg.paths:
        matches = sorted(Path(p) for p in glob.glob(pattern, recursive=True))
        if not any(_readable(path) for path in matches):
            raise ConfigError(f"data source {cfg.name!r}: {pattern!r} matches no file")
        for path in filter(_readable, matches):
            found.setdefault(os.path.realpath(path), path)
    packed = [str(path) for path in found.values() if path.suffix.lower() in _PACKED]
    if packed:
        raise ConfigError(f"data source {cfg.name!r}: unpack {', '.join(packed[:3])} first")
    return list(found.values())


def _readable(path: Path) -> bool:
    if path.is_dir() and (path / "dataset_dict.json").exists():
        raise ConfigError(f"{path} holds several splits; name one of them, as {path / 'train'}")
    return path.is_file() or (path / "state.json").is_file()


def _stdlib() -> list[Path]:
    """The source files of Python's standard library, without its tests."""
    root = sysconfig.get_paths()["stdlib"]
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    found = []
    for folder, below, names in os.walk(root):
        below[:] = sorted(set(below) - left_out)
        found += [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
    return found
