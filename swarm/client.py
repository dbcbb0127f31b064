"""The library for asyncio: connect to a swarm, generate, look at it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import logging
import os
import reprlib
import secrets
import weakref
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from swarm.admission import check_announcement
from swarm.announcement_record import check_record
from swarm.awake import Standstills
from swarm.config import SPECULATIONS, Settings
from swarm.config_loader import load_settings
from swarm.coverage import explained
from swarm.delegation import DelegatedSession
from swarm.discovery import SwarmView, peers_by_name
from swarm.errors import BadRequest, Cancelled, NoRoute, SwarmError, UnknownModel, Unreachable
from swarm.generation import AsyncStream, Generation
from swarm.health import Health
from swarm.info import Description, describe, fetch_files
from swarm.knowledge import known
from swarm.models import ModelProfile, resolve, tokenizer_files
from swarm.multiaddrs import peer_addresses
from swarm.plans import Demand, Knowledge, PlannedHop
from swarm.routing import plan_route, price
from swarm.sampling import SamplingParams
from swarm.session import GenerationRequest, Session
from swarm.stepping import StepSession
from swarm.tokenizer import TextTokenizer
from swarm.transcript import token_ids
from swarm.types import Announcement, PeerAddress, Route, Token
from swarm.wire import Wire, encoding_of, row_bytes

if TYPE_CHECKING:
    from swarm.dht import Dht
    from swarm.libp2p import Libp2pTransport

__all__ = ["AsyncClient", "AsyncStream", "Generation", "Message", "connect_async"]

logger = logging.getLogger(__name__)

MOST_MODELS, MOST_ASKED = 8, 3
"""Of one name; and peers of each that are asked whether it is the one."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")

Message = Mapping[str, str]
"""``{"role": "user", "content": "..."}``"""


class AsyncClient:
    """Use :func:`connect_async`. Methods may be called from many tasks at once."""

    # While it is connected, and no longer:
    transport: Libp2pTransport
    dht: Dht
    profile: ModelProfile
    tokenizer_files: Mapping[str, bytes]
    tokenizer: TextTokenizer
    view: SwarmView
    health: Health

    def __init__(
        self, initial_peers: Sequence[str], model: str | None, settings: Settings, via: Sequence[str] = ()
    ) -> None:
        self.settings = settings
        self._initial_peers = [*initial_peers, *via]
        self._via = peer_addresses(via)
        self._model = model
        self._exit = contextlib.AsyncExitStack()
        self._stepping: weakref.WeakSet[StepSession] = weakref.WeakSet()

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Raises :class:`BadRequest` for what there is only while it is connected."""
            if name in AsyncClient.__annotations__:
                raise BadRequest(
                    "this client is not connected; use it as: async with swarm.connect_async(...) as client"
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    async def __aenter__(self) -> Self:
        if not self._initial_peers:
            raise Unreachable("no peer of a swarm is known")
        # Imported here: hivemind takes seconds to import, and who only builds requests needs none of it.
        importlib.import_module("swarm.dht")
        with Standstills() as standstills:
            try:
                await self._join()
                if self.view.announcements() or not standstills.take():
                    return self
                await self._leave()
            except SwarmError:
                if not standstills.take():
                    raise
        await self._join()  # once more: while this process stood still, those that it asked gave it up
        return self

    async def _join(self) -> None:
        from swarm.dht import Dht
        from swarm.identity import Identity
        from swarm.libp2p import Libp2pTransport

        async with contextlib.AsyncExitStack() as stack:
            identity = Identity.ephemeral()
            self.transport = await stack.enter_async_context(Libp2pTransport(identity, self.settings, listen=False))
            self.dht = await stack.enter_async_context(Dht(self.transport, self.settings, check_record))
            await self.dht.connect(self._initial_peers)
            description = await self._find_model()
            self.profile = description.profile
            self.tokenizer_files = await self._tokenizer_files(description)
            self.tokenizer = TextTokenizer(self.tokenizer_files)
            view = SwarmView(
                self.dht,
                self.profile.model_id,
                self.profile.num_layers,
                self.settings.discovery,
                on_seen=self.dht.remember,
                check=functools.partial(check_announcement, self.settings.policy),
                planner=self.settings.planner,
            )
            self.view = await stack.enter_async_context(view)
            self.health = Health(self.settings.recovery.max_penalty_s)
            self._exit = stack.pop_all()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await asyncio.gather(*(session.close() for session in list(self._stepping)))
        finally:
            await self._leave()

    async def _leave(self) -> None:
        for name in AsyncClient.__annotations__:  # a view of the past would answer, and a session wait for peers
            vars(self).pop(name, None)
        await self._exit.aclose()

    async def _find_model(self) -> Description:
        """What the initial peers serve; with a name, the one that has it, of theirs or else of all in the swarm."""
        found, failures = await self._described(peer_addresses(self._initial_peers))
        if not found:
            raise failures[0]
        try:
            return named_model(found, self._model)
        except UnknownModel as unknown:
            if self._model is None or self._via:  # who sends no more than a prompt is served by whom it sends it to
                raise
            others = await peers_by_name(self.dht, names_of(self._model))
            found, _ = await self._described([peer for peers in others[:MOST_MODELS] for peer in peers[:MOST_ASKED]])
            with contextlib.suppress(UnknownModel):
                return named_model(found, self._model)
            raise UnknownModel(f"{unknown.message}, and nobody else in the swarm answers for it") from None

    async def _described(self, peers: Iterable[PeerAddress]) -> tuple[list[Description], list[SwarmError]]:
        """What they say, and why others say nothing."""
        asked = [describe(self.transport, peer, self.settings) for peer in peers]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, SwarmError):
                raise answer
        found = [answer for answer in answers if isinstance(answer, Description)]
        return found, [answer for answer in answers if isinstance(answer, SwarmError)]

    async def _tokenizer_files(self, description: Description) -> dict[str, bytes]:
        files = await fetch_files(self.transport, description, TOKENIZER_FILES, self.settings)
        if not files:
            files = tokenizer_files(resolve(description.profile.name, description.profile.dtype))
        return files

    # ---- generating -------------------------------------------------------------------------------------

    def request(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        logprobs: int = 0,
        seed: int | None = None,
        kv_cache: bool | None = None,
        speculation: str | None = None,
        wire: str | None = None,
        kv: str | None = None,
    ) -> GenerationRequest:
        """Defaults come from the settings. ``seed=None`` draws one. ``logprobs``: how many alternatives to report.

        Raises ``BadRequest`` or ``TooLong``.
        """
        defaults = self.settings.inference
        repetition_penalty = defaults.repetition_penalty if repetition_penalty is None else repetition_penalty
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else token_ids(prompt)
        sampling = SamplingParams(
            temperature=defaults.temperature if temperature is None else temperature,
            top_p=defaults.top_p if top_p is None else top_p,
            top_k=defaults.top_k if top_k is None else top_k,
            min_p=defaults.min_p if min_p is None else min_p,
            repetition_penalty=repetition_penalty or self.tokenizer.repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=logit_bias or {},
            logprobs=logprobs,
            seed=secrets.randbits(63) if seed is None else seed,
        )
        sampling.check_vocabulary(self.profile.vocab_size)
        drafts = defaults.speculation if speculation is None else speculation
        if drafts not in SPECULATIONS:
            raise BadRequest(f"speculation is {' or '.join(SPECULATIONS)}, not {reprlib.repr(drafts)}")
        return GenerationRequest(
            prompt=tuple(ids),
            max_tokens=defaults.max_tokens if max_tokens is None else max_tokens,
            sampling=sampling,
            end_ids=frozenset(self.profile.end_ids),
            no_kv_cache=not (defaults.enable_kv_cache if kv_cache is None else kv_cache),
            speculate=drafts != "off",
            wire=Wire.chosen(defaults.wire if wire is None else wire, self.profile.dtype),
            kv=defaults.kv if kv is None else kv,
        )

    def chat_prompt(self, messages: Iterable[Message]) -> list[int]:
        return self.tokenizer.apply_chat_template(list(messages))

    def events(
        self, prompt: str | Sequence[int], *, stop: str | Sequence[str] | None = None, **options: Any
    ) -> AsyncStream:
        """The generation with its route changes, see :class:`AsyncStream`; options as for :meth:`request`.

        It ends before the first text of ``stop``, one or several, that it would contain.
        """
        return AsyncStream(self, self.request(prompt, **options), stop)

    async def stream(self, prompt: str | Sequence[int], **options: Any) -> AsyncGenerator[Token, None]:
        async with contextlib.aclosing(self.events(prompt, **options).__aiter__()) as events:
            async for event in events:
                if isinstance(event, Token):
                    yield event

    async def generate(self, prompt: str | Sequence[int], **options: Any) -> Generation:
        stream = self.events(prompt, **options)
        async for _ in stream:
            pass
        if stream.result is None:
            raise Cancelled("the generation ended early")
        return stream.result

    async def chat(self, messages: Iterable[Message], **options: Any) -> Generation:
        return await self.generate(self.chat_prompt(messages), **options)

    # ---- looking ----------------------------------------------------------------------------------------

    def predict(self, route: Route, request: GenerationRequest) -> tuple[PlannedHop, ...]:
        """What the planner expects of ``route``; empty if some of its peers are no longer announced."""
        demand = self.demand(len(request.prompt), request.max_tokens, request.wire.name)
        try:
            return price(self.view.announcements(), route, demand, self.knowledge()).hops
        except NoRoute:
            return ()

    def session(self, request: GenerationRequest) -> Session | DelegatedSession:
        """A session of our own, or one that a peer owns for us if ``via`` was given."""
        if self._via:
            return DelegatedSession(self.transport, self._via, self.profile, request, self.settings)
        return Session(self.transport, self.view, self.profile, request, self.settings, self.health)

    def step_session(self, capacity: int) -> StepSession:
        """A session in step mode for up to ``capacity`` tokens, which ends with this client at the latest.

        Raises ``TooLong``.
        """
        session = StepSession(self.transport, self.view, self.profile, capacity, self.settings, self.health)
        self._stepping.add(session)
        return session

    async def peers(self) -> list[Announcement]:
        """What is announced for this model now."""
        return list(await self.view.refresh())

    async def plan(self, tokens: int = 0) -> Route:
        """The route that a session of ``tokens`` tokens would take; raises ``NoRoute``."""
        announcements = await self.view.refresh()
        try:
            return plan_route(announcements, self.profile.num_layers, tokens=tokens, knowledge=self.knowledge())
        except NoRoute as error:
            raise explained(error, announcements, self.profile, self.view.check) from None

    def knowledge(self) -> Knowledge:
        """For planning now."""
        return known(self.view, self.health, asyncio.get_running_loop().time(), self.settings.planner)

    def demand(self, prompt_tokens: int, new_tokens: int, wire: str | None = None) -> Demand:
        """What a session of this size asks of a route; ``wire``: if not that of the settings."""
        encoding = encoding_of(wire or self.settings.inference.wire, self.profile.dtype)
        return Demand(
            tokens=prompt_tokens + new_tokens,
            prompt_tokens=prompt_tokens,
            new_tokens=max(1, new_tokens),
            activation_bytes=row_bytes(encoding, self.profile.hidden_size),
            log_layers=self.profile.log_layers,
            chunk_tokens=self.settings.engine.prefill_chunk_tokens,
        )


def named_model(found: Sequence[Description], name: str | None) -> Description:
    """The one whose model ``name`` names, as its peers do or by a reference; without a name the first.

    A name may stand for several models, such as a checkpoint in other weights: then the log says which was taken.
    Raises :class:`UnknownModel`.
    """
    meant = list(found)
    if name is not None:
        by_reference = names_of(name)
        meant = [d for d in found if d.profile.model_id == name or d.profile.name in by_reference]
    if not meant:
        raise UnknownModel(f"the initial peers serve {_identities(found)}, not {name}")
    if any(other.profile.model_id != meant[0].profile.model_id for other in meant):
        logger.warning("there are %s: taking the first; --model names one of them", _identities(meant))
    return meant[0]


def names_of(reference: str) -> set[str]:
    """What the model that is meant may be called by its peers."""
    names = {reference}
    with contextlib.suppress(UnknownModel):  # a name need not be a reference on this machine
        names.add(resolve(reference).name)
    return names


def _identities(found: Sequence[Description]) -> str:
    """Each model once, with what tells it from others of its name."""
    profiles = {description.profile.model_id: description.profile for description in found}
    return ", ".join(f"{model_id} ({profile.precision})" for model_id, profile in profiles.items())


def connect_async(
    initial_peers: str | Sequence[str] | None = None,
    model: str | None = None,
    settings: Settings | None = None,
    *,
    via: str | Sequence[str] = (),
) -> AsyncClient:
    """``async with connect_async([...]) as client``. Without arguments: ``SWARM_INITIAL_PEERS`` and the settings.

    ``initial_peers``: multiaddrs, or a single text with one or with several and commas.
    ``via``: the same of peers that are to own the sessions; this process then only sends a prompt and hears tokens.
    """
    if settings is None:
        settings = load_settings(environ=os.environ).settings
    return AsyncClient(_listed(initial_peers or settings.network.initial_peers), model, settings, _listed(via))


def _listed(addresses: str | Sequence[str]) -> list[str]:
    return [part for part in addresses.split(",") if part.strip()] if isinstance(addresses, str) else list(addresses)
