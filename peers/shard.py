"""A layer range of a model, as a shorter transformers model.

The decoder is built by transformers on the meta device, so it costs nothing, and only the parameters of the range
are materialised, one tensor at a time. All arithmetic is the family's own modeling code; what is ours is which
layers run, where keys and values live (:mod:`peers.attention`) and that rows of many sessions share one pass.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import nn

from peers.attention import Attending, Span, Spans, spans_of
from peers.compiled_pass import CompiledPass
from peers.graph_pass import GraphPass
from peers.kv_cache import SequenceCache
from peers.loading import Progress, load_model
from peers.quantized_linear import PanelLinear
from peers.row_codec import Rows
from swarm import kv
from swarm.errors import BadTensor, Internal, ModelError, SwarmError, WrongRange
from swarm.models import ModelProfile
from swarm.sampling import Floats
from swarm.types import LayerRange

if TYPE_CHECKING:
    from peers.weights import TensorSource


MOST_VIEWS: Final = 8
"""Ranges of layers that are ready to run; the one that was used longest ago is made anew when it is asked for."""


@dataclass(slots=True)
class Step:
    """The new rows of one session in a batch."""

    layers: LayerRange
    """What to run: a sub-range of the shard, the same for all steps of a batch."""
    cache: SequenceCache
    start: int
    """Position of the first row. Positions of the cache from here on are forgotten before the step runs."""
    token_ids: Sequence[int] | None = None
    """The input when ``layers.start == 0``."""
    hidden: Rows | None = None
    """The input ``[rows, hidden]`` otherwise."""
    head_rows: int = 0
    """How many of the last rows need logits; only the last layer's stage can give any."""
    want_hidden: bool = False
    """Return hidden states (after the final norm) from the last stage too."""

    @property
    def rows(self) -> int:
        if self.token_ids is not None:
            return len(self.token_ids)
        return 0 if self.hidden is None else self.hidden.shape[0]


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What came of one step. If ``error`` is set, the step did not happen: its cache ends where the step began."""

    hidden: Rows | None = None
    """``[rows, hidden]``, for the next stage."""
    logits: torch.Tensor | None = None
    """``[head_rows, vocabulary]``, float32."""
    error: SwarmError | None = None


def use_device(device: torch.device) -> None:
    """For the calling thread: kernels that are not torch's own start on the current card."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


class Shard:
    """Layers ``layers`` of a model, ready to run. Use :meth:`load`."""

    def __init__(
        self,
        profile: ModelProfile,
        model: Any,
        layers: LayerRange,
        dtype: torch.dtype,
        device: torch.device,
        size_bytes: int,
    ) -> None:
        self.profile = profile
        self.layers = layers
        self.dtype = dtype
        self.device = device
        self.size_bytes = size_bytes
        """Bytes of the weights that are held; a matrix that embedding and head share counts once."""
        self._model = model
        self._views: dict[LayerRange, _View] = {}

    @classmethod
    def load(
        cls,
        profile: ModelProfile,
        config: dict[str, Any],
        source: TensorSource,
        layers: LayerRange,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        progress: Progress | None = None,
    ) -> Shard:
        """Reads the tensors of ``layers`` and builds the shard, its matrices as ``profile.weights`` says.

        ``config`` is the transformers config as a dictionary. Raises :class:`UnsupportedModel`,
        :class:`WrongRange` and, for tensors that are missing or have another shape, :class:`ModelError`.
        """
        if layers.end > profile.num_layers:
            raise WrongRange(f"layers {layers} of {profile.name}, which has {profile.num_layers}")
        if config.get("num_hidden_layers") != profile.num_layers:
            raise ModelError(f"config has {config.get('num_hidden_layers')} layers, profile {profile.num_layers}")
        target = torch.device(device)
        use_device(target)
        model, size_bytes = load_model(config, source, layers, target, dtype, profile.weights, progress)
        return cls(profile, model, layers, dtype, target, size_bytes)

    def new_cache(self, layers: LayerRange, capacity: int, kind: str = kv.MODEL) -> SequenceCache:
        """An empty cache for a session that runs ``layers`` here; raises :class:`BadRequest`."""
        if not self.layers.covers(layers):
            raise WrongRange(f"this peer holds layers {self.layers}, not {layers}")
        profile = self.profile
        return SequenceCache(layers, profile.num_kv_heads, profile.head_dim, capacity, self.dtype, self.device, kind)

    def release(self) -> None:
        """Let go of the weights; there are no more passes. Whoever still refers to the shard sees what it was."""
        self._model = None
        self._views.clear()

    def run(self, steps: Sequence[Step]) -> list[StepOutput]:
        """One forward pass for all steps, which must share one layer range; the results are in their order.

        What is wrong with one step (its shape, a gap, values that are not finite) becomes that step's ``error``
        and does not touch the others.
        """
        if any(step.layers != steps[0].layers for step in steps):
            raise WrongRange(f"a batch runs the same layers for all, not {sorted({str(s.layers) for s in steps})}")
        errors = [self._check(step) for step in steps]
        for index, step in enumerate(steps):
            if any(step.cache is earlier.cache for earlier in steps[:index]):
                errors[index] = Internal("two steps of one session in a batch")
        good = [step for step, error in zip(steps, errors, strict=True) if error is None]
        for step in good:
            step.cache.truncate(step.start)
        found: dict[int, StepOutput] = {}
        for part in self._passes(good):
            found |= zip(map(id, part), self._forward(part), strict=True)
        return [
            found[id(step)] if error is None else StepOutput(error=error)
            for step, error in zip(steps, errors, strict=True)
        ]

    def _passes(self, steps: list[Step]) -> list[list[Step]]:
        """On a card, caches of each kind have kernels of their own: a row's company must not choose them."""
        if self.device.type != "cuda":
            return [steps] if steps else []
        kinds = sorted({step.cache.kind for step in steps})
        return [[step for step in steps if step.cache.kind == kind] for kind in kinds]

    def _check(self, step: Step) -> SwarmError | None:
        layers = step.layers
        if not self.layers.covers(layers) or not step.cache.layers.covers(layers):
            return WrongRange(f"this peer holds layers {self.layers}, the session {step.cache.layers}, not {layers}")
        hidden_size, last = self.profile.hidden_size, layers.end == self.profile.num_layers
        if layers.start == 0:
            if not step.token_ids or step.hidden is not None:
                return BadTensor("the first stage takes token ids, at least one")
            if not 0 <= min(step.token_ids) <= max(step.token_ids) < self.profile.vocab_size:
                return BadTensor(f"a token id is outside the vocabulary of {self.profile.vocab_size}")
        elif step.hidden is None or step.token_ids is not None:
            return BadTensor("this stage takes hidden states")
        elif step.hidden.ndim != 2 or step.hidden.shape[0] == 0 or step.hidden.shape[1] != hidden_size:
            return BadTensor(f"hidden states are [rows, {hidden_size}], not {list(step.hidden.shape)}")
        if not 0 <= step.head_rows <= (step.rows if last else 0):
            return BadTensor(f"{step.head_rows} rows of logits from {step.rows} rows of layers {layers}")
        try:
            step.cache.check_room(step.start, step.rows)
        except SwarmError as error:
            return error
        return None

    def _forward(self, steps: Sequence[Step]) -> list[StepOutput]:
        layers = steps[0].layers
        view = self._views.pop(layers, None) or _View(self._model, self.layers, self.new_cache(layers, 1))
        self._views[layers] = view
        if len(self._views) > MOST_VIEWS:
            del self._views[next(iter(self._views))]
        spans = spans_of([s.cache for s in steps], [s.start for s in steps], [s.rows for s in steps])
        hidden, finite = view.decode(steps, spans)
        rows = [row for span, step in zip(spans, steps, strict=True) for row in _last_rows(span, step.head_rows)]
        logits = view.head(hidden if len(rows) == hidden.shape[0] else hidden[rows]) if rows else None
        # One number for the whole batch tells whether all is well; only if not, each session is asked.
        finite = finite and (logits is None or all_finite(logits))
        hidden, logits = _on_host(hidden), None if logits is None else logits.cpu()
        outputs, taken = [], 0
        for span, step in zip(spans, steps, strict=True):
            own = hidden[span.offset : span.offset + span.count] if len(spans) > 1 else hidden
            answer = logits[taken : taken + step.head_rows] if logits is not None and step.head_rows else None
            taken += step.head_rows
            if not finite and not (all_finite(own) and (answer is None or all_finite(answer))):
                outputs.append(StepOutput(error=BadTensor(f"layers {layers} gave values that are not finite")))
                continue
            step.cache.length = span.start + span.count
            keep = step.want_hidden or layers.end != self.profile.num_layers
            outputs.append(StepOutput(own if keep else None, answer))
        return outputs


class _View:
    """The model's own forward over a sub-range of its layers; shares all weights with the shard."""

    def __init__(self, model: Any, held: LayerRange, like: SequenceCache) -> None:
        """``like`` is a cache for the layers to run, as sessions have them."""
        base, layers, dtype = model.model, like.layers, like.dtype
        view = copy.copy(base)
        view._modules = dict(base._modules)
        chosen = slice(layers.start - held.start, layers.end - held.start)
        view._modules["layers"] = nn.ModuleList(list(base.layers)[chosen])
        # The loop over layers counts from 0 and looks types up in the model's config; the layers themselves keep
        # the whole config and their own index.
        view.config = copy.copy(model.config)
        view.config.__dict__["num_hidden_layers"] = len(layers)
        kinds = getattr(model.config, "layer_types", None)
        if kinds is not None:
            view.config.__dict__["layer_types"] = kinds[layers.start : layers.end]
        last = layers.end == model.config.num_hidden_layers
        if not last:
            view._modules["norm"] = nn.Identity()
        if layers.start > 0 and hasattr(view, "embedding_multiplier"):
            view.embedding_multiplier = 1.0
        self._base = view
        self._pass = CompiledPass.of(list(view._modules["layers"]), base.rotary_emb, dtype, base.norm if last else None)
        self._dtype, self._device = dtype, like.device
        # Without the decorators, which merge config defaults and look for outputs to record, at every call.
        self._run = inspect.unwrap(type(base).forward)
        width = None if layers.start == 0 else model.config.hidden_size
        self._graph = GraphPass.of(self._through, width, like)
        self._head = copy.copy(model)
        self._head._modules = {**model._modules, "model": _Given()}
        self._run_head = inspect.unwrap(type(model).forward)

    def decode(self, steps: Sequence[Step], spans: Spans) -> tuple[Rows, bool]:
        """Hidden states ``[rows, hidden]``, and whether all of them are finite."""
        if self._pass is not None:
            arrays = [_array(step.hidden) for step in steps if step.hidden is not None] or [self._embedded(steps)]
            return self._pass.run(arrays[0] if len(arrays) == 1 else np.concatenate(arrays), spans)
        given = self._given(steps)
        if self._graph is not None and self._graph.takes(spans):
            hidden = self._graph.run(given, spans)
        else:
            hidden = self._by_modules(given, spans)
        return hidden, all_finite(hidden)

    @torch.inference_mode()
    def _embedded(self, steps: Sequence[Step]) -> Floats:
        return self._base.embed_tokens(_ids(steps)).float().numpy()  # type: ignore[no-any-return]

    def _given(self, steps: Sequence[Step]) -> torch.Tensor:
        """Token ids ``[rows]``, or hidden states ``[rows, hidden]``."""
        rows = [
            torch.tensor(row) if isinstance(row, np.ndarray) else row
            for step in steps
            if (row := step.hidden) is not None
        ]
        return torch.cat(rows).to(self._dtype) if rows else _ids(steps)

    @torch.inference_mode()
    def _by_modules(self, given: torch.Tensor, spans: Spans) -> torch.Tensor:
        positions = torch.tensor([spans.positions], device=self._device)
        return self._through(given[None].to(self._device), positions, spans)[0]

    def _through(self, given: torch.Tensor, positions: torch.Tensor, spans: Attending) -> torch.Tensor:
        inputs = {"input_ids" if given.ndim == 2 else "inputs_embeds": given}
        output = self._run(self._base, position_ids=positions, use_cache=False, spans=spans, **inputs)
        return output.last_hidden_state  # type: ignore[no-any-return]

    @torch.inference_mode()
    def head(self, hidden: Rows) -> torch.Tensor:
        """Logits ``[rows, vocabulary]`` in float32, by the family's own code (it may scale or cap them)."""
        rows = torch.as_tensor(hidden)[None]
        if not isinstance(self._head.lm_head, PanelLinear):
            rows = rows.to(self._dtype)
        return self._run_head(self._head, inputs_embeds=rows).logits[0].float()  # type: ignore[no-any-return]


class _Given(nn.Module):
    """Stands where a causal model expects its decoder, and hands it hidden states that are already computed."""

    def forward(self, inputs_embeds: torch.Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)


def _ids(steps: Sequence[Step]) -> torch.Tensor:
    return torch.tensor([token for step in steps for token in step.token_ids or ()])


def _on_host(rows: Rows) -> Rows:
    return rows if isinstance(rows, np.ndarray) else rows.cpu()


def _array(rows: Rows) -> Floats:
    return rows if isinstance(rows, np.ndarray) else np.ascontiguousarray(rows.float().numpy())


def all_finite(rows: Rows) -> bool:
    """Whether no value is a NaN or an infinity: a sum with one is neither, and 0 times one is a NaN."""
    return math.isfinite(float(rows.sum())) or float((rows * 0).sum()) == 0


def _last_rows(span: Span, count: int) -> range:
    end = span.offset + span.count
    return range(end - count, end)
