"""Swarm: large language models on many people's machines, without a coordinator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swarm.client import AsyncClient, Client, Generation, connect, connect_async
    from swarm.types import Token

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "Generation", "Token", "__version__", "connect", "connect_async"]


def __getattr__(name: str) -> Any:
    """Loaded on first use: ``import swarm.types`` in a peer must not import the client."""
    if name == "Token":
        from swarm.types import Token

        return Token
    if name in __all__:
        from swarm import client

        return getattr(client, name)
    raise AttributeError(f"module 'swarm' has no attribute {name!r}")
