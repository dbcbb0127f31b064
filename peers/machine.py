"""What this machine can do for a model: its device, its free memory, and the measured time of loaded layers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

from peers.cgroup import allowance
from peers.compiled import to_compile
from peers.executor import Executor, SampleRequest, StepRequest, run
from peers.process_memory import keep_scratch, map_large_blocks, return_freed_heap, use_large_pages
from peers.row_codec import DTYPES
from peers.shard import Shard
from peers.weights import open_source
from swarm.architectures import bytes_per_weight
from swarm.config import Settings
from swarm.errors import BadTensor, Cancelled, ConfigError, Internal, ModelError
from swarm.models import ModelProfile, ModelReference, config_dict
from swarm.sampling import SamplingParams
from swarm.types import LayerRange

Report = Callable[[dict[str, object]], None]
"""Told of each event: ``{"event": "loading" | "ready" | "moving" | "draining" | "left", ...}``."""

DECODE_STEPS = 9
LEAST_SHARE = 0.5
"""Of a step's time that its layers take at least; what was measured otherwise is noise."""
PREFILL_ROWS = 128
"""As a prefill chunk usually has: the kernels that are compiled for it are used again."""
PAUSE_S = 0.005
"""Before each step of one row: as long as other stages have the token, and caches are filled with other things."""
PREFILLS = 3
"""So many chunks are timed, after one that warms up; the quickest counts."""


@dataclass(frozen=True, slots=True)
class Speed:
    decode_s_per_layer: float
    prefill_s_per_token_layer: float
    step_s: float = 0.0
    """Of a step with one row, beside its layers."""
    head_s: float = 0.0
    """... and for final norm, head and sampling, where the last layer is held."""

    def one_row_s(self, layers: int) -> float:
        """Of a step through so many layers, with the head if there is one."""
        return self.step_s + layers * self.decode_s_per_layer + self.head_s

    def or_quicker(self, other: Speed, layers: int) -> Speed:
        """The one whose step takes less."""
        return self if self.one_row_s(layers) <= other.one_row_s(layers) else other


def choose_device(wanted: str) -> torch.device:
    if wanted != "auto":
        try:
            device = torch.device(wanted)
            torch.empty(1, device=device)  # there may be no such device here, or no torch that can use it
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ConfigError(f"peer.device {wanted!r}: {str(error).splitlines()[0]}") from None
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def free_bytes(device: torch.device) -> int:
    """Memory of the device that nobody uses; a CPU's and that of Apple's chips is the machine's, or what a container or
    service may take of it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available, allowed = int(psutil.virtual_memory().available), allowance()
    return available if allowed is None else min(available, allowed.left_bytes)


def gflops(profile: ModelProfile, speed: Speed) -> float:
    """What the measured prefill amounts to: two operations for each weight and token."""
    weights = profile.layer_bytes / bytes_per_weight(profile.dtype, profile.weights)
    return 2e-9 * weights / max(speed.prefill_s_per_token_layer, 1e-12)


def load_shard(
    reference: ModelReference,
    profile: ModelProfile,
    layers: LayerRange,
    settings: Settings,
    report: Report,
    stopped: Callable[[], bool],
) -> Shard:
    """Blocks: for a thread of its own. Reports progress in steps of a tenth. Raises :class:`Cancelled` once
    ``stopped``."""
    told = 0

    def progress(done: int, total: int) -> None:
        nonlocal told
        if stopped():
            raise Cancelled("stopped while it loaded")
        tenth = 10 * done // max(1, total)
        if tenth > told:
            told = tenth
            report({"event": "loading", "layers": [layers.start, layers.end], "percent": 10 * tenth})

    if settings.peer.threads:
        torch.set_num_threads(settings.peer.threads)
    map_large_blocks()
    try:
        source = open_source(reference, layers)
        device = choose_device(settings.peer.device)
        if device.type == "cpu" and to_compile():
            report({"event": "loading", "layers": [layers.start, layers.end], "percent": 0, "compiling": True})
        shard = Shard.load(profile, config_dict(reference), source, layers, device, DTYPES[profile.dtype], progress)
        return_freed_heap()
        use_large_pages()
        return shard
    finally:
        keep_scratch()


async def measure(executor: Executor, prefill_s: float | None = None) -> Speed:
    """Time the layers that are really there, with the sizes that matter: one row, and a long chunk, unless
    ``prefill_s`` is known, for each token and layer.

    It is time of the processor, because others often start on the machine at the same moment.

    What a row takes whatever the layers is told apart by steps through one layer only, the head by steps with a token.
    Raises :class:`ModelError` if what they give is not finite: no session could use them.
    """
    layers, profile = executor.layers, executor.profile
    one = LayerRange(layers.start, layers.start + 1)
    caches = {held: executor.new_cache(held, PREFILL_ROWS + DECODE_STEPS) for held in (layers, one)}

    async def step(held: LayerRange, start: int, rows: int, *, head: bool = False) -> float:
        first, end = held.start == 0, start + rows
        request = StepRequest(
            layers=held,
            cache=caches[held],
            start=start,
            rows=rows,
            token_ids=[0] * rows if first else None,
            hidden=None if first else bytes(rows * profile.hidden_size * DTYPES[profile.dtype].itemsize),
            sample=SampleRequest(SamplingParams(), [0] * end, end) if head else None,
        )
        if rows == 1:
            await asyncio.sleep(PAUSE_S)
        try:
            return (await run(executor, request)).processor_s
        except Internal as error:
            if not isinstance(error.__cause__, BadTensor):
                raise
            found = f"{error.message} in {profile.dtype}"
            raise ModelError(f"{found}: the weights of {profile.name} are damaged, or need another dtype") from error

    async def chunk() -> float:
        return await step(layers, 0, PREFILL_ROWS) / PREFILL_ROWS / len(layers)

    context = 0
    if prefill_s is None:
        await chunk()
        prefill_s = min([await chunk() for _ in range(PREFILLS)])
        context = PREFILL_ROWS
        await step(one, 0, context)
    ones, alls, heads = [], [], []
    for position in range(context, context + DECODE_STEPS):
        ones.append(await step(one, position, 1))
        alls.append(await step(layers, position, 1))
        if layers.end == profile.num_layers:
            heads.append(await step(layers, position, 1, head=True))
    return _speed(ones, alls, heads, len(layers), prefill_s)


def _speed(ones: list[float], alls: list[float], heads: list[float], layers: int, prefill_s: float) -> Speed:
    """The quickest steps tell how the time divides, the quicker third how much it is: what makes the others slower
    passes, and what does not is told by :class:`peers.engine.Pace`."""
    usual = sorted(alls)[len(alls) // 3] / min(alls)
    layer_s = (min(alls) - min(ones)) / (layers - 1) if layers > 1 else min(alls)
    layer_s = min(max(layer_s, LEAST_SHARE * min(alls) / layers), min(alls) / layers)
    step_s = min(alls) - layers * layer_s
    head_s = max(min(heads) - min(alls), 0.0) if heads else 0.0
    return Speed(layer_s * usual, prefill_s, step_s * usual, head_s * usual)
