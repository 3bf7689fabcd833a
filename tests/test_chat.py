"""The client of an OpenAI-compatible server: what it sends, and what it asks again."""

import time
from types import SimpleNamespace

import pytest
from stub import Server, completion

from kit import chat
from kit.chat import Chat, ReplyError, ServerError

MESSAGES = [{"role": "user", "content": "Is it?"}]


@pytest.fixture
def server():
    server = Server()
    yield server
    server.end()


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
    assert first == {"model": "stub", "messages": MESSAGES, "temperature": 0.5, "max_tokens": 7}
    assert (second["model"], second["temperature"]) == ("mine", 0.0)


@pytest.mark.parametrize(
    "reply, kind, times",
    [
        ((503, b"busy"), ReplyError, 4),
        ((429, b"slow down"), ReplyError, 4),
        ((400, b"too long"), ReplyError, 1),
        ((404, b"no such model"), ServerError, 1),
        ((403, b"no"), ServerError, 1),
        ("late", ReplyError, 1),
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
    server.answer = lambda body: time.sleep(0.8) or (200, b"") if reply == "late" else reply
    with pytest.raises(kind):
        Chat(server.url, timeout=0.3).ask(MESSAGES)
    assert len(server.asked) == times
    assert [seconds for seconds in slept if seconds] == [1, 2, 4][: times - 1]


@pytest.mark.parametrize("models", [b"<html>", [], {}, {"data": []}, {"data": [[]]}])
def test_a_server_without_a_list_of_models_is_none(models, server):
    server.models = models
    with pytest.raises(ServerError, match="no list of models"):
        Chat(server.url)


def test_a_server_that_stumbles_is_asked_again(server, slept):
    replies = [(500, b"busy"), (200, completion("yes"))]
    server.answer = lambda body: replies.pop(0)
    assert Chat(server.url).ask(MESSAGES) == "yes" and max(slept) == 1


def test_a_reply_that_breaks_off_is_asked_again(server):
    client = Chat(server.url)
    server.promised = 1000
    with pytest.raises(ServerError, match="IncompleteRead"):
        client.ask(MESSAGES)
    assert len(server.asked) == 4
