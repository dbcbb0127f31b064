"""Importing torch and transformers for a peer: the model code, without what only training and compiling need.

``transformers.modeling_utils`` pulls in, when it is imported: scipy (the losses of object detection), sympy,
``torch._dynamo`` (decorators that hide functions from a compiler), accelerate, distributed tensors, and the paged
cache of its own batching. That is 120 MB and two seconds in every peer, none of it used to run a decoder layer.
While it is imported here,

* transformers is told that those optional packages are not installed (its own ``is_..._available``), and
* two modules that it imports without asking are stood in for, by modules whose every attribute is a class that does
  nothing, and as a decorator returns the function as it is.

The stand-ins are gone afterwards: whoever imports these modules later gets the real ones. If transformers' layout
changes so that this fails, it is imported as usual, and the peer is only larger. For a process that is a peer and
nothing else; a program that has imported transformers before keeps what it has.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Final

logger = logging.getLogger(__name__)

_UNAVAILABLE: Final = ("scipy", "accelerate", "torch_distributed", "jinja")
"""Optional packages, by the names in transformers' ``is_..._available``."""
_STOOD_IN: Final = (
    "torch._dynamo",
    "transformers.generation.continuous_batching",
    "transformers.quantizers",
    "transformers.models.auto.modeling_auto",
    "huggingface_hub.hf_api",
    "huggingface_hub.file_download",
)
"""With everything below them."""
_SHARED: Final = ("transformers.modeling_utils", "transformers.modeling_layers", "transformers.generation.utils")
"""What all decoder families import."""


def import_transformers() -> None:
    """Imports what all decoder families share. Call it before anything else has imported transformers."""
    if "transformers" in sys.modules:
        return
    # torch's threads would look for work for milliseconds after each of its own operations, on the processors that the
    # threads of a compiled pass are to run on, and other people's programs.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    before = set(sys.modules)
    try:
        with _without_collections():
            importlib.import_module("numpy")  # torch imports it, too, but takes a Ctrl-C meanwhile for a broken one
            importlib.import_module("torch")
            with _stand_ins(_STOOD_IN):
                _tell_unavailable()
                for name in _SHARED:
                    importlib.import_module(name)
    except Exception as error:
        # Whatever a changed layout raises: the ordinary import is the answer to all of it.
        logger.warning("transformers is imported whole, which takes 120 MB more: %s: %s", type(error).__name__, error)
        _forget("transformers", before)
        importlib.import_module("transformers.modeling_utils")
    _forget("huggingface_hub", before)  # whoever downloads imports it anew, with the modules that were stood in for


def _forget(package: str, before: Set[str]) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        if name not in before:
            del sys.modules[name]


def _tell_unavailable() -> None:
    """Replaces the questions in both modules that others take them from."""
    places = [importlib.import_module(name) for name in ("transformers.utils.import_utils", "transformers.utils")]
    for package in _UNAVAILABLE:
        question = f"is_{package}_available"
        for place in places:
            if not callable(getattr(place, question, None)):
                raise ImportError(f"{place.__name__} has no {question}")
            setattr(place, question, _no)


def _no(*_: object, **__: object) -> bool:
    return False


class _Nothing:
    """What a stand-in has in place of every class, function and decorator. Classes may inherit from it."""

    def __new__(cls, *arguments: Any, **_: Any) -> Any:
        if cls.__bases__ != (_Nothing,):
            return object.__new__(cls)
        return arguments[0] if arguments and callable(arguments[0]) else lambda decorated: decorated


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        placeholder = type(name, (_Nothing,), {"__module__": self.__name__})
        setattr(self, name, placeholder)
        return placeholder


class _StandInFinder(MetaPathFinder, Loader):
    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        below = any(fullname == name or fullname.startswith(f"{name}.") for name in self._names)
        return ModuleSpec(fullname, self, is_package=True) if below else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def _stand_ins(names: Sequence[str]) -> Iterator[None]:
    finder = _StandInFinder(names)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        stand_ins = [name for name, module in sys.modules.items() if isinstance(module, _StandIn)]
        for name in stand_ins:
            del sys.modules[name]
        for name in stand_ins:
            package, _, own = name.rpartition(".")
            if isinstance(vars(sys.modules.get(package, sys)).get(own), _StandIn):
                delattr(sys.modules[package], own)


@contextmanager
def _without_collections() -> Iterator[None]:
    """Imports make many objects that live for good; looking for cycles among them again and again is in vain."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
        gc.collect()
        gc.freeze()
