"""What goes wrong, in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict


class ErrorDetail(TypedDict):
    """message says what is wrong and with which value; param names the field."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """The body of every answer that is an error."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer other than the one that was asked for.

    Args:
      status: HTTP status.
      message: For whoever sent the request; cut where it goes on repeating what was sent.
      param: The field at fault.
      code: A word for programs.
      headers: Of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(_cut(message, 500))
        self.status, self.code = status, code
        self.param = None if param is None else _cut(param, 100)
        self.headers = dict(headers or {})

    def body(self) -> ErrorBody:
        """The error as it is sent."""
        kind = "server_error" if self.status >= 500 else _KINDS.get(self.status, _USUAL)
        return {
            "error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        }


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


_USUAL = "invalid_request_error"
_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
