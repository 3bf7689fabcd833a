"""A server that speaks OpenAI's chat protocol, for the tests of the client and of what uses it."""

import http.server
import json
import sys
import threading


def completion(text, end="stop"):
    return {"choices": [{"message": {"content": text}, "finish_reason": end}]}


class Server(http.server.ThreadingHTTPServer):
    """answer(body of a request) gives (status, reply), bytes or what becomes JSON. asked: (path,
    body, key) of each request."""

    daemon_threads = True
    request_queue_size = 64
    models = {"data": [{"id": "stub"}, {"id": "other"}]}
    promised = 0  # bytes of a reply, at least

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.asked = []
        self.problems = []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, body):
        return 200, completion("yes")

    def handle_error(self, request, address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that was killed
            self.problems.append(repr(sys.exc_info()[1]))

    def end(self):
        self.shutdown()
        self.server_close()
        assert not self.problems


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def send(self, status, reply):
        text = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(max(len(text), self.server.promised)))
        self.end_headers()
        self.wfile.write(text)
        self.close_connection = True

    def do_GET(self):
        is_list = self.path == "/v1/models"
        self.send(200 if is_list else 404, self.server.models)

    def do_POST(self):
        length = int(self.headers["Content-Length"])
        text = self.rfile.read(length)
        if len(text) == length:  # or the client was killed as it asked
            self.server.asked.append((self.path, json.loads(text), self.headers["Authorization"]))
            self.send(*self.server.answer(json.loads(text)))

    def log_message(self, *args):
        pass
