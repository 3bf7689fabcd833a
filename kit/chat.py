"""Chat: the client of an OpenAI-compatible server (`vllm serve MODEL`), for building and judging.

    ask(messages)  --POST URL/chat/completions-->  choices[0].message.content

    what came                             what follows
    ------------------------------------  -----------------------------------------------------
    401, 403, 404                         ServerError: anything else would fail in the same way
    429, 5xx, or not JSON                 asked again after 1, 2 and 4 seconds, then ReplyError
    no connection, or it broke            the same, then ServerError
    another 4xx (the prompt is too long)  ReplyError: this reply is lost
    nothing within the timeout            ReplyError: asked again, the server would work on both
    empty, cut off, or no completion      ReplyError: whoever asked may ask again

So a caller ends at a ServerError, and decides about one reply at a ReplyError (kit/work.py tries
again, then keeps the reason). The openai package does the same with a dozen dependencies; streams,
tools and batches, which it has besides, are not needed here.

Check this file alone:  pytest tests/test_chat.py
"""

import http.client
import json
import os
import time
import urllib.error
import urllib.request


class ServerError(RuntimeError):
    """The server cannot be used at all: asking it anything else would fail in the same way."""


class ReplyError(ValueError):
    """One reply is lost: it failed again and again, or is not what was asked for."""


class Chat:
    """An OpenAI-compatible server. url: up to and with /v1; $OPENAI_API_KEY is sent to it. model:
    its name there; default: the first that the server names. timeout: seconds for one reply.
    ServerError if it does not list its models."""

    def __init__(self, url: str, model: str | None = None, timeout: float = 300):
        self.url = url.rstrip("/")
        self.timeout = timeout
        self.key = os.environ.get("OPENAI_API_KEY", "")
        try:
            served = self._request("/models")["data"][0]["id"]  # even if not used: is it there?
        except (LookupError, TypeError, ReplyError) as error:
            raise ServerError(f"{self.url}/models: no list of models ({error})") from None
        self.model = model or served

    def ask(self, messages: list[dict], temperature: float = 0.0, max_tokens: int = 4096) -> str:
        """The reply to messages [{"role": ..., "content": ...}]. ReplyError, ServerError."""
        body = {"model": self.model, "messages": messages}
        body |= {"temperature": temperature, "max_tokens": max_tokens}
        try:
            choice = self._request("/chat/completions", body)["choices"][0]
            text = choice["message"]["content"]
            end = choice.get("finish_reason")
        except (LookupError, TypeError, AttributeError) as error:
            raise ReplyError(f"not a chat completion: {error!r}") from None
        if end == "length":
            raise ReplyError(f"the reply is cut off at {max_tokens} tokens")
        if not isinstance(text, str) or not text.strip():
            raise ReplyError("the reply is empty")
        return text

    def _request(self, path: str, body: dict | None = None) -> dict:
        """The JSON that a GET, or a POST of a body, brings."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        data = None if body is None else json.dumps(body).encode()
        for seconds in (0, 1, 2, 4):
            time.sleep(seconds)
            try:
                request = urllib.request.Request(self.url + path, data, headers)
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    return json.loads(reply.read())
            except urllib.error.HTTPError as error:
                said = error.read(300).decode(errors="replace")
                failure = ReplyError(f"the server answers {error.code}: {said}")
                if error.code in (401, 403, 404):
                    raise ServerError(f"{self.url}{path}: {failure}") from None
                if error.code != 429 and error.code < 500:
                    break
            except TimeoutError:
                raise ReplyError(f"no reply within {self.timeout:g} s") from None
            except (OSError, http.client.HTTPException) as error:
                failure = ServerError(f"{self.url}{path}: {error}")
            except ValueError as error:
                failure = ReplyError(f"the reply is not JSON: {error}")
        raise failure
