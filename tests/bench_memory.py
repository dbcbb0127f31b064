"""Measures a peer's memory and start: each layer range alone, as a process of its own, then serving.

Peak (``VmHWM``) and resident (``VmRSS``) memory of the Python process as Linux counts them: pages of shared libraries
are included, the libp2p daemon is not. ``python -m tests.bench_memory [--tokens N]``, one thread, float32.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import swarm
from swarm.local import LocalSwarm
from swarm.types import LayerRange

MODEL = "smollm2-135m"
WHOLE = LayerRange(0, 30)
THIRDS = (LayerRange(10, 20), LayerRange(0, 10), LayerRange(20, 30))
LIMIT = 0.6
"""How much of the whole model's peak a third of its layers may take."""
FIELDS = ("VmHWM", "VmRSS", "RssAnon", "RssFile")
STAGES = """
import sys
def tell(stage):
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    print(stage, *(int(fields[name].split()[0]) // 1024 for name in ("VmHWM", "RssAnon", "RssFile")), len(sys.modules))
tell("python")
import peers.commands
tell("command line")
import torch
tell("torch")
from peers.commands import import_server
import_server()
tell("transformers and all else")
"""
"""What a peer has imported before it looks at a model, in its order."""
TEXT = "The lighthouse keeper counted the ships that passed and wrote each name in a book. " * 30


def memory_of(pid: int) -> dict[str, int]:
    """Megabytes by field of ``/proc/PID/status``."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) // 1024 for name in FIELDS}


def row(name: str, memory: Mapping[str, int], base: int | None, note: str = "") -> None:
    ratio = f"{memory['VmHWM'] / base:6.3f}" if base else "      "
    print(f"{name:24}" + "".join(f"{memory[name]:9}" for name in FIELDS) + f"  {ratio}  {note}", flush=True)


def start_alone(layers: LayerRange) -> tuple[dict[str, int], float]:
    began = time.monotonic()
    with LocalSwarm(MODEL, [layers]) as swarm:
        took = time.monotonic() - began
        return memory_of(swarm.peers[0].pid), took


def serve(ranges: tuple[LayerRange, ...], tokens: int) -> dict[LayerRange, dict[str, int]]:
    """Memory after a short prompt, a long one and a few generations in turn, through a route of ``ranges``."""
    with LocalSwarm(MODEL, sorted(ranges)) as local, swarm.connect(local.initial_peers) as client:
        client.generate("Once upon a time", max_tokens=tokens, temperature=0)
        client.generate(TEXT, max_tokens=tokens, temperature=0.8, seed=1)
        for seed in range(3):
            client.generate(TEXT[:200], max_tokens=tokens, temperature=0.8, seed=seed)
        return {peer.layers: memory_of(peer.pid) for peer in local.peers}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=24)
    options = parser.parse_args()
    print("imports, MB: peak, anonymous, files, modules", flush=True)
    subprocess.run([sys.executable, "-c", STAGES], check=False)
    print(f"\n{'MB':24}" + "".join(f"{name:>9}" for name in FIELDS) + "   ratio", flush=True)
    base = None
    for layers in (WHOLE, *THIRDS):
        memory, took = start_alone(layers)
        base = base or memory["VmHWM"]
        row(f"{layers} ready", memory, base, f"{took:.1f} s from exec to ready")
    whole = serve((WHOLE,), options.tokens)
    served = whole | serve(THIRDS, options.tokens)
    base = whole[WHOLE]["VmHWM"]
    for layers in (WHOLE, *THIRDS):
        row(f"{layers} after serving", served[layers], base)
    worst = max(served[layers]["VmHWM"] for layers in THIRDS) / base
    print(f"\nlargest third: {worst:.3f} of the whole, limit {LIMIT}", flush=True)


if __name__ == "__main__":
    main()
