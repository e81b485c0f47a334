"""The server's log: one JSON object a line on stderr, and no words of a client in it unless asked for."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone

_USUAL = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class Lines(logging.Formatter):
    """Everything that a record was given, as JSON."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        told = {"time": time, "level": record.levelname.lower(), "message": record.getMessage()}
        told |= {name: value for name, value in vars(record).items() if name not in _USUAL}
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False, default=str)


def log_lines(package: str) -> None:
    """Write what a package logs, from now on."""
    handler = logging.StreamHandler()
    handler.setFormatter(Lines())
    logger = logging.getLogger(package)
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
