"""``swarm config``: what is in force, and why."""

from __future__ import annotations

import typer

from swarm.commands.options import AsJson, ConfigFile
from swarm.commands.shared import load, print_json
from swarm.config_loader import show

app = typer.Typer(no_args_is_help=True, help="The settings in force.")


@app.callback()
def root() -> None:
    """The settings in force."""


@app.command("show")
def config_show(config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Every setting, its value, and where that came from."""
    rows = show(load(config, {}, as_json=as_json))
    if as_json:
        print_json({key: {"value": value, "origin": origin} for key, value, origin in rows})
        return
    width = max(len(key) for key, _, _ in rows)
    for key, value, origin in rows:
        print(f"{key:<{width}}  {_written(value):<24}  {origin}")


def _written(value: object) -> str:
    """As in a file of settings."""
    match value:
        case bool():
            return str(value).lower()
        case tuple():
            return f"[{', '.join(map(str, value))}]"
        case "":
            return '""'
    return str(value)
