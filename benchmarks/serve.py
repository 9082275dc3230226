"""Many clients at `mmjax serve` for a while: are all answers right, how fast, does memory grow?

    .venv/bin/python -m benchmarks.serve [--path PATH] [--clients 64] [--seconds 60] [-- FLAGS]

PATH is a model folder; without it a tiny random model (about 1M parameters) is made. FLAGS are the
server's, which is a process of its own. Every question is asked once alone first; afterwards each
client asks one after another, half of them as streams, and compares every answer with that one,
token for token; one request in 16 is broken off. Prints a Markdown table. Ends with 1 if an answer
was wrong or lost, or the engine still held something at the end. Linux (reads /proc).
"""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import tokenizers
from flax import nnx
from tokenizers import decoders, models, pre_tokenizers

import mmjax
from mmjax.tokenizer import BOS, EOS, Tokenizer

QUESTIONS = 32
BREAK_OFF = 16
# Requests that may fail with a message: none should, so each of these counts as lost.
TRANSPORT_ERRORS = (OSError, http.client.HTTPException)


@dataclasses.dataclass
class Tally:
    """What the clients saw; times in seconds."""

    right: int = 0
    wrong: int = 0
    lost: int = 0
    broken_off: int = 0
    tokens: int = 0
    latency: list[float] = dataclasses.field(default_factory=list)
    first_token: list[float] = dataclasses.field(default_factory=list)
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)


def make_folder(folder: Path) -> None:
    """A tiny random M1 with a byte tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({char: n for n, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([BOS, EOS])
    tokenizer = Tokenizer(backend)
    cfg = mmjax.ModelConfig.tiny(vocab_size=tokenizer.vocab_size)
    mmjax.save(mmjax.Decoder(cfg, rngs=nnx.Rngs(0)), folder)
    tokenizer.save(folder)


def questions() -> list[dict[str, Any]]:
    """Prompts of 12 to 450 bytes, 8 to 70 new tokens; greedy and sampled ones by turns."""
    return [
        {
            "prompt": f"Question {n}: " + "and why? " * (n * n // 20),
            "max_tokens": 8 + 2 * n,
            "temperature": n % 2,
            "seed": n,
            "logprobs": 0,
        }
        for n in range(QUESTIONS)
    ]


class Client:
    """One kept connection."""

    def __init__(self, address: str, model: str) -> None:
        self._connection = http.client.HTTPConnection(address, timeout=120)
        self._model = model

    def ask(self, question: dict[str, Any], stream: bool) -> Iterator[list[str]]:
        """The tokens of the answer, as they come."""
        body = json.dumps(question | {"model": self._model, "stream": stream})
        self._connection.request("POST", "/v1/completions", body)
        response = self._connection.getresponse()
        if response.status != 200:
            raise http.client.HTTPException(response.read().decode())
        if not stream:
            yield json.loads(response.read())["choices"][0]["logprobs"]["tokens"]
            return
        done = False
        for line in response:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])["choices"][0]["logprobs"]["tokens"]
            done = done or line.startswith(b"data: [DONE]")
        if not done:
            raise http.client.HTTPException("the stream broke off")

    def close(self) -> None:
        """Hangs up."""
        self._connection.close()


def run_client(
    number: int, address: str, model: str, right: list[list[str]], end: float, tally: Tally
) -> None:
    """Asks until the time is over."""
    client, asked = Client(address, model), questions()
    turn = number
    while time.monotonic() < end:
        turn += 1
        pick = 7 * turn % len(asked)
        start, first, tokens = time.perf_counter(), 0.0, []
        try:
            for part in client.ask(asked[pick], stream=turn % 2 == 0):
                first = first or time.perf_counter() - start
                tokens += part
                if turn % BREAK_OFF == 0:
                    break
        except TRANSPORT_ERRORS as error:
            print(f"lost: {error!r}", file=sys.stderr)
            tokens = []
        seconds = time.perf_counter() - start
        if turn % BREAK_OFF == 0 or not tokens:
            client.close()
            client = Client(address, model)
        _count(tally, turn, tokens, right[pick], seconds, first)
    client.close()


def _count(
    tally: Tally, turn: int, tokens: list[str], right: list[str], seconds: float, first: float
) -> None:
    with tally.lock:
        if not tokens:
            tally.lost += 1
        elif turn % BREAK_OFF == 0:
            tally.broken_off += 1
        elif tokens != right:
            tally.wrong += 1
        else:
            tally.right += 1
            tally.tokens += len(tokens)
            tally.latency.append(seconds)
            if turn % 2 == 0:
                tally.first_token.append(first)


def start_server(path: Path, flags: list[str]) -> tuple[subprocess.Popen[str], str]:
    """The process and its host:port."""
    program = [sys.executable, "-m", "mmjax.cli", "serve", str(path), "--port=0"]
    process = subprocess.Popen(
        [*program, "--name=model", "--log-level=warning", *flags], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        print(line, end="", file=sys.stderr)
        if found := re.search(r"serving model at http://(\S+)/v1", line):
            # What else it says must not fill the pipe.
            threading.Thread(target=_pass_on, args=(process,), daemon=True).start()
            return process, found[1]
    raise SystemExit("the server did not start")


def _pass_on(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        print(line, end="", file=sys.stderr)


def resident(process: subprocess.Popen[str]) -> float:
    """MB of memory that the process holds."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1000


def leftovers(address: str) -> dict[str, float]:
    """What the engine holds: samples that run or wait, and pages that no kept prefix holds."""
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request("GET", "/metrics")
    page = connection.getresponse().read().decode()
    connection.close()
    value = {k: float(v) for k, v in re.findall(r"^mmjax_(\w+) (\S+)$", page, re.MULTILINE)}
    return {
        "running": value["running"],
        "waiting": value["waiting"],
        "pages": value["pages_used"] - value["pages_cached"],
    }


def measure(process: subprocess.Popen[str], address: str, clients: int, seconds: float) -> bool:
    """Prints the table; True if all is well."""
    alone = Client(address, "model")
    right = [[t for part in alone.ask(q, stream=False) for t in part] for q in questions()]
    alone.close()
    tally, end = Tally(), time.monotonic() + seconds
    threads = [
        threading.Thread(target=run_client, args=(n, address, "model", right, end, tally))
        for n in range(clients)
    ]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    memory = []
    while any(thread.is_alive() for thread in threads):
        memory.append(resident(process))
        time.sleep(0.5)
    elapsed = time.perf_counter() - start
    time.sleep(1.0)  # for the last hang-ups
    left = leftovers(address)
    _print(tally, elapsed, clients, memory, left)
    return not (tally.wrong or tally.lost or any(left.values()))


def _print(
    tally: Tally, elapsed: float, clients: int, memory: list[float], left: dict[str, float]
) -> None:
    print(f"| {clients} clients, {elapsed:.0f} s | |\n|---|---|")
    print(f"| right / wrong / lost | {tally.right} / {tally.wrong} / {tally.lost} |")
    print(f"| broken off by the client | {tally.broken_off} |")
    print(f"| requests/s, tokens/s | {tally.right / elapsed:.1f}, {tally.tokens / elapsed:.0f} |")
    for name, values in (("latency", tally.latency), ("first token", tally.first_token)):
        at = statistics.quantiles(values, n=100)
        told = ", ".join(f"{1000 * at[p - 1]:.0f}" for p in (50, 95, 99))
        print(f"| {name} p50, p95, p99 (ms) | {told} |")
    fifth = len(memory) // 5  # at first buffers grow to the size that the load needs
    print(
        f"| server's memory (MB): start, after a fifth, end | "
        f"{memory[0]:.0f}, {memory[fifth]:.0f}, {memory[-1]:.0f} |"
    )
    print(f"| left in the engine | {', '.join(f'{k} {v:.0f}' for k, v in left.items())} |")


def main() -> int:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--path", type=Path, help="model folder (a tiny random model)")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("flags", nargs="*", help="of mmjax serve, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        if args.path is None:
            jax.config.update("jax_platforms", "cpu")
            make_folder(Path(made))
        process, address = start_server(args.path or Path(made), args.flags)
        try:
            well = measure(process, address, args.clients, args.seconds)
        finally:
            process.terminate()
            process.wait()
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
