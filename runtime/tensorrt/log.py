"""What TensorRT says, kept for the sentences that are made of it."""

from __future__ import annotations

from typing import Any


def make_logger(trt: Any) -> Any:
    """A logger with ``errors`` and ``warnings``, the last ones last."""

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in {trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR}:
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(message)

    return Log()


def last_error(log: Any) -> str:
    """The last error that was logged."""
    return str(log.errors[-1]) if log.errors else "it gives no reason"
