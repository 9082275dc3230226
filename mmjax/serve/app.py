"""The routes, the streams and the errors."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mmjax.engine.results import Output, RequestError
from mmjax.serve.errors import ApiError
from mmjax.serve.jobs import Job, Served, chat_job, completion_job
from mmjax.serve.metrics import Metrics
from mmjax.serve.openapi import describe
from mmjax.serve.replies import Answer, Choice, Count
from mmjax.serve.worker import Engine, Reply, Worker

_log = logging.getLogger("mmjax.serve")
_HUNG_UP = 499


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """How the server treats its clients.

    Attributes:
      api_key: What requests to /v1 must bear; None lets anyone in.
      max_waiting: Samples that may wait for a slot before requests are turned away.
      max_body: Bytes of a request's body.
      heartbeat: Seconds of silence after which a stream shows that it is alive.
    """

    api_key: str | None = None
    max_waiting: int = 256
    max_body: int = 32 * 2**20
    heartbeat: float = 15.0


def create_app(engine: Engine, served: Served, config: ServeConfig | None = None) -> Starlette:
    """The ASGI application. It owns the engine from startup to shutdown.

    Args:
      engine: An idle `mmjax.Engine`.
      served: The model's name, tokenizer and length.
      config: How to treat clients; None for the defaults.

    Returns:
      The application; its `state.worker` is the engine's `Worker`.
    """
    server = _Server(engine, served, config or ServeConfig())
    get, post = ["GET"], ["POST"]
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", server.chat, methods=post),
            Route("/v1/completions", server.completions, methods=post),
            Route("/v1/models", server.models, methods=get),
            Route("/v1/models/{name:path}", server.model, methods=get),
            Route("/health", server.health, methods=get),
            Route("/metrics", server.metrics, methods=get),
            Route("/openapi.json", server.openapi, methods=get),
        ],
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            ClientDisconnect: _hung_up,
            Exception: _bug,
        },
        lifespan=server.lifespan,
    )
    app.state.worker = server.worker
    return app


class _Server:
    def __init__(self, engine: Engine, served: Served, config: ServeConfig) -> None:
        self._served, self._config = served, config
        self.worker = Worker(engine, engine.stats().slots + config.max_waiting)
        self._metrics = Metrics(lambda: self.worker.stats, lambda: self.worker.failure is None)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.worker.start()
        yield
        await self.worker.stop()

    async def chat(self, request: Request) -> Response:
        return await self._complete(request, chat_job)

    async def completions(self, request: Request) -> Response:
        return await self._complete(request, completion_job)

    async def models(self, request: Request) -> Response:
        self._authorise(request)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self._authorise(request)
        name = request.path_params["name"]
        if name != self._served.name:
            raise ApiError(404, f"the model {name!r} does not exist", code="model_not_found")
        return JSONResponse(self._model())

    async def health(self, request: Request) -> Response:
        failure = self.worker.failure
        if failure is None:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "failed", "error": type(failure).__name__}, 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(describe())

    def _model(self) -> dict[str, Any]:
        return {
            "id": self._served.name,
            "object": "model",
            "created": self._served.created,
            "owned_by": "mmjax",
            "max_model_len": self._served.max_length,
        }

    def _authorise(self, request: Request) -> None:
        key = self._config.api_key
        if key is None:
            return
        kind, _, given = request.headers.get("Authorization", "").partition(" ")
        # Compared in constant time: how long it takes must not tell how much was right.
        if kind.lower() != "bearer" or not hmac.compare_digest(given.encode(), key.encode()):
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _body(self, request: Request) -> bytes:
        limit, chunks, size = self._config.max_body, [], 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise ApiError(413, f"the body has more than {limit} bytes", code="body_too_large")
            chunks.append(chunk)
        return b"".join(chunks)

    async def _complete(self, request: Request, read: Callable[[bytes, Served], Job]) -> Response:
        ticket = _Ticket(self._metrics, request.url.path)
        try:
            self._authorise(request)
            body = await self._body(request)
            # A long prompt takes a while to parse and to encode; other streams go on meanwhile.
            job = await asyncio.to_thread(read, body, self._served)
            reply = await self._submit(job)
        except BaseException as error:
            ticket.close(_status(error))
            raise
        if job.stream:
            return _EventStream(self._events(job, reply, ticket), reply, ticket)
        return await self._whole(request, job, reply, ticket)

    async def _submit(self, job: Job) -> Reply:
        try:
            return await self.worker.submit(job.prompts, job.params)
        except RequestError as error:
            raise ApiError(400, str(error)) from None

    async def _whole(self, request: Request, job: Job, reply: Reply, ticket: _Ticket) -> Response:
        work = asyncio.ensure_future(_collect(job, reply, ticket))
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return Response(status_code=_HUNG_UP)  # nobody reads it
            answer = JSONResponse(work.result())
            ticket.status = 200
            return answer
        except ApiError as error:
            ticket.status = error.status
            raise
        finally:
            work.cancel()
            gone.cancel()
            reply.close()
            ticket.close()

    async def _events(self, job: Job, reply: Reply, ticket: _Ticket) -> AsyncGenerator[str, None]:
        count = Count()
        for choice in [opening for each in job.choices for opening in each.start()]:
            yield _event(job.chunk([choice]))
        try:
            while not reply.done:
                outputs = await reply.next(self._config.heartbeat)
                if not outputs:
                    yield ": still working\n\n"  # a comment, which clients skip
                ticket.saw(outputs)
                for output in outputs:
                    count.add(output)
                    for choice in _fed(job, reply, output):
                        yield _event(job.chunk([choice]))
        except ApiError as error:
            ticket.status = error.status
            yield _event(error.body())
            return
        if job.usage:
            yield _event(job.last(count.usage()))
        ticket.status = 200
        yield "data: [DONE]\n\n"


class _Ticket:
    """What the metrics learn of one request."""

    def __init__(self, metrics: Metrics, endpoint: str) -> None:
        self.status = _HUNG_UP  # until something else is known
        self._metrics, self._endpoint = metrics, endpoint
        self._start = time.perf_counter()
        self._first = False

    def saw(self, outputs: list[Any]) -> None:
        """Notes the first tokens."""
        if outputs and not self._first:
            self._first = True
            self._metrics.first_token.observe(time.perf_counter() - self._start)

    def close(self, status: int | None = None) -> None:
        """Counts the request."""
        status = status or self.status
        self._metrics.requests.labels(self._endpoint, str(status)).inc()
        if status == 200:
            self._metrics.duration.observe(time.perf_counter() - self._start)


class _EventStream(StreamingResponse):
    """Server-sent events; however the stream ends, its request leaves the engine."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None], reply: Reply, ticket: _Ticket) -> None:
        # Proxies are to pass each event on as it comes.
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events, self._reply, self._ticket = events, reply, ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._reply.close()
            self._ticket.close()
            await self._events.aclose()


async def _collect(job: Job, reply: Reply, ticket: _Ticket) -> Answer:
    count = Count()
    chunks: list[list[Choice]] = [[] for _ in job.choices]
    while not reply.done:
        outputs = await reply.next()
        ticket.saw(outputs)
        for output in outputs:
            count.add(output)
            for choice in _fed(job, reply, output):
                chunks[choice["index"]].append(choice)
    return job.whole(chunks, count.usage())


def _fed(job: Job, reply: Reply, output: Output) -> list[Choice]:
    prompt = reply.ids.index(output.request_id)
    return job.choices[prompt * job.params.n + output.index].feed(output)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(data: Any) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _status(error: BaseException) -> int:
    if isinstance(error, ApiError):
        return error.status
    return _HUNG_UP if isinstance(error, ClientDisconnect | asyncio.CancelledError) else 500


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """What the router refuses: an unknown path, a wrong method."""
    assert isinstance(error, HTTPException)
    told = f"{request.method} {request.url.path}: {error.detail}"
    body = ApiError(error.status_code, told).body()
    return JSONResponse(body, error.status_code, headers=error.headers)


async def _hung_up(request: Request, error: Exception) -> Response:
    return Response(status_code=_HUNG_UP)  # nobody reads it


async def _bug(request: Request, error: Exception) -> Response:
    """Starlette logs the traceback after this answer."""
    body = ApiError(500, "the server failed on this request; its log says why").body()
    return JSONResponse(body, 500)
