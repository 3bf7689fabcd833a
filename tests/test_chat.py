"""The client of an OpenAI-compatible server: what it sends, and what it asks again."""

import http.server
import json
import threading
import time
from types import SimpleNamespace

import pytest

from kit import chat
from kit.chat import Chat, ReplyError, ServerError

MESSAGES = [{"role": "user", "content": "Is it?"}]


def completion(content, end="stop"):
    return {"choices": [{"message": {"content": content}, "finish_reason": end}]}


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers each POST with server.reply: (status, body), or seconds to sleep before "yes"."""

    def send(self, status, body):
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(max(len(text), self.server.length)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self):
        self.send(200, self.server.models)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body, self.headers["Authorization"]))
        reply = self.server.reply
        if isinstance(reply, float):
            time.sleep(reply)
            reply = 200, completion("yes")
        self.send(*reply)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *args: None  # a client that went away
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    server.models = {"data": [{"id": "first"}, {"id": "second"}]}
    server.reply, server.length, server.asked = (200, completion("yes")), 0, []
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def slept(monkeypatch):
    """Seconds that the client would have slept."""
    found = []
    monkeypatch.setattr(chat, "time", SimpleNamespace(sleep=found.append))
    return found


def test_the_client_names_model_and_key(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert Chat(server.url + "/").ask(MESSAGES, 0.5, 7) == "yes"
    assert Chat(server.url, "mine").ask(MESSAGES) == "yes"
    (path, first, key), (_, second, _) = server.asked
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert first == {"model": "first", "messages": MESSAGES, "temperature": 0.5, "max_tokens": 7}
    assert (second["model"], second["temperature"]) == ("mine", 0.0)


@pytest.mark.parametrize(
    "reply, kind, times",
    [
        ((503, b"busy"), ReplyError, 4),
        ((429, b"slow down"), ReplyError, 4),
        ((400, b"too long"), ReplyError, 1),
        ((404, b"no such model"), ServerError, 1),
        ((403, b"no"), ServerError, 1),
        (0.8, ReplyError, 1),
        ((200, completion(None)), ReplyError, 1),
        ((200, completion(["a"])), ReplyError, 1),
        ((200, completion(" ")), ReplyError, 1),
        ((200, completion("a", "length")), ReplyError, 1),
        ((200, b"<html>"), ReplyError, 4),
        ((200, []), ReplyError, 1),
        ((200, {}), ReplyError, 1),
        ((200, {"choices": []}), ReplyError, 1),
        ((200, {"choices": [[]]}), ReplyError, 1),
    ],
)
def test_what_is_asked_again_and_what_is_not(reply, kind, times, server, slept):
    server.reply = reply
    with pytest.raises(kind):
        Chat(server.url, timeout=0.3).ask(MESSAGES)
    assert len(server.asked) == times
    assert [seconds for seconds in slept if seconds] == [1, 2, 4][: times - 1]


@pytest.mark.parametrize("models", [b"<html>", [], {}, {"data": []}, {"data": [[]]}])
def test_a_server_without_a_list_of_models_is_none(models, server):
    server.models = models
    with pytest.raises(ServerError, match="no list of models"):
        Chat(server.url)


def test_a_reply_that_breaks_off_is_asked_again(server):
    client = Chat(server.url)
    server.length = 1000
    with pytest.raises(ServerError, match="IncompleteRead"):
        client.ask(MESSAGES)
    assert len(server.asked) == 4
