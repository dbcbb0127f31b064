"""The compute thread: one batch of everything that is ready, again and again.

Continuous batching as in Orca (Yu et al., OSDI 2022): a batch is formed anew for each step out of whatever
sessions have input, see :mod:`peers.batching`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch

from peers.batching import Batching, Waiting
from peers.drafting import verified
from peers.executor import Cache, Done, StepReply, StepRequest
from peers.kv_cache import BLOCK, SequenceCache
from peers.row_codec import DTYPES, Rows, array_of, decoded, encoded
from peers.shard import Shard, Step, StepOutput, all_finite, use_device
from swarm import kv
from swarm.config import Settings
from swarm.errors import BadRequest, BadTensor, Cancelled, Internal, SwarmError
from swarm.models import ModelProfile
from swarm.sampling import SampleResult, sample
from swarm.types import LayerRange
from swarm.wire import ITEM_BYTES, encoding_of

logger = logging.getLogger(__name__)


MANY_ROWS = 32
"""From so many rows on, a pass waits for arithmetic rather than for memory, and more threads help."""

MOST_LOGITS_BYTES = 256 * 1024 * 1024
"""Of one step, for they are computed at once. No honest owner wants more."""

SMOOTHING = 0.1
"""Weight of the newest step in the running averages that announcements tell, see :class:`Pace`."""
MOST_SURPRISE = 1.25
"""A single step counts at most as so many times slower than usual: it may have been a hiccup."""
MOST_FAILURES = 3
"""Batches in a row that a device may fail: one that is lost fails all."""
DEVICE_ERRORS = ("CUDA error", "HIP error")
"""What torch says of those, in some kinds of exceptions."""
SLOWDOWN_HALF_S, QUEUE_HALF_S = 60.0, 5.0
"""In so much time without a step these averages lose half of what they tell."""


@dataclass(slots=True)
class Pace:
    """How long steps really take, against what was measured before. Written by the compute thread."""

    step_s: float = 0.0
    layer_s: float = 0.0
    head_s: float = 0.0
    slowdown: float = 1.0
    """Running average over steps of one row: a busy or throttled machine takes this many times longer."""
    queue_s: float = 0.0
    noted_at: float = 0.0
    """When the newest step was run."""
    observe: Callable[[Sequence[int], Sequence[float], float], None] | None = None
    """Told of every batch: rows and waiting time of each step, and the time of the computation."""

    def calibrate(self, step_s: float, layer_s: float, head_s: float) -> None:
        """What a step of one row takes on its own, for each layer, and for the head. What was noted is forgotten."""
        self.step_s, self.layer_s, self.head_s = step_s, layer_s, head_s
        self.slowdown, self.queue_s = 1.0, 0.0

    def slowdown_at(self, now: float) -> float:
        """What was seen long ago says little of now."""
        return 1.0 + (self.slowdown - 1.0) * math.exp2(min(0.0, self.noted_at - now) / SLOWDOWN_HALF_S)

    def queue_s_at(self, now: float) -> float:
        """... and least of all how long steps wait."""
        return self.queue_s * math.exp2(min(0.0, self.noted_at - now) / QUEUE_HALF_S)

    def note(self, batch: Sequence[Waiting], waits_s: Sequence[float], compute_s: float, now: float) -> None:
        if self.observe is not None:
            self.observe([waiting.piece.rows for waiting in batch], waits_s, compute_s)
        self.slowdown, self.queue_s, self.noted_at = self.slowdown_at(now), self.queue_s_at(now), now
        for wait_s in waits_s:
            self.queue_s += SMOOTHING * (wait_s - self.queue_s)
        request = batch[0].piece
        if len(batch) == 1 and request.rows == 1 and self.layer_s > 0:
            head_s = self.head_s if request.sample is not None or request.logit_rows else 0.0
            found = compute_s / (self.step_s + self.layer_s * len(request.layers) + head_s)
            self.slowdown += SMOOTHING * (min(found, MOST_SURPRISE * self.slowdown) - self.slowdown)


class Engine:
    """Runs a :class:`Shard` on one thread. An ``async with``; ``submit`` is for the loop that entered it."""

    def __init__(self, shard: Shard, settings: Settings) -> None:
        self._shard = shard
        limits, stages = settings.engine, shard.profile.num_layers / len(shard.layers)
        self._batching = Batching(limits.max_batch_tokens, limits.mixed_prefill_tokens, stages)
        self._threads = settings.peer.threads or torch.get_num_threads()
        self._prefill_threads = settings.peer.prefill_threads or max(self._threads, cores())
        self._dtype = DTYPES[shard.profile.dtype]
        self.pace = Pace()
        self.passes = 0
        self._submitted: list[Waiting] = []
        """In this turn of the loop."""
        self._arrived: queue.SimpleQueue[list[Waiting] | int] = queue.SimpleQueue()
        """From the loop; a number: the ``id`` of a cache whose steps nobody wants; an empty list: stop."""
        self._failures = 0
        """Batches that the device failed, since the last one that it did not."""
        self._given = self._taken = 0
        """Steps that the loop has submitted, and those of them that the thread knows of."""
        self._running: Sequence[Waiting] = ()
        """What the thread has taken and not answered yet."""
        self._thread = threading.Thread(target=self._work, name="swarm-engine", daemon=True)

    async def __aenter__(self) -> Engine:
        self._loop = asyncio.get_running_loop()
        self._broken: asyncio.Future[None] = self._loop.create_future()
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._arrived.put([])
        if not self._broken.cancel():
            self._broken.exception()  # whoever waited for a step has heard it
        await self._loop.run_in_executor(None, self._thread.join, 30.0)

    async def broken(self) -> None:
        """Waits until no step can be run any more; raises :class:`Internal` then."""
        await asyncio.shield(self._broken)

    @property
    def profile(self) -> ModelProfile:
        return self._shard.profile

    @property
    def layers(self) -> LayerRange:
        return self._shard.layers

    @property
    def kv_block(self) -> int:
        return BLOCK

    def new_cache(self, layers: LayerRange, capacity: int, kind: str = kv.MODEL) -> SequenceCache:
        return self._shard.new_cache(layers, capacity, kind)

    def copy_cache(self, cache: Cache, length: int, capacity: int) -> SequenceCache:
        if not isinstance(cache, SequenceCache):
            raise Internal("the engine runs on its own caches")
        return cache.copy(length, capacity)

    def cache_bytes(self, layers: LayerRange, positions: int, kind: str = kv.MODEL) -> int:
        profile = self.profile
        item = ITEM_BYTES[profile.dtype]
        return SequenceCache.bytes_needed(layers, profile.num_kv_heads, profile.head_dim, positions, item, kind)

    @property
    def queue_length(self) -> int:
        return len(self._batching) + self._given - self._taken

    def forget(self, cache: Cache) -> None:
        self._hand_over()  # what was submitted in this turn of the loop goes before it
        self._arrived.put(id(cache))

    def submit(self, step: StepRequest, done: Done) -> None:
        if self._broken.done():
            self._loop.call_soon(done, Internal("the engine has stopped"))
            return
        if not self._submitted:
            self._loop.call_soon(self._hand_over)
        self._submitted.append(Waiting(step, done, time.perf_counter()))
        self._given += 1

    def _hand_over(self) -> None:
        """All that one turn of the loop submits: sessions that arrive together are run together."""
        submitted, self._submitted = self._submitted, []
        if submitted:
            self._arrived.put(submitted)

    # ---- the thread -------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            self._work_off()
        except Exception as error:
            # The thread's outermost edge: whoever serves with it is to know.
            logger.exception("the engine has stopped")
            self._loop.call_soon_threadsafe(self._break, Internal(f"the engine has stopped: {type(error).__name__}"))

    def _break(self, error: SwarmError) -> None:
        """The thread is at its end: nobody waits for a step that it had, or was to get."""
        if self._broken.done():
            return
        self._broken.set_exception(error)
        self._hand_over()
        while not self._arrived.empty():
            if not isinstance(arrived := self._arrived.get_nowait(), int):
                self._batching.add(*arrived)
        waiting = (*self._running, *self._batching)
        _resolve(waiting, [error] * len(waiting))

    def _work_off(self) -> None:
        use_device(self._shard.device)
        threads = 0
        while batch := self._next_batch():
            self._running = batch
            started = time.perf_counter()
            many = sum(waiting.piece.rows for waiting in batch) >= MANY_ROWS
            wanted = self._prefill_threads if many else self._threads
            if threads != wanted:
                threads = wanted
                torch.set_num_threads(threads)
            waits_s = [max(0.0, started - waiting.since) for waiting in batch]
            replies = self._run_batch(batch, waits_s, started)
            now = time.perf_counter()
            answers = [waiting.take(reply, now) for waiting, reply in zip(batch, replies, strict=True)]
            self._loop.call_soon_threadsafe(_resolve, batch, answers)
            self._running = ()
            # The next hop waits for the answers; what is noted here can be while they are on their way.
            self.passes += 1
            self._batching.took(now - started)
            self.pace.note(batch, waits_s, now - started, now)
            self._batching.add(*[waiting for waiting, answer in zip(batch, answers, strict=True) if answer is None])
            if self._failures >= MOST_FAILURES:
                raise RuntimeError("the device is lost")
            del batch, replies, answers  # their sessions may end while this thread waits

    def _next_batch(self) -> list[Waiting]:
        """Waits for one; empty at the end."""
        while True:
            now = time.perf_counter()
            if self._arrived.empty() and (batch := self._batching.take(now)):
                return batch
            try:
                arrived = self._arrived.get(timeout=self._batching.hold_s(now))
            except queue.Empty:
                continue
            if isinstance(arrived, int):
                if forgotten := self._batching.forget(arrived):
                    cancelled = [Cancelled("nobody wants this step any more")] * len(forgotten)
                    self._loop.call_soon_threadsafe(_resolve, forgotten, cancelled)
                del forgotten
                continue
            if not arrived:
                return []
            self._batching.add(*arrived)
            self._taken += len(arrived)
            del arrived

    def _run_batch(
        self, batch: Sequence[Waiting], waits_s: Sequence[float], started: float
    ) -> list[StepReply | SwarmError]:
        results: list[StepReply | SwarmError | None] = [None] * len(batch)
        steps: list[tuple[int, Step]] = []
        for index, waiting in enumerate(batch):
            try:
                steps.append((index, self._to_step(waiting.piece)))
            except SwarmError as error:
                results[index] = error
        try:
            self._compute(batch, steps, results, waits_s, started)
            self._failures = 0
        except Exception as error:
            # Whatever a device or a family's code raises fails this batch. The peer lives on, if the device does.
            self._failures += any(words in str(error) for words in DEVICE_ERRORS)
            logger.exception("a batch of %d steps failed", len(steps))
            failed = Internal(f"the step failed: {type(error).__name__}")
            return [failed if result is None else result for result in results]
        return [result or Internal("a step without a result") for result in results]

    def _compute(
        self,
        batch: Sequence[Waiting],
        steps: Sequence[tuple[int, Step]],
        results: list[StepReply | SwarmError | None],
        waits_s: Sequence[float],
        started: float,
    ) -> None:
        processor_s = time.thread_time()
        outputs = self._shard.run([step for _, step in steps]) if steps else []
        tokens = [_sampled(batch[index].piece, output) for (index, _), output in zip(steps, outputs, strict=True)]
        compute_s = time.perf_counter() - started
        processor_s = time.thread_time() - processor_s if self._shard.device.type == "cpu" else compute_s
        for (index, step), output, sampled in zip(steps, outputs, tokens, strict=True):
            waiting = batch[index]
            if output.error is not None:
                results[index] = _blamed(output.error, step)
                continue
            if isinstance(sampled, SwarmError):
                results[index] = sampled
                continue
            results[index] = StepReply(
                hidden=b""
                if output.hidden is None
                else encoded(output.hidden, self._encoding(waiting.piece.output_wire)),
                tokens=sampled,
                logits=self._logits(waiting.piece, output),
                queue_s=waits_s[index],
                compute_s=compute_s,
                batch=len(batch),
                processor_s=processor_s,
            )

    def _to_step(self, request: StepRequest) -> Step:
        if not isinstance(request.cache, SequenceCache):
            raise Internal("the engine runs on its own caches")
        head_rows = request.sample.rows if request.sample is not None else request.logit_rows
        if head_rows > (most := MOST_LOGITS_BYTES // (4 * self.profile.vocab_size)):
            raise BadRequest(f"logits of {head_rows} rows at once; the limit is {most}")
        hidden: Rows | None = None
        if request.hidden is not None:
            encoding, width = self._encoding(request.input_wire), self.profile.hidden_size
            exact = encoding == "float32"
            hidden = array_of(request.hidden, width) if exact else decoded(request.hidden, encoding, width, self._dtype)
        return Step(
            layers=request.layers,
            cache=request.cache,
            start=request.start,
            token_ids=request.token_ids,
            hidden=hidden,
            head_rows=head_rows,
            want_hidden=request.want_hidden,
        )

    @staticmethod
    def _logits(request: StepRequest, output: StepOutput) -> bytes:
        if not request.logit_rows or output.logits is None:
            return b""
        return encoded(output.logits, "float32")

    def _encoding(self, wire: str) -> str:
        return encoding_of(wire, self.profile.dtype)


def _blamed(error: SwarmError, step: Step) -> SwarmError:
    """What is not finite arose in this very peer, unless it came in so: then, and only then, it is a bad tensor."""
    if not isinstance(error, BadTensor) or (step.hidden is not None and not all_finite(step.hidden)):
        return error
    blamed = Internal(error.message)
    blamed.__cause__ = error
    return blamed


def cores() -> int:
    """Those that this process may use; ``OMP_NUM_THREADS`` limits them as it does for torch."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return min(allowed, int(limit)) if limit.isdecimal() and int(limit) else allowed


def _sampled(request: StepRequest, output: StepOutput) -> tuple[SampleResult, ...] | SwarmError:
    if request.sample is None or output.logits is None:
        return ()
    wanted, logits = request.sample, output.logits

    def sample_row(row: int, history: Sequence[int]) -> SampleResult:
        numbers: np.ndarray = logits[row].numpy(force=True)
        return sample(numbers, wanted.params, len(history), history, wanted.prompt_length)

    try:
        return verified(wanted, sample_row)
    except SwarmError as error:
        return error
    except Exception as error:
        # Whatever one session wished for, the others of its batch get their tokens.
        logger.exception("sampling failed")
        return Internal(f"sampling failed: {type(error).__name__}")


def _resolve(batch: Sequence[Waiting], answers: Sequence[StepReply | SwarmError | None]) -> None:
    for waiting, answer in zip(batch, answers, strict=True):
        try:
            if answer is not None:
                waiting.done(answer)
        except Exception:
            # Whatever one session makes of its answer, the others of its batch get theirs.
            logger.exception("an answer of the engine was not taken")
