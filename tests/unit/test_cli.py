"""What the commands draw, and how they refuse."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import math
import sys
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from peers.commands import app as peer_app
from swarm import __version__
from swarm.bench.sections import Figure, Scale
from swarm.cli import main
from swarm.commands import bench, generate
from swarm.commands.app import app
from swarm.commands.bench import chosen
from swarm.commands.chat import LEAST_ANSWER_TOKENS, converse, fitting
from swarm.commands.drawing import ASCII, UNICODE, bar, cells, counts_line, pen_for, ruler
from swarm.commands.plan import rendered as rendered_plan
from swarm.commands.status import as_event, rendered, status_of
from swarm.commands.tables import Cell, table
from swarm.errors import BadRequest, Busy, NoRoute, TooLong
from swarm.gateway.console_map import swarm_map
from swarm.generation import Generation, Timings
from swarm.models import ModelProfile
from swarm.plans import Plan, PlannedHop
from swarm.routing import plan as find_plan
from swarm.sampling import SamplingParams
from swarm.trace import Trace
from swarm.trace_file import last_trace
from swarm.types import Announcement, Hop, LayerRange, ModelId, PeerAddress, PeerId, PeerState, Route, Token

NOBODY = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWJVPHZ7cXowpf1SihCL5hRdiWtppSv7xETwVwnW2P285F"


def profile(num_layers: int) -> ModelProfile:
    return ModelProfile(
        model_id=ModelId("m@0123456789abcdef"),
        name="m",
        architecture="llama",
        num_layers=num_layers,
        hidden_size=8,
        vocab_size=100,
        num_kv_heads=2,
        head_dim=4,
        max_positions=128,
        dtype="float32",
        end_ids=(0,),
        layer_bytes=1_000_000,
        embedding_bytes=500_000,
        head_bytes=500_000,
    )


def peer(name: str, start: int, end: int, state: PeerState = PeerState.SERVING) -> Announcement:
    return Announcement(
        peer=PeerAddress(PeerId(f"12D3KooW{name}")),
        model=ModelId("m@0123456789abcdef"),
        layers=LayerRange(start, end),
        state=state,
        version="0.1.0",
        decode_s_per_layer=0.002,
        prefill_s_per_token_layer=0.0001,
        kv_tokens_free=61_000,
        sessions=2,
    )


def anybody(announcement: Announcement) -> None:
    return None


def test_a_bar_has_one_cell_a_layer_or_shares_them() -> None:
    assert bar(LayerRange(2, 5), cells(6, 64), ASCII) == "..###."
    assert bar(LayerRange(2, 5), cells(6, 64), ASCII, serving=False) == "..===."
    deep = cells(100, 10)
    assert [str(column) for column in deep[:2]] == ["0:10", "10:20"]
    assert bar(LayerRange(9, 21), deep, ASCII) == "###......."
    assert sum(map(len, cells(100, 64))) == 100


def test_counts_are_of_the_weakest_layer_and_end_at_nine() -> None:
    assert counts_line([0, 1, 9, 10], cells(4, 64)) == "019+"
    assert counts_line([3, 0, 5, 5], cells(4, 2)) == "05"


def test_the_ruler_names_layers() -> None:
    assert ruler(cells(25, 64)) == "0         10        20   "
    assert ruler(cells(200, 20)) == "0         100       "


def test_a_terminal_without_unicode_gets_ascii() -> None:
    assert pen_for("utf-8") is UNICODE
    assert pen_for("latin-1") is ASCII
    assert pen_for(None) is ASCII


def test_colours_do_not_count_for_the_width() -> None:
    rows = [("a", Cell("long word", "red")), ("bb", Cell("x"))]
    plain = table(("n", "text"), rows, right=("n",))
    assert plain == [" n  text", " a  long word", "bb  x"]
    coloured = table(("n", "text"), rows, right=("n",), coloured=True)
    assert coloured == [plain[0], " a  \x1b[31mlong word\x1b[0m", plain[2]]


def test_status_is_a_picture_with_what_is_missing() -> None:
    peers = [
        (peer("AAAAAA", 4, 6, PeerState.DRAINING), 3.0),
        (peer("BBBBBB", 0, 3), 7.0),
        (peer("CCCCCC", 2, 5), math.inf),
    ]
    lines = rendered(status_of(profile(6), peers, anybody), ASCII, 80)
    assert lines[2:7] == [
        "peer    0       layers  state     a token  load  KV free  age  version",
        "BBBBBB  ###...  0:3     serving    6.0 ms     2      61k  7 s  0.1.0",
        "CCCCCC  ..###.  2:5     serving    6.0 ms     2      61k    ?  0.1.0",
        "AAAAAA  ....==  4:6     draining   4.0 ms     2      61k  3 s  0.1.0",
        "peers   112110",
    ]
    assert lines[-1].startswith("nobody serves layers 5:6: 1 of 6 layers, 2 MB of weights")
    assert not any("\x1b" in line for line in lines)
    event = as_event(status_of(profile(6), peers, anybody))
    assert event["missing"] == [[5, 6]]
    assert event["peers_of_layer"] == [1, 1, 2, 1, 1, 0]
    assert [entry["age_s"] for entry in event["peers"]] == [7.0, None, 3.0]
    json.dumps(event, allow_nan=False)


@pytest.mark.parametrize(
    ("width", "head"),
    [
        (128, "peer    0         10        20          layers  state    a token  load  KV free  age  version"),
        (80, "peer    0         17       layers  state    a token  load  KV free  age  version"),
        (70, "peer    0         18      layers  state    a token  load  KV free  age"),
        (60, "peer    0         20     layers  state    a token  load  age"),
        (50, "peer    0            layers  state    a token  age"),
        (40, "peer    0         20     layers  state"),
        (20, "peer    0           layers  state"),
    ],
)
def test_status_tells_less_on_a_narrow_terminal(width: int, head: str) -> None:
    lines = rendered(status_of(profile(30), [(peer("AAAAAA", 0, 30), 3.0)], anybody), ASCII, width)
    assert lines[2] == head
    assert max(map(len, lines[2:5])) <= max(width, 35)


def test_status_plan_and_console_tell_the_same_time_of_a_token() -> None:
    peers = [(peer("AAAAAA", 0, 3), 3.0), (replace(peer("BBBBBB", 3, 6), step_s=0.001, head_s=0.02), 3.0)]
    planned = find_plan([a for a, _ in peers], LayerRange(0, 6)).hops
    assert [one.compute_s for one in planned] == pytest.approx([0.006, 0.027])
    seen = status_of(profile(6), peers, anybody)
    assert [line.split()[4:6] for line in rendered(seen, ASCII, 64)[3:5]] == [["6.0", "ms"], ["27.0", "ms"]]
    assert [row.token for row in swarm_map(seen, {}).rows] == ["6.0 ms", "27.0 ms"]


def test_status_of_a_swarm_without_peers() -> None:
    lines = rendered(status_of(profile(4), [], anybody), ASCII, 80)
    assert lines[3] == "peers  0000"
    assert "nobody serves layers 0:4" in lines[-1]


def test_a_plan_is_a_table_with_what_was_left_out() -> None:
    hops = tuple(
        PlannedHop(Hop(PeerAddress(PeerId(f"12D3KooW{name}")), layers), 0.002, 0.001, 0.0, 0.01, 0.1)
        for name, layers in (("AAAAAA", LayerRange(0, 3)), ("BBBBBB", LayerRange(3, 6)))
    )
    left_out = tuple((PeerId(f"{number:06}"), "slower") for number in range(10))
    lines = rendered_plan(Plan(hops, 0.03, 0.025, 0.4, left_out), 100)
    assert lines[2] == "  1  BBBBBB  3:6     2.0 ms  0.0 ms  10.0 ms"
    assert "25.0 ms a token (40.0 tokens a second)" in lines[4]
    assert lines[-1] == "left out: 2 more"


class Words:
    """A client whose tokenizer makes a token of each word, and two for each message."""

    @property
    def tokenizer(self) -> Words:
        return self

    def apply_chat_template(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return [0 for message in messages for _ in range(2 + len(message["content"].split()))]


def test_a_chat_forgets_its_oldest_exchanges_but_not_the_system(capsys: pytest.CaptureFixture[str]) -> None:
    client: Any = Words()
    messages = [{"role": "system", "content": "be brief"}]
    for number in range(4):
        messages += [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": "yes " * 10}]
    messages.append({"role": "user", "content": "and now"})
    kept, prompt = fitting(messages, 1, client, 45 + LEAST_ANSWER_TOKENS)
    assert [message["content"] for message in kept if message["role"] != "assistant"] == [
        "be brief",
        "question 2",
        "question 3",
        "and now",
    ]
    assert len(prompt) == 40
    assert "first 4 messages are forgotten" in capsys.readouterr().err
    assert len(messages) == 10
    with pytest.raises(TooLong, match="this message has 102 tokens"):
        fitting([{"role": "user", "content": "word " * 100}], 0, client, 100)


def test_settings_are_shown_as_a_file_has_them() -> None:
    shown = CliRunner().invoke(app, ["config", "show"], env={"SWARM_INITIAL_PEERS": NOBODY}).stdout
    values = {line.split()[0]: line.split()[1] for line in shown.splitlines()}
    assert values["network.initial_peers"] == f"[{NOBODY}]"
    assert (values["network.announce_maddrs"], values["network.identity"]) == ("[]", '""')
    assert (values["network.unix_sockets"], values["network.use_relay"]) == ("true", "false")


def test_several_owners_may_be_given_with_commas() -> None:
    done = CliRunner().invoke(app, ["generate", "x", "--initial-peers", NOBODY, "--via", f"{NOBODY},there"])
    assert (done.exit_code, "bad peer address 'there':" in done.stderr) == (2, True)


def generation(text: str, tokens: int, finish_reason: str) -> Generation:
    route = Route((Hop(PeerAddress(PeerId("p")), LayerRange(0, 1)),))
    timings = Timings(0.1, 20.0, 0.1)
    return Generation(text, list(range(tokens)), 1, finish_reason, route, [], timings, Trace("m", tokens, ()))


class Parrot(Words):
    """Answers with the number of tokens of the prompt."""

    def __init__(self) -> None:
        self.prompts: list[int] = []

    def request(self, prompt: list[int], *, temperature: float = 0.0, max_tokens: int = 512) -> None:
        SamplingParams(temperature=temperature)

    def events(self, prompt: list[int], **options: Any) -> Generator[Token, None, Generation | None]:
        self.prompts.append(len(prompt))
        yield Token(0, 1, f"that was {len(prompt)}")
        return None


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_chat_keeps_what_was_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    client: Any = Parrot()
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo three\n/new\none\n"))
    converse(client, {}, [], 1000)
    assert client.prompts == [3, 3 + 5 + 4, 3]
    assert capsys.readouterr().out == "that was 3\nthat was 12\nthat was 3\n"


def test_a_chat_with_options_that_can_not_be_does_not_begin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client: Any = Parrot()
    monkeypatch.setattr("sys.stdin", Terminal("one\n"))
    with pytest.raises(BadRequest, match="temperature must be between"):
        converse(client, {"temperature": 999.0}, [], 1000)
    assert capsys.readouterr().err == ""


def test_what_ends_an_answer_of_a_chat_is_told_on_a_line_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Dying(Parrot):
        def events(self, prompt: list[int], **options: Any) -> Generator[Token, None, Generation | None]:
            yield from super().events(prompt, **options)
            raise NoRoute("nobody serves layers 10:20")

    client: Any = Dying()
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n"))
    with pytest.raises(NoRoute):
        converse(client, {}, [], 1000)
    assert capsys.readouterr().out == "that was 3\n"


def test_a_chats_prompt_is_not_among_the_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client: Any = Parrot()
    client.profile = profile(30)
    monkeypatch.setattr("sys.stdin", Terminal("one\n"))
    converse(client, {}, [], 1000)
    told = capsys.readouterr()
    assert told.out == "that was 3\n"
    assert "> " in told.err


def test_an_answer_of_a_chat_that_was_cut_says_so_and_is_what_why_explains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Brief(Parrot):
        def events(self, prompt: list[int], **options: Any) -> Generator[Token, None, Generation | None]:
            yield from super().events(prompt, **options)
            return generation("that was 3", len(self.prompts), "length" if len(self.prompts) == 2 else "stop")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    client: Any = Brief()
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n/new\none\n"))
    converse(client, {"max_tokens": 2}, [], 1000)
    assert capsys.readouterr().err == "swarm: forgotten\nswarm: cut at the limit of tokens (--max-tokens)\n"
    assert last_trace().prompt_tokens == 2


def test_a_message_whose_answer_was_stopped_before_its_first_word_is_forgotten(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Slow(Parrot):
        def events(self, prompt: list[int], **options: Any) -> Generator[Token, None, Generation | None]:
            if not self.prompts:
                self.prompts.append(len(prompt))
                raise KeyboardInterrupt
            return (yield from super().events(prompt, **options))

    client: Any = Slow()
    client.profile = profile(30)
    monkeypatch.setattr("sys.stdin", Terminal("one\ntwo\n"))
    converse(client, {}, [], 1000)
    told = capsys.readouterr()
    assert (client.prompts, told.out) == ([3, 3], "that was 3\n")
    assert "swarm: stopped\n" in told.err


def test_leaving_a_chat_ends_the_line_of_its_prompt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted(Terminal):
        def readline(self, *_: Any) -> str:
            raise KeyboardInterrupt

    client: Any = Parrot()
    client.profile = profile(30)
    monkeypatch.setattr("sys.stdin", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        converse(client, {}, [], 1000)
    assert capsys.readouterr().err.endswith("> \n")


@pytest.mark.parametrize(("max_tokens", "limit"), [(3, "(--max-tokens)"), (9, "(of a session, below --max-tokens)")])
def test_the_limit_that_cut_a_text_is_named(max_tokens: int, limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    generate._show_result(generation("abc", 3, "length"), max_tokens, as_json=False)
    assert capsys.readouterr().err.endswith(f"cut at the limit of tokens {limit}\n")


def started_by_bench(monkeypatch: pytest.MonkeyPatch, sections: Any, *arguments: str) -> tuple[list[int], Result]:
    """How many peers each swarm has that ``swarm bench`` starts; ``sections`` measures in its place."""
    started: list[int] = []

    @contextlib.contextmanager
    def local_swarm(name: str, ranges: Sequence[LayerRange], **_: Any) -> Iterator[None]:
        started.append(len(ranges))
        yield

    monkeypatch.setattr("swarm.local.LocalSwarm", local_swarm)
    monkeypatch.setattr(bench, "_sections", sections)
    result = CliRunner().invoke(app, ["bench", "--only", "sessions", *arguments], catch_exceptions=False)
    return started, result


async def no_sections(*_: Any) -> None:
    pass


def test_a_lone_contender_takes_part_in_the_sections_of_the_largest_swarm(monkeypatch: pytest.MonkeyPatch) -> None:
    assert started_by_bench(monkeypatch, no_sections, "--contenders", "one")[0] == [1]


def test_bench_measures_the_swarm_that_the_environment_names_unless_contenders_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SWARM_INITIAL_PEERS", NOBODY)
    assert started_by_bench(monkeypatch, no_sections)[0] == []
    assert started_by_bench(monkeypatch, no_sections, "--contenders", "three")[0] == [3]


@pytest.mark.parametrize(("failure", "code"), [(Busy("no room"), 5), (KeyboardInterrupt(), 130)])
def test_what_was_measured_before_a_section_fails_is_shown(
    failure: BaseException, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def sections(*arguments: Any) -> None:
        arguments[-1].append(Figure("speed", "one peer", 40.0, "tokens/s"))
        raise failure

    _, result = started_by_bench(monkeypatch, sections, "--contenders", "one", "--json")
    assert result.exit_code == code
    figure, *errors = [json.loads(line) for line in result.stdout.splitlines()]
    assert figure == {"event": "figure", "section": "speed", "name": "one peer", "value": 40.0, "unit": "tokens/s"}
    assert [error["code"] for error in errors] == (["busy"] if code == 5 else [])


def test_a_picture_that_does_not_fit_the_disk_is_told_after_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    async def sections(*arguments: Any) -> None:
        arguments[-1].append(Figure("speed", "one peer", 40.0, "tokens/s"))

    _, result = started_by_bench(monkeypatch, sections, "--contenders", "one", "--plot", "/dev/full")
    assert result.exit_code == 2
    assert "one peer" in result.stdout
    assert result.stderr.splitlines()[-1] == "swarm: can't write /dev/full: No space left on device"


def test_quick_leaves_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    scales: list[Scale] = []

    async def sections(*arguments: Any) -> None:
        scales.extend(argument for argument in arguments if isinstance(argument, Scale))

    started_by_bench(monkeypatch, sections, "--contenders", "one", "--quick")
    started_by_bench(monkeypatch, sections, "--contenders", "one", "--quick", "--rounds", "3", "--prompt", "90")
    assert [(scale.rounds, scale.tokens, scale.prompt) for scale in scales] == [(2, 16, 32), (3, 16, 90)]


def test_names_are_chosen_in_their_own_order() -> None:
    assert chosen([" c", "a", ""], ("a", "b", "c"), "letter") == ["a", "c"]
    assert chosen(["c,a"], ("a", "b", "c"), "letter") == ["a", "c"]
    with pytest.raises(BadRequest, match="'d' is no letter; there are: a, b, c"):
        chosen(["d"], ("a", "b", "c"), "letter")


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["generate", "hi"], 4, "no peer of a swarm is known; give the address"),
        (["chat"], 4, "'swarm-peer serve' starts a peer"),
        (["status"], 4, "bin/quickstart"),
        (["plan"], 4, "bin/quickstart"),
        (["status", "--initial-peers", "nonsense"], 2, "expected a list of multiaddrs"),
        (["generate", "hi", "--initial-peers", NOBODY], 4, "connection refused; give the address"),
        (["generate", "hi", "--speculation", "maybe"], 2, "--speculation: inference.speculation: expected auto or off"),
        (["chat", "--speculation", "maybe"], 2, "expected auto or off"),
        (["generate", "hi", "--wire", "pigeon"], 2, "expected model or bfloat16 or int8"),
        (["generate", "hi", "--kv", "int3"], 2, "--kv: inference.kv: expected model or int8"),
        (["bench", "--weights", "tiny"], 2, "expected auto or float32 or bfloat16 or int8 or int4"),
        (["bench", "--only", "colour"], 2, "'colour' is no section; there are: speed"),
        (["bench", "--only", ","], 2, "--only names no section; there are: speed"),
        (["bench", "--contenders", "transformers"], 2, "no swarm takes part"),
        (["bench", "--model", "colour"], 2, "'colour' is no folder, no .gguf file and no Hub id"),
        (["bench", "--url", "colour"], 2, "'colour' is no http or https URL"),
        (["bench", "--url", "http://127.0.0.1:9/v1"], 1, "http://127.0.0.1:9/v1/models does not answer"),
        (
            ["bench", "--plot", "/nowhere/figures.svg"],
            2,
            "can't write /nowhere/figures.svg: there is no folder /nowhere",
        ),
        (["bench", "--plot", "figures.png"], 2, "the picture is SVG, not .png: name it figures.svg"),
        (["bench", "--url", "localhost:8080/v1"], 2, "'localhost:8080/v1' is no http or https URL"),
        (["bench", "--url", "http://localhost:port/v1"], 2, "is no http or https URL: Invalid port"),
        (["bench", "--url", "http://"], 2, "is no http or https URL: no server"),
        (["bench", "--contenders", "one", "--initial-peers", NOBODY], 2, "--initial-peers run already: name one"),
        (["bench", "--link-ms", "20", "--initial-peers", NOBODY], 2, "links of peers that run already can't be slowed"),
        (
            ["bench", "--only", "memory", "--initial-peers", NOBODY],
            2,
            "memory is measured of peers that are started here",
        ),
        (["gateway", "--port", "0", "--api-key", "key\n"], 2, "the API key has spaces around it"),
        (["gateway", "--port", "0", "--api-key", "schl\u00fcssel"], 2, "characters beyond ASCII"),
        (["peers", "list", "--gateway", "http://localhost:port"], 2, "is no address of a gateway"),
        (["peers", "list", "--gateway", "http://[::1"], 2, "is no address of a gateway"),
        (
            ["chaos", "--context", "9" * 20],
            5,
            "99999999999999999999 tokens of prompt and 48 to generate; the limit is 4096",
        ),
        (["chaos", "--log-dir", "/dev/null/logs"], 2, "can't make the folder /dev/null/logs: Not a directory"),
        (["bench", "--tokens", "4096"], 5, "64 tokens of prompt and 4096 to generate; the limit is 4096"),
        (["chaos", "--kinds", "kill,meteor"], 2, "'meteor' is no kind of fault; there are: kill"),
        (["chaos", "--config", "/nowhere/settings.yaml"], 2, "/nowhere/settings.yaml: can't be read"),
    ],
)
def test_refusals_are_one_line_and_an_exit_code(arguments: list[str], code: int, told: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code
    assert told in result.stderr.splitlines()[-1]
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (app, ["generate", "hi"]),
        (app, ["chat"]),
        (app, ["status"]),
        (app, ["plan"]),
        (app, ["bench", "--only", "colour"]),
        (app, ["chaos", "--kinds", "meteor"]),
        (peer_app, ["probe", "--model", "none/such.gguf"]),
    ],
)
def test_logs_are_json_where_the_settings_say_so(
    command: typer.Typer, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWARM_LOG_FORMAT", "json")
    told = CliRunner().invoke(command, arguments).stderr.splitlines()
    assert told
    assert all("message" in json.loads(line) for line in told)


def test_with_json_a_refusal_is_an_event_too() -> None:
    result = CliRunner().invoke(app, ["status", "--json"])
    assert result.exit_code == 4
    assert json.loads(result.stdout)["code"] == "unreachable"
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "arguments", "told"),
    [
        (app, ["generate", "--json"], "Missing argument 'PROMPT'"),
        (app, ["generate", "hi", "--max-tokens", "few", "--json"], "Invalid value for '--max-tokens'"),
        (app, ["peers", "start", "--json", "--nonsense"], "No such option: --nonsense"),
        (peer_app, ["serve", "--json", "--threads", "x"], "Invalid value for '--threads'"),
    ],
)
def test_with_json_what_the_parser_refuses_is_an_event_too(
    command: typer.Typer, arguments: list[str], told: str
) -> None:
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 2
    event = json.loads(result.stdout)
    assert (event["event"], event["code"]) == ("error", "config")
    assert told in event["message"]
    assert CliRunner().invoke(command, [part for part in arguments if part != "--json"] + ["--nonsense"]).stdout == ""


@pytest.mark.parametrize("command", [app, peer_app])
def test_the_version_is_told(command: typer.Typer) -> None:
    told = CliRunner().invoke(command, ["--version"])
    assert (told.exit_code, told.stdout) == (0, f"{__version__}\n")


def test_a_trace_that_cannot_be_written_is_refused_before_the_swarm_is_asked(tmp_path: Path) -> None:
    for place, why in ((tmp_path, "it is a folder"), (tmp_path / "none" / "t.json", "there is no folder")):
        ran = CliRunner().invoke(app, ["generate", "x", "--initial-peers", NOBODY, "--trace", str(place)])
        assert ran.exit_code == 2
        assert f"can't write {place}: {why}" in ran.stderr


async def test_with_json_long_silence_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "SILENT_S", 0.5)
    async with generate.telling_of_silence(as_json=True) as heard:
        for _ in range(30):
            await asyncio.sleep(0.02)
            heard()
        assert capsys.readouterr().out == ""
        await asyncio.sleep(1.2)
    async with generate.telling_of_silence(as_json=False):
        await asyncio.sleep(0.6)
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in told] == ["waiting"] * 2
    assert told[0]["silent_s"] < told[1]["silent_s"]


def test_bytes_on_stdin_that_are_no_text_come_as_those_in_arguments_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"bad \xff"), "utf-8"))
    monkeypatch.setattr(sys, "argv", ["swarm", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert sys.stdin.read() == "bad \udcff"
