"""A generation as the console's page hears of it: server-sent events, JSON in each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from swarm.gateway.hub import Ended
from swarm.session import RouteChanged
from swarm.types import Hop, Route, Token


def sse(event: str, data: str) -> str:
    """One server-sent event; ``data`` may have many lines."""
    lines = "".join(f"data: {line}\n" for line in data.split("\n"))
    return f"event: {event}\n{lines}\n"


@dataclass(slots=True)
class Story:
    """Turns the events of one generation into messages, and keeps what the last one needs."""

    began_s: float
    """By the clock that gives the ``now_s`` of :meth:`tell`."""
    own: Mapping[str, str]
    """Peer ids that this gateway started, with the names it has for them."""
    route: Route | None = None
    last_s: float = 0.0
    tokens: int = 0

    def tell(self, event: RouteChanged | Token, now_s: float) -> str:
        message = self._routed(event, now_s) if isinstance(event, RouteChanged) else self._token(event, now_s)
        return _message(message)

    def _routed(self, event: RouteChanged, now_s: float) -> dict[str, Any]:
        before, self.route = self.route, event.route
        return {
            "event": "route",
            "epoch": event.epoch,
            "reason": event.reason,
            "index": self.tokens,
            "stalled_s": now_s - (self.last_s or self.began_s),
            "hops": [self._hop(hop) for hop in event.route.hops],
            "changes": changes(before, event.route) if before is not None else [],
        }

    def _hop(self, hop: Hop) -> dict[str, Any]:
        return {**_hop(hop), "own": self.own.get(hop.peer.peer_id, "")}

    def _token(self, token: Token, now_s: float) -> dict[str, Any]:
        gap_s = now_s - (self.last_s or self.began_s)
        self.last_s = now_s
        self.tokens = token.index + 1
        return {
            "event": "token",
            "index": token.index,
            "text": token.text,
            "gap_s": gap_s,
            "hops": [
                {
                    "peer_id": hop.peer_id,
                    "layers": [hop.layers.start, hop.layers.end],
                    "queue_s": hop.queue_s,
                    "compute_s": hop.compute_s,
                    "link_s": hop.link_s,
                    "batch": hop.batch,
                }
                for hop in token.hops
            ],
        }


def began_message(prompt_tokens: int) -> str:
    return _message({"event": "began", "prompt_tokens": prompt_tokens})


def end_message(ended: Ended) -> str:
    return _message(
        {
            "event": "done",
            "finish_reason": ended.finish_reason,
            "tokens": ended.tokens,
            "rebuilds": ended.rebuilds,
            "ttft_s": ended.ttft_s,
            "tokens_per_second": ended.tokens_per_second,
        }
    )


def error_message(code: str, message: str) -> str:
    return _message({"event": "error", "code": code, "message": message})


def changes(before: Route, after: Route) -> list[dict[str, Any]]:
    """Who is no longer on the route, and who has taken the layers; also where only the cuts between peers moved."""
    stayed = set(before.hops) & set(after.hops)
    return [
        {
            "lost": _hop(lost),
            "taken_by": [
                _hop(hop)
                for hop in after.hops
                if hop not in stayed and hop.layers.start < lost.layers.end and lost.layers.start < hop.layers.end
            ],
        }
        for lost in before.hops
        if lost not in stayed
    ]


def _hop(hop: Hop) -> dict[str, Any]:
    return {"peer_id": hop.peer.peer_id, "layers": [hop.layers.start, hop.layers.end]}


def _message(message: dict[str, Any]) -> str:
    return sse("message", json.dumps(message))
