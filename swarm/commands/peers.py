"""``swarm peers``: start and stop peers on the gateway's machine, through the gateway."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException
from typing import Annotated, Any

import typer

from swarm.commands.options import AsJson
from swarm.commands.shared import failing_well, print_json, say
from swarm.commands.tables import Cell, colours_wanted, table
from swarm.errors import BadRequest, DeadlineExceeded, SwarmError, from_code

REQUEST_S = 15.0
POLL_S = 0.5
READY_S = 300.0
"""For a peer to load its layers, which it may have to download."""
MAX_ANSWER_BYTES = 4_000_000
MAX_DETAIL = 160
COLOURS = {"serving": "green", "starting": "cyan", "loading": "cyan", "draining": "yellow", "failed": "red"}

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Peers on a gateway's machine: list, start, stop.")

Gateway = Annotated[str, typer.Option(envvar="SWARM_GATEWAY", help="The gateway's address.")]
Key = Annotated[str | None, typer.Option("--api-key", envvar="SWARM_API_KEY", help="If the gateway asks for one.")]
LOCAL = "http://127.0.0.1:8000"


class NoGateway(SwarmError):
    code, retryable, exit_code = "no_gateway", True, 4


class GatewayApi:
    """``/api`` of a gateway. Raises :class:`NoGateway`, or the error that the gateway answered with."""

    def __init__(self, url: str, key: str | None) -> None:
        if not _is_http(url):
            raise BadRequest(f"{url!r} is no address of a gateway; write http://HOST:PORT")
        self._url = url.rstrip("/")
        self._key = key
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def get(self, path: str) -> dict[str, Any]:
        return self._ask(urllib.request.Request(self._url + path, headers=self._headers))

    def post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        token = self.get("/api/token")["token"]
        headers = self._headers | {"X-Swarm-Token": str(token), "Content-Type": "application/json"}
        data = json.dumps(body or {}).encode()
        return self._ask(urllib.request.Request(self._url + path, data, headers, method="POST"))

    def _ask(self, request: urllib.request.Request) -> dict[str, Any]:
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_S) as response:
                answer = json.loads(response.read(MAX_ANSWER_BYTES))
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from None
        except (OSError, ValueError) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            why = reason.strerror if isinstance(reason, OSError) and reason.strerror else reason
            raise NoGateway(f"no gateway answers at {self._url} ({why}); 'swarm gateway' starts one") from None
        except HTTPException:
            answer = None
        if not isinstance(answer, dict):
            raise NoGateway(f"what answers at {self._url} is no gateway")
        return answer

    def _refusal(self, error: urllib.error.HTTPError) -> SwarmError:
        try:
            with error:
                said = json.loads(error.read(MAX_ANSWER_BYTES))["error"]
            code, message = said["code"], str(said["message"])
        except (ValueError, KeyError, TypeError, OSError, HTTPException):
            code, message = error.code, ""
        if code == "not_signed_in":
            wrong = "has another API key than" if self._key else "asks for its API key:"
            return BadRequest(f"the gateway {wrong} --api-key, or SWARM_API_KEY")
        if code in (None, "forbidden"):  # None: there is no such path
            return BadRequest(message)
        if not isinstance(code, str):  # some other server
            return NoGateway(f"what answers at {self._url} is no gateway: {error.code} {error.reason}")
        return from_code(code, message)


def _is_http(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        return parts.scheme in ("http", "https") and parts.port != 0  # asked for, as it raises for what is no port
    except ValueError:
        return False


@app.command("list")
def list_peers(gateway: Gateway = LOCAL, api_key: Key = None, as_json: AsJson = False) -> None:
    """List the peers that the gateway started."""
    with failing_well(as_json):
        peers = GatewayApi(gateway, api_key).get("/api/peers")["peers"]
        if as_json:
            print_json({"event": "peers", "peers": peers})
        elif not peers:
            say("this gateway has started no peer; 'swarm peers start' starts one")
        else:
            print("\n".join(_table(peers)))


@app.command()
def start(
    layers: Annotated[str, typer.Option(help="START:END, half open, or auto.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:N or mps.")] = "auto",
    max_memory_mb: Annotated[int, typer.Option(help="What the peer may take; 0: what is free.")] = 0,
    threads: Annotated[int, typer.Option(help="Of the compute thread; 0: as many as torch likes.")] = 1,
    model: Annotated[str, typer.Option(help="Another than the gateway's.")] = "",
    host_maddrs: Annotated[
        list[str] | None, typer.Option(help="Where it is to listen, if not on the loopback only; repeatable.")
    ] = None,
    wait: Annotated[bool, typer.Option(help="Until it serves.")] = True,
    gateway: Gateway = LOCAL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Start a peer on the gateway's machine."""
    asked = {
        "layers": layers,
        "device": device,
        "max_memory_mb": max_memory_mb,
        "threads": threads,
        "model": model,
        "host_maddrs": ",".join(host_maddrs or ()),
    }
    with failing_well(as_json):
        api = GatewayApi(gateway, api_key)
        peer = api.post("/api/peers", asked)
        if wait:
            try:
                peer = _until(api, peer, ("serving",), as_json=as_json)
            except KeyboardInterrupt:
                say(f"peer {peer['name']} goes on all the same; 'swarm peers stop {peer['name']}' ends it")
                raise
        _tell(peer, as_json)


@app.command()
def stop(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As 'swarm peers list' names it, for example p1.")],
    kill: Annotated[bool, typer.Option("--kill", help="At once, as if its power failed.")] = False,
    wait: Annotated[bool, typer.Option(help="Until it has left.")] = True,
    gateway: Gateway = LOCAL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Drain a peer: its sessions move to others, then it leaves."""
    with failing_well(as_json):
        api = GatewayApi(gateway, api_key)
        peer = api.post(f"/api/peers/{urllib.parse.quote(name, safe='')}/{'kill' if kill else 'drain'}")
        if wait and peer["state"] != "failed":  # as it has before: then it is gone, as was asked for
            peer = _until(api, peer, ("left",), as_json=as_json)
        _tell(peer, as_json)


def _until(api: GatewayApi, peer: dict[str, Any], states: tuple[str, ...], *, as_json: bool) -> dict[str, Any]:
    """Poll until it is in one of ``states``; says each change. Raises if it failed, or left before it served."""
    deadline = time.monotonic() + READY_S
    said = ""
    while peer["state"] not in states:
        if peer["state"] in ("failed", "left"):
            raise from_code(peer["code"] or SwarmError.code, f"peer {peer['name']}: {peer['detail']}")
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"peer {peer['name']} is {peer['state']} after {READY_S:g} s")
        now = f"{peer['state']}, {peer['percent']}%" if peer["state"] == "loading" else peer["state"]
        if now != said and not as_json:
            say(f"peer {peer['name']}: {now}")
        said = now
        time.sleep(POLL_S)
        peer = api.get(f"/api/peers/{peer['name']}")
    return peer


def _tell(peer: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json({"event": "peer"} | peer)
    else:
        print("\n".join(_table([peer])))


def _table(peers: list[dict[str, Any]]) -> list[str]:
    rows: list[list[str | Cell]] = [
        [
            peer["name"],
            Cell(peer["state"], COLOURS.get(peer["state"])),
            ":".join(map(str, peer["layers"])) if peer["layers"] else peer["asked"]["layers"],
            peer["peer_id"][-6:] or "-",
            f"{peer['memory_mb']} MB" if peer["memory_mb"] else "-",
            _cut(peer["detail"].splitlines()[0]) if peer["detail"] not in ("", peer["state"]) else "",
        ]
        for peer in peers
    ]
    head = ("name", "state", "layers", "peer", "memory", "")
    return table(head, rows, right=("memory",), coloured=colours_wanted())


def _cut(text: str) -> str:
    return text if len(text) <= MAX_DETAIL else f"{text[: MAX_DETAIL - 3]}..."
