"""`mmjax serve` with OpenAI's own client: answers, streams, tools, errors, hang-ups, failures."""

import asyncio
import concurrent.futures
import contextlib
import http.client
import json
import socket
import time
import urllib.request

import jsonschema_rs
import openai
import pytest

from mmjax.engine.results import Output, TokenLogprob
from mmjax.serve import ServeConfig
from mmjax.serve.openapi import describe
from mmjax.serve.replies import TextChoice
from tests.mmjax.engines import byte_tokenizer
from tests.mmjax.serving import CHAT, TEXT, ScriptedEngine, described, get, post, serving

CALL = '{"name": "add", "arguments": {"a": 1, "b": 2}}'
SCRIPTS = {
    "plain": "Grüße, 世界 🎉",
    "think": "<think>\nHm.\n</think>\n\nFour",
    "call": f"<think>\nAdd.\n</think>\nSo:\n<tool_calls>\n{CALL}\n{CALL}\n</tool_calls>",
    "bad call": "<tool_calls>\n{name: add}\n</tool_calls>",
}
TOOL = {"type": "function", "function": {"name": "add", "description": "a + b"}}


def script(prompt):
    texts = SCRIPTS | {"long": "x" * 1900}
    return next((text for key, text in texts.items() if f"say {key}" in prompt), "?")


@pytest.fixture(scope="module")
def engine():
    return ScriptedEngine(script)


@pytest.fixture(scope="module")
def address(engine):
    with serving(engine) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def said(key):
    """The reply without its thinking."""
    return SCRIPTS[key].rpartition("</think>")[2].lstrip()


def asking(key):
    return {"model": "tiny", "messages": [{"role": "user", "content": f"say {key}"}]}


def chat(client, key, **options):
    return client.chat.completions.create(**asking(key), **options)


def streamed(client, key, **options):
    """The choices of a chat, added up from the chunks of a stream, and the last chunk."""
    choices = {}
    for chunk in chat(client, key, stream=True, **options):
        for part in chunk.choices:
            whole = choices.setdefault(
                part.index, {"content": "", "reasoning": "", "calls": [], "logprobs": []}
            )
            delta = part.delta
            whole["content"] += delta.content or ""
            whole["reasoning"] += getattr(delta, "reasoning_content", None) or ""
            whole["calls"] += [
                (call.index, call.function.name, call.function.arguments)
                for call in delta.tool_calls or ()
            ]
            whole["logprobs"] += [t.token for t in part.logprobs.content] if part.logprobs else []
            assert "finish" not in whole
            if part.finish_reason:
                whole["finish"] = part.finish_reason
    return choices, chunk


def settled(engine, seconds=5.0):
    """Waits until the engine holds nothing."""
    end = time.monotonic() + seconds
    while engine.samples and time.monotonic() < end:
        time.sleep(0.01)
    return not engine.samples


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == ("tiny", "mmjax")
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="the model 'huge' does not exist"):
        client.models.retrieve("huge")


def test_chat(client):
    answer = chat(client, "plain")
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == SCRIPTS["plain"]
    assert choice.finish_reason == "stop"
    assert choice.logprobs is None
    assert answer.id.startswith("chatcmpl-")
    assert answer.usage.completion_tokens == len(SCRIPTS["plain"].encode()) + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


def test_content_in_parts_is_one_prompt(client):
    parts = [{"type": "text", "text": "say "}, {"type": "text", "text": "plain"}]
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": parts}]
    )
    assert answer.choices[0].message.content == SCRIPTS["plain"]


def test_thinking_is_apart(client):
    message = chat(client, "think").choices[0].message
    assert (message.reasoning_content, message.content) == ("Hm.", "Four")


def test_streamed_chat_adds_up_to_the_whole(client):
    for key in SCRIPTS:
        message = chat(client, key, tools=[TOOL]).choices[0].message
        choices, _ = streamed(client, key, tools=[TOOL])
        assert choices[0]["content"] == (message.content or "")
        assert choices[0]["reasoning"] == getattr(message, "reasoning_content", "")
        assert [c[1:] for c in choices[0]["calls"]] == [
            (c.function.name, c.function.arguments) for c in message.tool_calls or ()
        ]


def test_stream_comes_piece_by_piece_with_usage(client):
    stream = chat(client, "plain", stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len(chunks) > len(SCRIPTS["plain"]) / 2
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(SCRIPTS["plain"].encode()) + 1
    assert chunks[-2].choices[0].finish_reason == "stop"


def test_tool_calls(client):
    message = chat(client, "call", tools=[TOOL]).choices[0].message
    assert message.content == "So:"
    assert message.reasoning_content == "Add."
    assert len({call.id for call in message.tool_calls}) == 2
    for call in message.tool_calls:
        assert call.function.name == "add"
        assert json.loads(call.function.arguments) == {"a": 1, "b": 2}
    assert chat(client, "call", tools=[TOOL]).choices[0].finish_reason == "tool_calls"
    choices, _ = streamed(client, "call", tools=[TOOL])
    assert [call[0] for call in choices[0]["calls"]] == [0, 1]
    assert choices[0]["finish"] == "tool_calls"


def test_the_reply_goes_back_with_results(client, engine):
    """The client's own message objects are what it sends back."""
    message = chat(client, "call", tools=[TOOL]).choices[0].message
    history = [*asking("call")["messages"], message]
    history += [
        {"role": "tool", "tool_call_id": call.id, "content": "3"} for call in message.tool_calls
    ]
    prompts = []
    engine.script = lambda prompt: prompts.append(prompt) or script(prompt)
    client.chat.completions.create(model="tiny", messages=history, tools=[TOOL])
    engine.script = script
    assert prompts[0].count("tool name: add\ntool result: 3\n\n") == 2
    assert f"So:\n<tool_calls>\n{CALL}\n{CALL}\n</tool_calls>" in prompts[0]
    assert '<tools>\n{"name": "add", "description": "a + b", "parameters": {}}\n' in prompts[0]


def test_what_is_no_call_stays_text(client):
    for key, options in (
        ("bad call", {"tools": [TOOL]}),
        ("call", {}),
        ("call", {"tools": [TOOL], "tool_choice": "none"}),
    ):
        choice = chat(client, key, **options).choices[0]
        assert choice.message.tool_calls is None
        assert choice.finish_reason == "stop"
        assert choice.message.content == said(key)


def test_stop_limits_and_samples(client):
    answer = chat(client, "plain", n=3, max_completion_tokens=4, stop=["世"])
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert {c.message.content for c in answer.choices} == {"Grü"}
    assert {c.finish_reason for c in answer.choices} == {"length"}
    assert chat(client, "plain", stop=", ").choices[0].message.content == "Grüße"


def test_sampling_reaches_the_engine(client, engine):
    given = {"temperature": 0.5, "top_p": 0.25, "seed": 7, "stop": ["a", "b"], "max_tokens": 9}
    own = {
        "top_k": 3,
        "min_p": 0.125,
        "ignore_eos": True,
        "thinking_budget": 5,
        "repetition_halt": {"tokens": 10, "probability": 0.5},
        "stop_token_ids": [1, 2],
    }
    chat(client, "plain", **given, extra_body=own)
    params = list(engine.params.values())[-1]
    assert (params.temperature, params.top_p, params.seed) == (0.5, 0.25, 7)
    assert (params.stop, params.stop_ids, params.max_tokens) == (("a", "b"), (1, 2), 9)
    assert (params.top_k, params.min_p, params.ignore_eos) == (3, 0.125, True)
    assert (params.thinking_budget, params.logprobs, params.n) == (5, None, 1)
    assert (params.repetition_halt.tokens, params.repetition_halt.probability) == (10, 0.5)
    chat(client, "plain", extra_body={"repetition_halt": False})
    params = list(engine.params.values())[-1]
    assert params.repetition_halt is None
    assert (params.temperature, params.top_p) == (1.0, 1.0)
    assert params.max_tokens > 1900  # the rest of the context


def test_chat_logprobs(client):
    (choice,) = chat(client, "plain", logprobs=True, top_logprobs=2).choices
    tokens = choice.logprobs.content
    assert b"".join(bytes(t.bytes) for t in tokens[:-1]).decode() == SCRIPTS["plain"]
    assert tokens[0].token == "G"
    assert tokens[2].token == "bytes:\\xc3"
    assert tokens[0].logprob == -9999  # impossible, which JSON has no number for
    assert [(t.token, t.logprob) for t in tokens[0].top_logprobs] == [("!", -1.0), ('"', -2.0)]
    choices, _ = streamed(client, "plain", logprobs=True, top_logprobs=2)
    assert choices[0]["logprobs"] == [t.token for t in tokens]


def test_text_offsets_count_characters_of_several_tokens():
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("é!ab")
    logprobs = [TokenLogprob(i, -1.0, []) for i in ids]
    choice = TextChoice(0, tokenizer, logprobs=True)
    (chunk,) = choice.feed(Output("r", 0, ids, "é!ab", logprobs, "length", 1, 0))
    assert chunk["logprobs"]["text_offset"] == [0, 0, 1, 2, 3]


def test_completions(client):
    answer = client.completions.create(
        model="tiny", prompt=["say plain", "say think"], n=2, max_tokens=100, logprobs=1
    )
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    texts = [SCRIPTS["plain"]] * 2 + [SCRIPTS["think"]] * 2
    assert [c.text for c in answer.choices] == texts
    logprobs = answer.choices[2].logprobs
    assert "".join(logprobs.tokens[:-1]) == SCRIPTS["think"]
    assert logprobs.text_offset[:3] == [0, 1, 2]
    assert logprobs.token_logprobs[0] == -9999
    assert logprobs.top_logprobs[0] == {"!": -1.0, "<": -9999}
    assert answer.usage.prompt_tokens == len("say plain") + len("say think")


def test_completions_of_tokens_and_streams(client, engine):
    tokens = engine.tokenizer.encode("say think")
    for prompt in (tokens, [tokens]):
        answer = client.completions.create(model="tiny", prompt=prompt)
        assert answer.choices[0].text == SCRIPTS["think"][:16]
        assert answer.choices[0].finish_reason == "length"
    stream = client.completions.create(
        model="tiny", prompt="say plain", max_tokens=99, stream=True, logprobs=0
    )
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks) == SCRIPTS["plain"]
    assert chunks[-1].choices[0].finish_reason == "stop"
    tokens = [t for c in chunks for t in c.choices[0].logprobs.tokens]
    assert len(tokens) == len(SCRIPTS["plain"].encode()) + 1


def test_the_async_client_runs_requests_side_by_side(address):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as client:
            keys = [*SCRIPTS, *SCRIPTS]
            answers = await asyncio.gather(*(chat(client, key, n=2) for key in keys))
        for key, answer in zip(keys, answers, strict=True):
            for choice in answer.choices:
                assert choice.message.content == said(key)

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nowhere", 404), ("GET", CHAT, 405), ("POST", "/v1/models", 405)],
)
def test_wrong_paths(address, method, path, status):
    request = urllib.request.Request(f"{address}{path}", method=method)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=20)
    with caught.value as response:
        assert response.code == status
        assert path in json.loads(response.read())["error"]["message"]


def test_answers_are_as_described(client, address):
    for path, body in (
        (CHAT, asking("call") | {"tools": [TOOL], "logprobs": True}),
        (TEXT, {"model": "tiny", "prompt": "say plain", "logprobs": 2}),
    ):
        status, _, answer = post(address, path, body)
        assert status == 200
        jsonschema_rs.validate(described("Answer"), answer)
    assert json.loads(get(address, "/openapi.json")) == describe()


def test_api_key(engine):
    with serving(engine, config=ServeConfig(api_key="sésame")) as address:
        for headers in ({}, {"Authorization": "Bearer nonsense"}, {"Authorization": "sésame"}):
            encoded = {k: v.encode("latin-1", "replace") for k, v in headers.items()}
            status, told, body = post(address, CHAT, asking("plain"), encoded)
            assert status == 401
            assert body["error"]["code"] == "invalid_api_key"
            assert told["WWW-Authenticate"] == "Bearer"
        assert "ok" in get(address, "/health")
    with (
        serving(engine, config=ServeConfig(api_key="sesame")) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="sesame") as client,
    ):
        assert chat(client, "plain").choices[0].message.content == SCRIPTS["plain"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_slots(engine, stream):
    engine.delay = 0.005
    with serving(engine) as address:
        host, port = address.removeprefix("http://").split(":")
        body = json.dumps(asking("long") | {"stream": stream, "n": 3}).encode()
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s"
                % (len(body), body)
            )
            if stream:
                raw.recv(1000)
            while len(engine.samples) < 3:
                time.sleep(0.01)
        assert settled(engine)
        assert 'endpoint="/v1/chat/completions",status="499"} 1.0' in get(address, "/metrics")
    engine.delay = 0.0


def test_a_client_that_hangs_up_while_it_sends(address, engine):
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
    assert "ok" in get(address, "/health")


def test_a_full_queue_turns_requests_away():
    engine = ScriptedEngine(script, slots=2, delay=0.01)
    with (
        serving(engine, config=ServeConfig(max_waiting=1)) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        with chat(client, "long", stream=True, n=3) as stream:
            assert any(chunk.choices[0].delta.content for chunk in stream)
            status, headers, body = post(address, CHAT, asking("plain"))
            assert (status, headers["Retry-After"]) == (429, "1")
            assert body["error"]["code"] == "queue_full"
            assert "3 samples are running or waiting" in body["error"]["message"]
            page = get(address, "/metrics")
            assert "mmjax_running 2.0" in page
            assert "mmjax_waiting 1.0" in page
        assert settled(engine)
        assert chat(client, "plain").choices[0].message.content == SCRIPTS["plain"]


def test_an_engine_that_fails_says_so(caplog):
    engine = ScriptedEngine(script, delay=0.005)
    with (
        serving(engine) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as other,
    ):
        stream = iter(chat(client, "long", stream=True))
        next(stream)
        engine.broken = RuntimeError("the device is on fire")
        with pytest.raises(openai.APIError, match="the engine failed while it worked on this"):
            list(stream)
        assert "the device is on fire" in caplog.text
        assert "Traceback" in caplog.text
        status, _, body = post(address, CHAT, asking("plain"))
        assert (status, body["error"]["code"]) == (503, "engine_failed")
        with pytest.raises(urllib.error.HTTPError, match="503") as caught:
            get(address, "/health")
        with caught.value as response:
            assert json.loads(response.read()) == {"status": "failed", "error": "RuntimeError"}
        assert "mmjax_healthy 0.0" in get(address, "/metrics")
        assert "ok" not in other.models.list().data[0].id


def test_a_request_that_waits_when_the_engine_fails():
    engine = ScriptedEngine(script, delay=0.3)
    with serving(engine) as address:
        engine.broken = RuntimeError("broken")
        status, _, body = post(address, CHAT, asking("plain"))
        assert (status, body["error"]["type"]) == (500, "server_error")


def test_a_bug_in_one_request_is_its_own(engine, address):
    def broken(prompt):
        raise KeyError("bug")

    engine.script = broken
    status, _, body = post(address, CHAT, asking("plain"))
    engine.script = script
    assert status == 500
    assert "its log says why" in body["error"]["message"]
    assert post(address, CHAT, asking("plain"))[0] == 200


def test_a_silent_stream_shows_that_it_lives():
    engine = ScriptedEngine(script, delay=0.4)
    with serving(engine, config=ServeConfig(heartbeat=0.1)) as address:
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=20)
        body = json.dumps(asking("plain") | {"stream": True, "max_tokens": 1})
        connection.request("POST", CHAT, body)
        text = connection.getresponse().read().decode()
        connection.close()
    assert ": still working\n\n" in text
    assert text.endswith("data: [DONE]\n\n")


def test_metrics(client, address):
    chat(client, "plain")
    page = get(address, "/metrics")
    assert "mmjax_healthy 1.0" in page
    assert 'mmjax_requests_total{endpoint="/v1/chat/completions",status="200"}' in page
    assert "mmjax_time_to_first_token_seconds_bucket" in page
    for name in ("slots", "pages_total", "prompt_tokens_total", "generated_tokens_total"):
        assert f"\nmmjax_{name} " in page


@pytest.mark.parametrize("limit", [50, 1900])
def test_the_server_ends_after_its_requests_or_the_time_they_have(limit):
    """It waits for the short reply; the long one is cut off after two seconds."""
    engine, body = ScriptedEngine(script, delay=0.003), asking("long")
    body |= {"max_tokens": limit, "stream": True}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with serving(engine, drain=2) as address:
            read = pool.submit(_stream, address, json.dumps(body))
            while not engine.samples:
                time.sleep(0.01)
        assert engine.samples == []
        end = b"data: [DONE]" if limit == 50 else b'"code":"shutting_down"}}'
        assert read.result().strip().endswith(end)


def _stream(address, body):
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=20)
    with contextlib.closing(connection):
        connection.request("POST", CHAT, body)
        return connection.getresponse().read()
