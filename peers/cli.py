"""``swarm-peer``: what a volunteer types."""

from __future__ import annotations

import sys

from swarm.terminal import standard_streams


def main() -> None:
    with standard_streams("swarm-peer"):
        try:
            from peers.commands import app  # takes long enough for a Ctrl-C

            app()
        except KeyboardInterrupt:
            sys.exit(130)


if __name__ == "__main__":
    main()
