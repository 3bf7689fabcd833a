"""Building LongVideo-Reason (section 3 of the paper)."""

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
    """An OpenAI-compatible server, such as `vllm serve MODEL`. url: up to and with /v1. model: its
    name there; default: the first that the server names. timeout: seconds for one reply."""

    def __init__(self, url: str, model: str | None = None, timeout: float = 300, retries: int = 3):
        self.url, self.timeout, self.retries = url.rstrip("/"), timeout, retries
        self.key = os.environ.get("OPENAI_API_KEY", "")
        self.model = model or self._request("/models")["data"][0]["id"]

    def ask(self, messages: list[dict], temperature: float = 0.0, max_tokens: int = 4096) -> str:
        """The reply to messages [{"role": ..., "content": ...}]. ReplyError, ServerError."""
        body = {"model": self.model, "messages": messages}
        body |= {"temperature": temperature, "max_tokens": max_tokens}
        try:
            choice = self._request("/chat/completions", body)["choices"][0]
            text = choice["message"]["content"]
        except (LookupError, TypeError) as error:
            raise ReplyError(f"{self.url}: not a chat completion: {error!r}") from None
        if choice.get("finish_reason") == "length" or not isinstance(text, str) or not text.strip():
            raise ReplyError(f"the reply is empty, or cut off at {max_tokens} tokens")
        return text

    def _request(self, path: str, body: dict | None = None) -> dict:
        """GET, or POST of a body; asked again after 1, 2, 4 ... seconds."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    return json.loads(reply.read())
            except urllib.error.HTTPError as error:
                what, kind = f"{error.code} {error.read(300).decode(errors='replace')}", ReplyError
                if error.code in (401, 403, 404):
                    raise ServerError(f"{self.url}{path}: {what}") from None
                if error.code != 429 and error.code < 500:
                    break
            except TimeoutError:
                what, kind = f"no reply within {self.timeout:.0f} s", ReplyError
            except (OSError, ValueError) as error:  # no connection; not JSON
                what, kind = str(error), ServerError if isinstance(error, OSError) else ReplyError
        raise kind(f"{self.url}{path}: {what}")
