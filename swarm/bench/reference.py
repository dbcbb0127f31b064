"""``transformers`` ``generate`` on the whole model, in a process of its own: what a swarm is compared with.

``python -m swarm.bench.reference MODEL DTYPE THREADS`` reads one request a line and answers each with one line. It
ends with its stdin, so it can't outlive its owner.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from swarm.bench.runs import Run
from swarm.children import PYTHON, inherited_environment
from swarm.errors import Internal
from swarm.models import ModelReference, resolve

STOP_S = 10.0


class Reference:
    """The owner's side. Calls block; closing ends one that waits, with :class:`Internal`."""

    def __init__(self, model: str, dtype: str, threads: int = 1) -> None:
        self._process = subprocess.Popen(
            [*PYTHON, "-m", "swarm.bench.reference", model, dtype, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C in the terminal is for the owner
            env=inherited_environment() | {"TQDM_DISABLE": "1"},
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._process.kill()
        self._process.wait(STOP_S)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def ready(self) -> None:
        """Wait until the model is loaded."""
        self._answer()

    def generate(self, prompt: Sequence[int], max_tokens: int) -> Run:
        """Greedy, and past the end of the text: exactly ``max_tokens``."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"prompt": list(prompt), "max_tokens": max_tokens}) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise Internal(f"the transformers process is gone: {error}") from None
        answer = self._answer()
        return Run(list(answer["token_ids"]), list(answer["times"]))

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        try:
            line = self._process.stdout.readline()
        except ValueError:  # closed meanwhile
            line = ""
        if not line:
            raise Internal("the transformers process ended; what it said is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


# ---- the process ----------------------------------------------------------------------------------------------------


def _load(reference: ModelReference) -> Any:
    """The model as transformers itself reads it."""
    import torch
    import transformers

    library: Any = transformers  # it is half typed
    dtype = getattr(torch, reference.dtype)
    if reference.kind == "folder":
        return library.AutoModelForCausalLM.from_pretrained(str(reference.path), dtype=dtype)
    if reference.kind == "hub":
        return library.AutoModelForCausalLM.from_pretrained(reference.repo, revision=reference.revision, dtype=dtype)
    # What from_pretrained(gguf_file=...) does, without accelerate, which that asks for and does not need.
    read: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils").load_gguf_checkpoint
    path = str(reference.path)
    config = library.AutoConfig.for_model(**read(path)["config"])
    with torch.device("meta"):
        bare = library.AutoModelForCausalLM.from_config(config)
    tensors = read(path, return_tensors=True, model_to_load=bare)["tensors"]
    model = library.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(tensors, strict=False)  # a tied head is not in the file
    return model


def _serve(model_name: str, dtype: str, threads: int) -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # for whatever a library prints
    import torch
    from transformers.generation.streamers import BaseStreamer

    torch.set_num_threads(threads)
    model = _load(resolve(model_name, dtype)).eval()

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: object) -> None:
            self.times.append(time.perf_counter())  # the first is the prompt: when generate() begins

        def end(self) -> None:
            pass

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    say({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        ids, clock = torch.tensor([request["prompt"]]), Clock()
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=request["max_tokens"],
                eos_token_id=None,
                pad_token_id=0,
                streamer=clock,
            )
        times = [at - clock.times[0] for at in clock.times[1:]]
        say({"token_ids": output[0, ids.shape[1] :].tolist(), "times": times})


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
