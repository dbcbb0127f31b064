"""The library for programs without asyncio: its thread, and what it is called with."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from peers.answers import Answers
from swarm import protocol_pb2 as pb
from swarm.announcement_record import encode_announcement
from swarm.blocking_client import Client
from swarm.client import AsyncClient, connect_async, named_model
from swarm.config import InferenceSettings, Settings, TimeoutSettings
from swarm.discovery import key_of_name
from swarm.errors import BadRequest, Cancelled, StreamLost, UnknownModel, Unreachable
from swarm.health import Health
from swarm.identity import Identity
from swarm.info import Description
from swarm.models import load_profile, resolve, tokenizer_files
from swarm.testing import Directory, Faults, SimNetwork, SimTransport, VirtualLoop, run_virtual
from swarm.tokenizer import TextTokenizer
from swarm.transport import INFO
from swarm.types import Announcement, LayerRange, ModelId, PeerAddress, PeerId, PeerState, Token
from tests.checkpoints import make_checkpoint

ADDRESS = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWJVPHZ7cXowpf1SihCL5hRdiWtppSv7xETwVwnW2P285F"

OTHER = ADDRESS.replace("tcp/1", "tcp/2")


class Entered:
    """As much of an ``AsyncClient`` as says whether it is entered."""

    def __init__(self, fails: int = 0) -> None:
        self.settings = Settings()
        self.story: list[str] = []
        self.working = threading.Event()
        self.fails = fails

    async def __aenter__(self) -> Entered:
        if self.fails:
            self.fails -= 1
            raise Unreachable("nobody is there")
        self.story.append("entered")
        return self

    async def __aexit__(self, *_: object) -> None:
        self.story.append("left")

    async def generate(self, prompt: str) -> str:
        return prompt.upper()

    async def for_ever(self) -> None:
        try:
            self.working.set()
            await asyncio.Event().wait()
        finally:
            self.story.append("cancelled")

    async def events(self, prompt: str) -> AsyncGenerator[Token, None]:
        try:
            for index, character in enumerate(prompt):
                yield Token(index, ord(character), character, ())
        finally:
            self.story.append("freed")


@pytest.fixture
def entered() -> Entered:
    return Entered()


@pytest.fixture
def client(entered: Entered) -> Iterator[Client]:
    made = Client(cast(AsyncClient, entered))
    yield made
    made.close()
    gc.collect()  # warns, which is an error, of coroutines that nobody awaited


def network_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "swarm-network"]


def test_the_first_call_joins_and_close_leaves(client: Client, entered: Entered) -> None:
    assert entered.story == []
    assert client.generate("a") == cast(Any, "A")
    assert client.generate("b") == cast(Any, "B")
    assert entered.story == ["entered"]
    client.close()
    client.close()
    assert entered.story == ["entered", "left"]
    assert not network_threads()


def test_a_client_that_nobody_used_can_be_closed(client: Client, entered: Entered) -> None:
    client.close()
    assert entered.story == []


def test_a_with_block_joins_at_its_beginning(client: Client, entered: Entered) -> None:
    with client:
        assert entered.story == ["entered"]
    assert entered.story == ["entered", "left"]


USES: dict[str, Callable[[Client], object]] = {
    "generate": lambda client: client.generate("a"),
    "stream": lambda client: list(client.stream("a")),
    "run": lambda client: client.run(asyncio.sleep(0)),
    "profile": lambda client: client.profile,
    "step_session": lambda client: client.step_session(8),
    "with": lambda client: client.__enter__(),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_closed_client_refuses(client: Client, use: Callable[[Client], object]) -> None:
    with client:
        pass
    with pytest.raises(BadRequest, match="closed"):
        use(client)


def test_a_swarm_that_was_not_reached_may_be_tried_again() -> None:
    entered = Entered(fails=2)
    client = Client(cast(AsyncClient, entered))
    with pytest.raises(Unreachable):
        client.generate("a")
    with pytest.raises(Unreachable):
        client.run(asyncio.sleep(0))
    assert not network_threads()
    assert client.generate("a") == cast(Any, "A")
    client.close()
    gc.collect()


def test_closing_ends_what_another_thread_waits_for(client: Client, entered: Entered) -> None:
    seen: list[object] = []

    def wait() -> None:
        try:
            client.run(entered.for_ever())
        except Cancelled as error:
            seen.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    assert entered.working.wait(10)
    client.close()
    thread.join(10)
    assert len(seen) == 1
    assert entered.story == ["entered", "left", "cancelled"]


def test_closing_ends_a_stream_that_was_left_half_read(client: Client, entered: Entered) -> None:
    stream = client.stream("abc")
    assert next(stream).text == "a"
    client.close()
    assert entered.story == ["entered", "left", "freed"]
    with pytest.raises(BadRequest, match="closed"):
        next(stream)


def test_a_stream_that_the_garbage_collector_finds_on_the_networks_thread_is_ended(
    client: Client, entered: Entered
) -> None:
    stream = client.stream("abc")
    assert next(stream).text == "a"
    ring: list[object] = [stream]
    ring.append(ring)
    del stream, ring

    async def collect() -> None:
        gc.collect()

    thread = threading.Thread(target=lambda: client.run(collect()), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "the thread waits for itself"
    client.run(asyncio.sleep(0))
    assert entered.story == ["entered", "freed"]


class Lingering(Entered):
    """Its streams don't end by themselves, and it takes until :attr:`asked` is set to leave."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = replace(self.settings, timeouts=replace(self.settings.timeouts, send_s=0.01))
        self.freeing = threading.Event()
        self.leaving, self.asked = asyncio.Event(), asyncio.Event()

    async def __aexit__(self, *_: object) -> None:
        self.leaving.set()
        await self.asked.wait()

    async def events(self, prompt: str) -> AsyncGenerator[Token, None]:
        caller = threading.main_thread().ident
        assert caller is not None
        try:
            yield Token(0, ord(prompt), prompt, ())
            while sys._current_frames()[caller].f_code.co_name != "wait":  # noqa: ASYNC110 - no event says so
                await asyncio.sleep(0.01)
            signal.pthread_kill(caller, signal.SIGINT)
            await asyncio.Event().wait()
        finally:
            self.freeing.set()
            await asyncio.Event().wait()


@pytest.fixture
def lingering() -> Iterator[tuple[Client, Lingering]]:
    world = Lingering()
    client = Client(cast(AsyncClient, world))
    yield client, world
    world.asked.set()
    client.close()


def test_an_interrupt_is_what_is_raised_though_the_stream_takes_its_time_to_end(
    lingering: tuple[Client, Lingering],
) -> None:
    client, world = lingering
    with pytest.raises(KeyboardInterrupt):
        list(client.stream("a"))
    assert world.freeing.is_set()


class Waiting(Entered):
    """Its streams give nothing."""

    async def events(self, prompt: str) -> AsyncGenerator[Token, None]:
        try:
            self.working.set()
            await asyncio.Event().wait()
            yield Token(0, ord(prompt), prompt, ())
        finally:
            self.story.append("freed")


def test_an_interrupt_while_a_token_is_asked_for_ends_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed from this thread while the other one waits in it, it could not be ended any more: stages stayed open."""
    waiting = Waiting()
    with Client(cast(AsyncClient, waiting)) as client:
        assert client._network is not None
        loop = client._network._loop
        call_soon = loop.call_soon_threadsafe

        def interrupted(callback: Callable[..., object]) -> None:
            monkeypatch.undo()
            call_soon(callback)
            assert waiting.working.wait(10)
            raise KeyboardInterrupt

        monkeypatch.setattr(loop, "call_soon_threadsafe", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(client.stream("a"))
        for _ in range(100):
            if len(waiting.story) > 1:
                break
            client.run(asyncio.sleep(0.01))
        assert waiting.story == ["entered", "freed"]


def test_an_interrupt_waits_until_the_stream_has_ended_and_no_longer() -> None:
    waiting, main = Waiting(), threading.get_ident()

    def interrupt() -> None:
        waiting.working.wait(10)
        time.sleep(0.05)
        signal.pthread_kill(main, signal.SIGINT)

    with Client(cast(AsyncClient, waiting)) as client:
        threading.Thread(target=interrupt).start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            next(client.stream("a"))
        assert time.monotonic() - began < client.settings.timeouts.send_s / 2
        assert waiting.story == ["entered", "freed"]


def test_a_reader_that_leaves_while_the_client_is_closed_hears_nothing_of_it(
    lingering: tuple[Client, Lingering],
) -> None:
    client, world = lingering
    stream, errors = client.stream("a"), []
    next(stream)

    def leave() -> None:
        try:
            cast(Any, stream).close()
        except Cancelled as error:
            errors.append(error)

    thread = threading.Thread(target=leave)
    thread.start()
    assert world.freeing.wait(10)
    world.asked.set()
    client.close()
    thread.join(10)
    assert not thread.is_alive()
    assert errors == []


def test_work_under_way_may_ask_for_a_client_that_is_being_closed(lingering: tuple[Client, Lingering]) -> None:
    """Both waited for ever: such as where one thread closed a transformers model and another one generated."""
    client, world = lingering
    refused: list[str] = []

    async def ask() -> None:
        world.working.set()
        await world.leaving.wait()
        try:
            client.step_session(8)
        except BadRequest as error:
            refused.append(error.message)
        world.asked.set()

    asking = threading.Thread(target=lambda: client.run(ask()), daemon=True)
    asking.start()
    assert world.working.wait(10)
    closing = threading.Thread(target=client.close, daemon=True)
    closing.start()
    closing.join(10)
    assert not closing.is_alive()
    asking.join(10)
    assert refused == ["this client is closed"]


@pytest.mark.parametrize("use", [Client.close, lambda client: client.generate("a")], ids=["close", "generate"])
def test_what_a_client_runs_can_not_wait_for_it(client: Client, use: Callable[[Client], object]) -> None:
    async def wait() -> None:
        use(client)

    with pytest.raises(BadRequest, match="connect_async"):
        client.run(wait())


@pytest.mark.parametrize("use", ["generate", "stream", "close"])
def test_a_forked_process_waits_for_no_network_that_stayed_behind(client: Client, use: str) -> None:
    stream = client.events("abc")
    next(stream)
    forked = os.fork()
    if not forked:
        code = 1
        try:
            if use == "stream":
                stream.close()
            elif use == "close":
                client.close()
            else:
                with pytest.raises(BadRequest, match="forked"):
                    client.generate("b")
            code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + 10
    while (ended := os.waitpid(forked, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(forked, signal.SIGKILL)
            os.waitpid(forked, 0)
            pytest.fail("it waits for ever")
        time.sleep(0.01)
    assert ended == (forked, 0)
    assert client.generate("a") == cast(Any, "A")
    stream.close()


def test_a_single_address_need_not_be_in_a_list() -> None:
    alone = connect_async(ADDRESS, settings=Settings(), via=ADDRESS)
    listed = connect_async([ADDRESS], settings=Settings(), via=[ADDRESS])
    assert alone._initial_peers == listed._initial_peers == [ADDRESS, ADDRESS]
    several = connect_async(f"{ADDRESS},{OTHER},", settings=Settings())
    assert several._initial_peers == [ADDRESS, OTHER], "as in SWARM_INITIAL_PEERS"


@pytest.fixture(scope="module")
def asking() -> AsyncClient:
    reference = resolve("smollm2-135m")
    made = AsyncClient([], None, Settings())
    made.profile, made.tokenizer = load_profile(reference), TextTokenizer(tokenizer_files(reference))
    return made


@pytest.mark.parametrize("prompt", [None, ["a"], b"abc", 7, [1.5], [True]])
def test_what_is_no_prompt_is_a_bad_request(asking: AsyncClient, prompt: Any) -> None:
    with pytest.raises(BadRequest, match="a text or a list of token ids"):
        asking.request(prompt)


@pytest.mark.parametrize("max_tokens", ["a", 1.5, True, 0, 2**32, np.bool_(True), pytest.param(10**5000, id="huge")])
def test_what_is_no_number_of_tokens_is_a_bad_request(asking: AsyncClient, max_tokens: Any) -> None:
    """Beyond 32 bits no peer could be told of it, and beyond a float's range no route be planned for it."""
    with pytest.raises(BadRequest, match="max_tokens must be"):
        asking.request("a", max_tokens=max_tokens)


STRANGE: dict[str, list[Any]] = {
    "speculation": ["of", False],
    "wire": ["zip", 8],
    "kv": ["int4", 8],
    "logit_bias": [[5], "5"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in STRANGE.items() for value in values])
def test_an_option_that_can_not_be_is_a_bad_request_that_names_it(asking: AsyncClient, name: str, value: Any) -> None:
    with pytest.raises(BadRequest, match=re.escape(repr(value))):
        asking.request("a", **{name: value})


@pytest.mark.parametrize("messages", ["Hello", {"role": "user", "content": "Hello"}, ["Hello"]])
def test_what_are_no_messages_is_a_bad_request(asking: AsyncClient, messages: Any) -> None:
    with pytest.raises(BadRequest, match="messages are a list of objects such as"):
        asking.chat_prompt(messages)


def test_a_model_is_named_as_its_peers_do_or_by_a_reference(asking: AsyncClient, tmp_path: Path) -> None:
    built_in, toy = (
        Description(
            PeerAddress(PeerId(name)),
            replace(asking.profile, name=name, model_id=ModelId(f"{name}@1")),
            *(LayerRange(0, 1), "", "", {}, 0, 0, 0),
        )
        for name in ("smollm2-135m", "toy")
    )
    folder = make_checkpoint(tmp_path / "toy")
    for name, meant in ((None, built_in), ("smollm2-135m", built_in), ("toy", toy), (str(folder), toy)):
        assert named_model([built_in, toy], name) is meant
    for unknown in ("tinylama", "", "/none/such.gguf", "org/tinyllama"):
        served = "toy@1 (float32), smollm2-135m@1 (float32)"
        with pytest.raises(UnknownModel, match=re.escape(f"the initial peers serve {served}, not {unknown}")):
            named_model([toy, built_in], unknown)


def test_models_that_share_their_name_are_told_apart_by_their_identities(
    asking: AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    exact, coarse, again = (
        Description(PeerAddress(PeerId(peer)), profile, LayerRange(0, 1), "", "", {}, 0, 0, 0)
        for peer, profile in (
            ("a", asking.profile),
            ("b", replace(asking.profile, model_id=ModelId("smollm2-135m@4"), weights="int4")),
            ("c", asking.profile),
        )
    )
    assert named_model([coarse, exact], asking.profile.model_id) is exact
    assert named_model([exact, again], "smollm2-135m") is exact
    assert not caplog.messages, "nothing is in doubt"
    for name in (None, "smollm2-135m"):
        caplog.clear()
        assert named_model([coarse, exact, again], name) is coarse
        both = f"smollm2-135m@4 (float32, int4 weights), {asking.profile.model_id} (float32)"
        assert caplog.messages == [f"there are {both}: taking the first; --model names one of them"]
    alike = f"{asking.profile.model_id} (float32), smollm2-135m@4 (float32, int4 weights)"
    with pytest.raises(UnknownModel, match=re.escape(f"the initial peers serve {alike}, not smollm2-135m@5")):
        named_model([exact, coarse, again], "smollm2-135m@5")


@pytest.mark.parametrize(
    ("wanted", "via", "error"),
    [
        ("other", (), ""),
        ("other@1", (), ""),
        ("other@2", (), "not other@2, and nobody else in the swarm answers for it"),
        ("none", (), "the initial peers serve smollm2-135m@1 (float32), not none, and nobody else"),
        ("other", (OTHER,), "not other"),
    ],
)
def test_a_model_is_found_through_any_peer_of_the_swarm(
    asking: AsyncClient, wanted: str, via: tuple[str, ...], error: str
) -> None:
    """Only the initial peers were asked, and what others of the same DHT serve was said not to be there."""

    async def main() -> None:
        network = SimNetwork(random.Random(1), Faults())
        identity = Identity.ephemeral()
        gone = Identity.ephemeral()
        for peer_id, name in ((ADDRESS.split("/")[-1], "smollm2-135m"), (identity.peer_id, "other")):
            profile = replace(asking.profile, name=name, model_id=ModelId(f"{name}@1"))
            told = pb.Description(model=profile.model_id, profile_json=profile.to_json(), start=0, end=30)
            node = network.add(peer_id)
            answers = Answers(lambda told=told: told, lambda _: pb.RouteNews(), {}, None, None, TimeoutSettings())  # type: ignore[misc]
            await SimTransport(node).serve(INFO, answers.handle)
        records = {}
        for signer in (gone, identity):
            peer = PeerAddress(signer.peer_id, (f"/ip4/127.0.0.1/tcp/4001/p2p/{signer.peer_id}",))
            said = Announcement(peer, ModelId("other@1"), LayerRange(0, 30), PeerState.SERVING, "0", 1.0, 1.0, 9)
            records[signer.peer_id] = (encode_announcement(replace(said, sent_at=1000.0), signer), 1045.0)

        class Records:
            async def get_many(self, keys: Collection[str]) -> dict[str, dict[PeerId, tuple[bytes, float]]]:
                return {key: records if key == key_of_name("other") else {} for key in keys}

        client = AsyncClient([ADDRESS], wanted, Settings(), via)
        client.transport, client.dht = cast(Any, SimTransport(network.add("client"))), cast(Any, Records())
        description = await client._find_model()
        assert (description.peer.peer_id, description.profile.name) == (identity.peer_id, "other")

    with pytest.raises(UnknownModel, match=re.escape(error)) if error else contextlib.nullcontext():
        run_virtual(main)


@pytest.mark.parametrize("stands_still", [False, True])
@pytest.mark.parametrize("told", [False, True])
def test_who_stood_still_while_it_joined_joins_once_more(
    stands_still: bool, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peers give up who dials and then says nothing for long, and nobody answers whom it asked of the swarm before."""
    joins: list[int] = []

    async def join(client: AsyncClient) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        joins.append(len(joins))
        client.view = cast(Any, Directory())
        if stands_still and len(joins) == 1:
            loop.stand_still(12.0)
            await asyncio.sleep(1.0)
        if told and len(joins) == 1:
            raise StreamLost("the stream ended without its end frame")

    async def scenario() -> None:
        client = connect_async(ADDRESS, settings=Settings())
        if told and not stands_still:
            with pytest.raises(StreamLost):
                await client.__aenter__()
        else:
            async with client:
                assert client.view is not None
        assert len(joins) == 1 + stands_still

    monkeypatch.setattr(AsyncClient, "_join", join)
    run_virtual(scenario)


async def test_a_client_that_nobody_entered_says_so() -> None:
    client = connect_async(ADDRESS, settings=Settings())
    for use in (client.generate("a"), client.peers(), client.plan()):
        with pytest.raises(BadRequest, match="not connected; use it as: async with"):
            await use
    assert not hasattr(client, "nonsense")


async def test_a_client_that_was_left_answers_nothing_any_more(asking: AsyncClient) -> None:
    """A view of the past would, and a session would wait for peers."""
    client = connect_async(ADDRESS, settings=Settings())
    client.profile, client.tokenizer = asking.profile, asking.tokenizer
    client.view, client.health = cast(Any, Directory({}, lambda a: None)), Health(60.0)
    client.transport = cast(Any, None)
    await client.__aexit__(None, None, None)
    for use in (client.generate("a"), client.peers(), client.plan()):
        with pytest.raises(BadRequest, match="not connected; use it as: async with"):
            await use


def test_numbers_may_be_numpys(asking: AsyncClient) -> None:
    assert asking.request(cast(Any, np.array([3, 1, 4]))).prompt == (3, 1, 4)
    plain: dict[str, Any] = {"max_tokens": 7, "seed": 5, "top_k": 3, "temperature": 0.5, "top_p": 0.25, "logprobs": 2}
    kinds = {int: np.int64, float: np.float32}
    given = {name: kinds[type(value)](value) for name, value in plain.items()}
    asked = asking.request("a", **given, logit_bias={cast(int, np.int32(9)): cast(float, np.float64(1))})
    assert asked == asking.request("a", **plain, logit_bias={9: 1.0})
    assert asked.sampling.to_wire().seed == 5
    assert {type(asked.max_tokens), type(asked.sampling.seed), *map(type, asked.sampling.logit_bias)} == {int}
    assert {type(asked.sampling.temperature), *map(type, asked.sampling.logit_bias.values())} == {float}


def test_a_models_own_repetition_penalty_holds_where_nobody_names_one(tmp_path: Path) -> None:
    """As in transformers, whose ``generate`` takes it from generation_config.json, greedy too."""
    folder = make_checkpoint(tmp_path / "m")
    (folder / "generation_config.json").write_text('{"eos_token_id": 0, "repetition_penalty": 1.1}')
    reference = resolve(str(folder))
    made = AsyncClient([], None, Settings())
    made.profile, made.tokenizer = load_profile(reference), TextTokenizer(tokenizer_files(reference))
    assert made.request("a").sampling.repetition_penalty == 1.1
    assert made.request("a", repetition_penalty=1.0).sampling.repetition_penalty == 1.0
    made.settings = Settings(inference=InferenceSettings(repetition_penalty=1.3))
    assert made.request("a").sampling.repetition_penalty == 1.3
