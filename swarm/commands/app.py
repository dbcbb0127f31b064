"""All commands of ``swarm``."""

from __future__ import annotations

import typer

from swarm.commands import bench, chaos, chat, gateway, generate, peers, plan, settings, status, why
from swarm.commands.options import Version
from swarm.commands.shared import Commands

app = typer.Typer(cls=Commands, add_completion=False, no_args_is_help=True)


@app.callback()
def root(version: Version = False) -> None:
    """Use a swarm: generate, chat, look at it."""


app.command()(generate.generate)
app.command()(chat.chat)
app.command()(gateway.gateway)
app.command()(status.status)
app.command()(plan.plan)
app.command()(why.why)
app.command()(bench.bench)
app.command(epilog=chaos.EPILOG)(chaos.chaos)
app.add_typer(peers.app, name="peers")
app.add_typer(settings.app, name="config")
