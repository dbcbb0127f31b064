"""Every error that Swarm raises on purpose.

    SwarmError
    ├── ConfigError            config           a setting, flag or file that makes no sense
    ├── IdentityError          identity         key file corrupt, or in use by another process
    ├── PortInUse              port_in_use      another process listens on that port
    ├── NotAdmitted            not_admitted     this machine is below the swarm's policy, or has no room for a layer
    ├── ModelError             model            a checkpoint that can't be read or is inconsistent
    │   ├── HubUnreachable     hub_unreachable  the Hub does not answer, or not with what was asked for
    │   ├── UnknownModel       unknown_model    a reference that names no model
    │   └── UnsupportedModel   unsupported_model  an architecture that a shard can't run
    ├── BadRequest             bad_request      the request itself is wrong
    │   ├── WrongRange         wrong_range      layers outside the model, or outside what the peer holds
    │   └── TooLong            too_long         prompt and max_tokens exceed a limit (which is named)
    ├── Busy                   busy             a limit of the peer is reached; another may have room
    ├── NoRoute                no_route         some layers are served by nobody
    │   └── NoRoom             no_room          all are served, but not with KV room for so many tokens
    ├── Unreachable            unreachable      a peer, or all of them, can't be dialled
    ├── PeerLost               peer_lost        a peer that was in use is gone or silent
    │   ├── StreamLost         stream_lost      a stream ended without its end frame
    │   └── DeadlineExceeded   deadline         a wait took longer than its named deadline
    ├── ProtocolError          protocol         bytes that no honest peer sends
    │   ├── BadTensor          bad_tensor       wrong dtype, shape, size, or not finite
    │   ├── Gap                gap              a frame starts after the end of the stage's KV cache
    │   ├── StaleEpoch         stale_epoch      an open for an epoch that is over
    │   └── NotAllowed         not_allowed      a sender that the session's owner did not name
    ├── Evicted                evicted          the stage was idle and gave its memory to another
    ├── Cancelled              cancelled        the owner or the user ended the session
    └── Internal               internal         a bug; details are in the log of the peer that raised it

Each class carries what the edges need: ``code`` on the wire and in JSON, ``retryable`` (would another
peer, or a later moment, do?), ``http_status`` and ``exit_code``.
"""

from __future__ import annotations

from collections.abc import Iterator


class SwarmError(Exception):
    """Base of the tree. ``str(error)`` is a sentence for a person."""

    code = "error"
    retryable = False
    http_status = 500
    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigError(SwarmError):
    code, http_status, exit_code = "config", 400, 2


class IdentityError(SwarmError):
    code, exit_code = "identity", 2


class PortInUse(SwarmError):
    code, exit_code = "port_in_use", 2


class NotAdmitted(SwarmError):
    code, http_status, exit_code = "not_admitted", 403, 5


class ModelError(SwarmError):
    code, exit_code = "model", 2


class HubUnreachable(ModelError):
    code, retryable, http_status, exit_code = "hub_unreachable", True, 503, 1


class UnknownModel(ModelError):
    code, http_status = "unknown_model", 404


class UnsupportedModel(ModelError):
    code = "unsupported_model"


class BadRequest(SwarmError):
    code, http_status, exit_code = "bad_request", 400, 2


class WrongRange(BadRequest):
    code = "wrong_range"


class TooLong(BadRequest):
    code, exit_code = "too_long", 5


class Busy(SwarmError):
    code, retryable, http_status, exit_code = "busy", True, 429, 5


class NoRoute(SwarmError):
    code, retryable, http_status, exit_code = "no_route", True, 503, 3


class NoRoom(NoRoute):
    code, exit_code = "no_room", 5


class Unreachable(SwarmError):
    code, retryable, http_status, exit_code = "unreachable", True, 503, 4


class PeerLost(SwarmError):
    code, retryable, http_status, exit_code = "peer_lost", True, 502, 4


class StreamLost(PeerLost):
    code = "stream_lost"


class DeadlineExceeded(PeerLost):
    code, http_status = "deadline", 504


class ProtocolError(SwarmError):
    code, retryable, http_status = "protocol", True, 502


class BadTensor(ProtocolError):
    code = "bad_tensor"


class Gap(ProtocolError):
    code = "gap"


class StaleEpoch(ProtocolError):
    code = "stale_epoch"


class NotAllowed(ProtocolError):
    code = "not_allowed"


class Evicted(SwarmError):
    code, retryable, http_status, exit_code = "evicted", True, 503, 5


class Cancelled(SwarmError):
    code, exit_code = "cancelled", 130


class Internal(SwarmError):
    code, retryable = "internal", True


def _tree(root: type[SwarmError]) -> Iterator[type[SwarmError]]:
    yield root
    for child in root.__subclasses__():
        yield from _tree(child)


def from_code(code: str, message: str) -> SwarmError:
    """The error that a peer named on the wire; an unknown code (a newer peer) becomes ``Internal``."""
    for kind in _tree(SwarmError):
        if kind.code == code:
            return kind(message)
    return Internal(f"{code}: {message}")
