"""A peer's imports: without the compiler and its like, for every family, and with the same results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from peers.families import FAMILIES

ROOT = Path(__file__).parents[2]
PRINT = """
import hashlib, json, sys
import torch
from peers.families import FAMILIES, build_model
from peers.shard import Shard, Step
from swarm.types import LayerRange
from tests.lean_reference import SIZES, RandomSource, profile
torch.set_num_threads(1)
digests = {}
for family in FAMILIES:
    layers = LayerRange(0, SIZES["num_hidden_layers"])
    config = {"model_type": family, **SIZES}
    source = RandomSource(build_model(config, torch.device("cpu")))
    shard = Shard.load(profile(family), config, source, layers)
    (output,) = shard.run([Step(layers, shard.new_cache(layers, 8), 0, token_ids=[3, 1, 4, 1, 5], head_rows=5)])
    digests[family] = hashlib.sha256(output.logits.numpy().tobytes()).hexdigest()
unwanted = ("scipy", "sympy", "accelerate", "torch._dynamo", "torch.distributed.tensor", "trio")
print(json.dumps({"digests": digests, "unwanted": [name for name in unwanted if name in sys.modules]}))
"""
LEAN = "from peers.lean_imports import import_transformers; import_transformers()\n"


def run(program: str) -> tuple[dict[str, object], str]:
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.slow  # starts two processes that import transformers
def test_every_family_runs_the_same_and_nothing_unneeded_is_loaded() -> None:
    lean, _ = run(LEAN + PRINT)
    whole, _ = run(PRINT)
    assert set(lean["digests"]) == set(FAMILIES)  # type: ignore[call-overload]
    assert lean["digests"] == whole["digests"]
    assert lean["unwanted"] == []


def test_an_interrupt_while_numpy_is_imported_is_heard() -> None:
    """Else numpy, half imported, fails whoever needs it next."""
    program = """
import json, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "numpy._core.overrides":
            sys.meta_path.remove(self)
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
from peers.lean_imports import import_transformers
try:
    import_transformers()
except KeyboardInterrupt:
    print(json.dumps({"heard": "torch" not in sys.modules}))
"""
    assert run(program)[0] == {"heard": True}


@pytest.mark.slow
def test_what_was_stood_in_for_is_there_for_whoever_imports_it_later() -> None:
    program = """
import json
import torch._dynamo, transformers.generation.continuous_batching, transformers.quantizers
from huggingface_hub import HfApi, hf_hub_download
from transformers import AutoModelForCausalLM
print(json.dumps([torch._dynamo.disable.__module__, HfApi.__module__, hf_hub_download.__module__]))
"""
    modules, _ = run(LEAN + program)
    assert modules == ["torch._dynamo.decorators", "huggingface_hub.hf_api", "huggingface_hub.file_download"]


@pytest.mark.slow
def test_a_changed_layout_means_the_ordinary_import() -> None:
    program = """
import json, peers.lean_imports as lean
lean._UNAVAILABLE = ("something_that_transformers_never_heard_of",)
lean.import_transformers()
import transformers.modeling_utils
from transformers import AttentionInterface, GenerationMixin
from peers.families import build_model
print(json.dumps({"type": type(transformers.modeling_utils).__name__, "dynamo": "torch._dynamo" in lean.sys.modules}))
"""
    facts, complaint = run(program)
    assert facts == {"type": "module", "dynamo": True}
    assert "imported whole" in complaint
