"""From the body of a request to what the engine is to do."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Sequence

from mmjax.chat import render_chat
from mmjax.engine.images import ImagePrompt
from mmjax.engine.sampling import SamplingParams
from mmjax.serve.errors import ApiError
from mmjax.serve.images import ImageSource
from mmjax.serve.replies import Answer, ChatChoice, Choice, TextChoice, Usage
from mmjax.serve.requests import ChatRequest, CompletionRequest, Sampling, read_body, shown
from mmjax.tokenizer import Tokenizer
from mmjax.vision import Image, VisionConfig, image_tokens

# OpenAI's default for /v1/completions; a chat may go on to the end of the context.
_COMPLETION_TOKENS = 16
MAX_IMAGES = 64
_CHAT = "chat.completion"
_TEXT = "text_completion"

type Prompt = Sequence[int] | ImagePrompt


@dataclasses.dataclass(frozen=True)
class Served:
    """The model behind the API.

    Attributes:
      name: As requests call it.
      tokenizer: Of the model.
      max_length: Most tokens of a prompt and its completion together.
      vision: Of the model, None if it takes no images.
      images: Where images may come from.
      created: Unix time of the start, in seconds.
    """

    name: str
    tokenizer: Tokenizer
    max_length: int
    vision: VisionConfig | None = None
    images: ImageSource = dataclasses.field(default_factory=ImageSource)
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))


@dataclasses.dataclass(frozen=True)
class Job:
    """One request, ready for the engine.

    Attributes:
      prompts: Token ids of each prompt, or with images.
      params: How to sample each of them.
      choices: What makes the answer, prompt by prompt, sample by sample.
      stream: In chunks?
      usage: Counts at the end of the stream?
      head: What each chunk and the whole answer start with.
    """

    prompts: Sequence[Prompt]
    params: SamplingParams
    choices: Sequence[ChatChoice | TextChoice]
    stream: bool
    usage: bool
    head: Answer

    def chunk(self, choices: list[Choice]) -> Answer:
        """One event of a stream."""
        kind = _TEXT if self.head["object"] == _TEXT else f"{_CHAT}.chunk"
        answer: Answer = {**self.head, "object": kind, "choices": choices}
        if self.usage:
            answer["usage"] = None
        return answer

    def last(self, usage: Usage) -> Answer:
        """The event with the counts."""
        return {**self.chunk([]), "usage": usage}

    def whole(self, chunks: Sequence[Sequence[Choice]], usage: Usage) -> Answer:
        """The answer, from the chunks of each choice."""
        pairs = zip(self.choices, chunks, strict=True)
        return {**self.head, "choices": [c.whole(own) for c, own in pairs], "usage": usage}


def chat_job(body: bytes, served: Served) -> Job:
    """The job of a body of /v1/chat/completions.

    Raises:
      ApiError: the body is wrong, or too long for the model.
    """
    request = read_body(ChatRequest, body)
    _check_model(request, served)
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
    images = _images(request, served)
    prompt, tools = _rendered(request, served), bool(request.described_tools())
    length = len(prompt) + _more_tokens(images, served)
    params = request.sampling(
        _new_tokens(length, *_chat_limit(request), served.max_length, served, "messages"),
        (request.top_logprobs or 0) if request.logprobs else None,
    )
    logprobs = params.logprobs is not None
    choices = [
        ChatChoice(i, served.tokenizer, logprobs=logprobs, tools=tools) for i in range(params.n)
    ]
    whole = ImagePrompt(prompt, images) if images else prompt
    return _job(request, [whole], params, choices, _head("chatcmpl", _CHAT, served))


def completion_job(body: bytes, served: Served) -> Job:
    """The job of a body of /v1/completions.

    Raises:
      ApiError: the body is wrong, or too long for the model.
    """
    request = read_body(CompletionRequest, body)
    _check_model(request, served)
    given = request.prompts()
    prompts = [served.tokenizer.encode(p) if isinstance(p, str) else list(p) for p in given]
    if not all(prompts) or not prompts:
        raise ApiError(400, f"a prompt is empty; got {shown(request.prompt)}", param="prompt")
    limit = (request.max_tokens, "max_tokens")
    params = request.sampling(
        _new_tokens(max(map(len, prompts)), *limit, _COMPLETION_TOKENS, served, "prompt"),
        request.logprobs,
    )
    logprobs = params.logprobs is not None
    choices = [
        TextChoice(i, served.tokenizer, logprobs=logprobs) for i in range(len(prompts) * params.n)
    ]
    return _job(request, prompts, params, choices, _head("cmpl", _TEXT, served))


def _check_model(request: Sampling, served: Served) -> None:
    if request.model != served.name:
        raise ApiError(
            404,
            f"the model {request.model!r} does not exist; this server has {served.name!r}",
            param="model",
            code="model_not_found",
        )


def _rendered(request: ChatRequest, served: Served) -> list[int]:
    """The prompt of a chat."""
    start = served.tokenizer.document_start
    tools = request.described_tools()
    try:
        text = render_chat(request.rendered_messages(), tools=tools, document_start=start)
    except ValueError as error:
        raise ApiError(400, str(error), param="messages") from None
    return served.tokenizer.encode(text)


def _images(request: ChatRequest, served: Served) -> list[Image]:
    """The images of a chat."""
    urls = request.image_urls()
    if urls and served.vision is None:
        raise ApiError(400, f"the model {served.name!r} takes no images", param="messages")
    if len(urls) > MAX_IMAGES:
        told = f"{len(urls)} images are more than the {MAX_IMAGES} that one chat may hold"
        raise ApiError(400, told, param="messages")
    return [served.images.read(url) for url in urls]


def _more_tokens(images: Sequence[Image], served: Served) -> int:
    """Tokens that images take beyond the one that each has in the text."""
    if served.vision is None:
        return 0
    return sum(image_tokens(image.size, served.vision) - 1 for image in images)


def _chat_limit(request: ChatRequest) -> tuple[int | None, str]:
    """The limit that was given, and the name of its field."""
    if request.max_completion_tokens is None:
        return request.max_tokens, "max_tokens"
    if request.max_tokens is not None:
        told = "give max_completion_tokens or max_tokens, not both"
        raise ApiError(400, told, param="max_tokens")
    return request.max_completion_tokens, "max_completion_tokens"


def _new_tokens(
    longest: int,
    limit: int | None,
    field: str,
    default: int,
    served: Served,
    prompt_field: str,
) -> int:
    """How many tokens each sample may get."""
    room = served.max_length - longest
    told = f"the prompt has {longest} tokens, and the model takes {served.max_length} in all"
    if room < 1:
        told += "; shorten it, at least one new token must fit"
        raise ApiError(400, told, param=prompt_field, code="context_length_exceeded")
    if limit is not None and limit > room:
        told = f"{field}={limit} is too many: {told}; {room} are left"
        raise ApiError(400, told, param=field, code="context_length_exceeded")
    return min(default, room) if limit is None else limit


def _head(prefix: str, kind: str, served: Served) -> Answer:
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": served.name,
        "choices": [],
    }


def _job(
    request: Sampling,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    choices: Sequence[ChatChoice | TextChoice],
    head: Answer,
) -> Job:
    options = request.stream_options
    usage = bool(options and options.include_usage)
    return Job(prompts, params, choices, bool(request.stream), usage, head)
