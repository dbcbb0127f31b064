"""Copies: where what is written now was written before, and how it goes on there, changes and all.

The last tokens are looked up in the text before them, as in Saxena, "Prompt lookup decoding" (2023), and where they are
found a copy begins. Text that is repeated with changes (a name, a value, a column) leaves its source at each of them,
so a copy is not given up at a token that differs. As in ``diff``:

- After a difference it goes on where the newest tokens are found again a little further on in the source, whatever was
  replaced, put in or left out; until they are found, one token is taken to stand for one. The further that is from one
  for one, the more tokens have to be found.
- What was different is then known, an :class:`Edit`, and expected wherever a copy comes to the same tokens: where the
  token before them is the same too, what was done there last, elsewhere what was changed last. So a name is wrong
  once, be it one token or five, and with or without a space before it, which are other tokens.
- Several copies are followed at a time: the one that has agreed for a page is not lost to one that looks like the last
  few tokens. Edits are learned from the one that has agreed longest: to others most things are different.

Tokens are never decoded. A token more costs a bounded number of comparisons, whatever the length of the text. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher

_SHORTEST, _LONGEST = 2, 32
"""Tokens of a match: fewer are not looked for, more count as these."""
_CANDIDATES = 8
"""Newest occurrences that are compared."""
_COPIES = 4
"""Followed at a time."""
_PROVEN = 4
"""A copy that has agreed with fewer tokens than these ends at a difference."""
_DIFFERENT = 8
"""Tokens after which a copy ends that does not know where to go on."""
_FURTHER = 16
"""So many tokens of the source are searched for where to go on."""
_DISTANCE_BITS = 3
"""A token that is found makes up for a distance from one for one of less than this power of two."""
_FOLLOWED = 256
"""Newest tokens of a prompt that are followed, in case it ends in a copy."""
_BEGUN = 8
"""It does if a copy has agreed with so many tokens."""
_ENDING = 4
"""As many tokens put in may belong to the token before them, as a longer name's do; more belong to the place."""
_ANY = -1
SURE = 2
"""A copy goes on where so many of the newest tokens are found."""


@dataclass(frozen=True, slots=True)
class Edit:
    before: tuple[int, ...] = ()
    """In the source, ..."""
    after: tuple[int, ...] = ()
    """... and in the text."""


@dataclass(slots=True)
class Copy:
    source: int
    """The text goes on as the tokens from this position on, as far as is known for certain."""
    agreed: int
    """Tokens that were as expected; half of them are forgotten at a difference."""
    different: list[int] = field(default_factory=list)
    """What came since, if it is not what ``source`` has ..."""
    expected: tuple[int, ...] = ()
    """... and what is still to come, if it is an edit that is known ..."""
    onward: int = 0
    """... and where the source goes on then ..."""
    found: int = 0
    """... because so many of the newest tokens are before it. None: one token for one."""
    learned: dict[tuple[int, int], Edit] = field(default_factory=dict)
    """Edits that were found in it."""

    @property
    def lost(self) -> bool:
        """Where it goes on is not certain."""
        return bool(self.different) and not self.expected


class Lookup:
    """One text, its copies and its edits."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._edits: dict[tuple[int, int], Edit] = {}
        """By the last token of the source before it and the first that it is about, or one of them and ``_ANY``."""
        self.restart(tokens)

    def restart(self, tokens: Sequence[int]) -> None:
        """The text is this; edits stay. If it ends in a copy, as where an answer is begun or goes on elsewhere, that
        copy's edits are known too. What else is alike in a prompt, rows of a table, is no change of one to the other.
        """
        self._tokens: list[int] = []
        self._places: dict[tuple[int, int], list[int]] = {}
        self.copies: list[Copy] = []
        """Those that have agreed longest first; no two expect the same place next."""
        known = dict(self._edits)
        for token in tokens[:-_FOLLOWED]:
            self._add(token)
        for token in tokens[-_FOLLOWED:]:
            self.append(token)
        self.copies = [copy for copy in self.copies if copy.agreed >= _BEGUN]
        self._edits = known | (self.copies[0].learned if self.copies else {})
        self._begin()

    def append(self, token: int) -> None:
        """One more token is known."""
        self.copies = [copy for copy in self.copies if self._follow(copy, token)]
        self._add(token)
        self._begin()

    def ahead(self, copy: Copy, count: int) -> list[int]:
        """The next tokens, if ``copy`` goes on."""
        known, text = len(self._tokens), list(copy.expected)
        source = copy.onward if copy.different else copy.source
        while len(text) < count:
            if source < known:
                more, source = self._step(source)
                text += more
            else:  # it has reached its own beginning: a period
                text.append(text[source - known])
                source += 1
        return text[:count]

    def _follow(self, copy: Copy, token: int) -> bool:
        """``token`` comes next; is it still a copy?"""
        if not copy.different:
            copy.expected, copy.onward = self._step(copy.source)
        if copy.expected[:1] == (token,):
            copy.expected = copy.expected[1:]
            copy.different.append(token)
            copy.agreed += 1
            if not copy.expected:
                copy.source, copy.different = copy.onward, []
            return True
        copy.expected = ()
        copy.different.append(token)
        if copy.agreed < _PROVEN or len(copy.different) > _DIFFERENT:
            return False
        self._find_onward(copy)
        as_the_source = copy.found == len(copy.different) == copy.onward - copy.source
        if copy.found >= SURE or as_the_source:
            self._go_on(copy)
        return True

    def _step(self, source: int) -> tuple[tuple[int, ...], int]:
        """What comes for the token at ``source``, which may be an edit and the token after it; and where it goes on."""
        tokens = self._tokens
        last, first = tokens[source - 1], tokens[source]
        for key in ((last, first), (_ANY, first), (last, _ANY)):
            edit = self._edits.get(key)
            if edit is not None:
                end = source + len(edit.before)
                if end < len(tokens) and tuple(tokens[source:end]) == edit.before:
                    return (*edit.after, tokens[end]), end + 1
        return (tokens[source],), source + 1

    def _find_onward(self, copy: Copy) -> None:
        tokens, different, source = self._tokens, copy.different, copy.source
        one_for_one = source + len(different)
        copy.onward, copy.found, best = min(one_for_one, len(tokens)), 0, -1
        for onward in range(source + 1, min(source + _FURTHER, len(tokens)) + 1):
            found, most = 0, min(len(different), onward - source)
            while found < most and tokens[onward - 1 - found] == different[-1 - found]:
                found += 1
            worth = _DISTANCE_BITS * found - abs(onward - one_for_one).bit_length()
            if found and worth > best:
                copy.onward, copy.found, best = onward, found, worth

    def _go_on(self, copy: Copy) -> None:
        tokens, source = self._tokens, copy.source
        if all(other.agreed <= copy.agreed for other in self.copies):
            before = tuple(tokens[source : copy.onward - copy.found])
            after = tuple(copy.different[: len(copy.different) - copy.found])
            self._learn(copy, source, Edit())  # a known one that was not made here is forgotten here
            changes = SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
            for kind, start, end, new_start, new_end in changes:
                if kind != "equal":
                    self._learn(copy, source + start, Edit(before[start:end], after[new_start:new_end]))
        copy.agreed = copy.agreed // 2 + copy.found
        copy.source, copy.different = copy.onward, []

    def _learn(self, copy: Copy, source: int, edit: Edit) -> None:
        last, first = self._tokens[source - 1], self._tokens[source]
        new = {(last, first): edit}
        if edit.before:
            new[_ANY, first] = edit
        elif 0 < len(edit.after) <= _ENDING:
            new[last, _ANY] = edit
        copy.learned |= new
        self._edits |= new

    def _add(self, token: int) -> None:
        self._tokens.append(token)
        if len(self._tokens) > _SHORTEST:
            a, b = self._tokens[-3], self._tokens[-2]
            places = self._places.setdefault((a, b), [])
            places.append(len(self._tokens) - 1)
            if len(places) > _CANDIDATES:
                del places[0]

    def _begin(self) -> None:
        """A copy begins where most of the newest tokens are found, unless it is followed already."""
        tokens = self._tokens
        if len(tokens) >= _SHORTEST:
            places = self._places.get((tokens[-2], tokens[-1]), ())
            found = max(((self._alike(place), place) for place in places), default=None)
            if found is not None:
                self.copies.append(Copy(source=found[1], agreed=found[0]))
        longest: dict[int, Copy] = {}
        for copy in sorted(self.copies, key=lambda copy: -copy.agreed):
            longest.setdefault(copy.onward if copy.different else copy.source, copy)
        self.copies = list(longest.values())[:_COPIES]

    def _alike(self, place: int) -> int:
        tokens, length = self._tokens, 0
        while length < min(_LONGEST, place) and tokens[place - 1 - length] == tokens[-1 - length]:
            length += 1
        return length
