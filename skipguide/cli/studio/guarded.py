"""Guarded: the layer around the studio's server that keeps its pages and its requests on this machine."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

HOST = "127.0.0.1"
LARGEST_BODY = 20_000_000  # bytes of what is asked, without uploads
# Whatever a library's page would load from elsewhere, the browser refuses.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Guarded:
    """A layer around the server.

    - Pages may load from here only.
    - Other names for this machine are not answered: a page of somebody else's that resolves its own name to it would
      otherwise be of the same origin.
    - A file is uploaded: one that is named by an address, which gradio would fetch, is refused.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if headers.get(b"host", "").rsplit(":", 1)[0] not in (HOST, "localhost"):
            return await _refuse(send, 421, "the studio answers to 127.0.0.1 only")
        if scope["method"] == "POST" and not headers.get(b"content-type", "").startswith("multipart/"):
            body = await _body(receive)
            if len(body) > LARGEST_BODY:
                return await _refuse(send, 413, f"a request has at most {LARGEST_BODY:,} bytes")
            if _names_an_address(body):
                return await _refuse(send, 400, "a file is uploaded to the studio; it fetches none from an address")
            receive = _again(body, receive)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message.get("headers", []), *added]}
            await send(message)

        return await self.app(scope, receive, guarded)


async def _refuse(send: Send, status: int, words: str) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": words.encode()})


async def _body(receive: Receive) -> bytes:
    """The whole body, or as much of it as shows that it is too long."""
    found = bytearray()
    while len(found) <= LARGEST_BODY:
        message = await receive()
        found += message.get("body", b"")
        if not message.get("more_body"):  # the end, or the visitor went away
            break
    return bytes(found)


def _again(body: bytes, receive: Receive) -> Receive:
    """As if the body had not been read."""
    given = False

    async def message() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return message


def _names_an_address(body: bytes) -> bool:
    """Whether a file in what is asked lies somewhere else; what is no JSON is left to the server to refuse."""
    try:
        left = [json.loads(body)]
    except (ValueError, RecursionError):
        return False
    while left:
        value = left.pop()
        if isinstance(value, dict):
            path = value.get("path")
            if isinstance(path, str) and path.strip().lower().startswith(("http:", "https:")):
                return True
            left.extend(value.values())
        elif isinstance(value, list):
            left.extend(value)
    return False
