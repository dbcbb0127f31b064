"""The model families that shards are verified with, and how their bare models are built.

Any decoder that transformers writes in its current style would run, but only those whose shards a test has compared
with the whole model are accepted: a family with an unknown twist would give wrong text, silently.
"""

from __future__ import annotations

import importlib
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode

from peers.attention import IMPLEMENTATION
from swarm.errors import ModelError, SwarmError, UnsupportedModel

FAMILIES: Final = {
    "cohere2": ("cohere2", "Cohere2ForCausalLM"),
    "ernie4_5": ("ernie4_5", "Ernie4_5ForCausalLM"),
    "gemma": ("gemma", "GemmaForCausalLM"),
    "gemma3_text": ("gemma3", "Gemma3ForCausalLM"),
    "glm4": ("glm4", "Glm4ForCausalLM"),
    "granite": ("granite", "GraniteForCausalLM"),
    "helium": ("helium", "HeliumForCausalLM"),
    "llama": ("llama", "LlamaForCausalLM"),
    "mistral": ("mistral", "MistralForCausalLM"),
    "olmo2": ("olmo2", "Olmo2ForCausalLM"),
    "olmo3": ("olmo3", "Olmo3ForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "smollm3": ("smollm3", "SmolLM3ForCausalLM"),
    "starcoder2": ("starcoder2", "Starcoder2ForCausalLM"),
}
"""``model_type`` -> package in ``transformers.models``, class."""

_LENGTH_DEPENDENT_ROPE: Final = ("dynamic", "longrope")


def build_model(config: dict[str, Any], device: torch.device) -> Any:
    """The causal model of ``config`` with its matrices on the meta device and computed buffers on ``device``."""
    model_type = str(config.get("model_type", ""))
    if model_type not in FAMILIES:
        raise UnsupportedModel(f"model type {model_type!r} can't be sharded; supported: {', '.join(sorted(FAMILIES))}")
    from transformers import initialization
    from transformers.models.auto.configuration_auto import AutoConfig

    package, name = FAMILIES[model_type]
    # The family's own module only: the registry of all models would import far more, into every peer's memory.
    kind = getattr(importlib.import_module(f"transformers.models.{package}"), name)
    try:
        settings = AutoConfig.for_model(**config)
        _refuse_variants(settings)
        settings._attn_implementation = IMPLEMENTATION
        with _MetaParameters(), initialization.no_init_weights():
            model = kind(settings)
    except SwarmError:
        raise
    except Exception as error:  # at a wrong value transformers raises whatever its code comes to: a KeyError, say
        wrong = _named(config, error.args[0]) if isinstance(error, KeyError) and error.args else ""
        raise ModelError(f"transformers can't build a {model_type} of this config: {wrong or repr(error)}") from error
    _place_buffers(model, device)
    return model


def _named(config: dict[str, Any], unknown: object, within: str = "") -> str:
    """The field whose value transformers has looked up in vain, as words; empty if there is none."""
    for key, value in config.items():
        if isinstance(value, str) and value == unknown:
            return f"it knows no {within}{key} {unknown!r}"
        if isinstance(value, dict) and (found := _named(value, unknown, f"{within}{key}.")):
            return found
    return ""


def _refuse_variants(settings: Any) -> None:
    if getattr(settings, "use_bidirectional_attention", None):
        raise UnsupportedModel("bidirectional attention can't be run token by token")
    parameters = getattr(settings, "rope_parameters", None) or {}
    for group in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        if group.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
            # Its frequencies follow the longest sequence in the batch: sessions would change each other's results.
            raise UnsupportedModel(f"rotary embeddings of type {group['rope_type']!r} can't be batched by session")


class _MetaParameters(TorchFunctionMode):
    """Modules allocate their matrices with ``torch.empty``: those get no memory.

    Not all of a constructor's tensors, as ``torch.device("meta")`` would have it: ``arange`` on the meta device runs
    in Python and imports the compiler and sympy, 70 MB in all. What is computed here is small, and is needed.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


@torch.no_grad()
def _place_buffers(model: Any, device: torch.device) -> None:
    """Moves what no checkpoint holds (rotary frequencies, embedding scales) to ``device``. A buffer that was left
    empty is computed the way transformers itself does after loading on the meta device: through the family's
    ``_init_weights``. Matrices are still meta here, for which initialisation does nothing."""
    for module in list(model.modules()):
        buffers = dict(module.named_buffers(recurse=False))
        empty = [name for name, buffer in buffers.items() if buffer.is_meta]
        for name, buffer in buffers.items():
            placed = torch.full_like(buffer, float("nan"), device=device) if name in empty else buffer.to(device)
            module.register_buffer(name, placed, persistent=False)
        if empty:
            model._init_weights(module)
    for name, buffer in model.named_buffers():
        if not bool(torch.isfinite(buffer).all()):
            raise UnsupportedModel(f"{type(model).__name__}: don't know how to compute the buffer {name}")
