"""Drafts for lossless speculation round the ring: what the next tokens may be, and how many of them it pays to try.

The last stage knows every token of its session, so it is where drafts arise. It sends the newest token on the ring
together with a guess at those that follow; all stages run the rows in one pass, and the last one samples at each row in
turn for as long as the guess holds (:func:`verified`). Sampling is a pure function of logits, history, seed and
position, so the tokens are those of a generation without drafts, sampled ones too: the text is never changed by them,
as in Leviathan et al. ("Fast inference from transformers via speculative decoding", ICML 2023), and here not even the
random numbers are.

Guesses are looked up in the prompt and the text so far (Saxena, "Prompt lookup decoding", 2023). Three things are
added. A copy goes on at its next token after one that was replaced, which is what renaming is. Every token that comes
is compared with what would have been guessed, sent or not: so the share of right guesses is known, for each length of
match, at no cost. And a draft is as long as maximises expected tokens by expected time of the round, which is measured:
over slow links rows are nearly free, on one machine they are not. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peers.executor import SampleRequest
from swarm.sampling import SampleResult

MAX_DRAFT = 15
"""Tokens in one draft. With the token before them they are 16 rows, up to which kernels for few rows are quick."""

_SHORTEST, _LONGEST = 2, 8
"""Tokens of a match: fewer are not looked for, more count as these."""
_CANDIDATES = 8
"""Newest occurrences that are compared."""
_PRIOR = (0.2, 0.5, 0.2, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95)
"""Share of right guesses by length of match before anything is known. 0 and 1 are for a copy that goes on."""
_PRIOR_WEIGHT = 2.0
_KEPT = 0.97
"""What an observation of a bucket leaves of the weight of earlier ones."""
_ROW_SHARE = 0.08
"""A draft's row takes this share of a round's time before that is measured."""
_ROW_WEIGHT = 4.0
_KEPT_ROUND = 0.95
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


@dataclass(frozen=True, slots=True)
class _Guess:
    source: int
    """The token at this position is the guess."""
    length: int
    """So many tokens before it are those at the end of the text, ``_LONGEST`` at most."""
    going_on: bool
    """It is where the last guess was copied from, one further."""


class _Shares:
    """How often guesses were right, by kind and length of match; old observations fade."""

    def __init__(self) -> None:
        self._right = [[0.0] * len(_PRIOR), [0.0] * len(_PRIOR)]
        self._seen = [[0.0] * len(_PRIOR), [0.0] * len(_PRIOR)]

    def of(self, going_on: bool, length: int) -> float:
        prior = _PRIOR[length]
        right, seen = self._right[going_on][length], self._seen[going_on][length]
        return (prior * _PRIOR_WEIGHT + right) / (_PRIOR_WEIGHT + seen)

    def note(self, guess: _Guess, right: bool) -> None:
        kind, length = guess.going_on, guess.length
        self._right[kind][length] = self._right[kind][length] * _KEPT + right
        self._seen[kind][length] = self._seen[kind][length] * _KEPT + 1


class Rounds:
    """How long a round of the ring takes as a function of the rows drafted: a line through what was measured."""

    def __init__(self) -> None:
        self._n = self._k = self._kk = self._t = self._kt = 0.0
        self._batch = 1.0

    def note(self, drafted: int, seconds: float, batch: int) -> None:
        """``batch``: sessions that shared the passes, at most of all stages."""
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
        self.restart(tokens)

    def restart(self, tokens: Sequence[int]) -> None:
        """The session's tokens are these; what was learned about guesses and times stays."""
        self._tokens: list[int] = []
        self._after: dict[tuple[int, int], list[int]] = {}
        self._guess: _Guess | None = None
        for token in tokens:
            self._append(token)
        self._guess = self._best(None)

    def append(self, token: int) -> None:
        """One more token is known."""
        guess = self._guess
        if guess is not None:
            self._shares.note(guess, self._tokens[guess.source] == token)
        self._append(token)
        self._guess = self._best(None if guess is None else guess.source + 1)

    def note_round(self, drafted: int, right: int, seconds: float, batch: int) -> None:
        """A round of ``drafted`` guesses, of which ``right`` were, took so long; see :meth:`Rounds.note`."""
        self.rounds.note(drafted, seconds, batch)
        base, _ = self.rounds.line()
        brought = right - (min(seconds / base, _OUTLIER) - 1) if drafted else 0.0
        self._credit = min(self._credit + brought + _LOSS, _MOST)

    def propose(self, limit: int) -> tuple[int, ...]:
        """The draft that promises most: empty if none pays, ``limit`` tokens at most."""
        guess = self._guess
        if guess is None:
            return ()
        base, row = self.rounds.costs()
        gain = _GAIN if self._credit > 0 else _GAIN_IN_DEBT
        tokens, likely, best_length, best = 1.0, 1.0, 0, gain / base
        for length in range(1, min(limit, MAX_DRAFT) + 1):
            likely *= self._shares.of(guess.going_on, min(guess.length + length - 1, _LONGEST))
            tokens += likely
            if tokens / (base + length * row) > best:
                best_length, best = length, tokens / (base + length * row)
        text = self._tokens[guess.source : guess.source + best_length]
        while len(text) < best_length:  # the copy has reached its own beginning: a period
            text.append(text[len(text) - (len(self._tokens) - guess.source)])
        return tuple(text)

    def _append(self, token: int) -> None:
        self._tokens.append(token)
        if len(self._tokens) > _SHORTEST:
            a, b = self._tokens[-3], self._tokens[-2]
            places = self._after.setdefault((a, b), [])
            places.append(len(self._tokens) - 1)
            if len(places) > _CANDIDATES:
                del places[0]

    def _best(self, following: int | None) -> _Guess | None:
        """The likeliest guess at the next token; ``following``: where the last one's copy would go on."""
        tokens = self._tokens
        found = [] if following is None else [self._compared(following, going_on=True)]
        if len(tokens) >= _SHORTEST:
            places = self._after.get((tokens[-2], tokens[-1]), ())
            found += [self._compared(place, going_on=False) for place in reversed(places) if place != following]
        return max(found, key=lambda guess: (self._shares.of(guess.going_on, guess.length), guess.length), default=None)

    def _compared(self, source: int, *, going_on: bool) -> _Guess:
        tokens, length = self._tokens, 0
        while length < min(_LONGEST, source) and tokens[source - 1 - length] == tokens[-1 - length]:
            length += 1
        return _Guess(source, length, going_on)
