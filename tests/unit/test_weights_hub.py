"""The Hub's part, against a stand-in of its HTTP interface on the loopback: only what a range needs is fetched."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from safetensors.torch import load_file, save_file

from peers.weights import open_source
from swarm import hub
from swarm.errors import HubUnreachable, ModelError, UnknownModel
from swarm.models import ModelReference, TextTokenizer, config_dict, load_profile, resolve, tokenizer_files
from swarm.types import LayerRange
from tests.checkpoints import make_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class StandIn(ThreadingHTTPServer):
    """Serves one folder as the repository ``org/tiny``."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.fetched: list[str] = []
        self.asked = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def do_GET(self) -> None:
        self._serve(body=True)

    def _serve(self, *, body: bool) -> None:
        path = urlsplit(self.path).path
        if path.startswith("/api/models/"):
            self.server.asked += 1
            known = path.startswith("/api/models/org/tiny")
            self._answer(json.dumps(self._description()).encode() if known else b"{}", known, body, "application/json")
            return
        name = path.rpartition("/")[2]
        file = self.server.folder / name
        known = path.startswith(f"/org/tiny/resolve/{COMMIT}/") and file.is_file()
        if known and body:
            self.server.fetched.append(name)
        self._answer(file.read_bytes() if known else b"", known, body, "application/octet-stream")

    def _answer(self, content: bytes, known: bool, body: bool, kind: str) -> None:
        self.send_response(200 if known else 404)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        if not known:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if body:
            self.wfile.write(content)

    def _description(self) -> dict[str, Any]:
        siblings = []
        for file in sorted(self.server.folder.iterdir()):
            entry: dict[str, Any] = {"rfilename": file.name, "size": file.stat().st_size}
            if file.suffix == ".safetensors":
                digest = hashlib.sha256(file.read_bytes()).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": file.stat().st_size, "pointerSize": 130}
            siblings.append(entry)
        return {"id": "org/tiny", "sha": COMMIT, "siblings": siblings, "tags": [], "private": False, "downloads": 0}


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    from huggingface_hub import constants

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    hub.hub_repository.cache_clear()
    folder = make_checkpoint(tmp_path / "tiny", shard_bytes=100_000)
    server = StandIn(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    thread.join(5)
    server.server_close()
    hub.hub_repository.cache_clear()


@pytest.fixture
def reference(stand_in: StandIn) -> ModelReference:
    return resolve("org/tiny", endpoint=stand_in.endpoint)


def weight_files(stand_in: StandIn) -> list[str]:
    return [name for name in stand_in.fetched if name.endswith(".safetensors")]


def test_only_the_files_of_the_range_are_fetched(stand_in: StandIn, reference: ModelReference) -> None:
    by_tensor = json.loads((stand_in.folder / "model.safetensors.index.json").read_text())["weight_map"]
    wanted = {file for name, file in by_tensor.items() if name.startswith("model.layers.1.")}
    source = open_source(reference, LayerRange(1, 2))
    local = open_source(resolve(str(stand_in.folder)), LayerRange(1, 2))
    for name in local.names():
        assert torch.equal(source.read(name, torch.float32), local.read(name, torch.float32))
    assert set(weight_files(stand_in)) == wanted
    assert len(wanted) < len(set(by_tensor.values()))
    open_source(reference, LayerRange(1, 2))
    assert len(weight_files(stand_in)) == len(wanted)  # not fetched twice


def test_the_head_of_a_tied_model_is_fetched_to_be_compared(stand_in: StandIn, reference: ModelReference) -> None:
    index = stand_in.folder / "model.safetensors.index.json"
    facts = json.loads(index.read_text())
    table = load_file(stand_in.folder / facts["weight_map"]["model.embed_tokens.weight"])["model.embed_tokens.weight"]
    save_file({"lm_head.weight": table.clone()}, stand_in.folder / "own.safetensors")  # in a file of its own
    facts["weight_map"]["lm_head.weight"] = "own.safetensors"
    index.write_text(json.dumps(facts))
    config = json.loads((stand_in.folder / "config.json").read_text())
    (stand_in.folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert "lm_head.weight" not in open_source(reference, LayerRange(2, 4)).names()
    assert "own.safetensors" in weight_files(stand_in)


def test_profile_and_tokenizer_need_no_weights(stand_in: StandIn, reference: ModelReference) -> None:
    load_profile(reference)
    TextTokenizer(tokenizer_files(reference))
    assert config_dict(reference)["model_type"] == "llama"
    assert weight_files(stand_in) == []
    assert stand_in.asked == 1


def test_the_hub_and_a_folder_of_the_same_files_have_one_identity(stand_in: StandIn, reference: ModelReference) -> None:
    assert load_profile(reference) == load_profile(resolve(str(stand_in.folder)))


def test_a_single_file_repository(stand_in: StandIn, reference: ModelReference) -> None:
    for file in stand_in.folder.glob("model*"):
        file.unlink()
    make_checkpoint(stand_in.folder)
    assert len(open_source(reference, LayerRange(0, 4)).names()) == 4 * 9 + 3
    assert weight_files(stand_in) == ["model.safetensors"]


def test_what_was_fetched_once_works_without_the_hub(stand_in: StandIn, reference: ModelReference) -> None:
    profile = load_profile(reference)
    open_source(reference, LayerRange(0, 2))
    stand_in.folder.rename(stand_in.folder.with_name("gone"))
    hub.hub_repository.cache_clear()
    stand_in.shutdown()
    stand_in.server_close()
    assert load_profile(reference) == profile
    assert open_source(reference, LayerRange(0, 2)).names()


def test_an_unreachable_hub_and_an_unknown_repository_are_told_apart(stand_in: StandIn) -> None:
    with pytest.raises(UnknownModel, match="no public model org/other"):
        load_profile(resolve("org/other", endpoint=stand_in.endpoint))
    with pytest.raises(HubUnreachable, match="can't be asked for org/tiny") as caught:
        load_profile(resolve("org/tiny", endpoint="http://127.0.0.1:9"))
    assert caught.value.exit_code == 1, "not 2, after which systemd leaves a peer down: it may start before the network"


def test_missing_files_are_named(stand_in: StandIn, reference: ModelReference) -> None:
    index = json.loads((stand_in.folder / "model.safetensors.index.json").read_text())
    holder = index["weight_map"]["model.layers.0.mlp.up_proj.weight"]
    (stand_in.folder / holder).unlink()
    with pytest.raises(ModelError, match=f"lacks the file {holder}".replace(".", r"\.")):
        open_source(reference, LayerRange(0, 1))
    hub.hub_repository.cache_clear()
    (stand_in.folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_profile(reference)
