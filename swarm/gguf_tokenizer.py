"""A tokenizer out of a GGUF file's metadata, as the files that transformers and ``tokenizers`` read.

GGUF keeps vocabulary, merges and token types, and names the rest (how text is split before merging) by a word.
The splits are those of transformers and llama.cpp for these words.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from swarm.errors import ModelError, UnsupportedModel
from swarm.gguf_file import GgufHeader
from swarm.gguf_model import end_ids

logger = logging.getLogger(__name__)

_CONTROL, _USER_DEFINED = 3, 4
_SPECIALS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_NAMES = ("llama3", "llama-v3", "llama-bpe")
_SPLITS = dict.fromkeys((*_LLAMA3_NAMES, "falcon3", "smaug-bpe", "dbrx", "pixtral"), _LLAMA3_SPLIT)
_SPLITS |= dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2_SPLIT)
_SPLITS["tekken"] = _TEKKEN_SPLIT
_GPT2_NAMES = ("gpt-2", "phi-2", "olmo", "mpt", "jais", "trillion", "gigachat", "a.x-4.0")
_DIGITS_FIRST = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""Each digit is a piece of its own, before GPT-2's split of what is between them."""


def gguf_tokenizer_files(header: GgufHeader) -> dict[str, bytes]:
    """Raises :class:`UnsupportedModel` for a kind of vocabulary that is neither byte-level nor SentencePiece BPE."""
    from tokenizers import AddedToken, Tokenizer

    metadata = header.metadata
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise ModelError(f"{header.path} has no tokenizer (tokenizer.ggml.tokens)")
    kind = metadata.get("tokenizer.ggml.model")
    tokenizer: Tokenizer
    if kind == "gpt2":
        tokenizer = _byte_level(header, tokens)
    elif kind == "llama":
        tokenizer = _sentencepiece(header, tokens)
    else:
        raise UnsupportedModel(f"{header.path} has a tokenizer of the kind {kind!r}; supported are gpt2 and llama")

    settings = _settings(header, tokens)
    # in a byte-level vocabulary every real token is spelled in the byte alphabet; another one is mislabelled
    alphabet = set(_byte_spelling().values()) if kind == "gpt2" else None
    types = metadata.get("tokenizer.ggml.token_type") or [0] * len(tokens)
    control = [
        token
        for token, token_type in zip(tokens, types, strict=False)
        if token_type == _CONTROL and (alphabet is None or set(token) <= alphabet)
    ]
    named = [settings[key] for key in _SPECIALS if settings[key] is not None]
    specials = list(dict.fromkeys(control + named))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    whole = [
        AddedToken(token, normalized=False, special=False)
        for token, token_type in zip(tokens, types, strict=False)
        if token_type == _USER_DEFINED and tokenizer.token_to_id(token) is not None
    ]
    tokenizer.add_tokens(whole)
    _begin_and_end(tokenizer, settings)
    generation = {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": end_ids(header) or None,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings, ensure_ascii=False).encode(),
        "generation_config.json": json.dumps(generation).encode(),
    }


def _settings(header: GgufHeader, tokens: list[str]) -> dict[str, Any]:
    metadata = header.metadata
    # Where the flag is absent llama.cpp begins SentencePiece and Llama 3 prompts with BOS: these models were trained so
    begins = metadata.get("tokenizer.ggml.model") == "llama" or metadata.get("tokenizer.ggml.pre") in _LLAMA3_NAMES
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(metadata.get("tokenizer.ggml.add_bos_token", begins)),
        "add_eos_token": bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata.get("tokenizer.chat_template"),
    }
    for key, word in _SPECIALS.items():
        token_id = metadata.get(f"tokenizer.ggml.{word}_token_id")
        settings[key] = tokens[token_id] if isinstance(token_id, int) and token_id < len(tokens) else None
    return settings


def _begin_and_end(tokenizer: Any, settings: dict[str, Any]) -> None:
    """Into ``tokenizer.json`` itself: transformers 5 does not look at the flags where that file exists."""
    from tokenizers.processors import TemplateProcessing

    begin = settings["bos_token"] if settings["add_bos_token"] else None
    end = settings["eos_token"] if settings["add_eos_token"] else None
    named = list(dict.fromkeys(token for token in (begin, end) if token))
    parts = [*([f"{begin}:0"] if begin else []), "$A:0", *([f"{end}:0"] if end else [])]
    tokenizer.post_processor = TemplateProcessing(
        single=parts, special_tokens=[(token, tokenizer.token_to_id(token)) for token in named]
    )


def _byte_level(header: GgufHeader, tokens: list[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    merges = header.metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise ModelError(f"{header.path} has a byte-level tokenizer without merges (tokenizer.ggml.merges)")
    spelling = _byte_spelling()
    alphabet = set(spelling.values())
    vocab = {
        token if set(token) <= alphabet else "".join(spelling[byte] for byte in token.encode()): index
        for index, token in enumerate(tokens)
    }
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(_bpe(header, models.BPE, vocab, pairs, fuse_unk=False))
    named = str(header.metadata.get("tokenizer.ggml.pre", "default"))
    if named == "default":
        logger.warning("%s does not say how its tokenizer splits text; it is taken for GPT-2's way", header.path)
    elif named not in (known := [*_SPLITS, *_DIGITS_FIRST, *_GPT2_NAMES]):
        raise UnsupportedModel(
            f"{header.path} has a tokenizer that splits text as {named[:40]!r}; supported are {', '.join(known)}"
        )
    split = _SPLITS.get(named)
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if named in _DIGITS_FIRST else []
    steps += [pre_tokenizers.Split(Regex(split), behavior="isolated")] if split else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(header: GgufHeader, tokens: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    scores = header.metadata.get("tokenizer.ggml.scores")
    vocab = {token: index for index, token in enumerate(tokens)}
    listed = header.metadata.get("tokenizer.ggml.merges")
    if isinstance(listed, list):
        pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in listed)]
    elif isinstance(scores, list) and len(scores) == len(tokens):
        pairs = _merges_from_scores(vocab, scores)
    else:
        raise ModelError(f"{header.path} has a SentencePiece tokenizer without scores (tokenizer.ggml.scores)")
    tokenizer = Tokenizer(_bpe(header, models.BPE, vocab, pairs, fuse_unk=True, byte_fallback=True))
    prefix = bool(header.metadata.get("tokenizer.ggml.add_space_prefix", True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="first" if prefix else "never", split=False
    )
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _bpe(header: GgufHeader, kind: Any, vocab: dict[str, int], pairs: list[tuple[str, str]], **options: bool) -> Any:
    try:
        return kind(vocab=vocab, merges=pairs, **options)
    except Exception as error:  # the tokenizers library raises bare Exception, for merges of unknown tokens
        raise ModelError(f"{header.path} has an inconsistent tokenizer: {error}") from error


def _merges_from_scores(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece has no merges: any two tokens whose join is a token merge, those with the best score first."""
    merges: list[tuple[str, str, float]] = []
    for token, index in vocab.items():
        cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
        known = [(left, right, scores[index]) for left, right in cuts if left in vocab and right in vocab]
        merges += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    merges.sort(key=lambda merge: (merge[2], len(merge[0]), len(merge[1])), reverse=True)
    return [(left, right) for left, right, _ in merges]


def _byte_spelling() -> dict[int, str]:
    """GPT-2's way to write every byte as one visible character."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + at) for at, byte in enumerate(hidden)}
