"""A server on this machine that answers as it is told to, and keeps what it was asked."""

import contextlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-a-key-that-nobody-may-see-0123456789"


def completion(text, *, reason="stop", used=7):
    """Return a body as a good endpoint sends it."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": reason}
    return {"choices": [choice], "usage": {"prompt_tokens": used}}


@dataclass
class Reply:
    """What the server does with one request.

    Attributes:
        body: JSON, or bytes as they are.
        status: the last reply's is repeated.
        headers: more of them.
        before: seconds of silence.
        pause: seconds between bytes of the body.
        hangs_up: close the connection instead.
    """

    body: object = b""
    status: int = 200
    headers: dict = field(default_factory=dict)
    before: float = 0.0
    pause: float = 0.0
    hangs_up: bool = False


@dataclass
class Asked:
    """One request."""

    path: str
    headers: dict
    body: dict


@contextlib.contextmanager
def fake_endpoint(*replies):
    """Serve replies in turn, the last one again and again; yield the base URL and the requests."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            reply = replies[min(len(asked), len(replies) - 1)]
            asked.append(Asked(self.path, dict(self.headers), json.loads(body)))
            time.sleep(reply.before)
            if reply.hangs_up:
                self.close_connection = True
                return
            is_raw = isinstance(reply.body, bytes)
            content = reply.body if is_raw else json.dumps(reply.body).encode()
            with contextlib.suppress(ConnectionError):  # the client has given up
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if not reply.pause:
                    self.wfile.write(content)
                    return
                for byte in content:
                    self.wfile.write(bytes([byte]))
                    time.sleep(reply.pause)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
