"""A proxy in front of an S3 server that loses, refuses, delays and tears what passes through it.

The Host header goes on as the client sent and signed it, so signatures hold. Each reply is read
whole before any of it is passed on, so a fault that spares the server does not depend on timing.
"""

import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from pipelines.config import StorageSection
from pipelines.storage import Store, open_store


class Fault(Enum):
    LOST_REPLY = "the server did it, the client never hears"
    LOST_REQUEST = "the server never hears"
    SLOW_DOWN = "503 SlowDown, not passed on"
    CONFLICT = "409 ConditionalRequestConflict, not passed on"
    STALE_REFUSAL = "412 PreconditionFailed, not passed on"
    DELAY = "the reply comes late"
    SHORT_BODY = "half the body of the reply, then the connection ends"
    TORN_UPLOAD = "half the body reaches the server, then both connections are reset"


_REFUSALS = {
    Fault.SLOW_DOWN: (503, "SlowDown", "Please reduce your request rate."),
    Fault.CONFLICT: (409, "ConditionalRequestConflict", "A conflicting operation is under way."),
    Fault.STALE_REFUSAL: (
        412,
        "PreconditionFailed",
        "At least one of the pre-conditions you specified did not hold",
    ),
}


@dataclass(frozen=True)
class Request:
    """`path`: decoded, with the query: /bucket/key?list-type=2."""

    method: str
    path: str
    headers: dict[str, str]  # names in lower case


@dataclass(frozen=True)
class Exchange:
    """A line of the log. `status` None: the client got no (whole) reply."""

    method: str
    path: str
    fault: Fault | None
    status: int | None


@dataclass
class _Rule:
    fault: Fault
    matches: Callable[[Request], bool]
    at: int
    times: int
    seconds: float
    seen: int = 0


@dataclass
class FaultProxy:
    """`with FaultProxy(server_url) as proxy:` clients use `proxy.url`; workers may, too."""

    upstream: str
    log: list[Exchange] = field(default_factory=list)
    _rules: list[_Rule] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> "FaultProxy":
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def options(self) -> StorageSection:
        return StorageSection(endpoint_url=self.url)

    def before(self, store: Store) -> Store:
        """The same folder, reached through the proxy."""
        return open_store(store.url, self.options)

    def inject(
        self,
        fault: Fault,
        *,
        method: str | None = None,
        path: str = "",
        where: Callable[[Request], bool] = lambda request: True,
        at: int = 0,
        times: int = 1,
        seconds: float = 0.0,
    ) -> None:
        """Let the `at`-th request from now (from 0) with this method, `path` in its path and
        `where` true meet `fault`, and the next `times` - 1 of them. `seconds`: of a delay.
        """

        def matches(request: Request) -> bool:
            return method in (None, request.method) and path in request.path and where(request)

        with self._lock:
            self._rules.append(_Rule(fault, matches, at, times, seconds))

    def clear(self) -> None:
        """Forget faults and log."""
        with self._lock:
            self._rules.clear()
            self.log.clear()

    @property
    def hits(self) -> list[Exchange]:
        """The exchanges that met a fault."""
        with self._lock:
            return [exchange for exchange in self.log if exchange.fault is not None]

    def _rule_for(self, request: Request) -> _Rule | None:
        """The first rule whose turn it is; every matching rule counts the request."""
        chosen = None
        with self._lock:
            for rule in self._rules:
                if rule.matches(request):
                    if chosen is None and rule.at <= rule.seen < rule.at + rule.times:
                        chosen = rule
                    rule.seen += 1
        return chosen

    def _note(self, exchange: Exchange) -> None:
        with self._lock:
            self.log.append(exchange)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # kept-alive connections would hold up the end of a test
    request_queue_size = 128
    proxy: FaultProxy

    def handle_error(self, request, client_address) -> None:
        """Clients that hang up are the point here: no traceback."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    wbufsize = -1  # one packet for head and body; flushed by hand
    timeout = 60

    def log_message(self, *arguments: object) -> None:
        """The proxy keeps a log of its own."""

    def handle_expect_100(self) -> bool:
        super().handle_expect_100()
        self.wfile.flush()
        return True

    def _pass(self) -> None:
        names = {name.lower(): value for name, value in self.headers.items()}
        self._request = Request(self.command, unquote(self.path), names)
        self._rule = self.server.proxy._rule_for(self._request)
        fault = self._rule.fault if self._rule else None
        if fault in _REFUSALS:
            self._read_body()
            self._refuse(*_REFUSALS[fault])
        elif fault is Fault.LOST_REQUEST:
            self._read_body()
            self._ends_with(None)
        elif fault is Fault.TORN_UPLOAD:
            self._tear()
        else:
            self._forward(fault)
        with suppress(OSError):
            self.wfile.flush()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass

    def _ends_with(self, status: int | None) -> None:
        """Note the exchange, before the client knows; without a status the connection ends."""
        fault = self._rule.fault if self._rule else None
        exchange = Exchange(self._request.method, self._request.path, fault, status)
        self.server.proxy._note(exchange)
        self.close_connection |= status is None

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send_upstream(self, length: int, body: bytes) -> http.client.HTTPConnection:
        """The head, which announces `length` bytes, and `body`."""
        host = urlsplit(self.server.proxy.upstream).netloc
        upstream = http.client.HTTPConnection(host, timeout=60)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        own = {"connection", "expect", "transfer-encoding", "content-length"}  # of each hop
        for name, value in self.headers.items():
            if name.lower() not in own:
                upstream.putheader(name, value)
        if length or self.command in ("PUT", "POST"):
            upstream.putheader("Content-Length", str(length))
        upstream.endheaders(body or None)
        return upstream

    def _forward(self, fault: Fault | None) -> None:
        body = self._read_body()
        upstream = self._send_upstream(len(body), body)
        with upstream.getresponse() as reply:
            answer = reply.read()
        upstream.close()
        if self._rule and fault is Fault.DELAY:
            time.sleep(self._rule.seconds)
        torn = fault in (Fault.LOST_REPLY, Fault.SHORT_BODY)
        self._ends_with(None if torn else reply.status)
        if fault is not Fault.LOST_REPLY:
            kept = answer[: len(answer) // 2] if torn else answer
            self._answer(reply.status, reply.reason, reply.getheaders(), kept)

    def _tear(self) -> None:
        """Take half an upload, pass that on, and end both connections: unread data means RST."""
        length = int(self.headers.get("Content-Length", 0))
        upstream = self._send_upstream(length, self.rfile.read(length // 2))
        linger = struct.pack("ii", 1, 0)  # close with RST
        upstream.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        upstream.close()
        self._ends_with(None)

    def _refuse(self, status: int, code: str, message: str) -> None:
        error = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
        text = f"<?xml version='1.0'?>{error}"
        body = b"" if self.command == "HEAD" else text.encode()
        headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
        self._ends_with(status)
        self._answer(status, code, headers, body)

    def _answer(
        self, status: int, reason: str, headers: list[tuple[str, str]], body: bytes
    ) -> None:
        """`body` may be shorter than the Content-Length of `headers`; HEAD has none at all."""
        self.send_response_only(status, reason)
        lengths = [value for name, value in headers if name.lower() == "content-length"]
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", lengths[0] if lengths else str(len(body)))
        self.end_headers()
        self.wfile.write(body)
