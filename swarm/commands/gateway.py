"""``swarm gateway``: OpenAI's API and the console on a port of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
import webbrowser
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.commands.options import AsJson, ConfigFile, InitialPeers, LogFormat, Model, Verbose
from swarm.commands.shared import ending_on_sigterm, print_json, run, say
from swarm.config import Settings
from swarm.errors import ConfigError, SwarmError

if TYPE_CHECKING:
    from swarm.coverage import Coverage
    from swarm.gateway.local_peers import LocalPeers, OwnPeer, PeerSpec
    from swarm.gateway.state import Access

LOOK_S = 1.0
"""How often it is seen whether the peers that it started are still there."""


@dataclass(frozen=True, slots=True)
class Flags:
    """What is asked of this gateway alone, and is no setting."""

    host: str
    port: int
    model: str | None
    api_key: str
    allow_remote_control: bool
    start: Sequence[str]
    """Layers of the peers that it starts here, and waits for."""
    spare: Sequence[str]
    """... and of those that it does not wait for."""
    open_browser: bool
    as_json: bool


def gateway(
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    initial_peers: InitialPeers = None,
    model: Model = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="SWARM_API_KEY", show_envvar=True, help="What clients must send as a bearer token."),
    ] = None,
    allow_remote_control: Annotated[
        bool, typer.Option("--allow-remote-control", help="The console may start and stop peers from elsewhere, too.")
    ] = False,
    start: Annotated[
        list[str] | None,
        typer.Option(help="First start a peer here with these layers: START:END or auto; repeatable."),
    ] = None,
    spare: Annotated[
        list[str] | None,
        typer.Option(help="As --start, but nobody waits for it: for when another is lost."),
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Show the console in a browser.")] = False,
    log_format: LogFormat = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Serve OpenAI's API and a console at http://HOST:PORT."""
    flags = Flags(
        host, port, model, api_key or "", allow_remote_control, start or (), spare or (), open_browser, as_json
    )

    async def work(settings: Settings) -> None:
        await _serve(settings, flags)

    own = {"model": model, "log_format": log_format}
    with ending_on_sigterm():
        run(work, initial_peers, config, as_json=as_json, verbose=verbose, flags=own, stamped=True)


async def _serve(settings: Settings, flags: Flags) -> None:
    if flags.api_key != flags.api_key.strip() or not (flags.api_key.isascii() and flags.api_key.isprintable()):
        raise ConfigError("the API key has spaces around it or characters beyond ASCII: no client could send it")
    try:
        from swarm.gateway.app import create_app
        from swarm.gateway.local_peers import LocalPeers, PeerSpec
        from swarm.gateway.serve import Server, listen
        from swarm.gateway.state import Access, GatewayState
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed: run bin/setup, or pip install '.[gateway]'") from None
    from swarm.client import AsyncClient

    with listen(flags.host, flags.port) as sock:
        host = f"[{flags.host}]" if ":" in flags.host else flags.host
        url = f"http://{host}:{sock.getsockname()[1]}"
        async with contextlib.AsyncExitStack() as stack:
            local = await stack.enter_async_context(LocalPeers())
            initial_peers = list(settings.network.initial_peers)
            kind = settings.model
            specs, spares = (
                [PeerSpec(kind.name, kind.dtype, layers, kind.weights) for layers in ranges]
                for ranges in (flags.start, flags.spare)
            )
            async with local.several() if len(specs) + len(spares) > 1 else contextlib.nullcontext():
                initial_peers += await _start_peers(local, specs, initial_peers)
                say("joining the swarm")
                client = await stack.enter_async_context(AsyncClient(initial_peers, flags.model, settings))
                started = [local.start(spec, initial_peers) for spec in spares]
            for telling in (_tell_of_spares(local, started), _tell_of_losses(local)):
                stack.callback(asyncio.create_task(telling).cancel)
            access = Access(flags.host, flags.api_key, flags.allow_remote_control)
            state = GatewayState.of(client, settings, access, tuple(initial_peers), local)

            def ready() -> None:
                if flags.as_json:
                    print_json({"event": "ready", "url": url, "model": client.profile.name, "pid": os.getpid()})
                else:
                    say(f"{client.profile.name} at {url}, OpenAI's API at {url}/v1; Ctrl-C ends")
                for notice in _notices(access, state.generations.coverage()):
                    say(notice)
                if flags.open_browser:
                    _open_browser(url)

            def exiting() -> None:
                say("stopping")
                state.end()

            server = Server(create_app(state), settings.gateway, on_ready=ready, on_exit=exiting)
            await server.serve(sockets=[sock])


def _notices(access: Access, coverage: Coverage) -> Iterator[str]:
    """What somebody should know of a gateway that has just begun."""
    if not coverage.complete:
        yield f"no answers yet: {coverage.sentence()}"
    if not (access.on_loopback or access.api_key):
        yield f"whoever reaches {access.host} can use this gateway; --api-key asks for a key"


async def _start_peers(local: LocalPeers, specs: Sequence[PeerSpec], joins: Sequence[str]) -> list[str]:
    """Peers on this machine: the first, then the others at once, through it. Their addresses."""
    for group in (specs[:1], specs[1:]):
        started = [local.start(spec, [*joins, *local.addresses]) for spec in group]
        for peer in started:
            say(f"peer {peer.name} loads layers {peer.spec.layers}")
        for peer in started:
            await _serves(local, peer, "peer")
    return local.addresses


async def _tell_of_spares(local: LocalPeers, spares: Sequence[OwnPeer]) -> None:
    """One after the other, and whenever the console has ended one."""
    for spare in spares:
        say(f"spare {spare.name} loads layers {spare.spec.layers} meanwhile")
    for spare in spares:
        try:
            await _serves(local, spare, "spare")
        except SwarmError as error:
            say(f"a spare failed: {error.message.splitlines()[0]}")


async def _tell_of_losses(local: LocalPeers) -> None:
    told: set[str] = set()
    while True:
        for peer in local.lost():
            if peer.name not in told:
                told.add(peer.name)
                say(f"peer {peer.name} with layers {peer.layers} is lost: {peer.detail}")
        await asyncio.sleep(LOOK_S)


async def _serves(local: LocalPeers, peer: OwnPeer, kind: str) -> None:
    ready = await local.serving(peer.name)
    say(f"{kind} {peer.name} serves layers {ready.layers}")


def _open_browser(url: str) -> None:
    """Only one with a window: a browser in the terminal would take it over."""
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return
    threading.Thread(target=webbrowser.open, args=(url,), name="browser", daemon=True).start()
