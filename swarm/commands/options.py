"""Options that several commands have: their names, types and help, once. ``None``: as the settings say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import swarm

# ---- any command


def _print_version(wanted: bool) -> None:
    if wanted:
        print(swarm.__version__)
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
]
InitialPeers = Annotated[
    list[str] | None,
    typer.Option(help="Multiaddr of a running peer; several with commas, or repeated. Or SWARM_INITIAL_PEERS."),
]
Model = Annotated[str | None, typer.Option(help="Name of the model, if the peers serve several.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML settings.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout.")]
LogFormat = Annotated[str | None, typer.Option(help="Of what goes to stderr: text or json.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Tell more on stderr.")]

# ---- what is generated

MaxTokens = Annotated[int | None, typer.Option(help="Tokens to generate at most.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.")]
TopP = Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this probability.")]
TopK = Annotated[int | None, typer.Option(help="Keep this many of the likeliest tokens; 0: all.")]
MinP = Annotated[float | None, typer.Option(help="Keep tokens this likely, relative to the likeliest.")]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Above 1 makes known tokens less likely; 0: as the model's files say.")
]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text.")]
Speculation = Annotated[
    str | None, typer.Option(help="auto: guess repeated text ahead where that saves time; off. The text is the same.")
]
Wire = Annotated[
    str | None,
    typer.Option(
        help="Hidden states go from peer to peer as model (its dtype), or rounded for slow links: bfloat16, int8."
    ),
]
KV = Annotated[
    str | None,
    typer.Option(help="Stages keep keys and values as model (its dtype), or rounded in less memory: int8."),
]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; repeatable.")]

# ---- what a peer serves, and with what

ModelReference = Annotated[str | None, typer.Option(help="Built-in name, folder, .gguf file or Hub id.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")]
Weights = Annotated[
    str | None, typer.Option(help="How matrices are stored: float32, bfloat16, int8 or int4; auto: in the dtype.")
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda:N or mps.")]
MaxMemoryMb = Annotated[int | None, typer.Option(help="What the peer may take for weights and KV caches.")]
