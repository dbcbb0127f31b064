"""The commands of ``swarm-peer``."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Annotated, Any

import typer
import uvloop

from peers.lean_imports import import_transformers
from peers.process_memory import limit_growth, return_library_pages, wait_asleep
from swarm.commands.options import (
    AsJson,
    ConfigFile,
    Device,
    Dtype,
    InitialPeers,
    LogFormat,
    MaxMemoryMb,
    ModelReference,
    Verbose,
    Version,
    Weights,
)
from swarm.commands.shared import Commands, failing_well, print_json
from swarm.config import Settings
from swarm.config_loader import load_settings
from swarm.logs import log_to_stderr, say

if TYPE_CHECKING:
    from peers.machine import Report

PROGRAM = "swarm-peer"

app = typer.Typer(cls=Commands, add_completion=False, no_args_is_help=True)


HostMaddrs = Annotated[list[str] | None, typer.Option(help="Where to listen; repeatable.")]
AnnounceMaddrs = Annotated[list[str] | None, typer.Option(help="What to tell others instead; repeatable.")]
NatPortMap = Annotated[
    bool | None, typer.Option("--nat-port-map/--no-nat-port-map", help="Ask the router to forward the port (UPnP).")
]
UseRelay = Annotated[
    bool | None, typer.Option("--use-relay/--no-use-relay", help="Be reached through a relay if not directly.")
]


@app.callback()
def root(version: Version = False) -> None:
    """Run a peer: a layer range of a model, for the swarm."""


@app.command()
def serve(
    model: ModelReference = None,
    layers: Annotated[str | None, typer.Option(help="START:END, half open, or auto.")] = None,
    initial_peers: InitialPeers = None,
    host_maddrs: HostMaddrs = None,
    announce_maddrs: AnnounceMaddrs = None,
    nat_port_map: NatPortMap = None,
    auto_nat: Annotated[
        bool | None,
        typer.Option("--auto-nat/--no-auto-nat", help="Help others to find out whether they can be dialled."),
    ] = None,
    use_relay: UseRelay = None,
    device: Device = None,
    dtype: Dtype = None,
    weights: Weights = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of the compute thread; 0: as many as torch likes.")
    ] = None,
    max_memory_mb: MaxMemoryMb = None,
    identity: Annotated[str | None, typer.Option(help="Key file; made if missing.")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Serve /metrics for Prometheus there, on the loopback; 0: don't.")
    ] = None,
    log_format: LogFormat = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Load a layer range, join the swarm and serve until SIGTERM or Ctrl-C."""
    flags = {
        "model": model,
        "layers": layers,
        "initial_peers": initial_peers,
        "host_maddrs": host_maddrs,
        "announce_maddrs": announce_maddrs,
        "nat_port_map": nat_port_map,
        "auto_nat": auto_nat,
        "use_relay": use_relay,
        "device": device,
        "dtype": dtype,
        "weights": weights,
        "threads": threads,
        "max_memory_mb": max_memory_mb,
        "identity": identity,
        "metrics_port": metrics_port,
        "log_format": log_format,
    }
    with failing_well(as_json, PROGRAM):
        settings = load_settings(config, os.environ, flags).settings
        log_to_stderr(logging.INFO if verbose else logging.WARNING, settings.log.format)
        _serve(settings, as_json)


@app.command()
def probe(
    model: ModelReference = None,
    initial_peers: Annotated[
        list[str] | None, typer.Option(help="Peers to measure the way to, and to be dialled by; repeatable.")
    ] = None,
    host_maddrs: HostMaddrs = None,
    announce_maddrs: AnnounceMaddrs = None,
    nat_port_map: NatPortMap = None,
    use_relay: UseRelay = None,
    device: Device = None,
    dtype: Dtype = None,
    weights: Weights = None,
    max_memory_mb: MaxMemoryMb = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again, though it is known.")] = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Tell what this machine could give: devices, memory, layers, their speed, the way to other peers and back."""
    flags = {
        "model": model,
        "initial_peers": initial_peers,
        "host_maddrs": host_maddrs,
        "announce_maddrs": announce_maddrs,
        "nat_port_map": nat_port_map,
        "use_relay": use_relay,
        "device": device,
        "dtype": dtype,
        "weights": weights,
        "max_memory_mb": max_memory_mb,
    }
    with failing_well(as_json, PROGRAM):
        settings = load_settings(config, os.environ, flags).settings
        log_to_stderr(logging.WARNING, settings.log.format)
        import_transformers()
        from peers.survey import lines, survey

        def report(event: dict[str, object]) -> None:
            if as_json:
                print_json(event)
            else:
                print("\n".join(lines(event)))

        uvloop.run(survey(settings, report, fresh=fresh))


def _serve(settings: Settings, as_json: bool) -> None:
    _say(f"loading what serves {settings.model.name} (torch, transformers)")
    run = import_server()

    def report(event: dict[str, object]) -> None:
        if as_json:
            print_json(event)
        _say(_sentence(event))

    uvloop.run(run(settings, report))


def import_server() -> Callable[[Settings, Report], Coroutine[Any, Any, None]]:
    """In the order that keeps a peer small: what is imported first decides what else is."""
    limit_growth()
    wait_asleep()
    import_transformers()
    from peers.server import serve

    return_library_pages()
    return serve


def _say(text: str) -> None:
    say(PROGRAM, text)


def _sentence(event: dict[str, object]) -> str:
    match event:
        case {"event": "loading", "memory": memory}:
            return f"takes {memory}"
        case {"event": "loading", "compiling": True}:
            return "compiles its kernels first, once on this machine"
        case {"event": "loading", "percent": percent, "layers": [start, end]}:
            return f"layers {start}:{end} loaded to {percent}%"
        case {"event": "ready", "layers": [start, end], "model": model, "weights_mb": size, "addresses": [first, *_]}:
            serving = f"serving layers {start}:{end} of {model} ({size:.0f} MB of weights)"
            return f"{serving}\n{event['coverage']}\nothers join with --initial-peers {first}"
        case {"event": "moving", "layers": [start, end], "reason": reason}:
            return f"moves to layers {start}:{end}: {reason}"
        case {"event": "warning", "message": message}:
            return f"warning: {message}"
        case {"event": "coverage", "message": message}:
            return str(message)
        case {"event": "reachability", "message": message}:
            return f"this machine {message}"
        case {"event": "staying", "layers": [start, end], "reason": reason}:
            return f"stays with layers {start}:{end}: {reason}"
        case {"event": "draining", "sessions": sessions}:
            moving = f"{sessions} sessions move" if sessions != 1 else "1 session moves"
            return f"leaving: {moving} to other peers first; once more to end at once"
        case {"event": "left"}:
            return "left the swarm"
    return str(event)
