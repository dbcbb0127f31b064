"""Messages on the wire: parsing that trusts nothing, and the few conversions to our own types.

The messages themselves are in ``protocol.proto``. A frame that doesn't parse, or whose fields make no
sense, raises :class:`ProtocolError`; nothing is allocated in proportion to a number that a peer claims.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import TypeVar

from google.protobuf.message import DecodeError

from swarm import protocol_pb2 as pb
from swarm.errors import BadRequest, BadTensor, ProtocolError, SwarmError, WrongRange, from_code
from swarm.sampling import MAX_LOGPROBS, SampleResult
from swarm.types import HopTiming, LayerRange, PeerAddress, PeerId
from swarm.wire import row_bytes

MAX_ADDRESSES = 16
MAX_MULTIADDR_CHARS = 256
MAX_PEER_ID_CHARS = 128
MAX_HOPS = 256
MAX_TIMING_BYTES = 128
MAX_END_IDS = 64
MAX_MESSAGE_CHARS = 1000
"""Of an error, or of the reason for a new route."""
MAX_CODE_CHARS = 64
LEAST_LOGPROB = -9999.0
"""Stands for every token that is less likely; OpenAI's API says it so, too."""
MOST_LOGPROB = 1e-3
"""Of a certain token, with some rounding."""

Envelope = TypeVar(
    "Envelope", pb.ControlRequest, pb.ControlReply, pb.LinkMessage, pb.InfoRequest, pb.InfoReply, pb.DelegateReply
)


def decode(kind: type[Envelope], frame: bytes) -> Envelope:
    """One frame as the message ``kind``, with exactly one alternative set; raises :class:`ProtocolError`."""
    message = kind()
    try:
        message.ParseFromString(frame)
    except DecodeError as error:
        raise ProtocolError(f"a frame of {len(frame)} bytes is no {kind.__name__}") from error
    if message.WhichOneof("kind") is None:
        raise ProtocolError(f"an empty {kind.__name__}")
    return message


def address_to_wire(address: PeerAddress) -> pb.Address:
    return pb.Address(peer_id=address.peer_id, multiaddrs=address.multiaddrs)


def address_from_wire(address: pb.Address) -> PeerAddress:
    peer_id = peer_id_from_wire(address.peer_id)
    if len(address.multiaddrs) > MAX_ADDRESSES or any(len(m) > MAX_MULTIADDR_CHARS for m in address.multiaddrs):
        raise ProtocolError(f"more than {MAX_ADDRESSES} addresses, or one over {MAX_MULTIADDR_CHARS} characters")
    return PeerAddress(peer_id, tuple(address.multiaddrs))


def peer_id_from_wire(text: str) -> PeerId:
    if not 0 < len(text) <= MAX_PEER_ID_CHARS:
        raise ProtocolError(f"a peer id has 1 to {MAX_PEER_ID_CHARS} characters")
    return PeerId(text)


def error_to_wire(error: SwarmError, peer_id: PeerId | None = None, epoch: int = 0) -> pb.Error:
    return pb.Error(code=error.code, message=error.message[:MAX_MESSAGE_CHARS], peer_id=peer_id or "", epoch=epoch)


def error_from_wire(error: pb.Error) -> SwarmError:
    return from_code(one_line(error.code, MAX_CODE_CHARS), one_line(error.message))


def one_line(text: str, most: int = MAX_MESSAGE_CHARS) -> str:
    """What a stranger says, so that it may be shown on a terminal."""
    return "".join(c if c.isprintable() else " " for c in text[:most])


def check_count(items: Sized, most: int, named: str) -> None:
    """Raises :class:`BadRequest` for too many; call it before they are looked at: a frame has room for millions, and
    meanwhile nobody else is heard."""
    if len(items) > most:
        raise BadRequest(f"{len(items)} {named}; the limit is {most}")


def check_end_ids(ids: Sized) -> None:
    check_count(ids, MAX_END_IDS, "tokens that end the text")


def rows_to_wire(data: bytes, encoding: str, width: int) -> pb.Tensor:
    """``data``: rows ``[rows, width]`` in ``encoding``, see ``swarm.wire``."""
    tensor = pb.Tensor()
    put_rows(tensor, data, encoding, width)
    return tensor


def put_rows(tensor: pb.Tensor, data: bytes, encoding: str, width: int) -> None:
    """As :func:`rows_to_wire`, into the empty ``tensor`` of a message that is being filled."""
    tensor.dtype, tensor.data = encoding, data
    tensor.shape.extend((len(data) // row_bytes(encoding, width), width))


def rows_from_wire(tensor: pb.Tensor, encoding: str, width: int, max_rows: int) -> bytes:
    """The bytes of hidden states ``[rows, width]``, checked before anything is built of them.

    Raises :class:`BadTensor` on another encoding, shape or byte count. Values that are
    not finite show in what the layers make of them.
    """
    shape, data = tensor.shape[:3], tensor.data
    if tensor.dtype != encoding:
        raise BadTensor(f"hidden states as {tensor.dtype[:20]!r}; here they come as {encoding}")
    if len(shape) != 2 or shape[1] != width or not 0 < shape[0] <= max_rows:
        raise BadTensor(f"hidden states of shape {shape}; expected [1 to {max_rows}, {width}]")
    if len(data) != shape[0] * row_bytes(encoding, width):
        raise BadTensor(f"hidden states of shape {shape} in {len(data)} bytes")
    return data


def logprobs_to_wire(sampled: SampleResult) -> bytes:
    """``pb.Logprobs``, serialised: small enough to be kept until the owner has it."""
    return pb.Logprobs(
        logprob=max(sampled.logprob, LEAST_LOGPROB),
        top_ids=[token_id for token_id, _ in sampled.top],
        top_logprobs=[max(value, LEAST_LOGPROB) for _, value in sampled.top],
    ).SerializeToString()


def logprobs_from_wire(told: pb.Logprobs, vocab_size: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """A token's own log-probability, and the likeliest tokens with theirs. Raises :class:`ProtocolError`."""
    values = (told.logprob, *told.top_logprobs)
    if not all(LEAST_LOGPROB <= value <= MOST_LOGPROB for value in values):
        raise ProtocolError("a log-probability that is none")
    if len(told.top_ids) != len(told.top_logprobs) or len(told.top_ids) > MAX_LOGPROBS:
        raise ProtocolError(f"{len(told.top_ids)} likeliest tokens with {len(told.top_logprobs)} log-probabilities")
    if any(token_id >= vocab_size for token_id in told.top_ids):
        raise ProtocolError(f"one of the likeliest tokens is not in the vocabulary of {vocab_size}")
    return told.logprob, tuple(zip(told.top_ids, told.top_logprobs, strict=True))


def timing_to_wire(timing: HopTiming) -> bytes:
    """``pb.HopTiming``, serialised: the stages on its way hand it on as it is."""
    return pb.HopTiming(
        peer_id=timing.peer_id,
        start=timing.layers.start,
        end=timing.layers.end,
        queue_us=min(int(timing.queue_s * 1e6), 2**32 - 1),
        compute_us=min(int(timing.compute_s * 1e6), 2**32 - 1),
        batch=timing.batch,
        link_us=min(int(timing.link_s * 1e6), 2**32 - 1),
    ).SerializeToString()


def cut_timings(hops: Sequence[bytes], most: int = MAX_HOPS) -> list[bytes]:
    """As many as a route has at most, without those that are too long."""
    return [data for data in hops[:most] if len(data) <= MAX_TIMING_BYTES]


def timings_from_wire(hops: Sequence[bytes]) -> tuple[HopTiming, ...]:
    """What the hops say of their time; nothing, if one of them says nonsense: it's for the record only."""
    try:
        return tuple(_timing_from_wire(pb.HopTiming.FromString(data)) for data in cut_timings(hops))
    except (DecodeError, WrongRange):
        return ()


def _timing_from_wire(timing: pb.HopTiming) -> HopTiming:
    return HopTiming(
        peer_id=PeerId(timing.peer_id[:MAX_PEER_ID_CHARS]),
        layers=LayerRange(timing.start, timing.end),
        queue_s=timing.queue_us / 1e6,
        compute_s=timing.compute_us / 1e6,
        batch=timing.batch,
        link_s=timing.link_us / 1e6,
    )
