"""Drafts for lossless speculation round the ring: what the next tokens may be, and how many of them it pays to try.

The last stage knows every token of its session, so it is where drafts arise. It sends the newest token on the ring
together with a guess at those that follow; all stages run the rows in one pass, and the last one samples at each row in
turn for as long as the guess holds (:func:`verified`). Sampling is a pure function of logits, history, seed and
position, so the tokens are those of a generation without drafts, sampled ones too: the text is never changed by them,
as in Leviathan et al. ("Fast inference from transformers via speculative decoding", ICML 2023), and here not even the
random numbers are.

Guesses are looked up in the prompt and the text so far (:mod:`peers.lookup`). Every token that comes is compared with
what each copy expected, sent or not: so the share of right guesses is known, by how long a copy has agreed, at no cost.
The likeliest copy is drafted from, and its draft is as long as maximises expected tokens by expected time of the round,
which is measured: over slow links rows are nearly free, on one machine they are not. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from peers.executor import SampleRequest
from peers.lookup import SURE, Copy, Lookup
from swarm.sampling import SampleResult

MAX_DRAFT = 15
"""Tokens in one draft. With the token before them they are 16 rows, up to which kernels for few rows are quick."""

_PRIOR = (0.2, 0.5, 0.2, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95)
"""Share of right guesses before anything is known: of a copy after a difference, of which no token or one has been
found again; and of others, by how many tokens they have agreed with, from 2."""
_PRIOR_WEIGHT = 2.0
_KEPT = 0.97
"""What an observation of a bucket leaves of the weight of earlier ones."""
_ROW_SHARE = 0.08
"""A draft's row takes this share of a round's time before that is measured."""
_ROW_WEIGHT = 4.0
_KEPT_ROUND = 0.95
_SHORTEST_S = 0.001
"""A round counts as so long at least: the clock of uvloop's loops goes by milliseconds and gives 0 for shorter ones."""
_OUTLIER = 3.0
_GAIN, _GAIN_IN_DEBT = 1.03, 1.6
"""A draft has to promise this many times the tokens per second of a round without one; the second, where drafts have
cost more than they brought."""
_LOSS, _START, _MOST = 0.02, 0.5, 5.0
"""What drafts may cost: this share of the time, so many rounds at first, and at most so many from what they brought."""


def agrees(draft: int, sampled: int) -> bool:
    """The rule of acceptance: the token that the model itself gives at this place is the one that was guessed."""
    return draft == sampled


def verified(
    request: SampleRequest, sample_row: Callable[[int, Sequence[int]], SampleResult]
) -> tuple[SampleResult, ...]:
    """The tokens that follow: one for each guess that was right, and one that is the model's own.

    ``sample_row(row, history)`` samples after ``history`` from the logits of ``row``, counted from the first that was
    asked for. Rows after the first wrong guess are not looked at.
    """
    history, results = request.history, [sample_row(0, request.history)]
    for row, draft in enumerate(request.drafts, 1):
        if not agrees(draft, results[-1].token_id):
            break
        history = [*history, draft]
        results.append(sample_row(row, history))
    return tuple(results)


class _Shares:
    """How often the token came that a copy expected, by what spoke for the copy; old observations fade."""

    def __init__(self) -> None:
        self._right = [0.0] * len(_PRIOR)
        self._seen = [0.0] * len(_PRIOR)

    def of(self, copy: Copy, ahead: int = 0) -> float:
        """``ahead``: so many tokens more have come, and were as expected."""
        case = _case(copy, ahead)
        return (_PRIOR[case] * _PRIOR_WEIGHT + self._right[case]) / (_PRIOR_WEIGHT + self._seen[case])

    def note(self, copy: Copy, right: bool) -> None:
        case = _case(copy)
        self._right[case] = self._right[case] * _KEPT + right
        self._seen[case] = self._seen[case] * _KEPT + 1


def _case(copy: Copy, ahead: int = 0) -> int:
    """An index of ``_PRIOR``."""
    agreed = copy.agreed + ahead
    if copy.lost:
        if copy.found + ahead < SURE:
            return copy.found + ahead
        agreed = copy.agreed // 2 + ahead
    return min(agreed, len(_PRIOR) - 1)


class Rounds:
    """How long a round of the ring takes as a function of the rows drafted: a line through what was measured."""

    def __init__(self) -> None:
        self._n = self._k = self._kk = self._t = self._kt = 0.0
        self._batch = 1.0

    def note(self, drafted: int, seconds: float, batch: int) -> None:
        """``batch``: sessions that shared the passes, at most of all stages."""
        seconds = max(seconds, _SHORTEST_S)
        if self._n > 2:
            base, row = self.line()
            seconds = min(seconds, _OUTLIER * (base + drafted * row))
        new = (1.0, drafted, drafted * drafted, seconds, drafted * seconds)
        old = (self._n, self._k, self._kk, self._t, self._kt)
        self._n, self._k, self._kk, self._t, self._kt = (a * _KEPT_ROUND + b for a, b in zip(old, new, strict=True))
        self._batch += (1 - _KEPT_ROUND) * (batch - self._batch)

    def line(self) -> tuple[float, float]:
        """Seconds of a round without a draft, and of each row more."""
        if not self._n:
            return 1.0, _ROW_SHARE
        rows, seconds = self._k / self._n, self._t / self._n
        spread = self._kk - self._k * rows
        slope = (self._kt - self._k * seconds + _ROW_WEIGHT * _ROW_SHARE * seconds) / (spread + _ROW_WEIGHT)
        slope = max(0.0, min(slope, seconds / max(rows, 1.0)))
        return max(seconds - slope * rows, seconds / 16), slope

    def costs(self) -> tuple[float, float]:
        """As :meth:`line`; a row makes all sessions of the batch wait, so it counts for each of them."""
        base, row = self.line()
        return base, row * self._batch


class Drafter:
    """Follows one session's tokens and proposes what comes next."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.rounds = Rounds()
        self._credit = _START
        """In rounds without a draft: the time that drafts have saved, less what they took."""
        self._shares = _Shares()
        self._lookup = Lookup(tokens)

    def restart(self, tokens: Sequence[int]) -> None:
        """The session's tokens are these; what was learned about edits, guesses and times stays."""
        self._lookup.restart(tokens)

    def append(self, token: int) -> None:
        """One more token is known."""
        for copy in self._lookup.copies:
            self._shares.note(copy, self._lookup.ahead(copy, 1) == [token])
        self._lookup.append(token)

    def note_round(self, drafted: int, right: int, seconds: float, batch: int) -> None:
        """A round of ``drafted`` guesses, of which ``right`` were, took so long; see :meth:`Rounds.note`."""
        self.rounds.note(drafted, seconds, batch)
        base, _ = self.rounds.line()
        brought = right - (min(seconds / base, _OUTLIER) - 1) if drafted else 0.0
        self._credit = min(self._credit + brought + _LOSS, _MOST)

    def propose(self, limit: int) -> tuple[int, ...]:
        """The draft that promises most: empty if none pays, ``limit`` tokens at most."""
        copies = self._lookup.copies
        if not copies:
            return ()
        copy = max(copies, key=lambda copy: (self._shares.of(copy), copy.agreed))
        base, row = self.rounds.costs()
        gain = _GAIN if self._credit > 0 else _GAIN_IN_DEBT
        tokens, likely, best_length, best = 1.0, 1.0, 0, gain / base
        for length in range(1, min(limit, MAX_DRAFT) + 1):
            likely *= self._shares.of(copy, length - 1)
            tokens += likely
            if tokens / (base + length * row) > best:
                best_length, best = length, tokens / (base + length * row)
        return tuple(self._lookup.ahead(copy, best_length))
