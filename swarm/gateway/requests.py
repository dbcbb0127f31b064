"""From a request's bytes to a checked body: host, key, size, JSON, fields, each before the next costs anything."""

from __future__ import annotations

import asyncio
import hmac
import json
from typing import Any, NoReturn, TypeVar

from fastapi import Request
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from swarm.config import GatewaySettings
from swarm.errors import BadRequest
from swarm.gateway.bodies import Body
from swarm.gateway.console_guard import host_is_ours
from swarm.gateway.failures import ClientGone, NotJson, TooLarge, TooSlow, WrongHost, WrongKey, bad_field
from swarm.gateway.state import Access

B = TypeVar("B", bound=Body)


def check_access(request: Request, access: Access) -> None:
    """Raises :class:`WrongKey` or :class:`WrongHost`.

    Without a key, a gateway on the loopback answers only to its own names: a page of a stranger, whose name was made
    to lead here (DNS rebinding), must not use it through somebody's browser.
    """
    if access.api_key:
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not key.strip():
            raise WrongKey("You didn't provide an API key. Send it as a header: Authorization: Bearer YOUR_KEY.")
        if not hmac.compare_digest(key.strip().encode(), access.api_key.encode()):
            raise WrongKey("Incorrect API key provided.")
    elif access.on_loopback and not host_is_ours(request.headers.get("host", ""), access):
        raise WrongHost("this is not the name of the gateway; use its address, or localhost")


async def parsed(request: Request, kind: type[B], settings: GatewaySettings) -> B:
    """The body as ``kind``. Raises a :class:`SwarmError` that names what is wrong."""
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise NotJson("send JSON, with the header Content-Type: application/json")
    data = await read_body(request, settings)
    try:
        raw = json.loads(data, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"We could not parse the JSON body of your request: {str(error)[:200]}") from None
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise bad_field(error, raw) from None


async def read_body(request: Request, settings: GatewaySettings) -> bytes:
    """Raises :class:`TooLarge` before more is kept than the limit, :class:`TooSlow` or :class:`ClientGone`."""
    limit = settings.max_body_bytes
    refused = TooLarge(f"the request is larger than {limit} bytes (gateway.max_body_bytes)")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced[:18]) > limit:
        raise refused
    parts, size = [], 0
    try:
        async with asyncio.timeout(settings.body_s):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise refused
                parts.append(part)
    except TimeoutError:
        raise TooSlow(f"the request did not arrive within {settings.body_s:g} s (gateway.body_s)") from None
    except ClientDisconnect:
        raise ClientGone("the client went away") from None
    return b"".join(parts)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def as_json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
