"""The API's description, made of the models that check requests."""

from __future__ import annotations

import functools
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema

from mmjax.serve.errors import ErrorBody
from mmjax.serve.replies import Answer
from mmjax.serve.requests import ChatRequest, CompletionRequest

_REF = "#/components/schemas/{model}"
_WRONG = {
    "400": "The request is wrong; the message names field and value.",
    "401": "The API key is missing or wrong.",
    "404": "There is no such model.",
    "413": "The body is too large.",
    "429": "Too many samples wait; try again after Retry-After seconds.",
    "500": "The server or its engine failed.",
    "503": "The engine has stopped.",
}


@functools.cache
def describe() -> dict[str, Any]:
    """The OpenAPI 3.1 description of the server."""
    _, requests = models_json_schema(
        [(ChatRequest, "validation"), (CompletionRequest, "validation")], ref_template=_REF
    )
    schemas = dict(requests["$defs"])
    for kind in (Answer, ErrorBody):
        schema = TypeAdapter(kind).json_schema(ref_template=_REF)
        schemas |= schema.pop("$defs", {})
        schemas[kind.__name__] = schema
    paths = {
        "/v1/chat/completions": {"post": _completion("A reply to a chat.", "ChatRequest")},
        "/v1/completions": {"post": _completion("A continuation.", "CompletionRequest")},
        "/v1/models": {"get": _read("The model served, in a list.", "401")},
        "/v1/models/{name}": {
            "parameters": [
                {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
            ],
            "get": _read("The model served.", "401", "404"),
        },
        "/health": {"get": _read("Whether the engine works.", "503")},
        "/metrics": {"get": _read("Metrics in Prometheus' text format.")},
        "/openapi.json": {"get": _read("This description.")},
    }
    bearer = {"type": "http", "scheme": "bearer"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "mmjax serve", "version": "1"},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"api_key": bearer}},
    }


def _completion(told: str, body: str) -> dict[str, Any]:
    events = {"schema": {"type": "string"}}
    return {
        "summary": told,
        "security": [{}, {"api_key": []}],
        "requestBody": {"required": True, "content": _json(body)},
        "responses": {
            "200": {
                "description": "The answer; with stream=true, its chunks as server-sent events.",
                "content": {**_json("Answer"), "text/event-stream": events},
            },
            **_errors(*_WRONG),
        },
    }


def _read(told: str, *errors: str) -> dict[str, Any]:
    return {"summary": told, "responses": {"200": {"description": told}, **_errors(*errors)}}


def _errors(*statuses: str) -> dict[str, Any]:
    return {s: {"description": _WRONG[s], "content": _json("ErrorBody")} for s in statuses}


def _json(schema: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REF.format(model=schema)}}}
