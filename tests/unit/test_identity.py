"""Key files, their locks, and signatures checked from the peer id alone."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import base58
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import ConfigError, IdentityError
from swarm.identity import KEY_FILE_BYTES, Identity, is_peer_id, verify
from swarm.multiaddrs import is_dialable, parse, peer_address, peer_addresses, split

RSA_PEER_ID = "QmcgpsyWgH8Y8ajJz1Cu72KnS5uo2Aa2LpzU7kinSupNKC"


def test_a_key_file_is_made_once_private_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "peer.key"
    with Identity.load_or_create(path) as first:
        assert first.peer_id.startswith("12D3KooW")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.stat().st_size == KEY_FILE_BYTES
    with Identity.load_or_create(path) as second:
        assert second.peer_id == first.peer_id
    assert [file.name for file in path.parent.iterdir() if file.name.startswith(".")] == []


def test_the_peer_id_is_the_one_of_the_libp2p_specification() -> None:
    # the Ed25519 example key of the libp2p "Peer Ids and Keys" specification
    key = bytes.fromhex(
        "080112407e0830617c4a7de83925dfb2694556b12936c477a0e1feb2e148ec9da60fee7d"
        "1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e"
    )
    identity = Identity(key[4:36])
    public = bytes.fromhex("080112201ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e")
    assert base58.b58decode(identity.peer_id) == b"\x00\x24" + public


def test_an_identity_in_use_says_by_whom(tmp_path: Path) -> None:
    path = tmp_path / "peer.key"
    with Identity.load_or_create(path), pytest.raises(IdentityError, match=rf"in use by process {os.getpid()}"):
        Identity.load_or_create(path)


def test_an_identity_is_in_use_by_whatever_symlinks_it_is_reached(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    one, other, key = tmp_path / "one.key", tmp_path / "folder" / "other.key", tmp_path / "folder" / "peer.key"
    one.symlink_to(other)
    other.symlink_to(key)
    with Identity.load_or_create(one) as first:
        assert key.is_file(), "made where the symlinks lead"
        for path in (one, other, key):
            with pytest.raises(IdentityError, match="in use by process"):
                Identity.load_or_create(path)
    with Identity.load_or_create(other) as second:
        assert second.peer_id == first.peer_id


def test_the_lock_ends_with_a_killed_process(tmp_path: Path) -> None:
    path = tmp_path / "peer.key"
    code = f"from swarm.identity import Identity; i = Identity.load_or_create({str(path)!r}); print(i.peer_id); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as child:
        assert child.stdout is not None
        peer_id = child.stdout.readline().strip()
        with pytest.raises(IdentityError, match=f"in use by process {child.pid}"):
            Identity.load_or_create(path)
        child.kill()
    with Identity.load_or_create(path) as identity:
        assert identity.peer_id == peer_id


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\x08\x00\x12\xa8\x09" + bytes(1192), "RSA"),
        (b"\x08\x01\x12\x40" + bytes(10), "no Ed25519"),
        (b"junk" * 17, "no Ed25519"),
        (b"\x08\x01\x12\x40" + bytes(64), "public key does not belong"),
    ],
)
def test_a_bad_key_file_is_named_and_left_alone(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "peer.key"
    path.write_bytes(content)
    with pytest.raises(IdentityError, match=words) as caught:
        Identity.load_or_create(path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == content
    path.unlink()
    Identity.load_or_create(path).close()  # the failed attempt did not keep the lock


def test_a_folder_in_the_place_of_the_key_is_an_identity_error(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="can't read"):
        Identity.load_or_create(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(IdentityError, match="can't make or lock"):
        Identity.load_or_create(tmp_path / "file" / "peer.key")


def test_signatures() -> None:
    one, other = Identity.ephemeral(), Identity.ephemeral()
    signature = one.sign(b"message")
    assert verify(one.peer_id, b"message", signature)
    assert not verify(other.peer_id, b"message", signature)
    assert not verify(one.peer_id, b"messagf", signature)
    assert not verify(RSA_PEER_ID, b"message", signature)
    assert not verify(f" {one.peer_id}", b"message", signature), "one peer, one spelling"


@given(st.text() | st.binary() | st.none(), st.binary(), st.binary() | st.none())
def test_verify_takes_any_junk(peer_id: object, message: bytes, signature: object) -> None:
    assert not verify(peer_id, message, signature)
    assert not is_peer_id(peer_id)


@pytest.mark.parametrize(
    "text",
    [
        "/ip4/1.2.3.4/tcp/80",
        "/ip6/::1/tcp/80",
        "/dns4/example.org/tcp/443/wss",
        "/ip4/1.2.3.4/udp/4001/quic-v1",
        f"/ip4/1.2.3.4/tcp/80/p2p/{RSA_PEER_ID}/p2p-circuit",
    ],
)
def test_addresses_that_can_be_dialled(text: str) -> None:
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "junk",
        "/unix/tmp/x",
        "/ip4/1.2.3.4",
        "/ip4/1.2.3.4/tcp/99999",
        "/ip4/300.1.1.1/tcp/1",
        "/tcp/1/ip4/1.2.3.4",
        "/ip4/1.2.3.4/tcp/1,/ip4/1.2.3.4/tcp/2",
        "/ip4/1.2.3.4/tcp/1/http",
        "/ip4/1.2.3.4/tcp/1\0",
        "/dns4/" + "a" * 300 + "/tcp/1",
        None,
        7,
        b"/ip4/1.2.3.4/tcp/1",
    ],
)
def test_addresses_that_can_not(text: object) -> None:
    assert not is_dialable(text)


@given(st.text(alphabet="/ip4tcpd.0123456789quic-\0é,"))
def test_parsing_an_address_never_raises_anything_else(text: str) -> None:
    is_dialable(text)


def test_peer_addresses() -> None:
    peer_id = Identity.ephemeral().peer_id
    assert split(f"/ip4/1.2.3.4/tcp/1/p2p/{peer_id}") == ("/ip4/1.2.3.4/tcp/1", peer_id)
    assert split("/ip4/1.2.3.4/tcp/1/") == ("/ip4/1.2.3.4/tcp/1", None)
    joined = peer_addresses([f"/ip4/1.2.3.4/tcp/{port}/p2p/{peer_id}" for port in (1, 2, 1)])
    assert [peer.multiaddrs for peer in joined] == [tuple(f"/ip4/1.2.3.4/tcp/{port}/p2p/{peer_id}" for port in (1, 2))]
    with pytest.raises(ConfigError, match="lacks the peer id"):
        peer_address("/ip4/1.2.3.4/tcp/1")
    with pytest.raises(ConfigError, match="bad peer address 'junk'"):
        peer_address("junk")
    with pytest.raises(ConfigError, match="bad peer address 'None'"):
        peer_address(None)  # of a variable that is not set
