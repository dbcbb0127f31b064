"""Measured speeds, kept between runs: per model, device and version. Losing one costs a measurement, nothing else."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
from pathlib import Path

import torch

import swarm
from peers.machine import Speed
from swarm.cache import load_cached, store_cached
from swarm.config import PeerSettings
from swarm.models import ModelProfile


def load_speed(profile: ModelProfile, device: torch.device, settings: PeerSettings) -> Speed | None:
    """What was measured last; ``None`` if nothing was, or if it can't be read."""
    text = load_cached(_key(profile, device, settings))
    try:
        speed = Speed(**{name: float(value) for name, value in json.loads(text or "").items()})
    except (ValueError, TypeError, AttributeError):
        return None
    plausible = all(math.isfinite(value) and value >= 0 for value in dataclasses.astuple(speed))
    return speed if plausible and speed.decode_s_per_layer > 0 and speed.prefill_s_per_token_layer > 0 else None


def store_speed(profile: ModelProfile, device: torch.device, settings: PeerSettings, speed: Speed) -> None:
    """A full disk, or none that may be written, is no error."""
    store_cached(_key(profile, device, settings), json.dumps(dataclasses.asdict(speed)))


def _key(profile: ModelProfile, device: torch.device, settings: PeerSettings) -> str:
    threads = f"{settings.threads}+{settings.prefill_threads} threads" if device.type == "cpu" else ""
    versions = f"swarm {swarm.__version__} torch {torch.__version__}"
    return f"speed of {profile.model_id} {profile.dtype} on {device_name(device)} {threads} {versions}"


def device_name(device: torch.device) -> str:
    """As its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {os.cpu_count()} cores" + (", its GPU" if device.type == "mps" else "")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
