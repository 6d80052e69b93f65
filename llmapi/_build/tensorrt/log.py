"""What TensorRT says while it builds or loads: kept for messages, and passed on to llmapi's log."""

from __future__ import annotations

import logging
from typing import Any

log = logging.getLogger("llmapi")

_SHOWN = 400  # characters of a message


def make_logger(trt: Any) -> Any:
    """A logger for TensorRT; ``take()`` gives the errors since the last time it was asked.

    Args:
        trt: the module; the class is made here because it derives from one of it.
    """

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            text = " ".join(message.split())[:_SHOWN]
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self._errors.append(text)
                log.debug("tensorrt: %s", text)
            elif severity == trt.ILogger.WARNING:
                log.debug("tensorrt: %s", text)

        def take(self) -> list[str]:
            found, self._errors = self._errors, []
            # That there is no driver is said on the side and stops no build.
            return [text for text in found if "cudaError 35" not in text] or found

    return Logger()
