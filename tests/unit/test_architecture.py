"""Who may import whom, and what may lie at the top of the repository."""

from __future__ import annotations

import ast
import importlib
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for package in ("swarm", "peers") for path in (ROOT / package).rglob("*.py"))

HIVEMIND_MODULES = {"swarm.daemon", "swarm.daemon_requests", "swarm.dht", "swarm.dht_node"}
"""The network and the DHT. ``swarm._hivemind``, which loads hivemind by name, is a private part of them."""

PURE_MODULES = (
    "swarm.types",
    "swarm.errors",
    "swarm.config",
    "swarm.admission",
    "swarm.coverage",
    "swarm.link_times",
    "swarm.routing",
    "swarm.shortest_path",
    "swarm.health",
    "swarm.sampling",
    "peers.checkpoints",
    "peers.memory",
    "peers.placement",
    "peers.rebalance",
)
IMPURE = {"asyncio", "socket", "torch", "hivemind", "uvloop", "subprocess", "threading"}

TORCH_MODULES = {"swarm.huggingface", "swarm.huggingface.cache", "swarm.bench.reference"}
"""A model for transformers' own programs, and the process that measures transformers."""

LIGHT_MODULES = (
    "swarm",
    "swarm.stepping",
    "swarm.cli",
    "swarm.client",
    "swarm.session",
    "swarm.local",
    "swarm.config_loader",
)
"""Load neither torch nor transformers with the module: ``swarm status`` must answer at once."""

TOP_LEVEL = {"swarm", "peers", "configs", "bin", "tests", "pyproject.toml", "README.md", "LICENSE"}


@dataclass(frozen=True, slots=True)
class Import:
    module: str
    """Absolute name; for ``from a import b`` both ``a`` and ``a.b`` are listed: b may be a module."""
    at_import: bool
    """Runs when the module is loaded: not within a function, not for type checkers only."""
    line: int

    @property
    def top(self) -> str:
        return self.module.split(".")[0]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_for_type_checkers(node: ast.If) -> bool:
    return ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def imports_in(source: str, package: str) -> Iterator[Import]:
    """``package``: what relative imports count from."""
    stack: list[tuple[ast.AST, bool]] = [(ast.parse(source), True)]
    while stack:
        node, at_import = stack.pop()
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, at_import, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            yield Import(base, at_import, node.lineno)
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", at_import, node.lineno)
        elif isinstance(node, ast.If) and is_for_type_checkers(node):
            stack += [(child, False) for child in node.body] + [(child, at_import) for child in node.orelse]
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            stack += [(child, at_import and not inside) for child in ast.iter_child_nodes(node)]


def load() -> dict[str, list[Import]]:
    found = {}
    for path in SOURCES:
        name = module_name(path)
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found[name] = list(imports_in(path.read_text(encoding="utf-8"), package))
    return found


IMPORTS = load()


def closure(start: str) -> dict[str, str]:
    """Everything that loading ``start`` loads: our own modules with all they import, others by their top name.

    Maps each to the module that brought it in.
    """
    seen = {start: start}
    todo = [start]
    while todo:
        current = todo.pop()
        for item in IMPORTS.get(current, []):
            if not item.at_import:
                continue
            ours = item.top in {"swarm", "peers"}
            # A module loads the packages above it, too.
            parts = item.module.split(".")
            names = [".".join(parts[: i + 1]) for i in range(len(parts))] if ours else [item.top]
            for name in names:
                if name not in seen and (not ours or name in IMPORTS):
                    seen[name] = current
                    todo.append(name)
    return seen


def test_the_walk_sees_every_kind_of_import() -> None:
    source = """
import a.b
from c import d
from . import e
from ..f import g
if TYPE_CHECKING:
    import h
def work():
    import i
class K:
    import j
"""
    found = {item.module: item.at_import for item in imports_in(source, "swarm.gateway")}
    at_import = {module for module, is_at_import in found.items() if is_at_import}
    assert at_import >= {"a.b", "c", "c.d", "swarm.gateway.e", "swarm.f", "swarm.f.g", "j"}
    assert set(found) - at_import == {"h", "i"}


@pytest.mark.parametrize("name", [name for name in IMPORTS if name.split(".")[0] == "swarm"])
def test_swarm_never_imports_peers(name: str) -> None:
    assert [item for item in IMPORTS[name] if item.top == "peers"] == []


@pytest.mark.parametrize("name", [name for name in IMPORTS if name not in HIVEMIND_MODULES])
def test_only_network_and_dht_import_hivemind(name: str) -> None:
    assert [item for item in IMPORTS[name] if item.top == "hivemind"] == []
    if not name.startswith("swarm._"):
        assert [item for item in IMPORTS[name] if item.module.startswith("swarm._hivemind")] == []


@pytest.mark.parametrize("name", [name for name in IMPORTS if not name.startswith("swarm.gateway")])
def test_only_the_gateway_imports_a_web_framework(name: str) -> None:
    assert [item for item in IMPORTS[name] if item.top in {"fastapi", "starlette", "uvicorn"}] == []


@pytest.mark.parametrize("name", [name for name in IMPORTS if name.split(".")[0] == "swarm"])
def test_clients_need_no_torch(name: str) -> None:
    found = [item for item in IMPORTS[name] if item.top in {"torch", "transformers"}]
    assert name in TORCH_MODULES or found == []


@pytest.mark.parametrize("name", [name for name in PURE_MODULES if name in IMPORTS])
def test_pure_modules_do_no_io(name: str) -> None:
    """Not even inside functions, and nothing that they import does either."""
    assert [item for item in IMPORTS[name] if item.top in IMPURE] == []
    loaded = closure(name)
    assert {module: by for module, by in loaded.items() if module in IMPURE} == {}


@pytest.mark.parametrize("name", [name for name in LIGHT_MODULES if name in IMPORTS])
def test_light_modules_load_without_torch(name: str) -> None:
    loaded = closure(name)
    assert {module: by for module, by in loaded.items() if module in {"torch", "transformers"}} == {}


def test_top_level_of_the_repository() -> None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    top = {name.split("/")[0] for name in listed.split("\0") if name}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL


@pytest.mark.parametrize("benchmark", sorted(path.stem for path in (ROOT / "tests").glob("bench_*.py")))
def test_benchmarks_find_what_they_import(benchmark: str) -> None:
    """They are run by hand, months apart."""
    importlib.import_module(f"tests.{benchmark}")
