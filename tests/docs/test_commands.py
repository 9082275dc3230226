"""What README.md, CONTRIBUTING.md and docs/ print exists; with -m commands, it runs as printed."""

import contextlib
import dataclasses
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import PIL.Image
import pytest

import mmjax
from docs.generate.gallery import examples
from tests.docs.blocks import PAGES, ROOT, blocks, commands, faults, python_faults, spans
from tests.mmjax.engines import byte_tokenizer
from tests.mmjax.programs import random_model

LANGUAGES = {"sh", "python", "text"}
# For one block, on a machine that is busy with other things.
SECONDS = 600
# Where the pages serve.
PORT = 8000


def _name(page):
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_blocks_are_commands_python_or_text(page):
    wrong = [f"line {b.line}: {b.language!r}" for b in blocks(page) if b.language not in LANGUAGES]
    assert not wrong, f"{_name(page)}: say ```sh, ```python or ```text: {wrong}"
    odd = [b.comment for b in blocks(page) if b.comment and not (b.reason or b.background)]
    assert not odd, odd


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_what_is_printed_exists(page):
    wrong = [fault for words in spans(page) for fault in faults(words)]
    for block in blocks(page):
        if block.language == "sh":
            found = [fault for words in commands(block.text) for fault in faults(words)]
        elif block.language == "python":
            found = python_faults(block.text)
        else:
            found = []
        wrong += [f"line {block.line}: {fault}" for fault in found]
    assert not wrong, f"{_name(page)}: {wrong}"


@pytest.mark.parametrize("example", examples(), ids=lambda e: e.name)
def test_commands_of_configs_exist(example):
    assert not [fault for words in commands(example.commands) for fault in faults(words)]


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("mmjax convrt A B", "no command convrt"),
        ("mmjax convert A B --two hf", "no --two"),
        ("python -m train --config=configs/demo.py --config.data.batch=3", "no key data.batch"),
        ("python -m train --config=configs/dem.py", "configs/dem.py does not exist"),
        ("python -m benchmarks.nothing", "no module benchmarks.nothing"),
        ("make tset", "no target tset"),
        ("vllm serve", "no program"),
    ],
)
def test_a_wrong_command_is_found(command, fault):
    (words,) = commands(command)
    assert any(fault in found for found in faults(words)), faults(words)


# Running them ------------------------------------------------------------------------------------


def _tiny(folder, vision=False):
    """A model folder of random weights with a tokenizer of bytes."""
    tokenizer = byte_tokenizer()
    layers = {"num_layers": 2, "layer_types": ("lightning", "softmax")}
    if vision:
        tokenizer.backend.add_special_tokens(["<image>"])
        cfg = mmjax.ModelConfig.from_hf(ROOT / "tests/golden/vl/tiny_two_images")
        seen = dataclasses.replace(cfg.vision, image_token_id=tokenizer.vocab_size - 1)
        cfg = dataclasses.replace(cfg, vision=seen, **layers)
    else:
        cfg = mmjax.ModelConfig.tiny(**layers)
    vocab = {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_id}
    floats = {"dtype": "float32", "param_dtype": "float32"}
    mmjax.save(random_model(dataclasses.replace(cfg, **vocab, **floats)), folder)
    tokenizer.save(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folders that the pages call path/to/….."""
    folder = tmp_path_factory.mktemp("path") / "to"
    for name in ("MiniMax-M1-80k", "model"):
        _tiny(folder / name)
    _tiny(folder / "MiniMax-VL-01", vision=True)
    return folder


@pytest.fixture
def checkout(models, tmp_path, tmp_path_factory):
    """A copy of the checkout with the files that the pages take for granted."""
    listed = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT)
    for name in listed.decode().split("\n"):
        if name and not name.startswith("tests/") and (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "to").symlink_to(models)
    compiled = tmp_path_factory.getbasetemp() / "compiled"
    if "PYTEST_XDIST_WORKER" in os.environ:  # One for all workers.
        compiled = compiled.parent.parent / "compiled"
    compiled.mkdir(exist_ok=True)
    (tmp_path / ".compiled").symlink_to(compiled)
    # Where mmjax is not installed, as on a machine that runs from a checkout alone.
    if shutil.which("mmjax", path=Path(sys.executable).parent) is None:
        shim = tmp_path / ".bin" / "mmjax"
        shim.parent.mkdir()
        shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m mmjax.cli "$@"\n')
        shim.chmod(0o755)
    for name in ("cat.jpg", "dog.png"):
        PIL.Image.new("RGB", (40, 30), (200, 80, 0)).save(tmp_path / name)
    return tmp_path


def _environment(checkout):
    paths = [str(Path(sys.executable).parent), str(checkout / ".bin"), os.environ["PATH"]]
    own = {"PATH": os.pathsep.join(paths), "PYTHONPATH": str(checkout), "COLUMNS": "100"}
    # The pages serve and ask the same models: each of their programs is compiled once.
    kept = {
        "JAX_COMPILATION_CACHE_DIR": str((checkout / ".compiled").resolve()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return os.environ | own | kept | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


def _run(command, checkout, **kwargs):
    result = subprocess.run(
        command,
        cwd=checkout,
        env=_environment(checkout),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        stdin=subprocess.DEVNULL,
        **kwargs,
    )
    assert result.returncode == 0, f"{command[-1]}\n{result.stdout}\n{result.stderr}"
    return result.stdout


class _Server:
    """A block that serves until it is told to stop; `ready` waits for its first answer."""

    def __init__(self, block, checkout):
        # All pages print the same port: one of them serves at a time, whichever process runs it.
        self._turn = (Path(tempfile.gettempdir()) / f"mmjax-port-{PORT}.lock").open("w")
        fcntl.flock(self._turn, fcntl.LOCK_EX)
        _wait_for_the_port()
        self._log = checkout / "server.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                ["bash", "-c", f"exec {block.text.strip()}"],
                cwd=checkout,
                env=_environment(checkout),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def ready(self):
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            assert self._process.poll() is None, self._log.read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5) as answer:
                    assert answer.status == 200
                    return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(f"not up after {SECONDS} s: {self._log.read_text()}")

    def stop(self):
        self._process.send_signal(signal.SIGTERM)
        assert self._process.wait(SECONDS) == 0, self._log.read_text()
        self._turn.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._turn.close()


def _runnable(page):
    return any(b.language in ("sh", "python") and not b.reason for b in blocks(page))


def _wait_for_the_port():
    """Waits until nobody, such as the tests of another checkout, listens where the pages say."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", PORT)):
                return
        time.sleep(1)
    raise AssertionError(f"port {PORT}, which the pages print, is in use; stop what listens there")


@pytest.mark.commands
@pytest.mark.parametrize("page", list(filter(_runnable, PAGES)), ids=_name)
def test_the_page_runs_as_printed(page, checkout):
    with contextlib.ExitStack() as servers:
        _run_page(page, checkout, servers)


def _run_page(page, checkout, servers):
    # The Python blocks of a page share their names, as they would in a session of a reader.
    python, server, before = [], None, None
    for block in blocks(page):
        if block.language == "text" and before is not None:
            assert _same(before, block.text), f"{_name(page)} line {block.line}:\n{before}"
        before = None
        if block.reason or block.language == "text":
            continue
        if block.background:
            server = servers.enter_context(_Server(block, checkout))
            server.ready()
        elif block.language == "sh":
            before = _run(["bash", "-euo", "pipefail", "-c", block.text], checkout)
        elif named := re.match(r"# (\S+\.py)\b", block.text):
            (checkout / named[1]).write_text(block.text)
        else:
            python.append(block.text)
            if server is not None:
                _run([sys.executable, "-c", "\n".join(python)], checkout)
                python.clear()
        if server is not None and block == _last_of_server(page):
            server.stop()
            server = None
    if python:
        _run([sys.executable, "-c", "\n".join(python)], checkout)


def _last_of_server(page):
    """The last block that talks to the server, or the one that starts it."""
    return [b for b in blocks(page) if b.background or f"127.0.0.1:{PORT}" in b.text][-1]


def _same(output, printed):
    """Whether a command printed what the page shows below it, spaces at ends of lines aside."""
    lines = [[line.rstrip() for line in text.strip().splitlines()] for text in (output, printed)]
    return lines[0] == lines[1]
