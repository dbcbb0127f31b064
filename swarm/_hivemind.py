"""Load ``hivemind.p2p`` and ``hivemind.dht`` without the rest of hivemind; for the daemon and the DHT only.

``import hivemind`` runs ``hivemind/__init__.py``, which imports averaging, moe, optim and with them torch and
scipy: about 280 MB and seconds, in a client that never sees a tensor. Python runs the ``__init__`` of every parent
package, so stand-ins for three of them (``hivemind``, ``hivemind.utils``, ``hivemind.dht``) go into
``sys.modules`` first, with the real ``__path__``; every module below is the real one. Measured: 0.17 s and 38 MB,
no torch, no NumPy. ``utils`` is on the list because its ``__init__`` pulls torch for ``MPFuture``, ``dht`` because
of the forked ``hivemind.DHT`` that Swarm must not use anyway.

If hivemind's layout changes, this raises :class:`Internal` when ``swarm.daemon`` is imported: loudly, at once.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import sys
from types import ModuleType
from typing import Any

from swarm.errors import Internal

_TESTED = "1.1.12"

_REEXPORTED = {
    "hivemind.utils.logging": ("get_logger",),
    "hivemind.utils.serializer": ("MSGPackSerializer", "SerializerBase"),
    "hivemind.utils.timed_storage": ("DHTExpiration", "ValueWithExpiration", "get_dht_time", "TimedStorage"),
}
"""What modules below ``hivemind.p2p`` and ``hivemind.dht`` take from the package ``hivemind.utils`` itself."""


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(
            f"{self.__name__}.{name} is not loaded: swarm loads only hivemind.p2p and hivemind.dht; "
            "a program that wants all of hivemind imports it before swarm"
        )


def _stand_in(name: str, locations: list[str]) -> ModuleType:
    module = _StandIn(name)
    module.__path__ = locations
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
    return module


def _prepare() -> None:
    spec = importlib.util.find_spec("hivemind")
    if spec is None or not spec.submodule_search_locations:
        raise Internal(f"hivemind is not installed; pip install hivemind=={_TESTED}")
    root = list(spec.submodule_search_locations)
    _stand_in("hivemind", root)
    utils = _stand_in("hivemind.utils", [f"{path}/utils" for path in root])
    _stand_in("hivemind.dht", [f"{path}/dht" for path in root])
    for name, attributes in _REEXPORTED.items():
        module = importlib.import_module(name)
        for attribute in attributes:
            setattr(utils, attribute, getattr(module, attribute))


@functools.cache
def _quieten() -> None:
    """hivemind prints to stderr by itself and renames WARNING to WARN for the whole process; undo both."""
    hivemind_logging = importlib.import_module("hivemind.utils.logging")
    hivemind_logging.use_hivemind_log_handler("nowhere")
    logging.addLevelName(logging.WARNING, "WARNING")
    # p2pd's own log level; it arrives through a pipe that the event loop reads, so less is better
    setattr(importlib.import_module("hivemind.p2p.p2p_daemon"), "loglevel", "ERROR")  # noqa: B010  # an untyped module


def load(name: str) -> Any:
    """A module of hivemind, for example ``hivemind.p2p``. Raises :class:`Internal` if hivemind is not as expected."""
    try:
        if "hivemind" not in sys.modules:
            _prepare()
        _quieten()
        return importlib.import_module(name)
    except (ImportError, AttributeError, TypeError) as error:
        raise Internal(f"can't load {name}; swarm knows hivemind {_TESTED}: {error}") from error
