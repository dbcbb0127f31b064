"""``swarm``: what a user types. Text goes to stdout, everything else to stderr."""

from __future__ import annotations

import io
import sys

from swarm.terminal import standard_streams


def main() -> None:
    with standard_streams("swarm"):
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # as in arguments; the tokenizer refuses it
        try:
            from swarm.commands.app import app  # takes long enough for a Ctrl-C

            app()
        except KeyboardInterrupt:
            sys.exit(130)


if __name__ == "__main__":
    main()
