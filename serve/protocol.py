"""HTTP as uvicorn speaks it, to clients that do not take for ever over their headers."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_HEADERS = 16 << 10
"""Bytes of a request's line and headers."""
HEADER_SECONDS = 10.0
"""For them to come, from the connection or from the first byte of another request on it; and for the rest of
a body that was answered before it was read."""


class Protocol(H11Protocol):
    """uvicorn bounds how long an answered connection may be idle, and not how long headers may take."""

    late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        answered = self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE
        if answered or self.conn.their_state is h11.IDLE:
            self._expect_headers()
        else:
            self._cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        if self.late is None:  # a byte more is no reason to wait longer
            self.late = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _cancel(self) -> None:
        if self.late is not None:
            self.late.cancel()
            self.late = None
