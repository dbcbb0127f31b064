"""Errors as OpenAI's API words them: ``{"error": {"message", "type", "param", "code"}}``, with status and headers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from swarm.errors import BadRequest, Busy, Cancelled, NoRoute, SwarmError, TooLong, UnknownModel
from swarm.gateway.gate import Full

INVALID = "invalid_request_error"
NO_ROUTE_RETRY_S = 5
"""Layers come back when a peer has loaded them."""


class BadField(BadRequest):
    """One field of the request is wrong."""

    def __init__(self, message: str, param: str, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.field_code = code


class TooManyTokens(TooLong):
    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class WrongKey(SwarmError):
    code, http_status = "invalid_api_key", 401


class TooLarge(SwarmError):
    code, http_status = "request_too_large", 413


class NotJson(SwarmError):
    code, http_status = "unsupported_media_type", 415


class TooSlow(SwarmError):
    code, http_status = "request_timeout", 408


CLIENT_GONE = 499
"""nginx's status for a client that closed its connection; it is not read by anybody."""


class ClientGone(Cancelled):
    """The client went away before it got an answer."""

    http_status = CLIENT_GONE


class WrongHost(SwarmError):
    code, http_status = "wrong_host", 403


_OURS: tuple[tuple[type[SwarmError], str, str | None], ...] = (
    (TooLong, INVALID, "context_length_exceeded"),
    (BadRequest, INVALID, None),
    (UnknownModel, INVALID, "model_not_found"),
    (Busy, "requests", "rate_limit_exceeded"),
)
"""First match: type and code. Of the others, below 500 are the client's, the rest ours, under their own code."""


def error_body(error: SwarmError) -> dict[str, Any]:
    kind, code = next(
        ((kind, code) for ours, kind, code in _OURS if isinstance(error, ours)),
        (INVALID if error.http_status < 500 else "server_error", error.code),
    )
    if isinstance(error, BadField):
        code = error.field_code
    param = getattr(error, "param", "model" if isinstance(error, UnknownModel) else None)
    return {"error": {"message": error.message, "type": kind, "param": param, "code": code}}


def error_response(error: SwarmError) -> JSONResponse:
    headers = {}
    if isinstance(error, Busy | NoRoute):
        retry_after_s = error.retry_after_s if isinstance(error, Full) else NO_ROUTE_RETRY_S
        headers["retry-after"] = str(retry_after_s)
    if isinstance(error, WrongKey):
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(error), error.http_status, headers)


async def swarm_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, SwarmError)
    return error_response(error)


async def http_error(request: Request, error: Exception) -> JSONResponse:
    """Unknown paths and methods."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    message = f"Invalid URL ({where})" if error.status_code == 404 else f"{error.detail} ({where})"
    body = {"error": {"message": message, "type": INVALID, "param": None, "code": None}}
    return JSONResponse(body, error.status_code, error.headers)


async def unexpected(_: Request, __: Exception) -> JSONResponse:
    """A bug; the server logs it."""
    message = "The gateway had an error while processing your request; its log has the details."
    body = {"error": {"message": message, "type": "server_error", "param": None, "code": "internal"}}
    return JSONResponse(body, 500)


def bad_field(error: ValidationError, raw: object) -> BadField:
    """The first thing that is wrong with ``raw``, its place written as ``messages[0].content``.

    A field that may be of several types is wrong once for each: what was found deepest within it tells most.
    """
    first = error.errors(include_url=False, include_context=False, include_input=False)
    places = [_place(item["loc"], raw, item["type"] == "missing") for item in first]
    top = places[0][:1]
    chosen = max(
        (i for i, place in enumerate(places) if place[:1] == top), key=lambda i: (len(places[i]), -i), default=0
    )
    kind, place = first[chosen]["type"], _written(places[chosen])
    if kind == "missing":
        return BadField(f"Missing required parameter: '{place}'.", place, "missing_required_parameter")
    alike = {
        said(item["type"], item["msg"]) for item, other in zip(first, places, strict=True) if other == places[chosen]
    }
    code = "invalid_type" if kind.endswith(("_type", "_parsing")) else "invalid_value"
    return BadField(f"Invalid '{place}': {'; or '.join(sorted(alike))}.", place, code)


def said(kind: str, message: str) -> str:
    """What pydantic says of an input, without the names of Python's and our own classes."""
    if kind in ("dict_type", "model_type"):
        return "Input should be an object"
    return message.removeprefix("Value error, ")


def _place(loc: Sequence[int | str], raw: object, missing: bool) -> tuple[int | str, ...]:
    """The part of pydantic's path that leads through ``raw``; the rest names alternatives of a type."""
    place: list[int | str] = []
    for step in loc:
        named = isinstance(raw, dict) and step in raw
        counted = isinstance(raw, list) and isinstance(step, int) and step < len(raw)
        if named or counted:
            raw = raw[step]  # type: ignore[index]  # of a dict or list, as was just checked
        elif not (missing and isinstance(raw, dict) and step == loc[-1]):
            continue
        place.append(step)
    return tuple(place)


def _written(place: Sequence[int | str]) -> str:
    text = ""
    for step in place:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else str(step)
    return text or "body"
