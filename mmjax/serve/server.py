"""uvicorn with an end that both running requests and impatient operators can live with."""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import Any

import uvicorn
from starlette.applications import Starlette

# Seconds that an idle connection stays open: longer than clients keep theirs (5 s is common), so
# that none of them sends a request while this side hangs up.
_KEEP_ALIVE = 75
# Seconds for replies to be told that they are cut off; then connections are closed whatever comes.
_LAST_WORDS = 5


class HttpServer(uvicorn.Server):
    """Serves an application until SIGTERM or SIGINT; then waits for what runs, but not for long.

    Args:
      app: Of `create_app`.
      told: Said on stderr once connections are accepted.
      drain: Seconds for running requests after the signal. New connections are refused meanwhile.
      **settings: Of `uvicorn.Config`.
    """

    def __init__(self, app: Starlette, told: str, *, drain: int, **settings: Any) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                ws="none",
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE,
                timeout_graceful_shutdown=drain + _LAST_WORDS,
                **settings,
            )
        )
        self._worker, self._told, self._drain = app.state.worker, told, drain

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to listen, and says so."""
        await super().startup(sockets)
        print(self._told, file=sys.stderr, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuses connections, waits for running requests, and cuts them off when time is up."""
        end = asyncio.get_running_loop().call_later(self._drain, self._worker.abandon)
        await super().shutdown(sockets)
        end.cancel()
