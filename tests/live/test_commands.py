"""``swarm`` and ``swarm-peer`` as a user types them: what goes to stdout, exit codes, errors that say what to do."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import uvloop
from typer.testing import CliRunner

import swarm
from peers.commands import app as peer_app
from swarm.blocking_client import Client
from swarm.client import connect_async
from swarm.identity import Identity
from swarm.local import PEER_COMMAND, LocalSwarm
from swarm.types import LayerRange
from tests.checkpoints import make_checkpoint
from tests.live.helpers import MODEL, SETTINGS, Reference, descriptions, local_swarm, released
from tests.processes import is_gone

pytestmark = [pytest.mark.live, pytest.mark.timeout(90, func_only=True)]

ROOT = Path(__file__).parents[2]
NOBODY = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWHUw6WaVsZiZnpMQDXrzprqH4Ry3gyp8xC9Gm6psrPPcU"
PROMPT = "The capital of France is"


def environment(**extra: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("SWARM_")} | extra


def command(*arguments: str, peers: Sequence[str] = ()) -> list[str]:
    joins = [part for address in peers for part in ("--initial-peers", address)]
    return [sys.executable, "-m", "swarm.cli", *arguments, *joins]


def run(
    *arguments: str, peers: Sequence[str] = (), stdin: str = "", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments, peers=peers),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env=env or environment(),
        check=False,
    )


def started(arguments: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """For a test that does something to it while it runs."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(arguments, text=True, cwd=ROOT, **({"env": environment()} | pipes | options))


def events(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


@pytest.fixture(scope="module")
def client(thirds: LocalSwarm) -> Iterator[Client]:
    with swarm.connect(thirds.initial_peers, settings=SETTINGS) as connected:
        yield connected


# ---- swarm generate -------------------------------------------------------------------------------------------------


def test_the_text_goes_to_stdout_and_all_else_to_stderr(
    thirds: LocalSwarm, client: Client, reference: Reference
) -> None:
    done = run("generate", PROMPT, "--max-tokens", "8", "--temperature", "0", peers=thirds.initial_peers)
    assert done.returncode == 0, done.stderr
    expected = client.tokenizer.decode(reference.greedy(client.tokenizer.encode(PROMPT), 8))
    assert done.stdout == expected + "\n"
    for peer in thirds.peers[:3]:
        assert f"{peer.peer_id[-6:]}[{peer.layers}]" in done.stderr
    assert "8 tokens" in done.stderr


def test_json_lines_are_as_the_design_fixes_them(thirds: LocalSwarm, client: Client, reference: Reference) -> None:
    first = thirds.initial_peers[0]
    # one peer leads to all; --initial-peers may come from the environment; - reads the prompt from stdin
    options = ("--max-tokens", "6", "--temperature", "0", "--json")
    done = run("generate", "-", *options, stdin=PROMPT, env=environment(SWARM_INITIAL_PEERS=first))
    assert done.returncode == 0, done.stderr
    route, *tokens, last = events(done.stdout)
    prompt = client.tokenizer.encode(PROMPT)
    expected = reference.greedy(prompt, 6)
    assert list(route) == ["event", "epoch", "hops", "reason"]
    assert route["event"] == "route"
    assert route["hops"] == [{"peer_id": p.peer_id, "layers": [p.layers.start, p.layers.end]} for p in thirds.peers[:3]]
    assert [list(token) for token in tokens] == [["event", "index", "token_id", "text"]] * 6
    assert [token["index"] for token in tokens] == [0, 1, 2, 3, 4, 5]
    assert [token["token_id"] for token in tokens] == expected
    measured = {name: last.pop(name) for name in ("ttft_s", "tokens_per_second", "longest_gap_s")}
    assert all(value > 0 for value in measured.values())
    assert last == {
        "event": "done",
        "text": "".join(token["text"] for token in tokens),
        "token_ids": expected,
        "prompt_tokens": len(prompt),
        "finish_reason": "length",
        "rebuilds": 0,
    }


def test_a_stop_text_ends_the_text_before_it(thirds: LocalSwarm, client: Client) -> None:
    whole = client.generate(PROMPT, max_tokens=12, temperature=0).text
    stop = whole.strip().split()[-1]
    options = ("--max-tokens", "12", "--temperature", "0", "--json", "--stop", "never to be seen", "--stop", stop)
    done = run("generate", PROMPT, *options, peers=thirds.initial_peers)
    assert done.returncode == 0, done.stderr
    *_, last = events(done.stdout)
    assert last["finish_reason"] == "stop"
    assert last["text"] == whole[: whole.index(stop)]
    assert len(last["token_ids"]) <= 12


def test_chat_puts_the_prompt_through_the_template(thirds: LocalSwarm, client: Client, reference: Reference) -> None:
    done = run(
        "generate", "Say hi.", "--chat", "--max-tokens", "6", "--temperature", "0", "--json", peers=thirds.initial_peers
    )
    assert done.returncode == 0, done.stderr
    *_, last = events(done.stdout)
    prompt = client.tokenizer.apply_chat_template([{"role": "user", "content": "Say hi."}])
    assert last["prompt_tokens"] == len(prompt) > len(client.tokenizer.encode("Say hi."))
    assert last["token_ids"] == reference.greedy(prompt, 6)


def test_no_tokens_at_all_are_no_conversation(thirds: LocalSwarm) -> None:
    done = run("chat", "--max-tokens", "0", peers=thirds.initial_peers, stdin="Say hi.\n")
    assert (done.returncode, done.stdout) == (2, "")
    assert "max_tokens must be a whole number from 1" in done.stderr


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_ends_a_peer_that_loads(times: int) -> None:
    with started([*PEER_COMMAND, "serve", "--model", MODEL, "--layers", "0:30"], stdout=None) as process:
        assert process.stderr is not None
        while "loaded to 10%" not in process.stderr.readline():
            assert process.poll() is None
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)  # two signals at once are one
        _, stderr = process.communicate(timeout=10)
    assert process.returncode in ((130,) if times == 1 else (130, -signal.SIGINT))
    assert "100%" not in stderr
    assert "Traceback" not in stderr
    if times == 1:
        assert stderr.endswith("swarm-peer: stopped before it served\n")


@pytest.mark.parametrize("whole_group", [False, True], ids=["kill", "terminal"])
def test_ctrl_c_exits_130_and_frees_every_stage(thirds: LocalSwarm, whole_group: bool) -> None:
    """A terminal signals the whole process group, so the client's p2pd gets it too."""

    async def main() -> None:
        async with connect_async(thirds.initial_peers, settings=SETTINGS) as client:
            arguments = ("generate", PROMPT, "--max-tokens", "2000", "--temperature", "0", "--json")
            with started(command(*arguments, peers=thirds.initial_peers), start_new_session=True) as process:
                assert process.stdout is not None
                lines = [json.loads(process.stdout.readline()) for _ in range(4)]
                assert lines[-1]["event"] == "token"
                told = await descriptions(client, thirds)
                assert all(d.sessions == 1 and d.kv_bytes_used > 0 for d in told)
                (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
                _, stderr = process.communicate(timeout=20)
                assert process.returncode == 130, stderr
                assert "interrupted" in stderr
                assert "Traceback" not in stderr
            await released(client, thirds, limit_s=2.5)  # told to, not only after timeouts.owner_grace_s

    uvloop.run(main())


def test_a_reader_that_has_gone_ends_it_quietly(thirds: LocalSwarm) -> None:
    arguments = ("generate", PROMPT, "--max-tokens", "500", "--json")
    with started(command(*arguments, peers=thirds.initial_peers)) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(30) == 0
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("generate", "x", "--bogus"), "--bogus"),
        (("generate",), "prompt"),
        (("generate", "x", "--initial-peers", "foo"), "'foo'"),
        (("generate", "x", "--initial-peers", "/ip4/1.2.3.4/tcp/1"), "/p2p/"),
        (("generate", "x", "--initial-peers", "/ip4/300.1.1.1/tcp/1/p2p/12D3"), "300.1.1.1"),
        (("generate", "x", "--config", "does-not-exist.yaml"), "does-not-exist.yaml"),
    ],
    ids=["unknown flag", "no prompt", "no multiaddr", "no peer id", "bad address", "no such file"],
)
def test_wrong_usage_exits_2(arguments: tuple[str, ...], said: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert said.lower() in done.stderr.lower()
    assert "Traceback" not in done.stderr


def test_an_unknown_setting_names_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("inference:\n  max_token: 7\n")
    done = run("generate", "x", "--config", str(file), "--json")
    assert done.returncode == 2
    (event,) = events(done.stdout)
    assert event["event"] == "error"
    assert event["code"] == "config"
    assert "max_token" in event["message"]
    assert "max_tokens" in event["message"].replace("max_token:", "")
    done = run("generate", "x", env=environment(SWARM_INFERENCE_TEMPRATURE="1"))
    assert done.returncode == 2
    assert "temperature" in done.stderr.lower()


@pytest.mark.parametrize(
    "option", [("--temperature", "-1"), ("--top-p", "1.5"), ("--max-tokens", "0"), ("--stop", "")], ids=lambda o: o[0]
)
def test_senseless_sampling_is_wrong_usage(thirds: LocalSwarm, option: tuple[str, str]) -> None:
    done = run("generate", PROMPT, *option, "--json", peers=thirds.initial_peers[:1])
    assert done.returncode == 2, done.stderr
    assert events(done.stdout)[-1]["code"] == "bad_request"


def test_no_peer_reachable_exits_4() -> None:
    done = run("generate", "x", "--json", peers=[NOBODY])
    assert done.returncode == 4
    (event,) = events(done.stdout)
    assert (event["event"], event["code"]) == ("error", "unreachable")
    assert NOBODY in done.stderr
    done = run("generate", "x")
    assert done.returncode == 4
    assert "SWARM_INITIAL_PEERS" in done.stderr


def test_layers_that_nobody_serves_are_named_and_exit_3(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", "llama", layers=6)
    with local_swarm(str(checkpoint), [LayerRange(2, 4)], tmp_path / "logs") as peers:
        done = run("generate", "hello", "--json", peers=peers.initial_peers)
        assert done.returncode == 3, done.stderr
        (event,) = events(done.stdout)
        assert (event["event"], event["code"]) == ("error", "no_route")
        assert "0:2, 4:6" in event["message"]


def test_too_long_a_prompt_names_the_limit_and_exits_5(thirds: LocalSwarm) -> None:
    done = run("generate", "-", "--json", stdin="word " * 5000, peers=thirds.initial_peers[:1])
    assert done.returncode == 5, done.stderr
    (event,) = events(done.stdout)
    assert (event["event"], event["code"]) == ("error", "too_long")
    assert "4096" in event["message"]
    assert "5000" in event["message"] or "5001" in event["message"]


@pytest.mark.parametrize("name", ["tinyllama", "nobody/has-this", "no such model"])
def test_a_model_that_the_swarm_does_not_serve_is_unknown(thirds: LocalSwarm, name: str) -> None:
    done = run("generate", "x", "--model", name, "--json", peers=thirds.initial_peers[:1])
    assert done.returncode == 2, done.stderr
    assert events(done.stdout)[-1]["code"] == "unknown_model"
    assert MODEL in done.stderr, "the error says what is served"


# ---- swarm-peer serve -----------------------------------------------------------------------------------------------


def serve(*arguments: str) -> tuple[int, dict[str, Any], str]:
    """In this process, which has imported torch already; exit code, the error event, stderr."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        result = CliRunner().invoke(peer_app, ["serve", "--json", *arguments])
    finally:  # uvloop leaves those of a closed loop in force
        for number, handler in before.items():
            signal.signal(number, handler)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    *_, last = events(result.stdout)
    return result.exit_code, last, result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--model", "smolm2-135m"), "unknown_model", "smollm2-135m"),
        (("--model", "/does/not/exist"), "unknown_model", "/does/not/exist"),
        (("--layers", "20:40"), "wrong_range", "0:30"),
        (("--layers", "7:7"), "config", "7:7"),
        (("--device", "cuda:7"), "config", "cuda:7"),
        (("--device", "abacus"), "config", "abacus"),
        (("--dtype", "int3"), "config", "bfloat16"),
        (("--initial-peers", "nonsense"), "config", "nonsense"),
        (("--host-maddrs", "/ip4/127.0.0.1"), "config", "/ip4/127.0.0.1"),
        (("--host-maddrs", "/ip4/9.9.9.9/tcp/0"), "config", "9.9.9.9"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_peer_that_can_not_serve_says_why(arguments: tuple[str, ...], code: str, said: str) -> None:
    exit_code, event, stderr = serve(*arguments)
    assert (exit_code, event["code"]) == (2, code)
    assert said in event["message"]
    assert event["message"] in stderr


def test_a_corrupt_identity_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "identity"
    file.write_bytes(b"not a key")
    exit_code, event, _ = serve("--identity", str(file))
    assert (exit_code, event["code"]) == (2, "identity")
    assert str(file) in event["message"]
    assert file.read_bytes() == b"not a key"


def test_an_identity_is_used_once_at_a_time(tmp_path: Path) -> None:
    file = str(tmp_path / "identity")
    with Identity.load_or_create(file):
        exit_code, event, _ = serve("--identity", file)
    assert (exit_code, event["code"]) == (2, "identity")
    assert "in use" in event["message"]


def test_a_peer_that_restarts_finds_its_swarm_without_its_initial_peers(thirds: LocalSwarm, tmp_path: Path) -> None:
    serve = [*PEER_COMMAND, "serve", "--json", "--layers", "0:1", "--identity", str(tmp_path / "identity")]
    for options in (["--initial-peers", thirds.initial_peers[0]], []):
        with started([*serve, *options]) as process:
            assert process.stdout is not None
            seen = [json.loads(line) for line in stopped_when_ready(process)]
            process.communicate(timeout=20)
        assert process.returncode == 0
        verifier = next(event["vouched_by"] for event in seen if event["event"] == "ready")
        assert verifier in {peer.peer_id for peer in thirds.peers}, options


def stopped_when_ready(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stdout is not None
    for line in process.stdout:  # ends with the process
        if '"ready"' in line:
            process.send_signal(signal.SIGTERM)
        yield line


def test_a_port_in_use_is_refused_by_the_real_process() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [*PEER_COMMAND, "serve", "--json", "--host-maddrs", f"/ip4/127.0.0.1/tcp/{port}"],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=ROOT,
            env=environment(),
            check=False,
        )
    assert done.returncode == 2
    assert events(done.stdout)[-1]["code"] == "port_in_use"
    assert str(port) in done.stderr
    assert "Traceback" not in done.stderr


def test_a_peer_that_is_told_to_stop_while_it_starts_leaves_nothing(tmp_path: Path) -> None:
    """SIGTERM long before it is ready: exit 0, soon, and no daemon stays."""
    checkpoint = make_checkpoint(tmp_path / "model", "llama")
    serve = [*PEER_COMMAND, "serve", "--model", str(checkpoint), "--json"]
    with started(serve, start_new_session=True) as process:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        assert first["event"] == "loading"
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=20)
        assert process.returncode == 0, stderr
        assert "Traceback" not in stderr
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)  # nobody is left in its group
        assert is_gone(process.pid)


def test_a_gateway_that_is_told_to_stop_while_its_peers_start_leaves_nothing(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", "llama")
    folder = tmp_path / "temporary"
    folder.mkdir()
    arguments = command("gateway", "--port", "0", "--model", str(checkpoint), "--start", "0:1")
    with started(arguments, env=environment(TMPDIR=str(folder))) as process:
        assert process.stderr is not None
        assert "loads layers 0:1" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=20)
    assert (process.returncode, stderr) == (130, "swarm: interrupted\n")
    assert list(folder.iterdir()) == []


def test_a_peer_whose_initial_peers_are_all_silent_says_so_and_serves() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nobody = f"/ip4/127.0.0.1/tcp/{port}/p2p/12D3KooWGSHzBE7nQxcTQ3SyQe5J1GwsvDcsgXSxjk1tC6ebSSdM"
    serve = [*PEER_COMMAND, "serve", "--json", "--layers", "0:1", "--initial-peers", nobody]
    with started(serve) as process:
        assert process.stdout is not None
        seen: list[dict[str, Any]] = []
        for line in process.stdout:  # ends with the process
            seen.append(json.loads(line))
            if seen[-1]["event"] == "ready":
                process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == 0, stderr
    assert any(event.get("code") == "alone" for event in seen)
    assert f"tcp/{port}" in stderr
