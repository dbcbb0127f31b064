"""Who may use the console: signed in, from this site and no other, and peers only where that is allowed.

- The ``Host`` header must name this gateway: an address, ``localhost`` or the name it listens on. A page of a stranger
  whose name is made to point here (DNS rebinding) sends its own name. With an API key any name will do: such a page
  has neither the key nor the cookie.
- What changes something needs the page's token, which a page of another origin can't read, or the API key.
- With an API key, everything needs it: as a bearer token, or as the cookie that the sign-in page sets.
- Starting and stopping peers is off unless the gateway listens on the loopback and is asked from there, or
  ``--allow-remote-control`` was given.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request, Response
from fastapi.responses import JSONResponse, RedirectResponse
from fastapi.routing import APIRoute

from swarm.errors import SwarmError
from swarm.gateway.state import Access, is_loopback

COOKIE = "swarm_console"
TOKEN_HEADER = "x-swarm-token"
SIGN_IN = "/sign-in"
STATIC = "/static/"

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
_FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip")


class NotSignedIn(SwarmError):
    code, http_status = "not_signed_in", 401


class Forbidden(SwarmError):
    code, http_status = "forbidden", 403


def host_is_ours(host_header: str, access: Access) -> bool:
    """Whether a ``Host`` header names this gateway: any address will do, of names only those that lead nowhere else."""
    try:
        name = (urlsplit(f"//{host_header}").hostname or "").lower().rstrip(".")
    except ValueError:
        return False
    if name == "localhost" or name.endswith(".localhost") or name == access.host.lower():
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def cookie_value(access: Access) -> str:
    """Shows that its holder knew the API key; worthless after this process."""
    return hmac.new(access.control_token.encode(), access.api_key.encode(), hashlib.sha256).hexdigest()


def key_is_right(request: Request, access: Access) -> bool:
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    return bool(access.api_key) and kind.lower() == "bearer" and _same(key.strip(), access.api_key)


def is_signed_in(request: Request, access: Access) -> bool:
    return (
        not access.api_key
        or key_is_right(request, access)
        or _same(request.cookies.get(COOKIE, ""), cookie_value(access))
    )


def check_change(request: Request, access: Access) -> None:
    """Before anything is changed. Raises :class:`Forbidden`."""
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
        raise Forbidden("this request comes from a page of another site")
    if not key_is_right(request, access) and not _same(request.headers.get(TOKEN_HEADER, ""), access.control_token):
        raise Forbidden("the console's token is missing or of an earlier gateway; reload the page")


def why_no_control(request: Request, access: Access) -> str:
    """Why this request may not start or stop peers; empty if it may."""
    if access.allow_remote_control:
        return ""
    if not access.on_loopback:
        return (
            "peers can be started and stopped only if the gateway listens on 127.0.0.1, or with --allow-remote-control"
        )
    local = request.client is not None and is_loopback(request.client.host)
    if not local or any(name in request.headers for name in _FORWARDED):
        return "peers can be started and stopped from this machine only (--allow-remote-control)"
    return ""


def check_control(request: Request, access: Access) -> None:
    """Before a peer is started or stopped. Raises :class:`Forbidden`."""
    check_change(request, access)
    if reason := why_no_control(request, access):
        raise Forbidden(reason)


def _same(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode(), wanted.encode())


Handler = Callable[[Request], Coroutine[Any, Any, Response]]


def guarded(access: Access) -> type[APIRoute]:
    """The class of the console's routes: host and key are checked, errors are JSON, all answers have ``HEADERS``."""

    class GuardedRoute(APIRoute):
        def get_route_handler(self) -> Handler:
            handle = super().get_route_handler()

            async def guarded_handle(request: Request) -> Response:
                try:
                    response = await _checked(request, access, handle)
                except SwarmError as error:
                    body = {"error": {"code": error.code, "message": error.message}}
                    response = JSONResponse(body, error.http_status)
                for name, value in HEADERS.items():
                    response.headers.setdefault(name, value)
                return response

            return guarded_handle

    return GuardedRoute


async def _checked(request: Request, access: Access, handle: Handler) -> Response:
    if not access.api_key and not host_is_ours(request.headers.get("host", ""), access):
        raise Forbidden("this is not the name of the gateway; use its address, or localhost")
    path = request.url.path
    if not is_signed_in(request, access) and path != SIGN_IN and not path.startswith(STATIC):
        if "text/html" in request.headers.get("accept", ""):
            return RedirectResponse(SIGN_IN, 303)
        raise NotSignedIn("send the gateway's API key as a bearer token, or sign in at /sign-in")
    return await handle(request)
