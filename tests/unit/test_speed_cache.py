"""Measured speeds are kept between runs; whatever is wrong with the file, it costs a measurement only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import swarm
from peers.machine import Speed
from peers.speed_cache import load_speed, store_speed
from swarm.config import PeerSettings
from swarm.types import ModelId
from tests.sim.world import PROFILE

CPU = torch.device("cpu")
SPEED = Speed(0.001, 0.0001)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "swarm"


def test_what_was_stored_is_found_again(folder: Path) -> None:
    assert load_speed(PROFILE, CPU, PeerSettings()) is None
    store_speed(PROFILE, CPU, PeerSettings(), SPEED)
    assert load_speed(PROFILE, CPU, PeerSettings()) == SPEED
    assert len(list(folder.iterdir())) == 1, "nothing but the one file is left"


def test_another_model_version_or_number_of_threads_is_measured_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_speed(PROFILE, CPU, PeerSettings(), SPEED)
    assert load_speed(replace(PROFILE, model_id=ModelId("toy@1")), CPU, PeerSettings()) is None
    assert load_speed(PROFILE, CPU, PeerSettings(threads=7)) is None
    monkeypatch.setattr(swarm, "__version__", "99")
    assert load_speed(PROFILE, CPU, PeerSettings()) is None


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{", b"[1]", b'{"decode_s_per_layer": 1}', b'{"x": "y"}', b"1"])
def test_a_broken_file_counts_as_none(folder: Path, content: bytes) -> None:
    store_speed(PROFILE, CPU, PeerSettings(), SPEED)
    next(folder.iterdir()).write_bytes(content)
    assert load_speed(PROFILE, CPU, PeerSettings()) is None


@pytest.mark.parametrize("decode_s", [0.0, -1.0, float("nan"), float("inf")])
def test_an_implausible_speed_counts_as_none(folder: Path, decode_s: float) -> None:
    store_speed(PROFILE, CPU, PeerSettings(), Speed(decode_s, 0.1))
    assert load_speed(PROFILE, CPU, PeerSettings()) is None


def test_a_place_that_can_not_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    store_speed(PROFILE, CPU, PeerSettings(), SPEED)
    assert load_speed(PROFILE, CPU, PeerSettings()) is None


def test_a_full_disk_leaves_the_old_file_and_no_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store_speed(PROFILE, CPU, PeerSettings(), SPEED)

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    store_speed(PROFILE, CPU, PeerSettings(), Speed(9.0, 9.0))
    assert load_speed(PROFILE, CPU, PeerSettings()) == SPEED
    assert len(list(folder.iterdir())) == 1
