"""Length framing over a byte stream: 4 bytes big endian, then that many bytes; ``0xFFFFFFFF`` is the end frame.

hivemind's own stream API can't tell a killed peer from a clean end and trusts an 8-byte length; here an
EOF without the end frame is :class:`StreamLost`, and a length is checked before anything is read for it.

The hot path is a decode step: one frame of about 2 KB a hop. So ``send`` is one ``write`` and no wait, and ``receive``
takes two reads from a buffer that usually holds both; no task and no timer is made for either. A write wakes the
daemon, which costs more than all that precedes it: what one turn of the event loop sends on a stream is one write.
"""

from __future__ import annotations

import asyncio
import struct
from collections import Counter
from collections.abc import Callable

from swarm.awake import timeout_awake
from swarm.errors import ProtocolError, StreamLost
from swarm.types import PeerId

HEADER = struct.Struct(">I")
END = 0xFFFFFFFF

HIGH_WATER_BYTES = 256 * 1024
"""``send`` waits for the remote only above this much unsent data."""
_JOIN_BYTES = 64 * 1024
"""Up to here frames are joined into one write; above, the copy costs more than a second write."""
_PIECE_BYTES = 64 * 1024
"""Larger payloads are taken as they arrive, each piece with its own deadline: a lying length reserves nothing."""
_LINGER_S = 1.0
"""How long a closed stream stays open once all is written, so that the remote reads the end frame before its own writes
fail."""


class PartialFrames:
    """How many bytes of large frames have arrived in part, at all streams of a process, and what may."""

    def __init__(self, most_bytes_per_peer: int, most_bytes: int) -> None:
        self._most_bytes_per_peer = most_bytes_per_peer
        self._most_bytes = most_bytes
        self._held: dict[FramedStream, int] = {}

    def hold(self, stream: FramedStream, size: int) -> None:
        """Too many of one peer cost it this stream; too many of all cost the peer that has most all that it began."""
        self._held[stream] = self._held.get(stream, 0) + size
        if sum(held for one, held in self._held.items() if one.remote == stream.remote) > self._most_bytes_per_peer:
            stream.abort("had too many large frames under way")
        while sum(self._held.values()) > self._most_bytes:
            by_peer: Counter[PeerId] = Counter()
            for one, held in self._held.items():
                by_peer[one.remote] += held
            (worst, _), *_ = by_peer.most_common(1)
            for one in [one for one in self._held if one.remote == worst]:
                one.abort("gave way: too many large frames were under way")

    def release(self, stream: FramedStream) -> None:
        self._held.pop(stream, None)


class FramedStream:
    """A :class:`swarm.transport.Stream` over an asyncio reader and writer.

    One task may send while another receives. ``receive`` may be cancelled (a deadline of the caller) and called
    again: no bytes are lost.
    """

    __slots__ = (
        "__weakref__",
        "_arrived_at",
        "_ended",
        "_failure",
        "_max_frame_bytes",
        "_need",
        "_on_close",
        "_outgoing",
        "_outgoing_bytes",
        "_partial",
        "_pieces",
        "_reader",
        "_remote",
        "_remote_address",
        "_send_s",
        "_transport",
        "_writer",
        "_written_bytes",
    )

    def __init__(
        self,
        remote: PeerId,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        max_frame_bytes: int,
        send_s: float,
        partial: PartialFrames | None = None,
        remote_address: str = "",
        on_close: Callable[[FramedStream], None] | None = None,
    ) -> None:
        self._remote = remote
        self._remote_address = remote_address
        self._reader = reader
        self._writer = writer
        self._transport = writer.transport
        self._transport.set_write_buffer_limits(high=HIGH_WATER_BYTES)
        self._max_frame_bytes = max_frame_bytes
        self._send_s = send_s
        self._partial = partial or PartialFrames(max_frame_bytes, max_frame_bytes)
        self._on_close = on_close
        self._arrived_at = 0.0
        self._need: int | None = None
        """Bytes still to come of the frame whose header has been read."""
        self._pieces: list[bytes] = []
        self._outgoing: list[bytes] = []
        """To be written at the end of this turn of the loop."""
        self._outgoing_bytes = 0
        self._written_bytes = 0
        """Since the stream was opened, those included that are still unsent."""
        self._ended = False
        self._failure: str | None = None

    @property
    def remote(self) -> PeerId:
        return self._remote

    @property
    def remote_address(self) -> str:
        return self._remote_address

    @property
    def arrived_at(self) -> float:
        return self._arrived_at

    def __repr__(self) -> str:
        return f"FramedStream({self._remote[-6:]})"

    async def send(self, frame: bytes) -> None:
        size = len(frame)
        if size > self._max_frame_bytes:
            raise ProtocolError(f"frame of {size} bytes exceeds limits.max_frame_bytes ({self._max_frame_bytes})")
        transport = self._transport
        if self._failure is not None or transport.is_closing():
            raise self._broken("is closed")
        self._write(frame)
        if self._unsent_bytes > HIGH_WATER_BYTES:
            self._flush()
            await self._drain()

    def try_send(self, frame: bytes) -> bool:
        busy = self._unsent_bytes > HIGH_WATER_BYTES or len(frame) > self._max_frame_bytes
        if busy or self._failure is not None or self._transport.is_closing():
            return False
        self._write(frame)
        return True

    @property
    def _unsent_bytes(self) -> int:
        return self._outgoing_bytes + self._transport.get_write_buffer_size()

    def _write(self, frame: bytes) -> None:
        header = HEADER.pack(len(frame))
        self._written_bytes += HEADER.size + len(frame)
        if len(frame) > _JOIN_BYTES:
            self._flush()
            self._transport.write(header)
            self._transport.write(frame)
            return
        if not self._outgoing:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outgoing += (header, frame)
        self._outgoing_bytes += HEADER.size + len(frame)

    def _flush(self) -> None:
        outgoing, self._outgoing, self._outgoing_bytes = self._outgoing, [], 0
        # What a lost stream swallows is told at the next frame, like what the remote did not take.
        if outgoing and self._failure is None and not self._transport.is_closing():
            self._transport.write(b"".join(outgoing))

    async def receive(self) -> bytes | None:
        if self._ended:
            return None
        if self._failure is not None:
            raise self._lost(self._failure)
        try:
            if self._need is None:
                (need,) = HEADER.unpack(await self._reader.readexactly(HEADER.size))
                if need == END:
                    self._ended = True
                    return None
                if need > self._max_frame_bytes:
                    self._fail(f"announced a frame of {need} bytes")
                    raise ProtocolError(
                        f"peer {self._remote} announced a frame of {need} bytes; the limit is {self._max_frame_bytes}"
                    )
                self._need = need
            return await self._payload()
        except TimeoutError:
            raise self._lost(f"stalled for {self._send_s:g} s in the middle of a frame") from None
        except asyncio.IncompleteReadError:
            raise self._lost("ended without its end frame") from None
        except OSError as error:
            raise self._lost(f"failed: {str(error) or type(error).__name__}") from None

    async def close(self) -> None:
        if self._failure is not None:
            return
        self._flush()
        self._fail("was closed here", drop=False)
        transport = self._transport
        try:
            if transport.is_closing():
                return
            transport.write(HEADER.pack(END))
            if self._ended:
                self._writer.close()  # the remote said all it has to say: nothing left to wait for
                return
            # no EOF of our own: p2pd has no half-closed streams, it would cut the remote off while it still sends
            asyncio.get_running_loop().call_later(_LINGER_S, self._linger, transport.get_write_buffer_size(), 0.0)
        except (OSError, RuntimeError):
            transport.abort()

    def _linger(self, unsent: int, stalled_s: float) -> None:
        """Stay open until the remote has taken what was ``unsent`` before, and once more; or takes nothing any more."""
        left = self._transport.get_write_buffer_size()
        stalled_s = 0.0 if left < unsent else stalled_s + _LINGER_S
        if unsent == 0 or stalled_s > self._send_s:
            self.abort()
        else:
            asyncio.get_running_loop().call_later(_LINGER_S, self._linger, left, stalled_s)

    def abort(self, reason: str = "was aborted here") -> None:
        self._fail(reason)

    async def _payload(self) -> bytes:
        need, reader = self._need, self._reader
        assert need is not None  # set by receive
        if need <= _PIECE_BYTES and not self._pieces:
            # no deadline when the bytes are here already, which is nearly always so for a small frame
            if need and len(reader._buffer) < need:  # type: ignore[attr-defined]  # one timer less a frame
                async with timeout_awake(self._send_s):
                    frame = await reader.readexactly(need)
            else:
                frame = await reader.readexactly(need)
            self._need = None
            return frame
        while need:
            async with timeout_awake(self._send_s):
                piece = await reader.read(min(need, _PIECE_BYTES))
            if piece and self._failure is None:
                self._arrived_at = asyncio.get_running_loop().time()
                self._partial.hold(self, len(piece))
            if not piece or self._failure is not None:
                raise asyncio.IncompleteReadError(b"", need)
            self._pieces.append(piece)
            self._need = need = need - len(piece)
        frame = b"".join(self._pieces)
        self._drop_pieces()
        self._need = None
        return frame

    def _drop_pieces(self) -> None:
        self._pieces = []
        self._partial.release(self)

    async def _drain(self) -> None:
        """Wait until the remote has taken most of the buffer; the deadline starts again whenever it takes some, however
        much others write meanwhile."""
        while True:
            taken_bytes = self._written_bytes - self._unsent_bytes
            try:
                async with timeout_awake(self._send_s):
                    await self._writer.drain()
                return
            except TimeoutError:
                if self._written_bytes - self._unsent_bytes <= taken_bytes:
                    raise self._lost(f"took nothing for {self._send_s:g} s") from None
            except OSError as error:
                raise self._broken(f"failed: {str(error) or type(error).__name__}") from None

    def _broken(self, reason: str) -> StreamLost:
        """Sending is over; what the remote sent before can still be received."""
        return StreamLost(f"the stream to {self._remote[-6:]} {self._failure or reason}")

    def _lost(self, reason: str) -> StreamLost:
        self._fail(reason)
        return self._broken(reason)

    def _fail(self, reason: str, drop: bool = True) -> None:
        if self._failure is None:
            self._failure = reason
            self._drop_pieces()
            if self._on_close is not None:
                self._on_close(self)
        if drop:
            self._transport.abort()
