"""What all commands share: running under the settings in force, saying and failing."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import typer
from typer.core import TyperGroup

from swarm import logs
from swarm.config import Settings
from swarm.config_loader import LoadedSettings, load_settings
from swarm.errors import ConfigError, SwarmError, TooLong, Unreachable

T = TypeVar("T")
Work = Callable[[Settings], Coroutine[Any, Any, None]]

NEXT_STEPS = (
    "give the address of a running peer with --initial-peers or SWARM_INITIAL_PEERS; "
    "'swarm-peer serve' starts a peer and prints its address, 'bin/quickstart' shows a whole swarm on this machine"
)
"""For whoever has no swarm yet."""

USAGE_ERRORS = typer.BadParameter.__bases__
"""What all that the parser refuses is raised as; typer has no name for it."""


class Commands(TyperGroup):
    """With ``--json`` what the parser refuses is an event, too."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        arguments = sys.argv[1:] if args is None else list(args)
        try:
            return super().main(arguments, *rest, **options)
        except SystemExit as ended:
            refused: Any = ended.__context__
            to_tell = "--json" in arguments and isinstance(refused, USAGE_ERRORS)
            if to_tell:
                print_json({"event": "error", "code": ConfigError.code, "message": refused.format_message()})
            raise


def load(config: Path | None, flags: dict[str, object], *, as_json: bool) -> LoadedSettings:
    with failing_well(as_json):
        return load_settings(config, os.environ, flags)


def prepare(
    config: Path | None, flags: dict[str, object], *, as_json: bool, verbose: bool, stamped: bool = False
) -> Settings:
    """The settings in force; from now on the log goes to stderr in the format that they say."""
    settings = load(config, flags, as_json=as_json).settings
    log_to_stderr(verbose, settings.log.format, stamped=stamped)
    return settings


def run(
    work: Work,
    initial_peers: list[str] | None,
    config: Path | None,
    *,
    as_json: bool,
    verbose: bool,
    flags: Mapping[str, object] | None = None,
    stamped: bool = False,
) -> None:
    """Run ``work`` with the settings; a :class:`SwarmError` becomes one line on stderr and its exit code.

    ``flags``: of settings that are the command's own, as :func:`swarm.config_loader.load_settings` takes them.
    """
    all_flags = {"initial_peers": initial_peers, **(flags or {})}
    settings = prepare(config, all_flags, as_json=as_json, verbose=verbose, stamped=stamped)
    with failing_well(as_json):
        run_async(work(settings))


def check_length(prompt: int, tokens: int, settings: Settings) -> None:
    """Before peers are started for it, which takes long; raises :class:`TooLong`."""
    if prompt + tokens > (limit := settings.peer.max_cache_tokens_per_session):
        raise TooLong(f"{prompt} tokens of prompt and {tokens} to generate; the limit is {limit}")


def run_async(work: Coroutine[Any, Any, T]) -> T:
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def log_to_stderr(verbose: bool, log_format: str = "text", *, stamped: bool = False) -> None:
    """``stamped``: with the time, as it suits what runs for days; else warnings look like what :func:`say` says."""
    text_format = logs.STAMPED if stamped or verbose else "swarm: %(message)s"
    logs.log_to_stderr(logging.INFO if verbose else logging.WARNING, log_format, text_format)


@contextmanager
def failing_well(as_json: bool, program: str = "swarm") -> Iterator[None]:
    """Errors of ours become one line and an exit code, Ctrl-C 130; a bug keeps its traceback."""
    try:
        yield
    except SwarmError as error:
        fail(error, as_json, program)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        logs.say(program, "interrupted")
        raise typer.Exit(130) from None


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """SIGTERM ends the command the way Ctrl-C does, so that what it started is stopped."""

    def interrupt(number: int, frame: object) -> None:
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started in the background of a script
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def fail(error: SwarmError, as_json: bool, program: str = "swarm") -> None:
    if as_json:
        print_json({"event": "error", "code": error.code, "message": error.message})
    message = " ".join(error.message.split())
    logs.say(program, f"{message}; {NEXT_STEPS}" if isinstance(error, Unreachable) else message)


def print_json(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)


def say(text: str) -> None:
    logs.say("swarm", text)
