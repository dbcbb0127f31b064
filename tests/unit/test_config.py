from __future__ import annotations

import re
from pathlib import Path

import pytest

from swarm.config import Settings
from swarm.config_loader import DEFAULT, LoadedSettings, keys, load_settings, show
from swarm.config_rules import rule_for
from swarm.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"


def from_text(tmp_path: Path, text: str) -> LoadedSettings:
    file = tmp_path / "swarm.yaml"
    file.write_text(text, encoding="utf-8")
    return load_settings(file)


def refusal(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        from_text(tmp_path, text)
    return caught.value.message


# --- where a value comes from


def test_without_anything_all_is_default() -> None:
    loaded = load_settings()
    assert loaded.settings == Settings()
    assert set(loaded.origins.values()) == {DEFAULT}


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("inference: {max_tokens: 1, top_k: 2, temperature: 1e-1}\n")
    loaded = load_settings(
        file,
        {"SWARM_INFERENCE_TOP_K": "20", "SWARM_INFERENCE_MAX_TOKENS": "10", "HOME": "/"},
        {"max_tokens": 100, "model": None},
    )
    inference = loaded.settings.inference
    assert (inference.max_tokens, inference.top_k, inference.temperature, inference.top_p) == (100, 20, 0.1, 1.0)
    assert loaded.origins["inference.max_tokens"] == "flag:--max-tokens"
    assert loaded.origins["inference.top_k"] == "env:SWARM_INFERENCE_TOP_K"
    assert loaded.origins["inference.temperature"] == f"file:{file}"
    assert loaded.origins["inference.top_p"] == DEFAULT


def test_environment_names_the_file_and_a_flag_names_another(tmp_path: Path) -> None:
    mine, other = tmp_path / "mine.yaml", tmp_path / "other.yaml"
    mine.write_text("peer: {threads: 3}")
    other.write_text("peer: {threads: 4}")
    assert load_settings(None, {"SWARM_CONFIG": str(mine)}).settings.peer.threads == 3
    assert load_settings(other, {"SWARM_CONFIG": str(mine)}).settings.peer.threads == 4
    assert load_settings(None, {"SWARM_CONFIG": ""}).settings == Settings()


def test_initial_peers_have_a_short_variable_and_the_long_one_wins() -> None:
    short = {"SWARM_INITIAL_PEERS": "/ip4/1.2.3.4/tcp/1/p2p/A, /ip4/1.2.3.4/tcp/2/p2p/B,"}
    loaded = load_settings(None, short)
    assert loaded.settings.network.initial_peers == ("/ip4/1.2.3.4/tcp/1/p2p/A", "/ip4/1.2.3.4/tcp/2/p2p/B")
    assert loaded.origins["network.initial_peers"] == "env:SWARM_INITIAL_PEERS"
    loaded = load_settings(None, {"SWARM_NETWORK_INITIAL_PEERS": "/ip4/9.9.9.9/tcp/1", **short})
    assert loaded.settings.network.initial_peers == ("/ip4/9.9.9.9/tcp/1",)


def test_flags_by_key_or_by_name_and_absent_ones_are_no_choice() -> None:
    loaded = load_settings(
        flags={"peer.layers": "0:10", "model": "x.gguf", "initial_peers": [], "host-maddrs": ("/ip4/0.0.0.0/tcp/7",)}
    )
    assert loaded.settings.peer.layers == "0:10"
    assert loaded.settings.model.name == "x.gguf"
    assert loaded.settings.network.host_maddrs == ("/ip4/0.0.0.0/tcp/7",)
    assert loaded.origins["model.name"] == "flag:--model"
    assert loaded.origins["network.initial_peers"] == DEFAULT


def test_every_key_has_a_variable_that_takes_its_default() -> None:
    for key, value, _ in show(load_settings()):
        variable = "SWARM_" + key.replace(".", "_").upper()
        text = ",".join(value) if isinstance(value, tuple) else str(value)
        loaded = load_settings(None, {variable: text})
        assert loaded.settings == Settings()
        assert loaded.origins[key] == f"env:{variable}"


def test_names_of_flags_are_unique() -> None:
    names = [key.split(".")[1] for key in keys()]
    assert sorted(names) == sorted(set(names))


def test_every_default_passes_its_own_rule() -> None:
    for key, value, _ in show(load_settings()):
        assert rule_for(key, keys()[key]).allows(value), key


def test_show_lists_every_key_in_order() -> None:
    rows = show(load_settings(flags={"threads": 2}))
    assert [key for key, _, _ in rows] == list(keys())
    assert ("peer.threads", 2, "flag:--threads") in rows


# --- the shipped files


def test_default_yaml_lists_every_key_with_its_default() -> None:
    file = CONFIGS / "default.yaml"
    loaded = load_settings(file)
    assert loaded.settings == Settings()
    assert {key for key, origin in loaded.origins.items() if origin == DEFAULT} == set(), "missing in default.yaml"


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.name)
def test_shipped_files_load(file: Path) -> None:
    load_settings(file)


def test_tinyllama_is_served_in_bfloat16() -> None:
    model = load_settings(CONFIGS / "tinyllama.yaml").settings.model
    assert (model.name, model.dtype) == ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "bfloat16")


# --- files


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "peer:\n", "network:\n  # initial_peers: []\n"])
def test_a_file_that_says_nothing_changes_nothing(tmp_path: Path, text: str) -> None:
    assert from_text(tmp_path, text).settings == Settings()


def test_layers_are_text_even_where_yaml_1_1_sees_base_60(tmp_path: Path) -> None:
    assert from_text(tmp_path, "peer: {layers: 10:20}").settings.peer.layers == "10:20"


def test_lists_and_comma_separated_text_are_the_same(tmp_path: Path) -> None:
    listed = from_text(tmp_path, "network: {host_maddrs: [/ip4/0.0.0.0/tcp/1, /ip4/0.0.0.0/tcp/2]}")
    joined = from_text(tmp_path, "network: {host_maddrs: '/ip4/0.0.0.0/tcp/1,/ip4/0.0.0.0/tcp/2'}")
    assert listed.settings == joined.settings
    flags = load_settings(flags={"host_maddrs": ["/ip4/0.0.0.0/tcp/1, /ip4/0.0.0.0/tcp/2"]}).settings
    assert flags.network == listed.settings.network, "a flag that may be repeated"
    assert listed.settings.network.host_maddrs == ("/ip4/0.0.0.0/tcp/1", "/ip4/0.0.0.0/tcp/2")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("peer: {thread: 1}", "unknown key 'peer.thread'; did you mean 'peer.threads'?"),
        ("inference: {top-p: 1}", "did you mean 'inference.top_p'?"),
        ("peers: {threads: 1}", "unknown section 'peers'; did you mean 'peer'?"),
        ("zzzz: {}", "unknown section 'zzzz'; known are: model, inference"),
        ("7: {}", "unknown section 7"),
        ("peer: {1: 2}", "unknown key 'peer.1'"),
        ("peer: {threads: '1'}", "peer.threads: expected a whole number from 0 to 1024, got '1'"),
        ("peer: {threads: 1.0}", "peer.threads: expected a whole number"),
        ("peer: {threads: true}", "peer.threads: expected a whole number"),
        ("peer: {threads: -1}", "peer.threads: expected a whole number from 0 to 1024, got -1"),
        ("peer: {threads: }", "peer.threads: expected a whole number from 0 to 1024, got None"),
        ("peer: {prefill_threads: 1025}", "peer.prefill_threads: expected a whole number from 0 to 1024, got 1025"),
        ("peer: {max_memory_mb: 16777217}", "peer.max_memory_mb: expected a whole number from 0 to 16777216"),
        (
            "inference: {max_tokens: 1000000000000000000}",
            "at least 1, got 1000000000000000000 (it has more than 18 digi",
        ),
        ("peer: {checkpoints: yes}", "peer.checkpoints: expected true or false, got 'yes'"),
        ("peer: {checkpoints: 1}", "peer.checkpoints: expected true or false, got 1"),
        ("peer: {layers: 20:10}", "peer.layers: expected auto or START:END, for example 0:10, got '20:10'"),
        ("peer: {layers: 10}", "peer.layers: expected auto or START:END"),
        ("peer: {device: gpu}", "peer.device: expected auto, cpu, mps, cuda or cuda:N, got 'gpu'"),
        ("peer: {memory_safety_margin: 1}", "peer.memory_safety_margin: expected a number from 0 to below 1, got 1"),
        ("model: {dtype: int8}", "model.dtype: expected float32 or bfloat16 or float16, got 'int8'"),
        ("model: {name: ' '}", "model.name: expected text that is not empty"),
        ("inference: {temperature: true}", "inference.temperature: expected a number from 0 to 100, got True"),
        ("inference: {temperature: 101}", "inference.temperature: expected a number from 0 to 100, got 101"),
        ("inference: {repetition_penalty: 1e-3}", "a number from 0.01 to 100, or 0, got 0.001"),
        ("inference: {temperature: .nan}", "got nan (it must be finite)"),
        ("inference: {temperature: .inf}", "got inf (it must be finite)"),
        ("inference: {temperature: 1" + "0" * 400 + "}", "(it must be finite)"),
        ("peer: {threads: 1" + "0" * 5000 + "}", "not valid YAML"),
        ("inference: {top_p: 0}", "inference.top_p: expected a number above 0, at most 1, got 0"),
        ("timeouts: {open_s: -1}", "timeouts.open_s: expected a number of seconds above 0, got -1"),
        ("timeouts: {open_s: 0}", "timeouts.open_s: expected a number of seconds above 0, got 0"),
        ("recovery: {wait_s: -0.5}", "recovery.wait_s: expected a number of seconds, 0 or more, got -0.5"),
        ("network: {initial_peers: [1]}", "network.initial_peers: expected a list of multiaddrs"),
        ("network: {initial_peers: [1.2.3.4]}", "network.initial_peers: expected a list of multiaddrs"),
        ("network: {initial_peers: {a: b}}", "network.initial_peers: expected a list of multiaddrs"),
        ("peer: 3", "peer: expected keys with values, got 3"),
        ("- a\n- b\n", "expected sections (model, inference"),
        ("peer: {threads: 1, threads: 2}", "line 1, column 20: not valid YAML: the key 'threads' is given twice"),
        ("peer:\n  threads: [1\n", "line 3, column 1: not valid YAML"),
        ("peer: !!python/object/apply:os.getcwd []", "not valid YAML: could not determine a constructor"),
        ("a: \x00", "not valid YAML"),
        (
            "gateway: {cors_origins: [https://a.example/]}",
            "expected a list of origins such as https://chat.example.org",
        ),
        ("discovery: {announce_ttl_s: 300}", "announce_ttl_s: expected a number of seconds above 0, at most 110"),
        ("limits: {window_frames: 33}", "limits.window_frames: expected a whole number from 1 to 32, got 33"),
        ("limits: {max_waiting_frames: 63}", "limits.max_waiting_frames: expected a whole number of at least 64"),
        ("discovery: {announce_period_s: 60}", "discovery.announce_period_s (60.0, file:"),
    ],
)
def test_refusals_name_file_key_and_what_is_expected(tmp_path: Path, text: str, says: str) -> None:
    message = refusal(tmp_path, text)
    assert says in message
    assert str(tmp_path / "swarm.yaml") in message


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml: can't be read: No such file"):
        load_settings(tmp_path / "gone.yaml")
    with pytest.raises(ConfigError, match="can't be read: Is a directory"):
        load_settings(tmp_path)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"# \xe9\n")
    with pytest.raises(ConfigError, match="expected text in UTF-8"):
        load_settings(latin)
    latin.write_bytes(b"#" * (2 << 20))
    with pytest.raises(ConfigError, match="larger than"):
        load_settings(latin)


def test_deeply_nested_yaml_is_an_error_like_any_other(tmp_path: Path) -> None:
    assert "not valid YAML" in refusal(tmp_path, "[" * 20_000)


# --- environment and flags


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("SWARM_PEER_THREADS", "two", "SWARM_PEER_THREADS: peer.threads: expected a whole number"),
        ("SWARM_PEER_THREADS", "", "expected a whole number"),
        ("SWARM_PEER_THREADS", "1_0", "expected a whole number"),
        ("SWARM_INFERENCE_TOP_P", "nan", "expected a number above 0, at most 1, got 'nan'"),
        ("SWARM_INFERENCE_TEMPERATURE", "1e999", "it must be finite"),
        ("SWARM_INFERENCE_TEMPERATURE", "1.2.3", "expected a number from 0 to 100, got '1.2.3'"),
        ("SWARM_PEER_CHECKPOINTS", "maybe", "expected true or false"),
        ("SWARM_INITIAL_PEERS", "example.org:4001", "such as /ip4/HOST/tcp/PORT/p2p/PEER_ID, got"),
        ("SWARM_PEER_THREAD", "1", "unknown variable 'SWARM_PEER_THREAD'; did you mean 'SWARM_PEER_THREADS'?"),
        ("SWARM_INITAL_PEERS", "", "did you mean 'SWARM_INITIAL_PEERS'?"),
    ],
)
def test_environment_refusals(name: str, value: str, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        load_settings(None, {name: value})


def test_variables_of_other_programs_are_left_alone() -> None:
    assert load_settings(None, {"SWARM_TORCH_INDEX": "x", "SWARM_ID": "docker", "SWARM": "1"}).settings == Settings()


@pytest.mark.parametrize(("text", "value"), [("true", True), ("0", False), ("YES", True), ("off", False)])
def test_switches_in_the_environment(text: str, value: bool) -> None:
    assert load_settings(None, {"SWARM_PEER_CHECKPOINTS": text}).settings.peer.checkpoints is value


def test_flag_refusals() -> None:
    with pytest.raises(ConfigError, match=r"--threads: peer\.threads: expected a whole number from 0 to 1024, got -2"):
        load_settings(flags={"threads": -2})
    with pytest.raises(ConfigError, match=r"unknown setting 'thread'; did you mean"):
        load_settings(flags={"thread": 2})
    with pytest.raises(ConfigError, match="got nan"):
        load_settings(flags={"temperature": float("nan")})
