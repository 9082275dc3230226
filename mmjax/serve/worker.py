"""The thread that owns the engine, and the way in and out of it for asyncio."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

from mmjax.engine.results import EngineStats, Output
from mmjax.engine.sampling import SamplingParams
from mmjax.serve.errors import ApiError
from mmjax.serve.jobs import Prompt

_log = logging.getLogger("mmjax.serve")
_RETRY_AFTER = {"Retry-After": "1"}


@runtime_checkable
class Engine(Protocol):
    """What the server needs of `mmjax.Engine`."""

    def add(self, prompt: Prompt, params: SamplingParams, *, request_id: str | None = None) -> str:
        """Queues a prompt; RequestError if it cannot be run."""

    def step(self) -> list[Output]:
        """One round of work."""

    def cancel(self, request_id: str) -> bool:
        """Frees what a request holds."""

    def stats(self) -> EngineStats:
        """What the engine holds and has done."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""


class Reply:
    """The samples of one HTTP request, as they come. Close it, whatever happens."""

    def __init__(self, worker: Worker, ids: list[str], samples: int) -> None:
        self.ids = ids
        self._worker = worker
        self._running = dict.fromkeys(ids, samples)
        self._came: asyncio.Queue[list[Output] | ApiError] = asyncio.Queue()

    @property
    def unfinished(self) -> int:
        """Samples that have not ended."""
        return sum(self._running.values())

    async def next(self, timeout: float | None = None) -> list[Output]:
        """What came since the last call; nothing if that takes too long, or all samples ended.

        Raises:
          ApiError: the engine failed, or the server ends before the reply does.
        """
        if not self.unfinished and self._came.empty():
            return []
        try:
            batches = [await asyncio.wait_for(self._came.get(), timeout)]
        except TimeoutError:
            return []
        while not self._came.empty():
            batches.append(self._came.get_nowait())
        outputs: list[Output] = []
        for batch in batches:
            if isinstance(batch, ApiError):
                raise batch
            outputs += batch
        return outputs

    @property
    def done(self) -> bool:
        """Whether there is nothing more to come."""
        return not self.unfinished and self._came.empty()

    def close(self) -> None:
        """Gives back what is still running."""
        self._worker.cancel(self)

    def _take(self, outputs: list[Output]) -> None:
        for output in outputs:
            self._running[output.request_id] -= output.finish_reason is not None
        self._came.put_nowait(outputs)

    def _fail(self, error: ApiError) -> None:
        self._came.put_nowait(error)


class Worker:
    """Runs the engine in a thread of its own; every method here belongs to the event loop.

    Args:
      engine: Touched by the thread alone from `start` to `stop`.
      capacity: Most samples in the engine, waiting ones included.
    """

    def __init__(self, engine: Engine, capacity: int) -> None:
        self.capacity = capacity
        self.failure: BaseException | None = None
        self.stats = engine.stats()
        self._engine = engine
        self._replies: dict[str, Reply] = {}
        self._adding: set[asyncio.Future[None]] = set()
        self._commands: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="mmjax-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop

    def start(self) -> None:
        """Starts the thread; call it in the event loop that awaits the replies."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self, timeout: float = 10.0) -> None:
        """Ends the thread after the step that it is in."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join, timeout)
        if self._thread.is_alive():
            _log.warning("the engine's step did not end within %g s; leaving it", timeout)

    async def submit(self, prompts: Sequence[Prompt], params: SamplingParams) -> Reply:
        """Hands prompts to the engine.

        Raises:
          ApiError: 429, as many samples wait as may; 500 or 503, the engine fails or has failed.
          RequestError: the engine refuses a prompt.
        """
        if self.failure is not None:
            raise ApiError(503, "the engine stopped after an error", code="engine_failed")
        samples = len(prompts) * params.n
        if samples > self.capacity:
            raise ApiError(
                400, f"{samples} samples (prompts x n) are more than the {self.capacity} that fit"
            )
        running = sum(reply.unfinished for reply in set(self._replies.values()))
        if running + samples > self.capacity:
            raise ApiError(
                429,
                f"{running} samples are running or waiting, of at most {self.capacity}; try again",
                code="queue_full",
                headers=_RETRY_AFTER,
            )
        ids = [uuid.uuid4().hex for _ in prompts]
        reply = Reply(self, ids, params.n)
        self._replies |= dict.fromkeys(ids, reply)
        added: asyncio.Future[None] = self._loop.create_future()
        self._commands.put(partial(self._add, list(zip(ids, prompts, strict=True)), params, added))
        self._adding.add(added)
        try:
            await added
        except BaseException:
            reply.close()
            raise
        finally:
            self._adding.discard(added)
        return reply

    def cancel(self, reply: Reply) -> None:
        """Takes the requests of a reply that have not ended out of the engine."""
        for request in reply.ids:
            if self._replies.pop(request, None) is not None:
                self._commands.put(partial(self._engine.cancel, request))

    def _deliver(self, outputs: list[Output]) -> None:
        batches: dict[Reply, list[Output]] = {}
        for output in outputs:
            reply = self._replies.get(output.request_id)
            if reply is not None:
                batches.setdefault(reply, []).append(output)
        for reply, batch in batches.items():
            reply._take(batch)
            for request in [r for r in reply.ids if not reply._running[r]]:
                self._replies.pop(request, None)

    def abandon(self) -> None:
        """Ends every reply with an error: the server cannot wait for them any longer."""
        told = ApiError(503, "the server is shutting down", code="shutting_down")
        for reply in set(self._replies.values()):
            self.cancel(reply)
            reply._fail(told)

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        told = ApiError(
            500, "the engine failed while it worked on this request", code="engine_failed"
        )
        for reply in set(self._replies.values()):
            reply._fail(told)
        for added in self._adding:
            _settle(added, told)
        self._replies.clear()

    # From here on: in the engine's thread.

    def _run(self) -> None:
        try:
            while self._obey():
                outputs = self._engine.step() if self._engine.has_work else []
                self.stats = self._engine.stats()
                if outputs:
                    self._loop.call_soon_threadsafe(self._deliver, outputs)
        except BaseException as error:
            _log.exception("the engine failed; every request of it fails too")
            self._loop.call_soon_threadsafe(self._fail, error)

    def _obey(self) -> bool:
        """Carries out what has been asked for, waiting for it if there is no work; False to end."""
        wait = not self._engine.has_work
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            wait = False

    def _add(
        self,
        requests: list[tuple[str, Prompt]],
        params: SamplingParams,
        added: asyncio.Future[None],
    ) -> None:
        try:
            for request, prompt in requests:
                self._engine.add(prompt, params, request_id=request)
        except Exception as error:
            self._loop.call_soon_threadsafe(_settle, added, error)
        else:
            self._loop.call_soon_threadsafe(_settle, added, None)


def _settle(future: asyncio.Future[None], error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
