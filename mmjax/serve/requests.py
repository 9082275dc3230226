"""The bodies of requests: pydantic models, which both check them and describe them to OpenAPI."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, core_schema, from_json

from mmjax.engine.sampling import MAX_LOGPROBS, RepetitionHalt, SamplingParams
from mmjax.serve.errors import ApiError

MAX_SAMPLES = 128
_MAX_STOPS = 16


@dataclasses.dataclass(frozen=True)
class _Only:
    """A field of OpenAI's that has no effect here: values that ask for one are refused."""

    allowed: tuple[Any, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"enum": [None, *self.allowed]}

    def _check(self, value: Any) -> Any:
        if value is not None and value not in self.allowed:
            raise ValueError("is not supported here; leave the field out")
        return value


def _json_object(text: str) -> str:
    try:
        found = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise ValueError(f"should be a JSON object: {error}") from None
    if not isinstance(found, dict):
        raise ValueError("should be a JSON object")
    return text


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextItem(_Strict):
    """Text of a message; name is the tool's, in a tool's message."""

    type: Literal["text"]
    text: str
    name: str | None = None


class ImageUrl(_Strict):
    """Where an image is: a data URL, or an address if this server fetches any."""

    url: str = Field(min_length=1)
    detail: Annotated[Any, _Only(("auto", "high"))] = None


class ImageItem(_Strict):
    """An image of a user's message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class FunctionCall(_Strict):
    """What an assistant called; arguments is a JSON object as text."""

    name: str = Field(min_length=1)
    arguments: Annotated[str, AfterValidator(_json_object)]


class ToolCall(_Strict):
    """One call of an assistant's message."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class SystemMessage(_Strict):
    """Instructions."""

    role: Literal["system", "developer"]
    content: str | list[TextItem]
    name: str | None = None


class UserMessage(_Strict):
    """What the user says."""

    role: Literal["user"]
    content: str | list[Annotated[TextItem | ImageItem, Field(discriminator="type")]]
    name: str | None = None


class AssistantMessage(_Strict):
    """An earlier reply, as this server sent it; its reasoning is left out of the prompt."""

    role: Literal["assistant"]
    content: str | list[TextItem] | None = None
    tool_calls: list[ToolCall] | None = None
    reasoning_content: str | None = None
    name: str | None = None
    refusal: Annotated[Any, _Only(())] = None
    annotations: Annotated[Any, _Only(([],))] = None
    audio: Annotated[Any, _Only(())] = None
    function_call: Annotated[Any, _Only(())] = None


class ToolMessage(_Strict):
    """The result of a call."""

    role: Literal["tool"]
    content: str | list[TextItem]
    tool_call_id: str | None = None
    name: str | None = None


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class Function(_Strict):
    """A function that the model may call; parameters is a JSON schema."""

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Annotated[Any, _Only((False,))] = None


class Tool(_Strict):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class StreamOptions(_Strict):
    """include_usage asks for a last chunk with the counts of tokens."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, _Only((False,))] = None


class Repetition(_Strict):
    """When a sample that repeats itself ends."""

    tokens: int = Field(3000, ge=1, lt=2**31)
    probability: float = Field(0.99, gt=0, lt=1)


class Sampling(_Strict):
    """What both kinds of completion share: OpenAI's fields, then the engine's own."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    n: int | None = Field(None, ge=1, le=MAX_SAMPLES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=_MAX_STOPS)]
        | None
    ) = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)

    top_k: int | None = Field(None, ge=0, lt=2**31, description="0 keeps all tokens")
    min_p: float | None = Field(None, ge=0, le=1)
    stop_token_ids: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = Field(
        None, max_length=_MAX_STOPS
    )
    ignore_eos: bool | None = None
    thinking_budget: int | None = Field(
        None,
        ge=0,
        lt=2**31,
        description="tokens after which an open thinking part is closed; 0 for none",
    )
    repetition_halt: Repetition | Literal[False] | None = Field(
        None, description="false never ends a sample that repeats itself"
    )

    user: Any = Field(None, description="ignored")
    metadata: Any = Field(None, description="ignored")
    service_tier: Any = Field(None, description="ignored")
    safety_identifier: Any = Field(None, description="ignored")
    prompt_cache_key: Any = Field(None, description="ignored")
    store: Annotated[Any, _Only((False,))] = None
    frequency_penalty: Annotated[Any, _Only((0,))] = None
    presence_penalty: Annotated[Any, _Only((0,))] = None
    logit_bias: Annotated[Any, _Only(({},))] = None

    def sampling(self, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """The engine's parameters."""
        given = self.model_dump(
            include={"n", "seed", "temperature", "top_p", "top_k", "min_p", "ignore_eos"},
            exclude_none=True,
        )
        stop = self.stop or ()
        if self.repetition_halt is False:
            given["repetition_halt"] = None
        elif self.repetition_halt:
            given["repetition_halt"] = RepetitionHalt(**self.repetition_halt.model_dump())
        return SamplingParams(
            max_tokens=max_tokens,
            logprobs=logprobs,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_ids=tuple(self.stop_token_ids or ()),
            thinking_budget=self.thinking_budget,
            **given,
        )


class ChatRequest(Sampling):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[Tool] | None = None
    tool_choice: Annotated[Any, _Only(("auto", "none"))] = None
    parallel_tool_calls: Annotated[Any, _Only((True,))] = None
    response_format: Annotated[Any, _Only(({"type": "text"},))] = None
    modalities: Annotated[Any, _Only((["text"],))] = None
    reasoning_effort: Annotated[Any, _Only(())] = None

    def described_tools(self) -> list[dict[str, Any]]:
        """The functions that the model is to know of."""
        if self.tool_choice == "none":
            return []
        return [
            tool.function.model_dump(include={"name", "description", "parameters"})
            | {"description": tool.function.description or ""}
            | {"parameters": tool.function.parameters or {}}
            for tool in self.tools or ()
        ]

    def image_urls(self) -> list[str]:
        """Of all messages, in order."""
        items = [i for m in self.messages if isinstance(m.content, list) for i in m.content]
        return [item.image_url.url for item in items if isinstance(item, ImageItem)]

    def rendered_messages(self) -> list[dict[str, Any]]:
        """The messages for `render_chat`."""
        messages = [message.model_dump(exclude_none=True) for message in self.messages]
        for message in messages:
            message["role"] = {"developer": "system"}.get(message["role"], message["role"])
        return messages


Tokens = list[Annotated[int, Field(ge=0, lt=2**31)]]


class CompletionRequest(Sampling):
    """The body of /v1/completions."""

    prompt: str | Tokens | list[str] | list[Tokens]
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: Annotated[Any, _Only((1,))] = None
    echo: Annotated[Any, _Only((False,))] = None
    suffix: Annotated[Any, _Only(("",))] = None

    def prompts(self) -> Sequence[str | Tokens]:
        """One or more prompts, as texts or as tokens."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        tokens = [token for token in given if isinstance(token, int)]
        return [tokens] if tokens else [p for p in given if not isinstance(p, int)]


def read_body[Body: Sampling](kind: type[Body], body: bytes) -> Body:
    """The body of a request.

    Raises:
      ApiError: it is not JSON in UTF-8, or not what the model describes; names field and value.
    """
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise ApiError(400, f"the body must be a JSON object, got {shown(data)}")
    try:
        request = kind.model_validate(data)
    except ValidationError as error:
        raise _explain(kind, error.errors(include_url=False, include_context=False), data) from None
    if request.stream_options and not request.stream:
        raise ApiError(400, "stream_options needs stream=true", param="stream_options")
    return request


def _explain(kind: type[Sampling], errors: list[ErrorDetails], data: Any) -> ApiError:
    """One of the errors; where several forms were possible, what each of them would have been."""
    field = [error for error in errors if error["loc"][:1] == errors[0]["loc"][:1]]
    # Of several forms, the one that fits furthest.
    worst = max(field, key=lambda error: len(re.findall(r"[.[]", _path(error, data))))
    param = _path(worst, data)
    if worst["type"] == "extra_forbidden":
        close = difflib.get_close_matches(param, kind.model_fields, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        told = f"unknown field {shown(param)}{hint}"
        return ApiError(400, told, param=param, code="unknown_field")
    if worst["type"] == "missing":
        return ApiError(400, f"{param} is missing", param=param, code="missing_field")
    all_told = [e["msg"].removeprefix("Value error, ") for e in field if _path(e, data) == param]
    wrong = " or: ".join(dict.fromkeys(all_told))
    return ApiError(400, f"{param}: {wrong}; got {shown(worst['input'])}", param=param)


def _path(error: ErrorDetails, data: Any) -> str:
    """Where the error is, without the names of the alternatives that pydantic tried."""
    path, parts = "", error["loc"]
    for place, part in enumerate(parts):
        if isinstance(part, int) and isinstance(data, list):
            path, data = f"{path}[{part}]", data[part]
        elif isinstance(data, dict) and part in data:
            path, data = f"{path}.{part}", data[part]
        elif error["type"] == "missing" and place == len(parts) - 1:
            path = f"{path}.{part}"
    return path.removeprefix(".")


def shown(value: Any) -> str:
    """A value as an error message shows it: its beginning, if it is long."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else f"{text[:77]}…"
