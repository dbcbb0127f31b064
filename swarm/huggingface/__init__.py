"""``SwarmForCausalLM``: a transformers model whose decoder runs on the swarm, through sessions in step mode.

``generate`` with everything that it can do above logits works unchanged: greedy, sampling, beam search, prompt lookup
and assisted decoding, logits processors, stopping criteria, streamers; and so does ``pipeline("text-generation")``.
The KV cache stays with the peers: :class:`SwarmCache` holds a session for each sequence of the batch and knows all
its tokens. A beam that takes over another one's text costs the tokens in which they differ.

What a transformers model has and this one has not: weights, gradients, ``inputs_embeds``, attentions, continuous
batching, which is the peers' business, and hidden states between the layers of one peer: those at the cuts of the route
it has, see :class:`SwarmOutput`.

This package is the one that imports torch and transformers.
"""

from __future__ import annotations

import contextlib
import contextvars
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from swarm.blocking_client import Client, connect
from swarm.config import Settings
from swarm.errors import BadRequest
from swarm.huggingface.cache import SwarmCache
from swarm.models import ModelProfile

__all__ = ["SwarmCache", "SwarmConfig", "SwarmForCausalLM", "SwarmOutput"]

HIDDEN_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_CAPACITY = 512
"""Tokens that a session reserves at first, where nobody said how long the text will get."""
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What transformers calls a cache: the second until 5.23. Calls may use either."""


class SwarmConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """What ``generate`` and pipelines ask a config for; the weights' own config is the peers' business."""

    model_type = "swarm"

    @classmethod
    def of(cls, profile: ModelProfile) -> Self:
        facts: dict[str, Any] = {
            "name_or_path": profile.name,
            "vocab_size": profile.vocab_size,
            "hidden_size": profile.hidden_size,
            "num_hidden_layers": profile.num_layers,
            "num_key_value_heads": profile.num_kv_heads,
            "head_dim": profile.head_dim,
            "max_position_embeddings": profile.max_positions,
            "eos_token_id": list(profile.end_ids) or None,
            "dtype": torch.float32,
            "is_decoder": True,
        }
        return cls(**facts)


@dataclass
class SwarmOutput(CausalLMOutputWithPast):
    """``hidden_states[i]`` ``[batch, kept columns, hidden]`` is what comes out of layer ``cuts[i] - 1``.

    So it equals ``hidden_states[cuts[i]]`` of the whole model. There is one for each hop of the route, the last behind
    the final norm; of a batch whose sequences go different ways, those that all of them have. A route may change from
    one call to the next.
    """

    cuts: tuple[int, ...] | None = None


_caches: contextvars.ContextVar[list[SwarmCache]] = contextvars.ContextVar("caches of the generate call under way")


class SwarmForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """Use :meth:`from_pretrained`, and ``close`` it or use it as a context manager."""

    config_class = SwarmConfig
    main_input_name = "input_ids"

    def __init__(self, config: SwarmConfig, client: Client) -> None:
        super().__init__(config)
        self.client = client

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | None = None,
        *,
        initial_peers: str | Sequence[str] | None = None,
        settings: Settings | None = None,
    ) -> Self:
        """Connects to the swarm that ``initial_peers`` belong to (or ``SWARM_INITIAL_PEERS``); no weights are read.

        The reference, if given, must name the model that they serve. Raises :class:`swarm.errors.SwarmError`.
        """
        client = connect(initial_peers, pretrained_model_name_or_path, settings).__enter__()
        try:
            return cls.on(client)
        except BaseException:
            client.close()
            raise

    @classmethod
    def on(cls, client: Client) -> Self:
        """The model that ``client`` is connected to."""
        model = cls(SwarmConfig.of(client.profile), client)
        if "generation_config.json" in client.tokenizer_files:
            with _files(client) as folder:
                model.generation_config = GenerationConfig.from_pretrained(folder)
        model.training = False
        return model

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The model's tokenizer as transformers has it, made of the files that the peers hand out."""
        with _files(self.client) as folder:
            found: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
            return found

    def new_cache(self, max_tokens: int = DEFAULT_CAPACITY) -> SwarmCache:
        """For ``cache=``, to be kept across calls; ``max_tokens`` of each sequence are reserved at first."""
        return SwarmCache(self.client, max_tokens)

    def close(self) -> None:
        """Leave the swarm; all sessions end."""
        self.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def device(self) -> torch.device:
        """Where logits come to."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits; the peers compute in the dtype of the swarm."""
        return torch.float32

    @classmethod
    def can_generate(cls) -> bool:
        return True

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: SwarmCache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: SwarmCache | None = None,
        **unsupported: Any,
    ) -> SwarmOutput | tuple[Any, ...]:
        """Logits ``[batch, kept columns, vocabulary]``; padded columns have zeros.

        ``attention_mask`` ``[batch, past and new columns]`` may hide padding; positions count what is not hidden.
        Without a cache nothing stays at the peers, unless ``use_cache=True`` asks for one; ``past_key_values`` is an
        older name for it. ``output_hidden_states`` costs a round trip more, and as many rows from each hop as there are
        logits.
        """
        unsupported.pop("tokenizer", None)  # with which generate looks for stop_strings: it hands it on
        given = [name for name, value in unsupported.items() if value is not None]
        if given or output_attentions:
            raise BadRequest(f"a model on the swarm takes no {', '.join(given or ['output_attentions'])}")
        if input_ids is None or input_ids.ndim != 2 or not input_ids.numel():
            raise BadRequest("input_ids [batch, tokens] are needed")
        if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
            raise BadRequest(f"input_ids are whole numbers, not {input_ids.dtype}")
        kept = past_key_values if cache is None else cache
        if kept is not None and not isinstance(kept, SwarmCache):
            raise BadRequest(f"the cache is a {type(kept).__name__}, not a SwarmCache")
        columns = input_ids.shape[1]
        some = isinstance(logits_to_keep, torch.Tensor)
        whole = some or output_hidden_states or labels is not None or not 0 < logits_to_keep < columns
        keep = columns if whole else int(logits_to_keep)
        cache = kept if kept is not None else self.new_cache(columns + 1)
        if kept is None and use_cache:  # within generate, such as for its guidance, it is nobody else's
            _caches.get([]).append(cache)
        try:
            answers = cache.advance(input_ids, attention_mask, keep, bool(output_hidden_states))
        finally:
            if kept is None and not use_cache:
                cache.close()
        shown = [mask[-keep:] for mask in cache.masks]
        profile = self.client.profile
        logits = _rows(shown, [a.logits if a else b"" for a in answers], profile.vocab_size, torch.float32)
        states, cuts = None, None
        if output_hidden_states:
            dtype = HIDDEN_DTYPES[profile.dtype]
            cuts = tuple(sorted(set.intersection(*(set(a.hidden) for a in answers if a))))
            states = tuple(
                _rows(shown, [a.hidden[cut] if a else b"" for a in answers], profile.hidden_size, dtype) for cut in cuts
            )
        loss = self.loss_function(logits, labels, profile.vocab_size) if labels is not None else None
        wanted = logits[:, logits_to_keep] if some else logits[:, -int(logits_to_keep) :]
        held: dict[str, Any] = {CACHE: cache if kept is not None or use_cache else None}
        output = SwarmOutput(
            loss=loss,
            logits=wanted.to(input_ids.device),
            hidden_states=states,
            cuts=cuts,
            **held,
        )
        return output.to_tuple() if return_dict is False else output

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers has it; a text ends at the limit of tokens that a session may have, at the latest.

        Sessions end with the call, unless it was given a cache or returns it. ``cache_implementation`` is left out of
        account: it says how keys and values are kept on this machine, and they are at the peers (see
        ``inference.kv``).
        """
        kwargs.pop("cache_implementation", None)
        made: list[SwarmCache] = []
        token = _caches.set(made)
        given = [held for name in ("cache", "past_key_values") if (held := kwargs.pop(name, None)) is not None]
        if given:
            kwargs[CACHE] = given[0]
        result: Any = None
        try:
            result = super().generate(*args, **kwargs)  # type: ignore[misc]
            return result
        finally:
            _caches.reset(token)
            for cache in made:
                if cache is not getattr(result, CACHE, None):
                    cache.close()
                else:  # of a call within another one, as an assistant's, it ends with that
                    _caches.get([]).append(cache)
            made.clear()  # tasks of its sessions still refer to this context: the cache would never be forgotten

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """What ``generate_batch`` and the like begin with: for a cache in pages on this machine."""
        raise BadRequest(
            "a model on the swarm has no continuous batching of its own: its KV cache is at the peers, who batch what "
            "all sessions ask for. Call generate with several prompts, padded on the left"
        )

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """transformers' own hook."""
        mask = model_kwargs.get("attention_mask")
        if mask is not None and not mask[:, -1].all():
            raise BadRequest("a sequence of the batch ends with padding, so nothing says what follows; pad on the left")
        limit = min(self.client.profile.max_positions, self.client.settings.peer.max_cache_tokens_per_session)
        generation_config.max_length = longest = max(1, min(generation_config.max_length, limit))
        cache = model_kwargs.get(CACHE)
        if cache is None and generation_config.use_cache is not False:
            model_kwargs[CACHE] = cache = self.new_cache(longest)
            _caches.get([]).append(cache)
        elif isinstance(cache, SwarmCache):
            cache._is_user_defined = True
            cache.reserve(longest)

    def __deepcopy__(self, memo: dict[int, Any]) -> SwarmForCausalLM:
        return SwarmForCausalLM.on(self.client)


AutoModelForCausalLM.register(SwarmConfig, SwarmForCausalLM)  # pipelines ask it which models can write text


def _rows(shown: list[list[bool]], data: list[bytes], width: int, dtype: torch.dtype) -> torch.Tensor:
    """``[batch, columns, width]``: the answers, in order, in the columns that are shown, zeros elsewhere."""
    out = torch.zeros(len(shown), len(shown[0]), width, dtype=dtype)
    for row, mask, answer in zip(out, shown, data, strict=True):
        if answer:
            row[torch.tensor(mask)] = torch.frombuffer(bytearray(answer), dtype=dtype).view(-1, width)
    return out


@contextlib.contextmanager
def _files(client: Client) -> Iterator[Path]:
    """A folder, for a while, with the tokenizer and the generation settings that the peers hand out."""
    with tempfile.TemporaryDirectory(prefix="swarm-") as name:
        folder = Path(name)
        for file, data in client.tokenizer_files.items():
            (folder / file).write_bytes(data)
        yield folder
