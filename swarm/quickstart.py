"""``bin/quickstart``: three peers on this machine answer one prompt, or with ``--web`` serve the console."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from swarm.children import PYTHON, inherited_environment
from swarm.errors import SwarmError
from swarm.local import LocalSwarm
from swarm.types import LayerRange

MODEL = "smollm2-135m"
RANGES = (LayerRange(0, 10), LayerRange(10, 20), LayerRange(20, 30))
PROMPT = "Why is the sky blue? Answer in two sentences."
TOKENS = "200"
USAGE = """\
usage: bin/quickstart [PROMPT...]    answer a prompt, then stop (one that begins with a dash: after --)
       bin/quickstart --web [PORT]   a console in the browser; Ctrl-C stops it"""
PORT = "8000"


def _say(text: str) -> None:
    print(f"quickstart: {text}", file=sys.stderr, flush=True)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str]) -> int:
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    if arguments[:1] == ["--web"]:
        return _web(arguments[1:])
    if arguments[:1] == ["--"]:
        arguments = arguments[1:]
    elif arguments and arguments[0].startswith("-"):
        return _refuse(f"there is no option {arguments[0]}")
    prompt = " ".join(arguments).strip() or PROMPT
    signal.signal(signal.SIGTERM, _interrupt)
    _say(f"three peers with ten of {MODEL}'s thirty layers each, on this machine only")
    try:
        with LocalSwarm(MODEL, RANGES, report=_say) as swarm:
            _say(f"asking: {prompt}")
            joins = [part for address in swarm.initial_peers for part in ("--initial-peers", address)]
            command = [*PYTHON, "-m", "swarm.cli", "generate", "--chat", "--max-tokens", TOKENS, *joins, "--", prompt]
            code = subprocess.run(command, check=False, env=inherited_environment()).returncode
    except SwarmError as error:
        _say(error.message)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    finally:
        _say("all peers are stopped")
    if code == 0:
        command_path = os.path.relpath(Path(sys.executable).with_name("swarm"))
        _say(f"next: {command_path} chaos kills peers in the middle of generations, and compares the tokens")
    return code


def _web(arguments: list[str]) -> int:
    """The gateway starts the peers itself, so that its console may stop them."""
    port = arguments[0] if arguments else PORT
    if len(arguments) > 1 or not port.isdecimal():
        return _refuse(f"after --web comes a port and no more, not {' '.join(arguments)}")
    _say(f"three peers with ten of {MODEL}'s thirty layers each, as many spares, and a console, on this machine only")
    starts = [part for option in ("--start", "--spare") for layers in RANGES for part in (option, str(layers))]
    command = [*PYTHON, "-m", "swarm.cli", "gateway", "--port", port, "--model", MODEL, *starts, "--open"]
    os.execve(sys.executable, command, inherited_environment())


def _refuse(why: str) -> int:
    """The exit code of wrong usage."""
    _say(why)
    print(USAGE, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
