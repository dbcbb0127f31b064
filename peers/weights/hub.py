"""Weights from the Hugging Face Hub: only the files that hold the wanted tensors are fetched."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from swarm.architectures import FINAL_NORM, HEAD
from swarm.hub import fetch_description, fetch_files, hub_repository, hub_weight_files
from swarm.models import ModelReference


def fetch_range(reference: ModelReference, tensors: Iterable[str]) -> Path:
    """The local folder that holds the index and every file with one of ``tensors``; other files may be missing."""
    repository = hub_repository(reference.repo, reference.revision, reference.endpoint)
    files = hub_weight_files(repository)
    fetch_description(repository)
    wanted = set(tensors)
    if FINAL_NORM in wanted and HEAD in (files.by_tensor or {}):
        wanted.add(HEAD)  # with a tied head, too: whether it is the embedding is seen in the file
    return fetch_files(repository, sorted({files.holder(name) for name in wanted}))
