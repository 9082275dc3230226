"""The server on the real engine: OpenAI's client, many clients at once, hang-ups, SIGTERM."""

import argparse
import asyncio
import collections
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error

import httpx2
import hypothesis
import jsonschema_rs
import numpy as np
import openai
import pytest
import schemathesis
from flax import nnx

import mmjax
from mmjax import cli
from mmjax.convert.params import by_name
from mmjax.engine import Engine, SamplingParams
from mmjax.serve import cli as serve_cli
from mmjax.serve.openapi import describe
from tests.mmjax.programs import random_model, small_config
from tests.mmjax.serving import CHAT, TEXT, byte_tokenizer, described, get, serving

MESSAGES = [{"role": "user", "content": "1 + 2?"}]
TOOL = {"type": "function", "function": {"name": "add"}}
# What the model of `chain` says, token by token, after the last "\n" of a prompt.
SAYS = (
    "<thi", "nk>", "Add", " them", ".", "</th", "ink>\n\n", "So:", " ", "<tool", "_calls>",
    '{"name": "add"', ', "arguments": {"a"', ": 1}}", "</tool_calls>",
)  # fmt: skip


def layers(tokenizer, **changes):
    kinds = {"num_layers": 2, "layer_types": ("lightning", "softmax")}
    return random_model(small_config(**kinds, vocab_size=tokenizer.vocab_size, **changes))


def chain(tokenizer):
    """A model in which every token follows from the one before it: it says SAYS, then ends."""
    (start,) = tokenizer.encode("\n")
    path = [start, *map(tokenizer.backend.token_to_id, SAYS), tokenizer.eos_id]
    model = layers(tokenizer, hidden_size=24)
    weights = by_name(nnx.state(model))
    for name, weight in weights.items():
        value = np.zeros(weight.shape, np.float32) if "scale" not in name else np.ones(weight.shape)
        if name == "embed.embedding":
            value[:, 0] = 1
            value[path] = np.eye(len(path), 24)
        elif name == "head.kernel":
            value[: len(path) - 1, path[1:]] = 9 * np.eye(len(path) - 1)
        weight.set_value(weight.get_value().at[:].set(value.astype(np.float32)))
    return model


@pytest.fixture(scope="module")
def engine():
    """A random model, which says what nobody can foresee but everybody can repeat."""
    tokenizer = byte_tokenizer()
    sizes = {"page_size": 16, "prefill_chunk": 16, "prefix_block": 16}
    engine = Engine(layers(tokenizer), tokenizer, max_slots=4, max_length=192, **sizes)
    engine.warm_up()
    return engine


def questions():
    """Completions of many kinds, each with one right answer."""
    for n in range(8):
        yield {"prompt": "why? " * (n + 1), "max_tokens": 3 + 5 * n, "temperature": 0.0}
        yield {"prompt": f"how {n}", "max_tokens": 24, "seed": n, "top_p": 0.9, "n": 1 + n % 2}


def params(question):
    given = {key: value for key, value in question.items() if key != "prompt"}
    return SamplingParams(**given, logprobs=0)


def tokens_of(choice, tokenizer):
    """What logprobs say that a choice consists of."""
    return b"".join(
        bytes.fromhex(token[6:].replace("\\x", "")) if token[:6] == "bytes:" else token.encode()
        for token in choice.logprobs.tokens
    )


@pytest.fixture(scope="module")
def answers(engine):
    """Of each question: the bytes of each sample, asked alone."""
    return [
        [
            b"".join(map(engine.tokenizer.token_bytes, done.token_ids))
            for done in engine.generate([question["prompt"]], params(question))
        ]
        for question in questions()
    ]


def idle(engine, seconds=10.0):
    """Whether the engine comes to hold nothing but kept prefixes."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        stats = engine.stats()
        if not (stats.running or stats.waiting or stats.pages_used - stats.pages_cached):
            return True
        time.sleep(0.05)
    return False


async def _ask(client, question, stream):
    """The bytes of each sample."""
    options = question | {"model": "tiny", "logprobs": 0}
    if not stream:
        answer = await client.completions.create(**options)
        return [tokens_of(choice, None) for choice in answer.choices]
    samples = [b""] * question.get("n", 1)
    async for chunk in await client.completions.create(**options, stream=True):
        for choice in chunk.choices:
            samples[choice.index] += tokens_of(choice, None)
    return samples


async def _hang_up(client, question):
    async with await client.completions.create(
        **question | {"model": "tiny", "max_tokens": 140}, stream=True
    ) as stream:
        async for _ in stream:
            return


async def _client(address, number, rounds, answers):
    """One client's requests, one after another; every eighth is broken off."""
    right = 0
    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as client:
        for turn in range(rounds):
            pick = (7 * number + 3 * turn) % len(answers)
            question = list(questions())[pick]
            if (number + turn) % 8 == 0:
                await _hang_up(client, question)
            right += await _ask(client, question, stream=turn % 2 == 0) == answers[pick]
    return right


def test_64_clients_get_their_own_right_answers(engine, answers):
    async def run(address):
        return await asyncio.gather(*(_client(address, n, 3, answers) for n in range(64)))

    with serving(engine) as address:
        assert asyncio.run(run(address)) == [3] * 64
        assert idle(engine)
        page = get(address, "/metrics")
        assert "\nmmjax_running 0.0" in page
        assert "\nmmjax_waiting 0.0" in page
        generated = float(re.search(r"^mmjax_generated_tokens_total (\S+)", page, re.M)[1])
        assert generated > 64 * 3 * 3


def test_what_the_engine_refuses_is_a_400(engine):
    with (
        serving(engine) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        with pytest.raises(openai.BadRequestError, match="100000"):
            client.completions.create(model="tiny", prompt=[5, 100_000])
        with pytest.raises(openai.BadRequestError, match="the model takes 192 in all"):
            client.completions.create(model="tiny", prompt="x" * 192)
        with pytest.raises(openai.BadRequestError, match="max_tokens=192 is too many"):
            client.completions.create(model="tiny", prompt="x", max_tokens=192)
        assert (
            client.completions.create(model="tiny", prompt="x" * 191).usage.completion_tokens == 1
        )
    assert idle(engine)


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_nothing_that_fits_or_breaks_the_description_makes_a_500(engine, path, mode):
    """Schemathesis makes bodies of the description, right ones and wrong ones."""
    bodies = schemathesis.openapi.from_dict(describe())[path]["POST"].as_strategy(
        generation_mode=mode
    )
    counts = collections.Counter()

    # Most bodies fail for their model or messages; with good ones, their other fields count.
    good = {"messages": MESSAGES} if path == CHAT else {"prompt": "why?"}
    mended = hypothesis.strategies.sampled_from([None, {}, good])

    @hypothesis.settings(
        max_examples=60,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(bodies, mended)
    def send(case, mend):
        body = case.body
        if isinstance(body, dict) and mend is not None:
            body = _whole_numbers(body | mend | {"model": "tiny", "max_tokens": 4})
        answer = client.post(path, **_as_request(body))
        counts[answer.status_code] += 1
        assert answer.status_code < 500, answer.text
        if answer.status_code != 200:
            jsonschema_rs.validate(described("ErrorBody"), answer.json())

    with serving(engine) as address, httpx2.Client(base_url=address, timeout=60) as client:
        send()
        assert idle(engine)
        assert "ok" in get(address, "/health")
    assert counts[400] > 5
    assert mode == schemathesis.GenerationMode.NEGATIVE or counts[200] > 3, counts


def _whole_numbers(body):
    """To JSON schema 7.0 is an integer, to the server it is not: it would refuse most bodies."""
    return json.loads(
        json.dumps(body), parse_float=lambda x: int(x[:-2]) if x[-2:] == ".0" else 0.5
    )


def _as_request(body):
    """Bytes as they are, what JSON can say as JSON."""
    if isinstance(body, bytes):
        return {"content": body}
    return {"content": b""} if type(body).__name__ == "NotSet" else {"content": json.dumps(body)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder with the chain model and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "chain"
    tokenizer = byte_tokenizer(SAYS)
    mmjax.save(chain(tokenizer), folder)
    tokenizer.save(folder)
    return folder


def start(folder, *flags, env=None):
    """A `mmjax serve` process and the address that it tells."""
    program = [sys.executable, "-m", "mmjax.cli", "serve", str(folder), "--port=0", *flags]
    process = subprocess.Popen(
        program,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | (env or {}),
    )
    told = []
    for line in process.stderr:
        told.append(line)
        if found := re.search(r"serving chain at (\S+)/v1", line):
            return process, found[1], "".join(told)
    raise AssertionError("".join(told))


def test_a_served_folder_until_sigterm(folder):
    """Chat, thinking, tools, logprobs, stop; then running requests end and new ones find no one."""
    process, address, told = start(
        folder, "--max-slots=2", "--max-length=4096", "--prefill-chunk=16", "--host=0.0.0.0"
    )
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    try:
        assert "0.0.0.0 can be reached from other machines, and no API key is asked for" in told
        address = address.replace("0.0.0.0", "127.0.0.1")
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            _check_chat(client)
            _check_drain(process, client, address)
        rest = process.communicate(timeout=30)[1]
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()
    assert process.returncode == 0, rest
    assert "Traceback" not in rest


def _check_chat(client):
    create = client.chat.completions.create
    (choice,) = create(
        model="chain", messages=MESSAGES, tools=[TOOL], temperature=0, logprobs=True
    ).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.reasoning_content == "Add them."
    assert choice.message.content == "So:"
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 1})
    assert [t.token for t in choice.logprobs.content[:-1]] == list(SAYS)
    chunks = list(create(model="chain", messages=MESSAGES, tools=[TOOL], stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(getattr(d, "reasoning_content", "") for d in deltas) == "Add them."
    assert [c.function.name for d in deltas for c in d.tool_calls or ()] == ["add"]
    (choice,) = create(model="chain", messages=MESSAGES, stop="<tool").choices
    assert (choice.message.content, choice.finish_reason) == ("So: ", "stop")
    halt = {"repetition_halt": {"tokens": 4, "probability": 0.5}}
    (choice,) = create(model="chain", messages=MESSAGES, extra_body=halt).choices
    assert (choice.finish_reason, choice.stop_reason) == ("length", "repetition")
    (choice,) = create(model="chain", messages=MESSAGES, extra_body={"thinking_budget": 3}).choices
    assert choice.message.reasoning_content == "Add"


def _check_drain(process, client, address):
    stream = client.completions.create(
        model="chain", prompt="\n", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    )
    seen = [next(stream)]
    process.send_signal(signal.SIGTERM)
    refused = False
    for chunk in stream:
        seen.append(chunk)
        refused = refused or _is_refused(address)
    assert seen[-1].choices[0].finish_reason == "length"
    assert refused


def _is_refused(address):
    try:
        get(address, "/health")
    except (urllib.error.URLError, ConnectionError):
        return True
    return False


def test_wrong_flags(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MMJAX_API_KEY", raising=False)
    (tmp_path / "key").write_text("\n")
    for flags, told in (
        (["--host=192.0.2.1"], "cannot bind 192.0.2.1:8000: "),  # nobody's address
        (["--host=no.such.host.invalid"], "cannot bind no.such.host.invalid:8000"),
        (["--api-key-file", str(tmp_path / "key")], "key must be printable ASCII, and not empty"),
        (["--api-key-file", str(tmp_path / "none")], "No such file"),
        (["--port=0", "--max-slots=0"], "max_slots"),
        (["--compilation-cache=/dev/null/a"], "--compilation-cache /dev/null/a cannot be written"),
    ):
        assert cli.main(["serve", str(folder), *flags]) == 2
        assert told in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert cli.main(["serve", str(tmp_path / "empty"), "--port=0"]) == 2
    assert "mmjax serve: error:" in capsys.readouterr().err
    for flag, told in (
        ("--max-waiting=-1", "invalid count value: '-1'"),
        ("--port=99999", "--port: invalid choice: 99999"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["serve", str(folder), flag])
        assert told in capsys.readouterr().err


def test_the_api_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    (tmp_path / "key").write_text("from file\n")
    monkeypatch.setenv("MMJAX_API_KEY", "from environment")
    parser = argparse.ArgumentParser()
    serve_cli.add_arguments(parser)
    flags = ["folder", "--api-key-file", str(tmp_path / "key")]
    assert serve_cli._api_key(parser.parse_args(flags)) == "from file"
    assert serve_cli._api_key(parser.parse_args(flags[:1])) == "from environment"
    monkeypatch.delenv("MMJAX_API_KEY")
    assert serve_cli._api_key(parser.parse_args(flags[:1])) is None


def test_what_is_not_installed_is_said(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mmjax.serve", None)
    with pytest.raises(SystemExit):
        cli.main(["serve", "folder"])
    assert "pip install 'mmjax[serve]'" in capsys.readouterr().err
