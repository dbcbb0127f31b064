"""``swarm status``: who is there, what they hold, what is missing."""

from __future__ import annotations

import asyncio
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from swarm.commands.drawing import Pen, bar, cells, counts_line, pen_for, ruler
from swarm.commands.options import AsJson, ConfigFile, InitialPeers, Model, Verbose
from swarm.commands.shared import print_json, run, say
from swarm.commands.tables import Cell, colours_wanted, paint, table
from swarm.config import Settings
from swarm.coverage import Coverage, served
from swarm.models import ModelProfile
from swarm.plans import Check
from swarm.types import Announcement, PeerId, PeerState

WATCH_S = 2.0
MOST_COLUMNS, LEAST_COLUMNS = 64, 10
"""Of the picture."""
LEAST_TOLD = ("version", "KV free", "load", "age", "a token")
"""What a narrow terminal does without, in this order."""
STALE_S = 20.0
"""A peer announces itself every 15 s: one that is older may be gone."""
CLEAR = "\x1b[H\x1b[2J"
STATE_COLOURS = {PeerState.SERVING: "green", PeerState.JOINING: "cyan", PeerState.DRAINING: "yellow"}


@dataclass(frozen=True, slots=True)
class Status:
    profile: ModelProfile
    peers: Sequence[tuple[Announcement, float]]
    """With their ages in seconds, by first layer."""
    coverage: Coverage
    refused: Mapping[PeerId, str]
    """Why a peer that serves is in no plan."""


def status(
    initial_peers: InitialPeers = None,
    model: Model = None,
    watch: Annotated[bool, typer.Option("--watch", help="Again and again, until Ctrl-C.")] = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Show the peers of a swarm, their layers, speed and load, and which layers are missing."""

    async def work(settings: Settings) -> None:
        if not as_json and not watch:
            say("looking at the swarm")
        from swarm.client import AsyncClient

        async with AsyncClient(list(settings.network.initial_peers), model, settings) as client:
            while True:
                announcements = await client.peers()
                aged = [(a, client.view.age(a.peer.peer_id)) for a in announcements]
                now = status_of(client.profile, aged, client.view.check)
                if as_json:
                    print_json(as_event(now))
                else:
                    _show(now, clear=watch)
                if not watch:
                    return
                await asyncio.sleep(WATCH_S)

    run(work, initial_peers, config, as_json=as_json, verbose=verbose)


def status_of(profile: ModelProfile, peers: Sequence[tuple[Announcement, float]], check: Check) -> Status:
    """``check``: as planners do, see ``swarm.plans.Knowledge``."""
    ordered = sorted(peers, key=lambda item: (item[0].layers, item[0].peer.peer_id))
    refused = {a.peer.peer_id: reason for a, _ in ordered if a.state is PeerState.SERVING and (reason := check(a))}
    return Status(profile, ordered, served([a for a, _ in ordered], profile, check), refused)


def _show(status: Status, *, clear: bool) -> None:
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 2 * MOST_COLUMNS
    lines = rendered(status, pen_for(sys.stdout.encoding), width, coloured=colours_wanted())
    if clear and sys.stdout.isatty():
        print(CLEAR, end="")
    print("\n".join([*lines, ""]) if clear else "\n".join(lines), flush=True)


def rendered(status: Status, pen: Pen, width: int, *, coloured: bool = False) -> list[str]:
    """For a terminal of ``width`` columns."""
    profile, coverage = status.profile, status.coverage
    told = _columns(status)

    def left() -> int:
        return width - sum(2 + max(map(len, [name, *map(str, column)])) for name, column in told.items())

    for name in LEAST_TOLD:
        if left() < min(LEAST_COLUMNS, profile.num_layers):
            del told[name]
    columns = cells(profile.num_layers, min(MOST_COLUMNS, max(LEAST_COLUMNS, left())))
    first, *others = told
    picture: list[str | Cell] = [
        Cell(bar(a.layers, columns, pen, serving=a.state is PeerState.SERVING), STATE_COLOURS.get(a.state))
        for a, _ in status.peers
    ]
    rows = [list(row) for row in zip(told[first], picture, *(told[name] for name in others), strict=True)]
    rows.append(["peers", counts_line(coverage.counts, columns), *[""] * len(others)])
    lines = table(
        (first, ruler(columns), *others), rows, right=("a token", "load", "KV free", "age"), coloured=coloured
    )
    verdict = paint(coverage.sentence(), "green" if coverage.complete else "red", coloured=coloured)
    silent = [a.peer.peer_id[-6:] for a, age_s in status.peers if STALE_S < age_s < math.inf]
    doubt = [f"not heard of for {STALE_S:.0f} s, perhaps gone: {', '.join(silent)}"] if silent else []
    refused = [f"not used: {peer[-6:]}: {reason}" for peer, reason in status.refused.items()]
    return [
        f"{profile.model_id}, {profile.num_layers} layers, {profile.precision}",
        "",
        *lines,
        "",
        verdict,
        *doubt,
        *refused,
    ]


def _columns(status: Status) -> dict[str, list[str | Cell]]:
    """What is told of each peer, by its heading."""
    return {
        "peer": [a.peer.peer_id[-6:] for a, _ in status.peers],
        "layers": [str(a.layers) for a, _ in status.peers],
        "state": [Cell(a.state, STATE_COLOURS.get(a.state)) for a, _ in status.peers],
        "a token": [f"{1e3 * a.token_s(a.layers):.1f} ms" for a, _ in status.peers],
        "load": [
            f"{a.sessions}" + (f" +{1e3 * a.queue_s:.0f} ms" if a.queue_s >= 0.001 else "") for a, _ in status.peers
        ],
        "KV free": [f"{a.kv_tokens_free / 1000:.0f}k" for a, _ in status.peers],
        "age": [
            Cell("?" if math.isinf(age_s) else f"{age_s:.0f} s", "yellow" if age_s > STALE_S else None)
            for _, age_s in status.peers
        ],
        "version": [a.version for a, _ in status.peers],
    }


def as_event(status: Status) -> dict[str, Any]:
    return {
        "event": "status",
        "model": status.profile.model_id,
        "num_layers": status.profile.num_layers,
        "peers": [
            {
                "peer_id": a.peer.peer_id,
                "addresses": list(a.peer.multiaddrs),
                "layers": [a.layers.start, a.layers.end],
                "state": a.state.value,
                "version": a.version,
                "decode_s_per_layer": a.decode_s_per_layer,
                "step_s": a.step_s,
                "head_s": a.head_s,
                "prefill_s_per_token_layer": a.prefill_s_per_token_layer,
                "queue_s": a.queue_s,
                "sessions": a.sessions,
                "kv_tokens_free": a.kv_tokens_free,
                "refused": status.refused.get(a.peer.peer_id),
                "age_s": None if math.isinf(age_s) else round(age_s, 1),
            }
            for a, age_s in status.peers
        ],
        "peers_of_layer": list(status.coverage.counts),
        "missing": [[gap.start, gap.end] for gap in status.coverage.missing],
        "coverage": status.coverage.sentence(),
    }
