"""A server with OpenAI's chat API for tests: it answers from a function, after the faults that a test asks for."""

import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any]], Any]


class ChatServer(ThreadingHTTPServer):
    """Keeps every request with its time; `faults` of a prompt come before its answer, one per request."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, answer: Answer, faults: Mapping[str, Sequence[Any]] | None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.faults = answer, dict(faults or {})
        self.lock, self.seen = threading.Lock(), Counter[str]()
        self.requests: list[tuple[float, str, dict[str, Any]]] = []
        self.headers: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, *_given: Any) -> None:
        """Say nothing of clients that hung up."""

    def next_fault(self, body: dict[str, Any]) -> Any:
        """The fault of this request; faults are listed under words of the user's message, or "" for all others."""
        said = body["messages"][-1]["content"]
        with self.lock:
            self.requests.append((time.monotonic(), said, body))
            self.seen[said] += 1
            named = [found for words, found in self.faults.items() if words and re.search(rf"{words}\b", said)]
            faults = named[0] if named else self.faults.get("", ())
            return faults[self.seen[said] - 1] if self.seen[said] <= len(faults) else None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ChatServer

    def log_message(self, *_given: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.headers.append({name.lower(): value for name, value in self.headers.items()})
        match self.server.next_fault(body):
            case "drop":  # a reset: the client reads no end of a reply
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()
            case "half":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"choices": [')
                self.close_connection = True
            case ("slow", float(seconds)):
                time.sleep(seconds)
                self.reply(200, self.server.answer(body))
            case (int(status), str(message)):
                self.reply(status, {"error": {"message": message}})
            case (int(status), str(message), dict(headers)):
                self.reply(status, {"error": {"message": message}}, headers)
            case None:
                self.reply(200, self.server.answer(body))
            case other:  # a whole reply, as text or JSON
                self.reply(200, other)

    def reply(self, status: int, content: Any, headers: Mapping[str, str] | None = None) -> None:
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def chat_server(answer: Answer, faults: Mapping[str, Sequence[Any]] | None = None) -> Iterator[ChatServer]:
    server = ChatServer(answer, faults)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)
