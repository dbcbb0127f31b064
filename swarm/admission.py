"""Who may serve in a swarm: its policy, and vouchers for probed layers. A peer checks itself, every planner the others.

A joiner counts when another peer has sent a small input through its layers, found the numbers right, and signed that it
did (``peers.probe``). The signature covers who, which model and which layers, so a peer that moves needs another one.
A voucher guards against what goes wrong by itself: ghosts, unreachable addresses, broken memory, wrong kernels.
It is no proof against a peer that answers probes rightly and sessions wrongly.
"""

from __future__ import annotations

import msgpack

from swarm.config import PolicySettings
from swarm.dht_time import dht_time
from swarm.errors import NotAdmitted
from swarm.identity import Identity, verify
from swarm.types import Announcement, LayerRange, ModelId, PeerId, Voucher

_DOMAIN = b"swarm voucher 1\n"
"""Signed together with the facts, so that no other signature of the same key passes for a voucher."""


def objection(policy: PolicySettings, memory_mb: int, gflops: float, gpu: bool) -> str | None:
    """What a peer lacks for this swarm, as the end of a sentence that begins with the peer, or ``None``."""
    if memory_mb < policy.min_memory_mb:
        return f"gives {memory_mb} MB of memory, this swarm asks for {policy.min_memory_mb} (policy.min_memory_mb)"
    if gflops < policy.min_compute_gflops:
        asked = f"{policy.min_compute_gflops:g} (policy.min_compute_gflops)"
        return f"computes {gflops:.0f} GFLOPS, this swarm asks for {asked}"
    if policy.gpu_required and not gpu:
        return "has no GPU, this swarm asks for one (policy.gpu_required)"
    return None


def check_announcement(policy: PolicySettings, announcement: Announcement) -> str | None:
    """For ``swarm.routing.Knowledge.check``; that a voucher's signature holds was checked when it was decoded."""
    if announcement.voucher is None:
        return "nobody has vouched for its layers"
    reason = objection(policy, announcement.memory_mb, announcement.gflops, announcement.gpu)
    return None if reason is None else f"it {reason}"


def require(policy: PolicySettings, memory_mb: int, gflops: float, gpu: bool) -> None:
    """For the peer itself; raises :class:`NotAdmitted`."""
    reason = objection(policy, memory_mb, gflops, gpu)
    if reason is not None:
        raise NotAdmitted(f"this machine {reason}")


def vouch(identity: Identity, subject: PeerId, model: ModelId, layers: LayerRange) -> Voucher:
    """The word of ``identity`` that it has probed ``layers`` of ``subject``."""
    at = dht_time()
    return Voucher(identity.peer_id, at, identity.sign(_message(subject, model, layers, at)))


def is_signed(voucher: Voucher, subject: PeerId, model: ModelId, layers: LayerRange) -> bool:
    """Whether the verifier signed just this."""
    return verify(voucher.verifier, _message(subject, model, layers, voucher.at), voucher.signature)


def _message(subject: PeerId, model: ModelId, layers: LayerRange, at: float) -> bytes:
    facts: bytes = msgpack.packb([subject, model, layers.start, layers.end, float(at)])
    return _DOMAIN + facts
