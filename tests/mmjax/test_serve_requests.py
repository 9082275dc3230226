"""What is wrong with a request is said in a 4xx that names it; nothing that is sent makes a 500."""

import socket

import jsonschema_rs
import pytest

from mmjax.serve import ServeConfig
from tests.mmjax.serving import CHAT, TEXT, ScriptedEngine, described, get, post, serving

USER = {"role": "user", "content": "hi"}
GOOD = {CHAT: {"model": "tiny", "messages": [USER]}, TEXT: {"model": "tiny", "prompt": "x"}}
# path, body (fields added to a good one; or bytes), status, what the message says, param
MALFORMED = [
    (CHAT, b"{", 400, "the body is not JSON: EOF while parsing", None),
    (CHAT, b"", 400, "the body is not JSON", None),
    (CHAT, b'{"model": "\xff\xfe"}', 400, "the body is not JSON: invalid unicode", None),
    (CHAT, b'{"model": "\\ud800"}', 400, "the body is not JSON", None),
    (CHAT, b'{"model": "tiny", "temperature": NaN}', 400, "the body is not JSON", None),
    (CHAT, b"[" * 100_000, 400, "the body is not JSON: recursion limit", None),
    (CHAT, b"[1]", 400, "the body must be a JSON object, got [1]", None),
    (CHAT, b'"' + b"x" * 3_000_000 + b'"', 413, "the body has more than 2000000 bytes", None),
    (CHAT, {"model": None}, 400, "model: Input should be a valid string; got null", "model"),
    (CHAT, {"model": "huge"}, 404, "'huge' does not exist; this server has 'tiny'", "model"),
    (CHAT, {"model": "x" * 10**6}, 404, "the model 'xxxx", "model"),
    (CHAT, {"x" * 10**6: 1}, 400, 'unknown field "xxxx', "x" * 99 + "…"),
    (CHAT, {"messages": None}, 400, "messages: Input should be a valid list", "messages"),
    (CHAT, {"messages": []}, 400, "messages: List should have at least 1 item", "messages"),
    (CHAT, {"messages": [USER, 3]}, 400, "got 3", "messages[1]"),
    (CHAT, {"messages": [{"role": "robot"}]}, 400, "'robot'", "messages[0]"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "is missing", "messages[0].content"),
    (CHAT, {"messages": [USER | {"content": 3}]}, 400, "got 3", "messages[0].content"),
    (
        CHAT,
        {"messages": [USER | {"content": [{"type": "input_audio", "input_audio": {}}]}]},
        400,
        "does not match any of the expected tags: 'text', 'image_url'",
        "messages[0].content[0]",
    ),
    (CHAT, {"messages": [{"role": "tool", "content": "3"}]}, 400, "tool of a result", "messages"),
    (CHAT, {"messages": [{"role": "assistant"}]}, 400, "must be a string or a list", "messages"),
    (CHAT, {"messages": [USER | {"content": "x" * 2000}]}, 400, "the model takes 2000", "messages"),
    (CHAT, {"max_tokens": -1}, 400, "greater than or equal to 1; got -1", "max_tokens"),
    (CHAT, {"max_tokens": 0}, 400, "got 0", "max_tokens"),
    (CHAT, {"max_tokens": "9"}, 400, 'valid integer; got "9"', "max_tokens"),
    (CHAT, {"max_tokens": 1.5}, 400, "got 1.5", "max_tokens"),
    (CHAT, {"max_tokens": 10**30}, 400, "max_tokens", "max_tokens"),
    (CHAT, {"max_tokens": 1999}, 400, "max_tokens=1999 is too many: the prompt has", "max_tokens"),
    (CHAT, {"max_tokens": 1, "max_completion_tokens": 2}, 400, "not both", "max_tokens"),
    (CHAT, {"n": 10**9}, 400, "less than or equal to 128; got 1000000000", "n"),
    (CHAT, {"n": 128}, 400, "128 samples (prompts x n) are more than the 20 that fit", None),
    (CHAT, {"n": True}, 400, "valid integer; got true", "n"),
    (CHAT, {"temperature": -1}, 400, "got -1", "temperature"),
    (CHAT, {"temperature": "hot"}, 400, 'got "hot"', "temperature"),
    (CHAT, {"top_p": 0}, 400, "greater than 0; got 0", "top_p"),
    (CHAT, {"stop": 3}, 400, "valid string or: Input should be a valid list; got 3", "stop"),
    (CHAT, {"stop": [""]}, 400, "at least 1 character", "stop[0]"),
    (CHAT, {"stop": ["x"] * 17}, 400, "at most 16 items", "stop"),
    (CHAT, {"seed": 2**70}, 400, "seed", "seed"),
    (CHAT, {"stream": "yes"}, 400, "valid boolean", "stream"),
    (CHAT, {"stream_options": {"include_usage": True}}, 400, "needs stream", "stream_options"),
    (CHAT, {"top_logprobs": 3}, 400, "needs logprobs", "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, 400, "20; got 21", "top_logprobs"),
    (CHAT, {"tools": [{"type": "function"}]}, 400, "is missing", "tools[0].function"),
    (CHAT, {"tool_choice": "required"}, 400, 'leave the field out; got "requi', "tool_choice"),
    (CHAT, {"response_format": {"type": "json_object"}}, 400, "not supported", "response_format"),
    (CHAT, {"presence_penalty": 0.5}, 400, "not supported", "presence_penalty"),
    (CHAT, {"temprature": 0}, 400, "\"temprature\"; did you mean 'temperature'?", "temprature"),
    (CHAT, {"thinking_budget": -1}, 400, "got -1", "thinking_budget"),
    (CHAT, {"repetition_halt": {"tokens": 0}}, 400, "got 0", "repetition_halt.tokens"),
    (TEXT, {"prompt": None}, 400, "prompt: ", "prompt"),
    (TEXT, {"prompt": ""}, 400, 'a prompt is empty; got ""', "prompt"),
    (TEXT, {"prompt": []}, 400, "empty; got []", "prompt"),
    (TEXT, {"prompt": ["a", ""]}, 400, "empty; got", "prompt"),
    (TEXT, {"prompt": ["a", 3]}, 400, "prompt", "prompt[0]"),
    (TEXT, {"prompt": [-1]}, 400, "got -1", "prompt[0]"),
    (TEXT, {"prompt": [100_000]}, 400, "token 100000 is beyond the vocabulary", None),
    (TEXT, {"prompt": ["a"] * 21}, 400, "more than the 20 that fit", None),
    (TEXT, {"logprobs": -1}, 400, "got -1", "logprobs"),
    (TEXT, {"echo": True}, 400, "not supported", "echo"),
    (TEXT, {"best_of": 3}, 400, "not supported", "best_of"),
]  # fmt: skip


@pytest.fixture(scope="module")
def strict_address():
    config = ServeConfig(max_waiting=16, max_body=2_000_000)
    with serving(ScriptedEngine(lambda prompt: "hello"), config=config) as address:
        yield address


@pytest.mark.parametrize(
    ("path", "wrong", "status", "message", "param"), MALFORMED, ids=range(len(MALFORMED))
)
def test_malformed(strict_address, path, wrong, status, message, param):
    body = GOOD[path] | wrong if isinstance(wrong, dict) else wrong
    told = post(strict_address, path, body)
    jsonschema_rs.validate(described("ErrorBody"), told[2])
    error = told[2]["error"]
    assert (told[0], error["param"]) == (status, param), error
    assert message in error["message"]
    assert len(error["message"]) <= 500


@pytest.mark.parametrize(
    "head",
    [
        b"GET /v1/models/\xff HTTP/1.1\r\n",
        b"GET /v1/models/%ff%00 HTTP/1.1\r\n",
        b"nonsense\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: x\r\n",
        b"GET /health HTTP/1.1\r\nAuthorization: \xff\xfe\r\nX: " + b"x" * 200_000 + b"\r\n",
    ],
)
def test_what_is_hardly_http_is_refused_too(strict_address, head):
    host, port = strict_address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(head + b"Host: x\r\nConnection: close\r\n\r\n")
        answer = raw.recv(1000)
    assert answer.startswith(b"HTTP/1.1 4")
    assert "ok" in get(strict_address, "/health")
