"""Limits of containers and services, from files as the kernel shows them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peers import machine
from peers.cgroup import Allowance, allowance

MB = 10**6


def group(folder: Path, limit: str, used_mb: int, idle_mb: int = 0, *, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    idle = "inactive_file" if version == 2 else "total_inactive_file"
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used_mb * MB}\n")
    (folder / "memory.stat").write_text(f"anon 7\n{idle} {idle_mb * MB}\n")


def found(folder: Path, membership: str) -> Allowance | None:
    (folder / "membership").write_text(membership)
    return allowance(folder, folder / "membership")


def test_a_service_is_held_to_the_tightest_limit_above_it(tmp_path: Path) -> None:
    group(tmp_path / "system.slice", str(8000 * MB), 7500, 100)
    group(tmp_path / "system.slice" / "swarm-peer.service", str(3000 * MB), 500)
    membership = "0::/system.slice/swarm-peer.service\n"
    assert found(tmp_path, membership) == Allowance(8000 * MB, 600 * MB)
    group(tmp_path / "system.slice", "max", 7500)
    assert found(tmp_path, membership) == Allowance(3000 * MB, 2500 * MB)


@pytest.mark.parametrize("path", ["/", "/../../system.slice"])
def test_a_container_sees_its_own_group_as_the_root(path: str, tmp_path: Path) -> None:
    group(tmp_path, str(2000 * MB), 700, 100)
    assert found(tmp_path, f"0::{path}\n") == Allowance(2000 * MB, 1400 * MB)


def test_version_one_names_files_otherwise_and_may_tell_the_hosts_path(tmp_path: Path) -> None:
    group(tmp_path / "memory", str(1000 * MB), 1500, 200, version=1)
    membership = "5:cpu,cpuacct:/docker/ab\n4:memory:/docker/ab\n0::/\n"
    assert found(tmp_path, membership) == Allowance(1000 * MB, 0)
    group(tmp_path / "memory", "9223372036854771712", 1500, version=1)
    assert found(tmp_path, membership) is None


def test_no_groups_no_limit(tmp_path: Path) -> None:
    assert found(tmp_path, "") is None
    assert found(tmp_path, "what is this\n") is None
    assert allowance(tmp_path, tmp_path / "none") is None


def test_what_is_free_is_what_a_peer_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "allowance", lambda: Allowance(10 * MB, 7 * MB))
    assert machine.free_bytes(torch.device("cpu")) == 7 * MB
    monkeypatch.setattr(machine, "allowance", lambda: None)
    assert machine.free_bytes(torch.device("cpu")) > 7 * MB
