"""A trace in the format of Chrome's trace viewer, which Perfetto (ui.perfetto.dev) opens as well. Pure.

One row for the owner, one for each hop. Hops tell durations only, by their own clocks; their bars are laid out one
after the other within the token's time, in the order of the ring: queue, layers, link to the next hop. What is left
at the end of a token is wire and waiting that nobody measured.

The format: "Trace Event Format", Google, complete events (``"ph": "X"``), microseconds.
"""

from __future__ import annotations

from typing import Any

from swarm.trace import Trace
from swarm.types import HopTiming

_OWNER = 0


def chrome_trace(trace: Trace) -> dict[str, Any]:
    rows: dict[tuple[str, str], int] = {}
    events: list[dict[str, Any]] = []
    at_s = 0.0
    for token in trace.tokens:
        name = "prompt and first token" if token.index == 0 else f"token {token.index}"
        spent_s = sum(hop.queue_s + hop.compute_s + hop.link_s for hop in token.hops)
        elsewhere_s = max(0.0, token.gap_s - spent_s)
        told = {"index": token.index, "elsewhere_ms": round(1e3 * elsewhere_s, 3)}
        events.append(_bar(_OWNER, name, at_s, token.gap_s, told))
        began_s = at_s
        for hop in token.hops:
            row = rows.setdefault((hop.peer_id, str(hop.layers)), len(rows) + 1)
            events += _hop_bars(row, began_s, hop, token.index)
            began_s += hop.queue_s + hop.compute_s + hop.link_s
        at_s += token.gap_s
    rows_named = {_OWNER: "tokens"} | {row: f"{peer[-6:]} [{layers}]" for (peer, layers), row in rows.items()}
    names = [_name("process_name", 0, trace.model), *(_name("thread_name", *named) for named in rows_named.items())]
    return {
        "displayTimeUnit": "ms",
        "otherData": {"model": trace.model, "prompt_tokens": trace.prompt_tokens},
        "traceEvents": [*names, *events],
    }


def _hop_bars(row: int, at_s: float, hop: HopTiming, index: int) -> list[dict[str, Any]]:
    parts = (("queue", hop.queue_s), ("compute", hop.compute_s), ("link", hop.link_s))
    bars = []
    for name, duration_s in parts:
        if duration_s > 0:
            bars.append(_bar(row, name, at_s, duration_s, {"index": index, "batch": hop.batch}))
        at_s += duration_s
    return bars


def _bar(row: int, name: str, at_s: float, duration_s: float, told: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "cat": "generation",
        "ph": "X",
        "pid": 1,
        "tid": row,
        "ts": round(1e6 * at_s, 1),
        "dur": round(1e6 * duration_s, 1),
        "args": told,
    }


def _name(kind: str, row: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": 1, "tid": row, "args": {"name": name}}
