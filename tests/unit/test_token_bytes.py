"""Tokens as bytes, and log-probabilities off the wire."""

from __future__ import annotations

import math

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

from swarm import protocol_pb2 as pb
from swarm.errors import ProtocolError
from swarm.models import TextTokenizer, resolve, tokenizer_files
from swarm.protocol import LEAST_LOGPROB, logprobs_from_wire, logprobs_to_wire
from swarm.sampling import SampleResult
from swarm.token_bytes import TokenBytes


@pytest.mark.parametrize(
    "text", ["plain words", " \n\t", "na\u00efve caf\u00e9", "\u4e9c\U0001f642", "<|im_start|>user"]
)
def test_tokens_of_a_text_are_its_bytes(text: str) -> None:
    tokenizer = TextTokenizer(tokenizer_files(resolve("smollm2-135m")))
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()


def test_sentencepiece_has_spaces_and_single_bytes() -> None:
    vocabulary = {"<unk>": 0, "\u2581the": 1, "<0xE4>": 2, "a": 3}
    tokenizer = Tokenizer(BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    found = TokenBytes(tokenizer)
    assert [found[token_id] for token_id in range(5)] == [b"<unk>", b" the", b"\xe4", b"a", b""]


def test_log_probabilities_travel() -> None:
    data = logprobs_to_wire(SampleResult(3, -0.5, ((3, -0.5), (9, -math.inf))))
    assert logprobs_from_wire(pb.Logprobs.FromString(data), 10) == (-0.5, ((3, -0.5), (9, LEAST_LOGPROB)))


@pytest.mark.parametrize(
    "told",
    [
        pb.Logprobs(logprob=math.nan),
        pb.Logprobs(logprob=-math.inf),
        pb.Logprobs(logprob=0.5),
        pb.Logprobs(logprob=-1, top_ids=[1], top_logprobs=[]),
        pb.Logprobs(logprob=-1, top_ids=[10], top_logprobs=[-1]),
        pb.Logprobs(logprob=-1, top_ids=[1], top_logprobs=[math.nan]),
        pb.Logprobs(logprob=-1, top_ids=[1] * 21, top_logprobs=[-1] * 21),
    ],
)
def test_what_is_no_log_probability_is_refused(told: pb.Logprobs) -> None:
    with pytest.raises(ProtocolError):
        logprobs_from_wire(told, 10)
