"""``swarm chaos``: kill, freeze and drain peers in the middle of generations, and compare the tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.commands.options import AsJson, ConfigFile, ModelReference, Verbose, Weights
from swarm.commands.shared import (
    check_length,
    ending_on_sigterm,
    failing_well,
    prepare,
    print_json,
    run_async,
    say,
)
from swarm.commands.tables import Cell, colours_wanted, table
from swarm.config import Settings
from swarm.config_rules import listed
from swarm.faults import KINDS, Observation, Trial, medians, plan_trials

if TYPE_CHECKING:
    from swarm.local import LocalSwarm

COPIES = 2
"""Peers for each layer range: one for the route, and a spare."""

MOST_FAULTS = 10_000
HEAD = ("trial", "fault", "sampling", "peer", "at token", "stall", "computed again", "tokens")
EPILOG = "Kinds of faults: " + "; ".join(f"{kind}: {meaning}" for kind, meaning in KINDS.items()) + "."


def chaos(
    seed: Annotated[int, typer.Option(help="Of the schedule; the same seed gives the same faults.")] = 0,
    faults: Annotated[
        int | None, typer.Option(min=1, max=MOST_FAULTS, help="How many; without it, each kind once.")
    ] = None,
    kinds: Annotated[list[str] | None, typer.Option(help="Which, see below; repeatable.")] = None,
    tokens: Annotated[int, typer.Option(min=8, help="To generate in each trial.")] = 48,
    context: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 200,
    parts: Annotated[int, typer.Option(min=1, help="Layer ranges; each has two peers.")] = 3,
    in_one: Annotated[bool, typer.Option("--in-one", help="All faults in one generation.")] = False,
    drafts: Annotated[bool, typer.Option("--drafts", help="Speculate, too: several tokens may come at once.")] = False,
    model: ModelReference = None,
    weights: Weights = None,
    log_dir: Annotated[Path | None, typer.Option(help="Keep what the peers say there.")] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Break a local swarm with spares while it generates. Exit code 1 if a single token differs."""
    flags: dict[str, object] = {"model": model, "weights": weights, "speculation": "auto" if drafts else "off"}
    settings = prepare(config, flags, as_json=as_json, verbose=verbose)
    with failing_well(as_json), ending_on_sigterm():
        chosen = listed(kinds or KINDS)
        trials = plan_trials(seed, chosen, faults or len(chosen), tokens, parts, in_one=in_one, drafts=drafts)
        check_length(context, tokens, settings)
        # Later: that a schedule makes no sense is known at once, and this takes a second to import.
        from swarm.local import LocalSwarm, even_ranges
        from swarm.models import config_dict, resolve

        reference = resolve(settings.model.name, settings.model.dtype)
        ranges = even_ranges(int(config_dict(reference)["num_hidden_layers"]), parts)
        say(f"{len(ranges)} layer ranges of {reference.name} with {COPIES} peers each, on this machine only")
        extra = ["--verbose"] if log_dir is not None else []
        with LocalSwarm(
            settings.model.name,
            [*ranges] * COPIES,
            dtype=settings.model.dtype,
            weights=settings.model.weights,
            extra_args=extra,
            env={
                "SWARM_PEER_PREFIX_CACHE": "false",  # every trial has the same prompt, and is to be replayed whole
                "SWARM_NETWORK_UNIX_SOCKETS": str(settings.network.unix_sockets),
            },
            log_dir=log_dir,
            keep_nursery=True,
            report=say,
        ) as swarm:
            identical = True

            async def work() -> None:
                nonlocal identical
                try:
                    identical = await _chaos(swarm, settings, trials, tokens, context, as_json)
                finally:
                    swarm.stop()  # ends a thread that waits for a peer to start, for which the loop would wait

            run_async(work())
        if not identical:
            raise typer.Exit(1)


async def _chaos(
    swarm: LocalSwarm, settings: Settings, trials: Sequence[Trial], tokens: int, context: int, as_json: bool
) -> bool:
    from swarm.chaos import Chaos
    from swarm.client import AsyncClient
    from swarm.sample_text import sample_prompt

    async with AsyncClient(swarm.initial_peers, None, settings) as client:
        prompt = sample_prompt(client.tokenizer, context)
        greedy, sampled = (
            # Without the end of text: as many tokens as are asked for, always.
            dataclasses.replace(
                client.request(prompt, max_tokens=tokens, temperature=heat, seed=2024), end_ids=frozenset()
            )
            for heat in (0.0, 0.8)
        )
        tried = Chaos(swarm, client, (greedy, sampled))
        await tried.all_seen()
        normal = await tried.undisturbed()
        say(
            f"undisturbed: {normal.timings.tokens_per_second:.1f} tokens a second, "
            f"first after {normal.timings.ttft_s:.2f} s, {context} tokens of context"
        )
        observations: list[Observation] = []
        for number, trial in enumerate(trials):
            say(f"trial {number}: " + ", ".join(fault.kind for fault in trial.faults))
            for seen in await tried.run(number, trial):
                observations.append(seen)
                if as_json:
                    print_json({"event": "fault", **_as_json(seen)})
                else:
                    say(" ".join(str(cell) for cell in _row(seen)))
            await tried.mend(last=number == len(trials) - 1)
        left = await tried.stages_left()
    identical = bool(observations) and all(seen.identical for seen in observations)
    if as_json:
        stalls = {kind: round(stall, 4) for kind, stall in medians(observations).items()}
        summary = {"event": "done", "identical": identical, "median_stall_s": stalls, "stages_left": left}
        print_json(summary)
    else:
        _show(observations, left)
    return identical and not left


def _show(observations: Sequence[Observation], left: int) -> None:
    coloured = colours_wanted()
    print(
        "\n".join(
            table(HEAD, [_row(seen) for seen in observations], right=("trial", "at token", "stall"), coloured=coloured)
        )
    )
    same = sum(seen.identical for seen in observations)
    stalls = ", ".join(f"{kind} {stall:.2f} s" for kind, stall in medians(observations).items())
    print(f"\n{same} of {len(observations)} faults left every token as it was. Median stalls: {stalls}.")
    print(f"Stages that are still open on the peers: {left}.")


def _row(seen: Observation) -> tuple[str | Cell, ...]:
    again = ", ".join(f"{layers} x {positions}" for layers, positions in seen.replayed if positions)
    verdict = Cell("identical", "green") if seen.identical else Cell("DIFFERENT", "red")
    note = f" ({seen.note})" if seen.note else ""
    return (
        str(seen.trial),
        seen.kind,
        "sampled" if seen.sampled else "greedy",
        ", ".join(seen.hit),
        "prompt" if seen.token < 0 else str(seen.token),
        "-" if seen.stall_s is None else f"{seen.stall_s:.2f} s",
        again or "nothing",
        Cell(verdict.text + note, verdict.colour),
    )


def _as_json(seen: Observation) -> dict[str, object]:
    return {
        "trial": seen.trial,
        "kind": seen.kind,
        "sampled": seen.sampled,
        "hit": seen.hit,
        "token": seen.token,
        "stall_s": None if seen.stall_s is None else round(seen.stall_s, 4),
        "replayed": [{"layers": [layers.start, layers.end], "positions": n} for layers, n in seen.replayed],
        "identical": seen.identical,
        "note": seen.note,
    }
