"""Who a process is: an Ed25519 libp2p key, its peer id, and signatures that are checked from the id alone.

An Ed25519 peer id is the public key itself (libp2p spec "Peer Ids and Keys"): base58 of an identity
multihash over the protobuf ``PublicKey{type: Ed25519, data: 32 bytes}``. So :func:`verify` needs no key
exchange and no directory. RSA ids are hashes and would; hivemind makes those, Swarm doesn't.
"""

from __future__ import annotations

import fcntl
import functools
import os
from pathlib import Path
from types import TracebackType
from typing import Self

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from swarm.atomic_file import write_atomically
from swarm.errors import IdentityError
from swarm.types import PeerId

# protobuf by hand: field 1 (type) = 1 (Ed25519), field 2 (data) = length-delimited
_PRIVATE_HEAD = b"\x08\x01\x12\x40"
_PUBLIC_HEAD = b"\x08\x01\x12\x20"
_RSA_HEAD = b"\x08\x00\x12"
_MULTIHASH_HEAD = b"\x00\x24"
"""Identity "hash" of 36 bytes."""

KEY_FILE_BYTES = len(_PRIVATE_HEAD) + 64
SIGNATURE_BYTES = 64
MAX_PEER_ID_LENGTH = 64


def _peer_id(public: bytes) -> PeerId:
    return PeerId(base58.b58encode(_MULTIHASH_HEAD + _PUBLIC_HEAD + public).decode())


def _public_key(peer_id: object) -> bytes | None:
    """The 32 bytes inside an Ed25519 peer id, or ``None`` for anything else."""
    return _decoded(peer_id) if isinstance(peer_id, str) and len(peer_id) <= MAX_PEER_ID_LENGTH else None


@functools.lru_cache(maxsize=8192)  # base58 in Python takes longer than the signature that is checked with it
def _decoded(peer_id: str) -> bytes | None:
    try:
        raw = base58.b58decode(peer_id)
    except ValueError:
        return None
    head = _MULTIHASH_HEAD + _PUBLIC_HEAD
    # encoding again refuses what base58 decodes leniently (surrounding blanks): one peer, one spelling
    if len(raw) != len(head) + 32 or not raw.startswith(head) or base58.b58encode(raw).decode() != peer_id:
        return None
    return raw[len(head) :]


def is_peer_id(text: object) -> bool:
    """True for the one spelling of an Ed25519 peer id; never raises."""
    return _public_key(text) is not None


def verify(peer_id: object, message: bytes, signature: object) -> bool:
    """True if ``peer_id`` signed ``message``. Takes any junk from the network and never raises."""
    public = _public_key(peer_id)
    if public is None or not isinstance(signature, bytes) or len(signature) != SIGNATURE_BYTES:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


class Identity:
    """A key pair. From a file it holds a lock until :meth:`close` (or the end of the process)."""

    __slots__ = ("_lock_fd", "_private", "_seed", "peer_id")

    def __init__(self, seed: bytes, lock_fd: int | None = None) -> None:
        """``seed``: the 32 private bytes."""
        self._seed = seed
        self._private = Ed25519PrivateKey.from_private_bytes(seed)
        self._lock_fd = lock_fd
        self.peer_id = _peer_id(self._public_bytes())

    @classmethod
    def ephemeral(cls) -> Identity:
        """A fresh identity that lives in this process only."""
        return cls(os.urandom(32))

    @classmethod
    def load_or_create(cls, path: str | os.PathLike[str]) -> Identity:
        """Read the key file, or make it (mode 0600, folders too), and lock it. Raises :class:`IdentityError`.

        The lock is that of the file at the end of symlinks.
        """
        file = Path(os.path.realpath(Path(path).expanduser()))
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            fd = _lock(file)
        except OSError as error:
            raise IdentityError(f"can't make or lock the identity {file}: {error.strerror or error}") from error
        try:
            try:
                seed = _parse(file.read_bytes(), file)
            except FileNotFoundError:
                seed = os.urandom(32)
                write_atomically(file, _key_bytes(seed))
            return cls(seed, fd)
        except OSError as error:
            os.close(fd)
            raise IdentityError(f"can't read or write the identity {file}: {error.strerror or error}") from error
        except BaseException:
            os.close(fd)
            raise

    def sign(self, message: bytes) -> bytes:
        """64 bytes; :func:`verify` checks them with :attr:`peer_id` alone."""
        return self._private.sign(message)

    def private_key_file(self, folder: str | os.PathLike[str]) -> Path:
        """Where p2pd can read the key (libp2p protobuf, mode 0600): written unless it is there, or there no more, as
        temporary folders are cleaned of what is some days old."""
        file = Path(folder) / "identity.key"
        if not file.exists():
            write_atomically(file, _key_bytes(self._seed))
        return file

    def close(self) -> None:
        """Give the lock back; the key itself stays usable. Safe to call twice."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Identity({self.peer_id})"

    def _public_bytes(self) -> bytes:
        raw = serialization.Encoding.Raw, serialization.PublicFormat.Raw
        return self._private.public_key().public_bytes(*raw)


def _key_bytes(seed: bytes) -> bytes:
    raw = serialization.Encoding.Raw, serialization.PublicFormat.Raw
    return _PRIVATE_HEAD + seed + Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes(*raw)


def _parse(data: bytes, file: Path) -> bytes:
    """The seed in a key file; raises :class:`IdentityError` that says what is wrong with it."""
    if not data:
        raise IdentityError(f"identity {file} is empty; delete it to get a new one, or restore it from a copy")
    if data.startswith(_RSA_HEAD):
        raise IdentityError(f"identity {file} holds an RSA key; Swarm needs Ed25519 (ids that begin with 12D3KooW)")
    if len(data) != KEY_FILE_BYTES or not data.startswith(_PRIVATE_HEAD):
        raise IdentityError(f"identity {file} is no Ed25519 libp2p key ({len(data)} bytes); it may be corrupt")
    seed = data[len(_PRIVATE_HEAD) :][:32]
    if _key_bytes(seed) != data:
        raise IdentityError(f"identity {file} is corrupt: its public key does not belong to its private key")
    return seed


def _lock(file: Path) -> int:
    """Hold ``FILE.lock``; two processes with one peer id would steal each other's connections."""
    lock = file.with_name(file.name + ".lock")
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.truncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError:
        holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise IdentityError(f"identity {file} is in use by process {holder}; give each peer its own") from None
    except BaseException:
        os.close(fd)
        raise
    return fd
