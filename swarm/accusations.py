"""Whom to replace when one hop says of another that it can't be reached, or that it sends rubbish."""

from __future__ import annotations

from swarm.types import PeerId


class Accusations:
    """Of one session.

    Only one end of a link tells that it doesn't work, and that end may be the broken one. So a hop that names another,
    which the owner hears well, is believed once; when it then names one more, it is the one to be replaced. After that
    it begins anew, for it may be the only peer with its layers.
    """

    def __init__(self) -> None:
        self._believed: dict[PeerId, PeerId] = {}

    def believed(self, accuser: PeerId, accused: PeerId, *, heard: bool) -> bool:
        """Whether the accused is to be replaced, not the accuser.

        ``heard``: the owner hears the accused well; one that it doesn't hear is lost, whoever says so.
        """
        if not heard or self._believed.setdefault(accuser, accused) == accused:
            return True
        del self._believed[accuser]
        return False
