"""Swarm: large language models on many people's machines, without a coordinator."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swarm.blocking_client import Client, connect
    from swarm.client import AsyncClient, Generation, connect_async
    from swarm.types import Token

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "Generation", "Token", "__version__", "connect", "connect_async"]

_HOMES = {
    "AsyncClient": "swarm.client",
    "Client": "swarm.blocking_client",
    "Generation": "swarm.client",
    "Token": "swarm.types",
    "connect": "swarm.blocking_client",
    "connect_async": "swarm.client",
}


def __getattr__(name: str) -> Any:
    """Loaded on first use: ``import swarm.types`` in a peer must not import the client."""
    if name not in _HOMES:
        raise AttributeError(f"module 'swarm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
