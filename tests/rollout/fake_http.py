"""The fake server's HTTP: one thread a connection, and faults that show on the wire."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import json
import select
import socket
import struct
import sys
import urllib.parse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tests.rollout.fake_faults import Fault

if TYPE_CHECKING:
    from tests.rollout.fake_sglang import FakeServer


class Refusal(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, body: Any) -> None:
        super().__init__(str(body))
        self.status, self.body = status, body


class Gone(Exception):
    """The client, or this server, went away."""


class HttpServer(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], handler: Any) -> None:
        self.connections: set[socket.socket] = set()
        super().__init__(address, handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections break here on purpose, on both sides: only other errors are told."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def reset(connection: socket.socket) -> None:
    """Close at once, as the kernel does for a killed process."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)


@dataclasses.dataclass(frozen=True)
class Peer:
    connection: socket.socket

    def gone(self) -> bool:
        """Whether the client has closed its end."""
        try:
            readable, _, _ = select.select([self.connection], [], [], 0)
            return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""
        except (OSError, ValueError):
            return True


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, *args: Any, server_state: FakeServer) -> None:
        self._state = server_state
        super().__init__(*args)

    def do_GET(self) -> None:
        self._serve(None)

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._serve(json.loads(text) if text else None)

    def log_message(self, *_: object) -> None:
        """Silence."""

    def _serve(self, body: Any) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        try:
            if not self._state.authorised(url.path, self.headers.get("Authorization")):
                raise Refusal(401, {"error": "Unauthorized"})
            faults = self._state.receive(url.path, body)
            with self._state.alone(url.path):
                for fault in self._before(faults):
                    raise Refusal(fault.status, {"error": {"message": "a scripted fault"}})
                answer = self._state.answer(url.path, query, body, faults, Peer(self.connection))
            for fault in faults:
                if fault.kind == "edit":
                    self._state.edit(fault, answer)
            kinds = {fault.kind for fault in faults}
            self._send(200, answer, cut="cut" in kinds, truncate="truncate" in kinds)
        except Refusal as refusal:
            self._send(refusal.status, refusal.body)
        except Gone:
            self.close_connection = True
            reset(self.connection)

    def _before(self, faults: list[Fault]) -> Iterator[Fault]:
        """Let the faults happen that come before an answer; yields those that replace it."""
        peer = Peer(self.connection)
        for fault in faults:
            if fault.kind == "hang":
                self._state.hang(peer)
            elif fault.kind == "delay":
                # The real server loads weights to the end, whoever still waits.
                loads = fault.path == "/update_weights_from_disk"
                self._state.pause_for(fault.seconds, None if loads else peer)
            elif fault.kind == "drop":
                raise Gone
            elif fault.kind == "status":
                yield fault

    def _send(self, status: int, answer: Any, *, cut: bool = False, truncate: bool = False) -> None:
        is_text = isinstance(answer, str)
        data = answer.encode() if is_text else json.dumps(answer).encode()
        data = data[: len(data) // 2] if truncate else data
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if is_text else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            raise Gone
