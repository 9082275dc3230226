"""The models that judge: an engine of this process, or an endpoint with OpenAI's interface."""

from __future__ import annotations

import abc
import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mmjax.chat import render_chat
from mmjax.engine import Engine, RequestError, SamplingParams


class Judge(abc.ABC):
    """A model that answers prompts."""

    @abc.abstractmethod
    def complete(self, prompts: Sequence[str]) -> list[str | Exception]:
        """A reply to each prompt, or why there is none."""


class EngineJudge(Judge):
    """An engine of this process.

    Args:
      engine: With a tokenizer.
      max_tokens: Of a reply.
    """

    def __init__(self, engine: Engine, max_tokens: int = 2048) -> None:
        self._engine, self._lock = engine, threading.Lock()  # one thread at a time may call it
        self._params = SamplingParams(max_tokens, temperature=0.0)

    def complete(self, prompts: Sequence[str]) -> list[str | Exception]:
        """All prompts side by side; one that the engine refuses, or cuts off, has no reply."""
        replies: list[str | Exception] = []
        with self._lock:
            names = [self._added(prompt) for prompt in prompts]
            texts: dict[str, list[str]] = {n: [] for n in names if isinstance(n, str)}
            reasons: dict[str, str | None] = {}
            while len(reasons) < len(texts):
                for output in self._engine.step():
                    texts[output.request_id].append(output.text)
                    if output.finish_reason:
                        reasons[output.request_id] = output.finish_reason
        for name in names:
            if not isinstance(name, str):
                replies.append(name)
            elif reasons[name] == "stop":
                replies.append("".join(texts[name]))
            else:
                replies.append(ValueError(f"the judge's reply ended by {reasons[name]}"))
        return replies

    def _added(self, prompt: str) -> str | Exception:
        tokenizer = self._engine.tokenizer
        start = tokenizer.document_start if tokenizer else ""
        content = self._without_special(prompt)
        chat = render_chat([{"role": "user", "content": content}], document_start=start)
        try:
            return self._engine.add(chat, self._params)
        except RequestError as error:
            return error

    def _without_special(self, text: str) -> str:
        """A text of which nothing becomes a special token, as the end of a turn is one."""
        if self._engine.tokenizer is None:
            return text
        added = self._engine.tokenizer.backend.get_added_tokens_decoder().values()
        special = [t.content for t in added if t.special and len(t.content) > 1]
        while found := [token for token in special if token in text]:
            for token in found:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text


class EndpointJudge(Judge):
    """`POST {url}/chat/completions`, as OpenAI, vLLM, SGLang and `mmjax serve` answer it.

    Args:
      url: Up to /v1.
      model: Its name there.
      key: For the header Authorization; "" for none.
      max_tokens: Of a reply.
      seconds: For a call.
      retries: Further calls after one that failed for the moment: no connection, no answer in
        time, too many requests, an error of the server.
      workers: Calls at a time.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str = "",
        *,
        max_tokens: int = 2048,
        seconds: float = 120.0,
        retries: int = 4,
        workers: int = 16,
    ) -> None:
        self._url, self._model, self._key = f"{url.rstrip('/')}/chat/completions", model, key
        self._max_tokens, self._seconds = max_tokens, seconds
        self._retries, self._workers = retries, workers

    def complete(self, prompts: Sequence[str]) -> list[str | Exception]:
        """Several calls at a time."""
        with ThreadPoolExecutor(self._workers) as pool:
            return list(pool.map(self._reply, prompts))

    def _reply(self, prompt: str) -> str | Exception:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self._max_tokens,
            "temperature": 0.0,
        }
        for attempt in range(self._retries + 1):
            try:
                choice = self._post(body)["choices"][0]
                if choice["finish_reason"] != "stop":
                    return ValueError(f"the judge's reply ended by {choice['finish_reason']}")
                return str(choice["message"]["content"])
            except (OSError, http.client.HTTPException) as error:
                for_good = isinstance(error, urllib.error.HTTPError) and not (
                    error.code in (408, 409, 429) or error.code >= 500
                )
                if for_good or attempt == self._retries:
                    return error
            except (KeyError, IndexError, TypeError, ValueError) as error:
                return ValueError(f"{self._url} gave no chat completion: {error!r}")
            time.sleep(min(2.0**attempt, 30.0) * random.uniform(0.5, 1.0))
        raise AssertionError("unreachable")

    def _post(self, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self._url,
            json.dumps(body).encode(),
            {
                "Content-Type": "application/json",
                **({"Authorization": f"Bearer {self._key}"} if self._key else {}),
            },
        )
        try:
            with urllib.request.urlopen(request, timeout=self._seconds) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            error.close()
            raise
