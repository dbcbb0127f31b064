"""Text to token ids and back, exactly as transformers does it, without importing transformers.

The files come from a peer, so they are checked as a stranger's: the chat template runs in jinja's sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from swarm.checkpoint_files import json_object
from swarm.errors import BadRequest, ModelError
from swarm.token_bytes import TokenBytes

if TYPE_CHECKING:
    from jinja2 import Template
    from tokenizers import Tokenizer

_REPLACEMENT = "\ufffd"
_MAX_POWER = 64
_MAX_REPEATED = 1_000_000
"""Limits of a chat template's arithmetic; no real template comes near."""
_SPECIALS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TextTokenizer:
    """Made of the files that :func:`swarm.models.tokenizer_files` yields."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        """Raises :class:`ModelError` if a file is missing or damaged."""
        from tokenizers import Tokenizer

        if "tokenizer.json" not in files:
            raise ModelError("there is no tokenizer.json among the model's files")
        settings = _json(files, "tokenizer_config.json")
        try:
            self._tokenizer: Tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
        except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
            raise ModelError(f"tokenizer.json is damaged: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._specials = _special_tokens(settings)
        self._template_text = _template_text(settings)
        self._template: Template | None = None
        self._bytes: TokenBytes | None = None
        generation = _json(files, "generation_config.json")
        self.repetition_penalty: float = generation.get("repetition_penalty") or 1.0
        """What transformers' ``generate`` takes where nobody names one, when it is greedy, too."""

    @property
    def has_chat_template(self) -> bool:
        return self._template_text is not None

    def encode(self, text: str) -> list[int]:
        """With the special tokens that ``tokenizer.json`` puts round every prompt; flags elsewhere, as in
        transformers 5, don't count. Raises :class:`BadRequest` for what is not valid Unicode."""
        return self._encode(text, add_special_tokens=True)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """Raises :class:`BadRequest` if the model has no chat template, or its template refuses the messages."""
        from jinja2 import TemplateError

        if self._template_text is None:
            raise BadRequest("this model has no chat template; give it a plain prompt")
        if not all(isinstance(message, Mapping) for message in messages):
            raise BadRequest('messages are a list of objects such as {"role": "user", "content": "..."}')
        try:
            if self._template is None:
                self._template = _compile(self._template_text)
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._specials,
            )
        # a template is a program: besides its own errors it can fail like any code at odd messages
        except (
            TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise BadRequest(f"the model's chat template does not accept these messages: {error}") from error

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """See :meth:`render_chat`; the template writes the special tokens itself, so none are added."""
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt)
        return self._encode(text, add_special_tokens=False)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            lone = f"U+{ord(text[error.start]):04X}"
            raise BadRequest(f"the text is not valid Unicode, or did not come as UTF-8: it has a lone {lone}") from None
        # of a batch: encode() of one text holds the interpreter's lock, and all other threads, until it is done
        return list(self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for; its bytes may be a part of a character."""
        if self._bytes is None:
            self._bytes = TokenBytes(self._tokenizer)
        return self._bytes[token_id]

    def stream(self) -> TextStream:
        return TextStream(self)


class TextStream:
    """Tokens to text, one at a time: the pieces joined are the text of all tokens together.

    A token is decoded together with the last one that gave text, because a tokenizer may treat the start of a
    text differently (SentencePiece drops its leading space) and a character may be spread over several tokens.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._shown = 0
        """Tokens at the start of the window whose text is out."""
        self._shown_text = ""

    def push(self, token_id: int) -> str:
        """What this token adds; empty while a character is incomplete."""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        if text.endswith(_REPLACEMENT):
            return ""
        return self._show(text)

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        return self._show(self._tokenizer.decode(self._window))

    def _show(self, text: str) -> str:
        piece = text[len(self._shown_text) :]
        if piece:
            # tokens without text of their own stay in the window, so that it never begins with one
            self._window = self._window[self._shown :]
            self._shown = len(self._window)
            self._shown_text = self._tokenizer.decode(self._window)
        return piece


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    return json_object(files.get(name, b"{}"), name)


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """``bos_token`` and the like; each is written as a string or as an object with ``content``."""
    found = {}
    for key in _SPECIALS:
        value = settings.get(key)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[key] = value
    return found


def _template_text(settings: dict[str, Any]) -> str | None:
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _compile(text: str) -> Template:
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # jinja's own escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(layout: str) -> str:
        return datetime.now().strftime(layout)

    class Environment(ImmutableSandboxedEnvironment):
        """The sandbox keeps a template from reaching out, but not from eating the machine: ``'x' * 10**10``."""

        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "**" and (not isinstance(right, int | float) or abs(right) > _MAX_POWER):
                raise SecurityError("a power is too large")
            if operator == "*":
                for factor, times in ((left, right), (right, left)):
                    if hasattr(factor, "__len__") and isinstance(times, int) and len(factor) * times > _MAX_REPEATED:
                        raise SecurityError("a repetition is too long")
            return super().call_binop(context, operator, left, right)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _generation_block()])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment.from_string(text)


def _generation_block() -> Any:
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class GenerationBlock(Extension):
        """``{% generation %}``: marks the assistant's text for training; here it is only its content."""

        tags = {"generation"}  # noqa: RUF012 - jinja's own way

        def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return GenerationBlock
