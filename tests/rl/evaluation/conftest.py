"""A server on the loopback address that speaks OpenAI's chat-completions protocol."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Server(ThreadingHTTPServer):
    """Answers `\\boxed{2}` to every problem; keeps what it was asked; can be told to fail first."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = []
        self.keys = []
        self.failures = []
        self.finish = "stop"
        self.answer = "So the answer is \\boxed{2}."
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def reply(self, status, tree):
        body = json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.reply(200, {"data": [{"id": "tiny"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(body)
            self.server.keys.append(self.headers.get("Authorization"))
            failure = self.server.failures.pop() if self.server.failures else None
        if failure == "hang up":
            self.connection.close()
        elif failure:
            self.reply(failure, {"error": "busy"})
        else:
            message = {"role": "assistant", "content": self.server.answer}
            choice = {"message": message, "finish_reason": self.server.finish}
            self.reply(200, {"choices": [choice], "usage": {"completion_tokens": 7}})


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
