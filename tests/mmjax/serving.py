"""A server on a free port of this machine, an engine that says what it is told to, a tokenizer."""

import contextlib
import dataclasses
import http.client
import json
import math
import socket
import threading
import time
import urllib.request

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from mmjax.engine import EngineStats, Output, RequestError, TokenLogprob
from mmjax.serve import ServeConfig, Served, create_app
from mmjax.serve.openapi import describe
from mmjax.serve.server import HttpServer
from mmjax.tokenizer import BOS, EOS, Tokenizer

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def byte_tokenizer(added=()):
    """Bytes are tokens; so are the turn markers and what is added."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({char: n for n, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([BOS, EOS])
    backend.add_tokens(list(added))
    return Tokenizer(backend)


@dataclasses.dataclass
class Running:
    request: str
    index: int
    prompt: int
    text: list
    limit: int


class ScriptedEngine:
    """Has the surface of `mmjax.Engine`; replies with `script(prompt)`, a character a step."""

    def __init__(self, script, *, slots=4, max_length=2000, delay=0.0):
        self.tokenizer, self.max_length = byte_tokenizer(), max_length
        self.script, self.slots, self.delay = script, slots, delay
        self.samples, self.params, self.broken = [], {}, None

    def add(self, prompt, params, *, request_id=None):
        if max(prompt) >= self.tokenizer.vocab_size:
            raise RequestError(f"token {max(prompt)} is beyond the vocabulary")
        text = self.script(self.tokenizer.decode(prompt))
        for stop in params.stop:
            text = text.partition(stop)[0]
        self.params[request_id] = params
        self.samples += [
            Running(request_id, i, len(prompt), list(text), params.max_tokens)
            for i in range(params.n)
        ]
        return request_id

    def step(self):
        if self.broken:
            raise self.broken
        time.sleep(self.delay)
        outputs = [self._advance(sample) for sample in self.samples[: self.slots]]
        ended = {(o.request_id, o.index) for o in outputs if o.finish_reason}
        self.samples = [s for s in self.samples if (s.request, s.index) not in ended]
        return outputs

    def _advance(self, sample):
        """The sample's next character, or its end."""
        params = self.params[sample.request]
        ids, text, reason = [self.tokenizer.eos_id], "", "stop"
        if sample.text:
            text, reason = sample.text.pop(0), None
            ids = self.tokenizer.encode(text)
            sample.limit -= len(ids)
            reason = "length" if sample.limit <= 0 else None
        logprobs = None
        if params.logprobs is not None:
            top = [(n, -1.0 - n) for n in range(params.logprobs)]
            logprobs = [TokenLogprob(token, -math.inf, top) for token in ids]
        return Output(sample.request, sample.index, ids, text, logprobs, reason, sample.prompt, 3)

    def cancel(self, request_id):
        before = len(self.samples)
        self.samples = [s for s in self.samples if s.request != request_id]
        return len(self.samples) < before

    @property
    def has_work(self):
        return bool(self.samples)

    def stats(self):
        running = min(len(self.samples), self.slots)
        waiting = len(self.samples) - running
        return EngineStats(running, waiting, 0, self.slots, running, 0, self.slots, 0, 0, 0, 0)


@contextlib.contextmanager
def serving(engine, config=None, drain=5, vision=None):
    """The address of a server around an engine."""
    served = Served("tiny", engine.tokenizer, engine.max_length, vision)
    app = create_app(engine, served, config or ServeConfig())
    server = HttpServer(app, "", drain=drain, log_config=None)
    with socket.create_server(("127.0.0.1", 0)) as bound:
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.01)
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def post(address, path, body, headers=()):
    """(status, headers, body as JSON) of a raw request."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=20)
    try:
        data = body if isinstance(body, bytes | type(None)) else json.dumps(body).encode()
        connection.request("POST", path, data, dict(headers))
        response = connection.getresponse()
        return response.status, response.headers, json.loads(response.read())
    finally:
        connection.close()


def get(address, path):
    with urllib.request.urlopen(f"{address}{path}", timeout=20) as response:
        return response.read().decode()


def described(name):
    """The JSON schema of something that the server's OpenAPI description names."""
    return describe() | {"$ref": f"#/components/schemas/{name}"}
