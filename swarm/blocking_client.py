"""The library for programs without asyncio."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Generator, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from swarm.client import AsyncClient, Message, connect_async
from swarm.config import Settings
from swarm.errors import BadRequest, Cancelled
from swarm.generation import Generation
from swarm.models import ModelProfile
from swarm.network_thread import NetworkThread
from swarm.session import RouteChanged
from swarm.stepping import StepSession
from swarm.tokenizer import TextTokenizer
from swarm.transcript import GenerationRequest
from swarm.types import Announcement, Route, Token

T = TypeVar("T")

_WAITS_FOR_ITSELF = "what a client runs can't wait for that client; see swarm.connect_async"


class Client:
    """Does what :class:`AsyncClient` does, with the network on a thread of its own, from the first use until
    :meth:`close`. A context manager."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._network: NetworkThread | None = None
        """While the client is open."""
        self._closed = False
        self._changing = threading.RLock()

    def __enter__(self) -> Self:
        self._opened()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends what still runs. May be called again. Raises :class:`BadRequest` where it would wait for itself."""
        with self._changing:
            if self._network is not None and self._network.is_current:
                raise BadRequest(_WAITS_FOR_ITSELF)
            self._closed = True
            network, self._network = self._network, None
        if network is None or not network.lives:
            return
        try:  # without the lock: what still runs on the network's thread may ask for it
            network.begin(self._client.__aexit__(None, None, None))()
        finally:
            network.end()

    @property
    def profile(self) -> ModelProfile:
        return self._opened().profile

    @property
    def tokenizer(self) -> TextTokenizer:
        return self._opened().tokenizer

    @property
    def settings(self) -> Settings:
        return self._client.settings

    @property
    def tokenizer_files(self) -> Mapping[str, bytes]:
        return self._opened().tokenizer_files

    def request(self, prompt: str | Sequence[int], **options: Any) -> GenerationRequest:
        """See :meth:`AsyncClient.request`."""
        return self._opened().request(prompt, **options)

    def step_session(self, capacity: int) -> StepSession:
        """See :meth:`AsyncClient.step_session`; its methods are for :meth:`run`."""
        return self._opened().step_session(capacity)

    def generate(self, prompt: str | Sequence[int], **options: Any) -> Generation:
        return self.run(self._opened().generate(prompt, **options))

    def chat(self, messages: Iterable[Message], **options: Any) -> Generation:
        return self.run(self._opened().chat(messages, **options))

    def stream(self, prompt: str | Sequence[int], **options: Any) -> Iterator[Token]:
        """Tokens as they come; breaking out of the loop frees the stages."""
        with contextlib.closing(self.events(prompt, **options)) as events:
            for event in events:
                if isinstance(event, Token):
                    yield event

    def events(
        self, prompt: str | Sequence[int], **options: Any
    ) -> Generator[RouteChanged | Token, None, Generation | None]:
        """Tokens, and each change of the route; it returns the generation that they make."""
        stream = self._opened().events(prompt, **options)
        events = aiter(stream)

        async def following() -> RouteChanged | Token:
            return await anext(events)  # on the network's thread, whose loop learns here that it is to end them

        while True:
            try:
                event = self.run(following())
            except StopAsyncIteration:
                return stream.result
            try:
                yield event
            except BaseException:  # the reader has left; what is raised above has ended the events already
                self._end(events)
                raise

    def _end(self, events: AsyncGenerator[object, None]) -> None:
        with self._changing:
            network = self._network
            if network is None or not network.lives:
                return  # closing ends them, or they are another process's
            wait = network.begin(events.aclose())
        if network.is_current:  # the garbage collector came there upon a stream that was left half read
            return
        with contextlib.suppress(Cancelled):  # the client is closed meanwhile
            wait()

    def peers(self) -> list[Announcement]:
        return self.run(self._opened().peers())

    def plan(self, tokens: int = 0) -> Route:
        return self.run(self._opened().plan(tokens))

    def run(self, work: Awaitable[T]) -> T:
        """Wait for ``work`` on the network's thread. Ctrl-C cancels it, and waits until it has cleaned up.

        Raises :class:`BadRequest` if the client is closed or nobody could do it, :class:`Cancelled` if it is closed
        meanwhile.
        """
        with self._changing:
            try:
                network = self._open()
                if not network.lives:
                    raise BadRequest("this process was forked after its client was connected; connect another one here")
                if network.is_current:
                    raise BadRequest(_WAITS_FOR_ITSELF)
            except BaseException:
                if isinstance(work, Coroutine):
                    work.close()  # Python warns of one that is never awaited
                raise
            wait = network.begin(work)
        return wait()

    def begin(self, work: Coroutine[Any, Any, object]) -> None:
        """As :meth:`run`, but nobody waits: for the garbage collector, on any thread. A closed client does nothing."""
        with self._changing:
            network = self._network
            if network is None or not network.lives:
                work.close()
            else:
                network.begin(work)

    def _opened(self) -> AsyncClient:
        with self._changing:
            self._open()
        return self._client

    def _open(self) -> NetworkThread:
        """Joins the swarm if that is still to be done."""
        if self._closed:
            raise BadRequest("this client is closed")
        if self._network is None:
            network = NetworkThread(self._client.settings.timeouts.send_s)
            network.start()
            try:
                network.begin(self._client.__aenter__())()
            except BaseException:
                network.end()
                raise
            self._network = network
        return self._network


def connect(
    initial_peers: str | Sequence[str] | None = None,
    model: str | None = None,
    settings: Settings | None = None,
    *,
    via: str | Sequence[str] = (),
) -> Client:
    """``with swarm.connect(["/ip4/.../p2p/..."]) as client: print(client.generate("Hello").text)``

    Without ``with``: the first call joins the swarm, :meth:`Client.close` leaves it.
    """
    return Client(connect_async(initial_peers, model, settings, via=via))
