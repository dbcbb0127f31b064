"""What transformers 5 makes of a ``tokenizer.json`` that its folder says is a ``LlamaTokenizer``'s.

Files of Llama 2's time put a space before the text after every special token, by a normaliser. transformers 5 takes
vocabulary and merges only, and by default puts one at the start of a text.
"""

from __future__ import annotations

import json
from typing import Any

from swarm.checkpoint_files import json_object

_STEPS = ({"type": "ByteFallback"}, {"type": "Fuse"})


def as_llama_tokenizer(data: bytes, settings: dict[str, Any], source: str) -> bytes:
    """``data``: the file; ``settings``: those of ``tokenizer_config.json``. What is no SentencePiece BPE stays."""
    described = json_object(data, source)
    parts = json.dumps([described.get("pre_tokenizer"), described.get("decoder")])
    model = described.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or '"ByteLevel"' in parts:
        return data
    prefix = settings.get("add_prefix_space")
    prefix = prefix is None or bool(prefix)
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    scheme = ("always" if settings.get("legacy") else "first") if prefix else "never"
    described |= {
        "model": model | {"unk_token": None, "fuse_unk": True, "byte_fallback": True},
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False},
        "decoder": {
            "type": "Sequence",
            "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, *_STEPS, *strip],
        },
    }
    return json.dumps(described, ensure_ascii=False).encode()
