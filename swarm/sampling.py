"""How the next token is chosen: parameters, and a sampler whose randomness is a function of seed and position.

A sampled generation has to survive the loss of a peer as exactly as a greedy one: the replacement computes the same
logits up to rounding, and must draw the same token. So there is no generator state to lose. The noise of token id
``i`` at position ``p`` is a pure function of ``(seed, p, i)``, taken from Philox (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011), and the token is chosen by the Gumbel-max trick (Gumbel 1954; Maddison et
al., "A* sampling", NIPS 2014): ``argmax(logits / temperature + gumbel noise)`` is an exact draw from the softmax.
Unlike a draw by inverting the cumulative distribution, where one rounding error shifts every later boundary, this
changes its answer only if the two best candidates were within rounding of each other, as greedy decoding would.

Order and meaning of the filters are those of transformers' logits processors: bias, penalties, temperature,
``top_k``, ``top_p``, ``min_p``. numpy only: clients and gateways sample too, and need no torch for it.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from swarm import protocol_pb2
from swarm.config import MAX_REPETITION_PENALTY, MAX_TEMPERATURE, MIN_REPETITION_PENALTY
from swarm.errors import BadRequest, BadTensor

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]

MAX_PENALTY: Final = 2.0
"""Of presence and frequency, either sign; as OpenAI has it."""
MAX_BIAS: Final = 100.0
MAX_BIASES: Final = 1024
MAX_LOGPROBS: Final = 20

_BLOCK: Final = 64
_NUCLEUS_GUESSES: Final = (1e-2, 1e-4, 1e-6)


_RANGES: Final = {
    "temperature": (0.0, MAX_TEMPERATURE),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY),
    "presence_penalty": (-MAX_PENALTY, MAX_PENALTY),
    "frequency_penalty": (-MAX_PENALTY, MAX_PENALTY),
}
_MOST: Final = {"top_k": 2**32 - 1, "seed": 2**64 - 1, "logprobs": MAX_LOGPROBS}
"""Of those that are whole numbers, from 0 on."""

GREEDY_BELOW = 1e-5
"""A temperature under this is greedy: logits divided by it would leave float32."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """One session's wishes. Raises :class:`BadRequest`, naming the limit, for values without a meaning."""

    temperature: float = 0.0
    """0: greedy."""
    top_k: int = 0
    """0: off."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Over prompt and generated tokens, as in transformers (Keskar et al., CTRL, 2019)."""
    presence_penalty: float = 0.0
    """Subtracted once from each token that was generated already, as OpenAI has it; the prompt does not count."""
    frequency_penalty: float = 0.0
    """Subtracted for each time that a token was generated."""
    seed: int = 0
    """Whoever wants variety draws one: equal seeds give equal texts."""
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    logprobs: int = 0
    """How many alternatives to report."""

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            object.__setattr__(self, name, number(name, getattr(self, name), low, high))
        for name, most in _MOST.items():
            object.__setattr__(self, name, whole_number(name, getattr(self, name), 0, most))
        if np.float32(self.top_p) == 0:  # as it would come off the wire
            raise BadRequest("top_p must be above 0; 1 switches it off")
        if not isinstance(self.logit_bias, Mapping):
            raise BadRequest(f"logit_bias maps token ids to numbers; {reprlib.repr(self.logit_bias)} does not")
        _few_biases(self.logit_bias)
        biases = {
            whole_number("a token id in logit_bias", token_id, 0, 2**32 - 1): number(
                f"logit_bias of token {token_id}", bias, -MAX_BIAS, MAX_BIAS
            )
            for token_id, bias in self.logit_bias.items()
        }
        object.__setattr__(self, "logit_bias", biases)

    def check_vocabulary(self, vocab_size: int) -> None:
        """For who opens a session; :func:`sample` ignores what is outside. Raises :class:`BadRequest`."""
        for token_id in self.logit_bias:
            if token_id >= vocab_size:
                raise BadRequest(f"logit_bias names token {token_id}, the vocabulary has {vocab_size}")

    def to_wire(self) -> protocol_pb2.Sampling:
        return protocol_pb2.Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            logit_bias=dict(self.logit_bias),
            logprobs=self.logprobs,
        )

    @classmethod
    def from_wire(cls, message: protocol_pb2.Sampling) -> SamplingParams:
        """Fields that protobuf leaves out are 0; for ``top_p`` and ``repetition_penalty`` that means: off."""
        _few_biases(message.logit_bias)
        return cls(
            temperature=_decimal(message.temperature),
            top_k=message.top_k,
            top_p=_decimal(message.top_p) or 1.0,
            min_p=_decimal(message.min_p),
            repetition_penalty=_decimal(message.repetition_penalty) or 1.0,
            presence_penalty=_decimal(message.presence_penalty),
            frequency_penalty=_decimal(message.frequency_penalty),
            seed=message.seed,
            logit_bias={token_id: _decimal(bias) for token_id, bias in message.logit_bias.items()},
            logprobs=message.logprobs,
        )


@dataclass(frozen=True, slots=True)
class SampleResult:
    token_id: int
    logprob: float = 0.0
    """By the model itself: before penalties, temperature and filters. Only if ``logprobs`` were asked for."""
    top: tuple[tuple[int, float], ...] = ()
    """The ``logprobs`` likeliest tokens, likeliest first, with their log-probabilities."""


def sample(
    logits: Floats, params: SamplingParams, position: int, history: Sequence[int], prompt_length: int
) -> SampleResult:
    """The token at ``position``, from ``logits`` ``[vocabulary]``.

    ``history`` is every token before it, of which the first ``prompt_length`` are the prompt. Raises
    :class:`BadTensor` if the largest logit is not finite.
    """
    if logits.ndim != 1 or not math.isfinite(highest := float(logits[likeliest := int(logits.argmax())])):
        raise BadTensor(f"logits {list(logits.shape)} without a finite maximum")
    wanted = _penalised(logits, params, history[:position], prompt_length)
    if params.temperature < GREEDY_BELOW:
        token_id = likeliest if wanted is logits else int(wanted.argmax())
    else:
        token_id = _draw(wanted, params, position)
    if not params.logprobs:
        return SampleResult(token_id)
    normaliser = highest + math.log(float(np.exp(logits - np.float32(highest)).sum(dtype=np.float64)))
    best = _largest(logits, params.logprobs)
    best = best[np.lexsort((best, -logits[best]))][: params.logprobs]
    top = tuple((int(index), float(logits[index]) - normaliser) for index in best)
    return SampleResult(token_id, float(logits[token_id]) - normaliser, top)


def surviving(logits: Floats, params: SamplingParams) -> tuple[Ids, Floats]:
    """The token ids that may be drawn, ascending, and their logits divided by the temperature."""
    scores = logits / np.float32(params.temperature)
    ids = _largest(scores, params.top_k) if 0 < params.top_k < len(scores) else None
    kept = scores if ids is None else scores[ids]
    if params.top_p < 1:
        chosen = _nucleus(kept, params.top_p)
        ids, kept = chosen if ids is None else ids[chosen], kept[chosen]
    if params.min_p > 0:
        chosen = np.flatnonzero(kept >= kept.max() + np.float32(math.log(params.min_p)))
        ids, kept = chosen if ids is None else ids[chosen], kept[chosen]
    return np.arange(len(scores)) if ids is None else ids, kept


def _draw(logits: Floats, params: SamplingParams, position: int) -> int:
    ids, scores = surviving(logits, params)
    if len(ids) == 1:
        return int(ids[0])
    # The raw stream of a bit generator is fixed for good; the methods of numpy's Generator may change. One 64-bit
    # word gives the noise of two neighbouring ids, and all are drawn, so that an id's noise never depends on which
    # others survive; only the survivors pay for logarithms.
    words = np.random.Philox(key=np.array([params.seed, position], dtype=np.uint64)).random_raw((len(logits) + 1) // 2)
    bits = words.astype("<u8", copy=False).view("<u4")[ids]
    uniform = (bits + 0.5) * 2.0**-32
    return int(ids[(scores - np.log(-np.log(uniform))).argmax()])


def _penalised(logits: Floats, params: SamplingParams, history: Sequence[int], prompt_length: int) -> Floats:
    generated = history[prompt_length:]
    repeats = params.repetition_penalty != 1 and len(history) > 0
    counts = (params.presence_penalty != 0 or params.frequency_penalty != 0) and len(generated) > 0
    if not (repeats or counts or params.logit_bias):
        return logits
    out = logits.copy()
    for token_id, bias in params.logit_bias.items():
        if token_id < len(out):
            out[token_id] += np.float32(bias)
    if repeats:
        seen = np.unique(np.asarray(history, dtype=np.intp))
        seen = seen[seen < len(out)]
        scores = out[seen]
        penalty = np.float32(params.repetition_penalty)
        out[seen] = np.where(scores < 0, scores * penalty, scores / penalty)
    if counts:
        seen, times = np.unique(np.asarray(generated, dtype=np.intp), return_counts=True)
        seen, times = seen[seen < len(out)], times[seen < len(out)]
        out[seen] -= np.float32(params.presence_penalty) + np.float32(params.frequency_penalty) * times.astype("f4")
    return out


def _largest(scores: Floats, count: int) -> Ids:
    """Ids of all scores at least as large as the ``count``-th largest, ascending: ties stay, as in transformers.

    Selecting in the whole vocabulary takes most of a millisecond. The ``count``-th largest of the maxima of blocks
    is a lower bound that leaves few candidates.
    """
    blocks = len(scores) // _BLOCK
    if count * 2 < blocks:
        maxima = scores[: blocks * _BLOCK].reshape(blocks, _BLOCK).max(axis=1)
        bound = np.partition(maxima, blocks - count)[blocks - count]
        ids = np.flatnonzero(scores >= bound)
    else:
        ids = np.arange(len(scores))
    candidates = scores[ids]
    least = np.partition(candidates, len(candidates) - count)[len(candidates) - count]
    kept: Ids = ids[candidates >= least]
    return kept


def _nucleus(scores: Floats, top_p: float) -> Ids:
    """Indices, ascending, of the likeliest tokens whose probability reaches ``top_p`` together (Holtzman et al., 2020).

    A token stays if those ahead of it do not reach ``top_p`` yet, so at least one does. Only as many are sorted as
    hold the nucleus for sure: those above a bound, if their sum reaches it.
    """
    weights = np.exp(scores - scores.max())
    needed = top_p * float(weights.sum(dtype=np.float64))
    for bound in (*_NUCLEUS_GUESSES, 0.0):
        ids = np.flatnonzero(weights >= bound)
        ahead = weights[ids].astype(np.float64)
        if bound == 0 or ahead.sum() >= needed:
            break
    order = np.argsort(-ahead, kind="stable")
    before = np.cumsum(ahead[order]) - ahead[order]
    kept: Ids = np.sort(ids[order[: max(1, int(np.searchsorted(before, needed)))]])
    return kept


def _few_biases(biases: Sized) -> None:
    if len(biases) > MAX_BIASES:
        raise BadRequest(f"logit_bias has {len(biases)} entries, the limit is {MAX_BIASES}")


def _decimal(value: float) -> float:
    """The shortest decimal that float32 rounds to ``value``: 0.7 comes off the wire as 0.7."""
    return float(str(np.float32(value)))


def number(name: str, value: Any, low: float, high: float) -> float:
    """``value``, which may be one of numpy's; raises :class:`BadRequest`."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not (is_number and low <= value <= high):
        raise BadRequest(f"{name} must be between {low:g} and {high:g}, not {_shown(value)}")
    return float(value)


def whole_number(name: str, value: Any, low: int, high: int) -> int:
    """As :func:`number`, for counts and ids."""
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not (is_whole and low <= value <= high):
        raise BadRequest(f"{name} must be a whole number from {low} to {high}, not {_shown(value)}")
    return int(value)


def _shown(value: object) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # Python writes no number of more than some thousand digits
        return "one of so many digits"
