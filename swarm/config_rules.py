"""What a setting may be: conversion by the field's type, and the range of each key. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from swarm.config import (
    MAX_MEMORY_MB,
    MAX_REPETITION_PENALTY,
    MAX_TEMPERATURE,
    MAX_THREADS,
    MIN_REPETITION_PENALTY,
    MOST_WINDOW_FRAMES,
    SPECULATIONS,
    Settings,
)
from swarm.dht_time import TOLERANCE_S
from swarm.errors import ConfigError, WrongRange
from swarm.kv import KINDS
from swarm.types import MAX_LIFETIME_S, LayerRange
from swarm.wire import WIRES

MAX_DIGITS = 18
"""Of a whole number: those have room in 64 bits."""


@dataclass(frozen=True, slots=True)
class Rule:
    expects: str
    """Ends the sentence "expected ..."."""
    allows: Callable[[Any], bool]


def _any(_: object) -> bool:
    return True


def _whole(minimum: int) -> Rule:
    return Rule(f"a whole number of at least {minimum}", lambda value: bool(value >= minimum))


def _up_to(maximum: int) -> Rule:
    return Rule(f"a whole number from 0 to {maximum}", lambda value: bool(0 <= value <= maximum))


def _between(low: float, high: float) -> Rule:
    return Rule(f"a number from {low:g} to {high:g}", lambda value: bool(low <= value <= high))


def _one_of(*names: str) -> Rule:
    return Rule(" or ".join(names) if len(names) > 1 else names[0], lambda value: value in names)


def _is_layers(value: str) -> bool:
    try:
        return value == "auto" or bool(LayerRange.parse(value))
    except WrongRange:
        return False


def _maddrs(example: str) -> Rule:
    return Rule(f"a list of multiaddrs such as {example}", lambda value: all(addr.startswith("/") for addr in value))


_NAME = Rule("text that is not empty", lambda value: bool(value.strip()))
_LONGEST_TTL_S = MAX_LIFETIME_S - 2 * TOLERANCE_S
"""No node takes an announcement for longer; the clocks of two may differ by so much."""
_PATIENCE = Rule("a number of seconds, 0 or more", lambda value: value >= 0)

_SPECIAL: Mapping[str, Rule] = {
    "model.name": _NAME,
    "model.dtype": _one_of("float32", "bfloat16", "float16"),
    "model.weights": _one_of("auto", "float32", "bfloat16", "int8", "int4"),
    "inference.top_p": Rule("a number above 0, at most 1", lambda value: 0 < value <= 1),
    "inference.top_k": _whole(0),
    "inference.min_p": _between(0, 1),
    "inference.temperature": _between(0, MAX_TEMPERATURE),
    "inference.repetition_penalty": Rule(
        f"a number from {MIN_REPETITION_PENALTY:g} to {MAX_REPETITION_PENALTY:g}, or 0",
        lambda value: value == 0 or MIN_REPETITION_PENALTY <= value <= MAX_REPETITION_PENALTY,
    ),
    "inference.speculation": _one_of(*SPECULATIONS),
    "inference.wire": _one_of(*WIRES),
    "inference.kv": _one_of(*KINDS),
    "peer.layers": Rule("auto or START:END, for example 0:10", _is_layers),
    "peer.device": Rule(
        "auto, cpu, mps, cuda or cuda:N",
        lambda value: re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", value) is not None,
    ),
    "peer.threads": _up_to(MAX_THREADS),
    "peer.prefill_threads": _up_to(MAX_THREADS),
    "peer.max_memory_mb": _up_to(MAX_MEMORY_MB),
    "peer.memory_safety_margin": Rule("a number from 0 to below 1", lambda value: 0 <= value < 1),
    "peer.cache_eviction_policy": _one_of("lru"),
    "network.initial_peers": _maddrs("/ip4/HOST/tcp/PORT/p2p/PEER_ID"),
    "network.host_maddrs": _maddrs("/ip4/127.0.0.1/tcp/4001"),
    "network.announce_maddrs": _maddrs("/ip4/127.0.0.1/tcp/4001"),
    "discovery.announce_ttl_s": Rule(
        f"a number of seconds above 0, at most {_LONGEST_TTL_S:g}, which nodes keep it for",
        lambda value: 0 < value <= _LONGEST_TTL_S,
    ),
    "timeouts.step_factor": Rule("a number of at least 1", lambda value: value >= 1),
    "timeouts.owner_grace_s": _PATIENCE,
    "timeouts.drain_s": _PATIENCE,
    "limits.max_frame_bytes": _whole(1024),
    "limits.max_info_bytes": _whole(1024),
    "limits.window_frames": Rule(
        f"a whole number from 1 to {MOST_WINDOW_FRAMES}", lambda value: 1 <= value <= MOST_WINDOW_FRAMES
    ),
    "limits.max_waiting_frames": _whole(2 * MOST_WINDOW_FRAMES),
    "recovery.wait_s": _PATIENCE,
    "recovery.max_rebuilds": _whole(0),
    "recovery.max_penalty_s": _PATIENCE,
    "planner.hop_s": _PATIENCE,
    "planner.hop_margin_s": _PATIENCE,
    "planner.link_s": _PATIENCE,
    "planner.bytes_per_s": Rule("a number of bytes a second above 0", lambda value: value > 0),
    "planner.spread": Rule("a number from 0 to below 1", lambda value: 0 <= value < 1),
    "placement.settle_s": _PATIENCE,
    "placement.gap_drain_s": _PATIENCE,
    "placement.rebalance_cooldown_s": _PATIENCE,
    "placement.rebalance_threshold": Rule("a number from 0 to below 1", lambda value: 0 <= value < 1),
    "policy.min_memory_mb": _whole(0),
    "peer.metrics_host": _NAME,
    "peer.metrics_port": Rule("a port, 1 to 65535, or 0", lambda value: 0 <= value <= 65535),
    "gateway.max_queue": _whole(0),
    "gateway.max_body_bytes": _whole(1024),
    "gateway.kept_traces": _whole(0),
    "gateway.finish_s": _PATIENCE,
    "gateway.cors_origins": Rule(
        "a list of origins such as https://chat.example.org, or *",
        lambda value: all(re.fullmatch(r"\*|https?://[^/\s]+", origin) for origin in value),
    ),
    "log.format": _one_of("text", "json"),
}
"""What the type and the unit in the name do not say already."""


def rule_for(key: str, kind: Any) -> Rule:
    """The rule of a key; without a special one counts are at least 1, durations above 0, other numbers not negative."""
    if key in _SPECIAL:
        return _SPECIAL[key]
    if kind is bool:
        return Rule("true or false", _any)
    if kind is int:
        return _whole(1)
    if kind is float and key.endswith("_s"):
        return Rule("a number of seconds above 0", lambda value: value > 0)
    if kind is float:
        return Rule("a number of at least 0", lambda value: value >= 0)
    return Rule("text" if kind is str else "a list of texts", _any)


def check_together(settings: Settings, origins: Mapping[str, str]) -> None:
    """Rules about two keys; raises :class:`ConfigError`."""
    for small, large in (
        ("discovery.announce_period_s", "discovery.announce_ttl_s"),  # or peers vanish between two announcements
        ("limits.max_streams_per_peer", "limits.max_streams"),
        ("limits.max_frame_bytes", "limits.max_partial_bytes_per_peer"),
        ("limits.max_partial_bytes_per_peer", "limits.max_partial_bytes"),
    ):
        low, high = (getattr(getattr(settings, key.split(".")[0]), key.split(".")[1]) for key in (small, large))
        if low > high:
            raise ConfigError(
                f"{small} ({low}, {origins[small]}) must not be larger than {large} ({high}, {origins[large]})"
            )


def listed(items: Iterable[str]) -> tuple[str, ...]:
    """What may be given several times may be given once, with commas."""
    return tuple(part.strip() for item in items for part in item.split(",") if part.strip())


def coerce(raw: object, kind: Any) -> Any:
    """A value of YAML or Python as ``kind``; nothing is guessed. Raises ValueError."""
    if kind == tuple[str, ...]:
        items = [raw] if isinstance(raw, str) else raw
        if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
            raise ValueError
        return listed(items)
    if kind is float and isinstance(raw, int) and not isinstance(raw, bool):
        return _finite(float(raw) if abs(raw) < 2**1000 else math.inf)  # float() of more digits overflows
    if type(raw) is not kind:  # exact: a bool is an int by inheritance only
        raise ValueError
    if isinstance(raw, int) and abs(raw) >= 10**MAX_DIGITS:
        raise ValueError(f"it has more than {MAX_DIGITS} digits")
    return _finite(raw) if isinstance(raw, float) else raw


_SWITCHES = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def coerce_text(raw: object, kind: Any) -> Any:
    """What stands in an environment variable or after a flag, as ``kind``. Raises ValueError."""
    if not isinstance(raw, str):
        raise ValueError
    text = raw.strip()
    if kind is bool:
        if text.lower() not in _SWITCHES:
            raise ValueError
        return _SWITCHES[text.lower()]
    if kind is int:
        # int() would take 1_000 and digits of other scripts
        if re.fullmatch(rf"[-+]?[0-9]{{1,{MAX_DIGITS}}}", text) is None:
            raise ValueError
        return int(text)
    if kind is float:
        if re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", text) is None:
            raise ValueError
        return _finite(float(text))
    return coerce(text, kind)


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("it must be finite")
    return value
