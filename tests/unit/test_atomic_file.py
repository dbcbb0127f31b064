"""Small files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from swarm.atomic_file import write_atomically
from swarm.dht import _read_book, _write_book
from swarm.identity import Identity
from swarm.types import PeerAddress


def test_a_file_is_private_and_replaced_as_a_whole(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for data in (b"one", b"two"):
        write_atomically(file, data)
        assert file.read_bytes() == data
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [file]


def test_a_peer_book_that_a_full_disk_does_not_take_leaves_the_old_one_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    peer_id, book = Identity.ephemeral().peer_id, tmp_path / "me.key.peers"
    known = PeerAddress(peer_id, (f"/ip4/10.0.0.1/tcp/1/p2p/{peer_id}",))
    _write_book(book, [known])
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        patch.setattr(os, "fsync", full)
        _write_book(book, [])
    assert _read_book(book) == [known]
    assert list(tmp_path.iterdir()) == [book]
    assert "No space left" in caplog.text
