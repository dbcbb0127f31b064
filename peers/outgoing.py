"""What a stage says to its targets: frames to peers, tokens to the owner. Pure."""

from __future__ import annotations

from peers.stage import Stage, Target
from peers.step_answers import step_to_wire
from swarm import protocol_pb2 as pb
from swarm.models import ModelProfile
from swarm.protocol import put_rows
from swarm.wire import encoding_of


def output_of(stage: Stage, target: Target, start: int, end: int) -> pb.Output:
    """The tokens that follow positions ``start .. end - 1``, for the owner."""
    output = pb.Output(epoch=target.epoch, start=start, token_ids=stage.tokens[start + 1 : end + 1])
    if stage.logprobs:
        # Prompt tokens, which an owner may ask for as well, have none.
        told = (stage.logprobs.get(place, b"") for place in range(start + 1, end + 1))
        output.logprobs.extend(pb.Logprobs.FromString(data) for data in told)
    output.hops.extend(stage.trace.get(end, ()))
    return output


def frame_of(
    stage: Stage, target: Target, start: int, end: int, profile: ModelProfile, most_rows: int
) -> pb.LinkMessage:
    """Outputs ``start .. end - 1`` for a peer: hidden states, or tokens for the first stage. What may follow the newest
    token goes round the ring with it, in ``most_rows`` at most."""
    message = pb.LinkMessage()
    frame = message.frame  # filled in place: messages copy what they are made of
    frame.session, frame.epoch, frame.sequence, frame.layer = stage.session, target.epoch, target.sequence, target.layer
    frame.start = start
    if not stage.is_decode(start, end):
        frame.want_ack = True
    if stage.step_mode:
        frame.step.CopyFrom(step_to_wire(stage.step))
    if stage.log is None:
        frame.start = start + 1
        frame.token_ids.extend(stage.tokens[start + 1 : end + 1])
        draft = stage.guess(most_rows - len(frame.token_ids)) if end == stage.output_end else None
        if draft is not None and draft.ids:
            frame.token_ids.extend(draft.ids)
            frame.draft, frame.draft_start = draft.number, draft.start
    else:
        if stage.draft and end > stage.draft_start:
            frame.draft, frame.draft_start = stage.draft, stage.draft_start
        encoding = encoding_of(stage.output_wire, profile.dtype)
        put_rows(frame.hidden, stage.log.read(start, end), encoding, profile.hidden_size)
        frame.hops.extend(stage.trace.get(end, ()))
    return message
