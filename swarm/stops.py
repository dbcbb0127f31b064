"""Stop strings in a stream of text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence

from swarm.errors import BadRequest

MAX_STOPS = 16


class StopFinder:
    """Passes text on, except what is, or may yet become, a stop string."""

    def __init__(self, stops: str | Sequence[str] | None) -> None:
        """``stops``: one or several, or none. Raises ``BadRequest`` for an empty one, too many, or what is no text."""
        stops = [stops] if isinstance(stops, str) else () if stops is None else stops
        texts = isinstance(stops, Sequence) and all(isinstance(stop, str) and stop for stop in stops)
        if not texts or len(stops) > MAX_STOPS:
            raise BadRequest(f"at most {MAX_STOPS} stop texts, none of them empty")
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What may be shown now. After a stop string: nothing more, and :attr:`found`."""
        if self.found:
            return ""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            shown, self._held = self._held[: min(places)], ""
            return shown
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """The end of the text: what was held back is no stop string after all."""
        shown, self._held = self._held, ""
        return "" if self.found else shown

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins ``stop``."""
        return next((n for n in range(min(len(stop) - 1, len(self._held)), 0, -1) if self._held.endswith(stop[:n])), 0)
