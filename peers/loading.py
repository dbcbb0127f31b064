"""Reading a layer range: the bare model of the family, minus what the range does not need, plus its tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from peers import decoder_layer
from peers.block_kernels import block_kernels
from peers.card_linear import CardLinear, card_works
from peers.compact_linear import CompactLinear
from peers.decoder_layer import DecoderLayer, Rotation
from peers.families import build_model
from peers.file_embedding import FileEmbedding
from peers.linear import DenseLinear, OneDnnLinear, packing_works
from peers.process_memory import return_freed_heap, return_library_pages
from peers.quantized_linear import SideBySide, quantized_linear
from peers.weights.blocks import BLOCK, BlockKind, Blocks, to_blocks
from swarm.errors import ModelError, UnsupportedModel
from swarm.types import LayerRange

if TYPE_CHECKING:
    from peers.weights import TensorSource

Progress = Callable[[int, int], None]
"""Called with (bytes read, bytes in all) while a shard loads, counted in the dtype of the model."""

_EMBEDDING: Final = "model.embed_tokens.weight"
_HEAD: Final = "lm_head.weight"
_TRIM_BYTES: Final = 32 * 2**20
"""How much is read between two reminders to the allocator; each takes about a millisecond."""
_QUANTISE_BYTES: Final = 4 * 2**20
"""Float32 bytes that are quantised at once; the intermediate values are several times that."""

LAYER_KINDS: Final = {"int4": BlockKind.Q4_1, "int8": BlockKind.Q8_0, "bfloat16": BlockKind.BFLOAT16}
"""What a layer's matrices become by the choice of weights."""
HEAD_KINDS: Final = LAYER_KINDS | {"int4": BlockKind.Q8_0}
"""The head's errors go straight into the text: it keeps 8 bits."""


def load_model(
    config: dict[str, Any],
    source: TensorSource,
    layers: LayerRange,
    device: torch.device,
    dtype: torch.dtype,
    weights: str,
    progress: Progress | None,
) -> tuple[Any, int]:
    """The causal model with only ``layers`` in its ``model.layers``, and the bytes of its weights in memory.

    ``embed_tokens`` is there only with layer 0, ``norm`` and ``lm_head`` only with the last. Memory never holds
    more than the range plus the parts of one product. On a CPU the embedding stays in the checkpoint, which therefore
    has to stay open, unless it is the head as well. ``weights`` is a key of ``LAYER_KINDS``, or a dtype's name or
    ``auto`` for matrices in ``dtype``.
    """
    kind = weights if weights in LAYER_KINDS and weights != str(dtype).removeprefix("torch.") else None
    model = build_model(config, device)
    like_llama = config["model_type"] in decoder_layer.FAMILIES
    if like_llama and 2 * len(model.model.rotary_emb.inv_freq) != model.model.layers[0].self_attn.head_dim:
        raise UnsupportedModel(f"models of the family {config['model_type']} rotate whole heads, not a part of each")
    _drop_the_rest(model, layers)
    return_library_pages()
    reader = _Reader(model, source, device, dtype, kind, progress)
    reader.read_head()
    reader.read_embedding()
    if like_llama and getattr(model.config, "hidden_act", "") == "silu":
        for index in range(layers.start, layers.end):
            model.model.layers[index] = reader.fused(f"model.layers.{index}")
        model.model.rotary_emb = Rotation(model.model.rotary_emb)
    reader.read_the_rest()
    model.model.layers = nn.ModuleList(layer for layer in model.model.layers if not isinstance(layer, nn.Identity))
    return_library_pages()
    return model.eval(), reader.size_bytes


def _drop_the_rest(model: Any, layers: LayerRange) -> None:
    """Layers outside the range become placeholders, so that those inside keep their names for reading."""
    base = model.model
    num_layers = len(base.layers)
    for index in range(num_layers):
        if not layers.start <= index < layers.end:
            base.layers[index] = nn.Identity()
    if layers.start > 0:
        base._modules["embed_tokens"] = None
    if layers.end < num_layers:
        base._modules["norm"] = nn.Identity()
        model._modules["lm_head"] = None


class _Reader:
    """Fills a bare model, one module at a time."""

    def __init__(
        self,
        model: Any,
        source: TensorSource,
        device: torch.device,
        dtype: torch.dtype,
        weights: str | None,
        progress: Progress | None,
    ) -> None:
        self._model, self._source, self._device, self._dtype = model, source, device, dtype
        self._weights = weights
        self._progress = progress
        self._stored = _stored_names(model, source)
        """Parameters that are still to be read, and the tensor that holds each."""
        self._pack = device.type == "cpu" and packing_works(dtype)
        unpacked = device.type == "cpu" and dtype == torch.bfloat16 and not self._pack
        self._in_panels = unpacked and block_kernels() is not None
        """A CPU for which oneDNN packs no bfloat16 multiplies it slowly, too: ours do so in float32."""
        self._total = sum(model.get_parameter(name).numel() for name in self._stored) * dtype.itemsize
        self._done = self._trimmed = 0
        self.size_bytes = 0

    def read_head(self) -> None:
        """A head that is not to be as large as ``dtype`` has it: in blocks, or as the checkpoint stores it where
        that changes no result."""
        linear = self._model.lm_head if _HEAD in self._stored else None
        if not isinstance(linear, nn.Linear):
            return
        if self._weights is not None and linear.in_features % BLOCK == 0:
            self._model.lm_head = self._linear(["lm_head"], HEAD_KINDS)
            return
        if not (self._pack or self._in_panels) or getattr(linear, "bias", None) is not None:
            return
        name = self._stored[_HEAD]
        found = self._source.blocks(name) if block_kernels() is not None else None
        if found is not None:
            self._model.lm_head = quantized_linear(found, None)
            del self._stored[_HEAD]
            self._read(linear.weight.numel(), found.data.nbytes)
            return
        if self._in_panels:
            self._model.lm_head = self._linear(["lm_head"])
        if self._dtype != torch.float32:
            return
        head = CompactLinear.read(
            linear.out_features, linear.in_features, lambda start, stop: self._source.compact(name, start, stop)
        )
        if head is not None:
            self._model.lm_head = head
            del self._stored[_HEAD]
            self._read(linear.weight.numel(), head.size_bytes)

    def read_embedding(self) -> None:
        """Leaves the table in the checkpoint, unless the head needs it too: then both have the one."""
        if _EMBEDDING not in self._stored:
            return
        model, base = self._model, self._model.model
        shared = self._stored.get(_HEAD) == _EMBEDDING
        if shared or self._device.type == "cpu":
            self._total -= base.embed_tokens.weight.numel() * self._dtype.itemsize
        if shared:
            del self._stored[_HEAD]
            self._read_parameter(_EMBEDDING)
            table = base.embed_tokens.weight
            model.lm_head.weight = table
            if model.lm_head.bias is None:
                model.lm_head = self._product(table.detach(), None, packed=False)
        elif self._device.type == "cpu":
            del self._stored[_EMBEDDING]
            base.embed_tokens = FileEmbedding(base.embed_tokens, self._source, _EMBEDDING, self._dtype)

    def fused(self, path: str) -> DecoderLayer:
        """The layer at ``path`` in few products; reads all of it."""
        attention, mlp = f"{path}.self_attn", f"{path}.mlp"
        query_key_value = self._linear([f"{attention}.{name}_proj" for name in "qkv"])
        output = self._linear([f"{attention}.o_proj"])
        gate_up = self._linear([f"{mlp}.gate_proj", f"{mlp}.up_proj"])
        down = self._linear([f"{mlp}.down_proj"])
        for name in [name for name in self._stored if name.startswith(f"{path}.")]:
            self._read_parameter(name)
        return DecoderLayer(self._model.get_submodule(path), query_key_value, output, gate_up, down)

    def read_the_rest(self) -> None:
        # By name: a list of the modules themselves would keep every unpacked matrix alive.
        for path in [name for name, module in self._model.named_modules() if type(module) is nn.Linear]:
            weight = f"{path}.weight"
            if weight in self._stored:
                parent, _, own = path.rpartition(".")
                setattr(self._model.get_submodule(parent), own, self._linear([path]))
        for name in list(self._stored):
            self._read_parameter(name)

    def _read_parameter(self, name: str) -> None:
        path, _, attribute = name.rpartition(".")
        module = self._model.get_submodule(path)
        module._parameters[attribute] = nn.Parameter(self._tensor(name), requires_grad=False)

    def _linear(self, paths: Sequence[str], kinds: dict[str, BlockKind] = LAYER_KINDS) -> nn.Module:
        """One product with the matrices of the linears at ``paths``, their outputs side by side."""
        modules = [self._model.get_submodule(path) for path in paths]
        names = [f"{path}.weight" for path in paths]
        bias: torch.Tensor | None = None
        if modules[0].bias is not None:
            bias = torch.cat([self._tensor(f"{path}.bias") for path in paths])
        if self._weights is not None and modules[0].in_features % BLOCK == 0:
            return _beside([self._blocks(name, kinds[self._weights]) for name in names], bias)
        parts = [self._tensor(name) for name in names]
        weight = parts[0] if len(parts) == 1 else torch.cat(parts)
        del parts
        return self._product(weight, bias)

    def _product(self, weight: torch.Tensor, bias: torch.Tensor | None, packed: bool = True) -> nn.Module:
        if self._pack:
            return OneDnnLinear(weight, bias, packed)
        if self._in_panels and weight.shape[1] % BLOCK == 0:
            return quantized_linear(to_blocks(weight, BlockKind.BFLOAT16), bias)
        return CardLinear(weight, bias) if card_works(self._device) else DenseLinear(weight, bias)

    def _tensor(self, name: str) -> torch.Tensor:
        tensor = self._source.read(self._stored.pop(name), self._dtype, self._device)
        self._read(tensor.numel(), tensor.nbytes)
        return tensor

    def _blocks(self, name: str, kind: BlockKind) -> Blocks:
        """As the checkpoint has them if that takes no more bits; otherwise made from its numbers. What is chosen as
        bfloat16 is bfloat16."""
        stored = self._stored.pop(name)
        found = self._source.blocks(stored)
        if found is None or found.kind.bits > kind.bits or (kind is BlockKind.BFLOAT16 and found.kind is not kind):
            found = _quantised(self._source.read(stored, torch.float32), kind)
        self._read(found.rows * found.columns, found.data.nbytes)
        return found.to(self._device)

    def _read(self, numbers: int, size_bytes: int) -> None:
        self._done += numbers * self._dtype.itemsize
        self.size_bytes += size_bytes
        if self._progress is not None:
            self._progress(self._done, self._total)
        if self._done - self._trimmed >= _TRIM_BYTES or self._done == self._total:
            self._trimmed = self._done
            return_freed_heap()


def _quantised(weights: torch.Tensor, kind: BlockKind) -> Blocks:
    rows = max(1, _QUANTISE_BYTES // (4 * weights.shape[1]))
    return Blocks(kind, torch.cat([to_blocks(part, kind).data for part in torch.split(weights, rows)]))


def _beside(parts: Sequence[Blocks], bias: torch.Tensor | None) -> nn.Module:
    """One product where all parts are of one kind; a checkpoint may mix them."""
    if len({part.kind for part in parts}) == 1:
        data = parts[0].data if len(parts) == 1 else torch.cat([part.data for part in parts])
        return quantized_linear(Blocks(parts[0].kind, data), bias)
    biases = [None] * len(parts) if bias is None else torch.split(bias, [part.rows for part in parts])
    return SideBySide([quantized_linear(part, own) for part, own in zip(parts, biases, strict=True)])


def _stored_names(model: Any, source: TensorSource) -> dict[str, str]:
    """For each parameter of the model the name of the tensor that holds it, which is there and has its shape."""
    names = set(source.names())
    wanted = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    # Checkpoints with a tied head rarely store it. The last stage of several reads the embedding in its place.
    stored = {name: name for name in wanted}
    if model.config.tie_word_embeddings and _HEAD in wanted:
        stored[_HEAD] = _EMBEDDING
    for name, shape in wanted.items():
        if stored[name] not in names:
            raise ModelError(f"the checkpoint has no tensor {stored[name]}")
        found = tuple(source.shape(stored[name]))
        if found != tuple(shape):
            raise ModelError(f"{stored[name]} is {list(found)} in the checkpoint, {list(shape)} by the config")
    return stored
