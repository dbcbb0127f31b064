"""Commands whose standard streams are full or closed, or that are interrupted before anything else."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from peers.cli import main as peer_main
from swarm.cli import main as swarm_main
from swarm.logs import say
from swarm.terminal import SharedLine

ROOT = Path(__file__).parents[2]
NOBODY = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWHUw6WaVsZiZnpMQDXrzprqH4Ry3gyp8xC9Gm6psrPPcU"


def shell(command: str) -> tuple[int, str]:
    """Exit code and stderr."""
    done = subprocess.run(
        ["/bin/sh", "-c", f'exec "{sys.executable}" -m {command}'],
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        cwd=ROOT,
        check=False,
    )
    return done.returncode, done.stderr


class Screen(io.StringIO):
    """Stdout and stderr of a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (["air, ", "route", "which "], "air, \nswarm: route\nwhich \n"),
        (["air\n", "route", "which "], "air\nswarm: route\nwhich \n"),
        (["air", "route"], "air\nswarm: route\n"),
        (["route", "air", "route", "route", "", "which"], "swarm: route\nair\nswarm: route\nswarm: route\nwhich\n"),
    ],
)
def test_a_report_in_the_middle_of_a_text_has_a_line_of_its_own(
    pieces: list[str], shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Screen()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("sys.stderr", screen)
    line = SharedLine()
    monkeypatch.setattr("swarm.logs.shared_line", line)
    for piece in pieces:
        if piece == "route":
            say("swarm", piece)
        else:
            line.write(piece)
    line.end()
    assert screen.getvalue() == shown


def test_what_was_typed_after_a_report_has_its_line_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("sys.stderr", screen)
    line = SharedLine()
    line.write("air")
    line.leave()
    screen.write("^C")
    line.end(echoed=True)
    assert screen.getvalue() == "air\n^C\n"


def test_a_text_that_goes_to_a_file_is_not_broken_by_a_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = SharedLine()
    monkeypatch.setattr("swarm.logs.shared_line", line)
    line.write("air, ")
    say("swarm", "route")
    line.write("which")
    line.end()
    told = capsys.readouterr()
    assert (told.out, told.err) == ("air, which\n", "swarm: route\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("swarm.cli config show", "swarm"),
        (f"swarm.cli status --json --initial-peers {NOBODY}", "swarm"),
        ("peers.cli --help", "swarm-peer"),
    ],
)
def test_a_full_disk_is_one_line(command: str, name: str) -> None:
    assert shell(f"{command} >/dev/full") == (1, f"{name}: can't write: No space left on device\n")


@pytest.mark.parametrize("command", ["swarm.cli config show", "swarm.cli --help", "peers.cli serve --help"])
def test_nobody_reads_on_and_all_is_well(command: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", *command.split()],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            cwd=ROOT,
            check=False,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", ["swarm.cli gateway --port 0", "peers.cli serve --layers 0:99"])
def test_with_json_logs_nothing_else_comes_on_stderr(command: str) -> None:
    code, stderr = shell(f"{command} --log-format json")
    told = [json.loads(line) for line in stderr.splitlines()]
    assert code != 0
    assert len(told) > 1
    assert all(line["message"] and line["logger"].startswith("swarm") for line in told)


@pytest.mark.parametrize(("encoding", "name"), [("ascii", b"mod\xc3\xa8le"), ("utf-8", b"\xff")])
def test_what_the_terminal_has_no_character_for_is_a_question_mark(encoding: str, name: bytes) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "swarm.cli", "config", "show"],
        capture_output=True,
        timeout=60,
        cwd=ROOT,
        env=os.environb | {b"SWARM_MODEL_NAME": name, b"PYTHONIOENCODING": encoding.encode()},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"model.name")
    assert b"?" in done.stdout.splitlines()[0]


def test_standard_streams_may_be_closed() -> None:
    code, stderr = shell(f"swarm.cli status --initial-peers {NOBODY} <&- >&-")
    assert code == 4
    assert "Traceback" not in stderr


@pytest.mark.parametrize(("main", "module"), [(swarm_main, "swarm.commands.app"), (peer_main, "peers.commands")])
def test_ctrl_c_while_modules_load_is_quiet(
    main: Callable[[], None], module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupting:
        def find_spec(self, name: str, *_: object) -> None:
            if name == module:
                raise KeyboardInterrupt

    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
