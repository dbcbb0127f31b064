"""What speculation is worth: the same generations with and without it, on text that repeats itself and on prose."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from swarm.bench.runs import Run, percentile, ratio
from swarm.bench.sections import Figure, Scale, SwarmContender

_CODE = """def report(orders):
    total = 0
    for order in orders:
        total += order.price * order.count
        print(order.name, order.price, order.count)
    return total


def check(orders):
    for order in orders:
        if order.count < 1:
            raise ValueError(order.name)
        if order.price < 0:
            raise ValueError(order.name)


def cheapest(orders):
    return min(orders, key=lambda order: order.price)
"""
_JSON = """[
  {"name": "Anna", "city": "Oslo", "age": 31, "member": true},
  {"name": "Bela", "city": "Graz", "age": 45, "member": false},
  {"name": "Carl", "city": "Bonn", "age": 27, "member": true},
  {"name": "Dora", "city": "Lyon", "age": 62, "member": true},
  {"name": "Emil", "city": "Bern", "age": 38, "member": false}
]"""
_PASSAGE = (
    "The lighthouse keeper wrote down every ship that passed: its name, its flag, the hour, the weather, and what he "
    "thought its sailors were having for supper. One night in autumn a ship passed that had no name and no flag. He "
    "wrote down the hour and the weather, and for supper he wrote: nothing, they are ghosts."
)


@dataclass(frozen=True, slots=True)
class Task:
    name: str
    wish: str
    repetitive: bool
    begun: str = ""
    """The beginning of the answer: a small model that was shown where to begin copies better."""


# The built-in model must really do what it is asked: of many names and places to begin at, it changes few throughout.
TASKS = (
    Task(
        "code, a name changed",
        f"Repeat this code, with the name `order` changed to `item`:\n\n```python\n{_CODE}```",
        True,
        "```python\n" + _CODE[: _CODE.index("def check")].replace("order", "item"),
    ),
    Task("JSON", f"Repeat this JSON exactly:\n\n```json\n{_JSON}\n```", True, '```json\n[\n  {"name": "Anna",'),
    Task("quotation", f"Repeat this text word for word:\n\n{_PASSAGE}", True),
    Task("prose", "Write a story about a baker who finds a map in a loaf of bread.", False),
    Task("explanation", "Explain to a child why the sky is blue and why the sun is red in the evening.", False),
)

LEAST_TOKENS = 96
"""Shorter generations have hardly repeated anything."""


async def speculation(contender: SwarmContender, scale: Scale, report: Callable[[str], None]) -> list[Figure]:
    """Tokens a second with ``auto`` and with ``off``, in turn; to the end of the text."""
    figures: list[Figure] = []
    most = max(scale.tokens, LEAST_TOKENS)
    for task in TASKS:
        client = contender.client
        prompt = client.chat_prompt([{"role": "user", "content": task.wish}]) + client.tokenizer.encode(task.begun)
        # Greedy prose of a small model soon goes round in circles.
        temperature = 0.0 if task.repetitive else 0.8
        runs: dict[str, list[Run]] = {"off": [], "auto": []}
        for number in range(scale.rounds):
            for choice in sorted(runs, reverse=bool(number % 2)):
                run = await contender.generate(
                    prompt, most, speculation=choice, temperature=temperature, seed=number, to_the_end=True
                )
                runs[choice].append(run)
                report(
                    f"speculation, {task.name}, round {number + 1} of {scale.rounds}: {choice} "
                    f"{run.tokens_per_second:.1f} tokens/s, {len(run.token_ids)} tokens"
                )
        if all(len(run.token_ids) > 1 for done in runs.values() for run in done):
            figures += _of_task(task, runs)
        else:
            report(f"speculation, {task.name}: an answer of one token, from which nothing follows")
    return figures


def _of_task(task: Task, runs: dict[str, list[Run]]) -> list[Figure]:
    rates = {choice: [run.tokens_per_second for run in done] for choice, done in runs.items()}
    rounds = [_passes(run) for run in runs["auto"]]
    same = all(a.token_ids == b.token_ids for a, b in zip(runs["auto"], runs["off"], strict=True))
    kind = "repetitive" if task.repetitive else "new text"
    gaps = [gap for run in runs["auto"] for gap in run.gaps]
    return [
        Figure("speculation", f"{task.name} ({kind}): off", statistics.median(rates["off"]), "tokens/s"),
        Figure("speculation", f"{task.name}: auto", statistics.median(rates["auto"]), "tokens/s"),
        Figure("speculation", f"{task.name}: auto / off", ratio(rates["auto"], rates["off"]), "x"),
        Figure("speculation", f"{task.name}: tokens a round of the ring", statistics.median(rounds), ""),
        Figure("speculation", f"{task.name}: between tokens, p95", 1e3 * percentile(gaps, 0.95), "ms"),
        Figure("speculation", f"{task.name}: the same tokens", float(same), ""),
    ]


def _passes(run: Run) -> float:
    """Tokens for each pass through the layers: a pass's first token has the hops' times."""
    return len(run.token_ids) / max(1, sum(bool(hops) for hops in run.hops))
