"""Lines of log on stderr: text for people, or JSON for whatever collects them."""

from __future__ import annotations

import json
import logging
import sys
from typing import TextIO

from swarm.terminal import shared_line


class JsonFormatter(logging.Formatter):
    """One object a line: ``time`` (Unix), ``level``, ``logger``, ``message``, and ``exception`` where there is one.

    What a caller gives as ``extra={"fields": {...}}`` stands beside them.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


STAMPED = "%(asctime)s %(name)s: %(message)s"


class _Reports(logging.StreamHandler[TextIO]):
    def emit(self, record: logging.LogRecord) -> None:
        shared_line.leave()
        super().emit(record)


def log_to_stderr(level: int, log_format: str, text_format: str = STAMPED) -> None:
    """``log_format``: ``text``, in ``text_format``, or ``json``. What was set up before is replaced."""
    handler = _Reports(sys.stderr)
    text = logging.Formatter(text_format)
    handler.setFormatter(JsonFormatter() if log_format == "json" else text)
    logging.basicConfig(level=level, handlers=[handler], force=True)


def say(program: str, text: str) -> None:
    """To whoever started ``program``: name and ``text`` on stderr, or objects like the others where logs are JSON."""
    formatters = (handler.formatter for handler in logging.getLogger().handlers)
    json_format = next((formatter for formatter in formatters if isinstance(formatter, JsonFormatter)), None)
    shared_line.leave()
    for line in text.splitlines():
        record = logging.LogRecord(program, logging.INFO, "", 0, line, None, None)
        print(json_format.format(record) if json_format else f"{program}: {line}", file=sys.stderr, flush=True)
