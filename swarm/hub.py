"""The Hugging Face Hub: which files a repository has and what they hash to, and fetching single ones.

What was learnt of a repository is kept, so that a model that was once fetched can be served without the Hub.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from swarm.cache import load_cached, store_cached
from swarm.checkpoint_files import INDEX, SINGLE, WeightFiles, indexed_files, read_json
from swarm.errors import HubUnreachable, ModelError, UnknownModel

_DESCRIPTION_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    INDEX,
)


@dataclass(frozen=True, slots=True)
class HubRepository:
    """One commit of a repository."""

    repo: str
    commit: str
    files: tuple[str, ...]
    sha256: dict[str, str]
    """Of the large files, as the Hub's own storage knows them."""
    endpoint: str | None


@functools.lru_cache(maxsize=16)  # a process keeps to the commit that it saw first
def hub_repository(repo: str, revision: str, endpoint: str | None) -> HubRepository:
    """Raises :class:`UnknownModel` if there is no such repository, :class:`HubUnreachable` if nobody answers."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    key = f"hub {endpoint} {repo} {revision}"
    try:
        info = HfApi(endpoint=endpoint).model_info(repo, revision=revision, files_metadata=True)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise UnknownModel(f"the Hub has no public model {repo} at {revision}, or it needs a token") from error
    except _network_errors() as error:
        known = _remembered(key)
        if known is None:
            raise HubUnreachable(f"the Hub can't be asked for {repo}: {error}") from error
        return known
    siblings = info.siblings or []
    found = HubRepository(
        repo=repo,
        commit=info.sha or revision,
        files=tuple(sorted(file.rfilename for file in siblings)),
        sha256={file.rfilename: file.lfs.sha256 for file in siblings if file.lfs is not None},
        endpoint=endpoint,
    )
    store_cached(key, json.dumps(asdict(found)))
    return found


def _network_errors() -> tuple[type[Exception], ...]:
    """Everything that huggingface_hub raises when a request fails; the HTTP library below it changes by version."""
    from huggingface_hub import errors

    return (OSError, errors.EntryNotFoundError, errors.HTTPError)  # type: ignore[attr-defined]  # not in its __all__


def _remembered(key: str) -> HubRepository | None:
    try:
        facts = json.loads(load_cached(key) or "{}")
        return HubRepository(**facts | {"files": tuple(facts["files"])})
    except (ValueError, TypeError, KeyError):
        return None


def fetch_files(repository: HubRepository, names: Iterable[str]) -> Path:
    """The local folder of this commit, once it holds these files."""
    from huggingface_hub import hf_hub_download

    folder = Path()
    for name in names:
        if name not in repository.files:
            raise ModelError(f"{repository.repo} on the Hub lacks the file {name}")
        try:
            found = hf_hub_download(repository.repo, name, revision=repository.commit, endpoint=repository.endpoint)
        except _network_errors() as error:
            raise HubUnreachable(f"{name} of {repository.repo} can't be fetched from the Hub: {error}") from error
        folder = Path(str(found)).parents[len(Path(name).parts) - 1]
    return folder


def fetch_description(repository: HubRepository) -> Path:
    """The local folder with config, tokenizer and index; no weights are fetched."""
    if "config.json" not in repository.files:
        raise ModelError(f"{repository.repo} on the Hub has no config.json; a GGUF file must be downloaded first")
    return fetch_files(repository, [name for name in _DESCRIPTION_FILES if name in repository.files])


def hub_weight_files(repository: HubRepository) -> WeightFiles:
    if INDEX in repository.files:
        return indexed_files(read_json(fetch_files(repository, [INDEX]) / INDEX), repository.repo)
    if SINGLE in repository.files:
        return WeightFiles(repository.repo, (SINGLE,))
    raise ModelError(f"{repository.repo} on the Hub has neither {INDEX} nor {SINGLE}")
