"""What every request passes before anything else looks at it: whose it is, how large, and whether there is room."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from omni.server.errors import ApiError
from omni.server.queue import Worker

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_MULTIPART = ("/v1/audio/transcriptions",)
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Limits:
    """How much is let in.

    Attributes:
        body_bytes: of one request.
        held_bytes: of all requests that are inside at a time.
        body_seconds: until a request must have arrived.
        queue_size: requests that may wait besides the one that is worked on.
    """

    body_bytes: int = 16 * 2**20
    held_bytes: int = 128 * 2**20
    body_seconds: float = 30.0
    queue_size: int = 64


class Guard:
    """ASGI middleware: host, origin, token, type and size of each request, and a place in the queue.

    Args:
        app: what comes behind.
        worker: whose queue it is.
        limits: how much is let in.
        token: what every request must bring, as a bearer token or as the password of basic authentication; "": nothing.
        hosts: names under which the server may be addressed; empty: any. On the loopback address this keeps foreign
            web pages out whose name was pointed here (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, worker: Worker, limits: Limits, token: str, hosts: tuple[str, ...]) -> None:
        self.app, self.worker, self.limits, self.hosts = app, worker, limits, hosts
        self._token = token.encode()
        self.held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # a websocket
            await send({"type": "websocket.close", "code": 1008})
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name.lower() for name, _ in message["headers"]}
                extra = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
                message["headers"] = [*message["headers"], *(item for item in extra if item[0] not in given)]
            await send(message)

        try:
            self._check(Headers(scope=scope))
            if scope["method"] == "POST":
                await self._with_body(scope, receive, send_with_headers)
            else:
                await self.app(scope, receive, send_with_headers)
        except ApiError as error:
            await error.response()(scope, receive, send_with_headers)

    def _check(self, headers: Headers) -> None:
        host = _host_name(headers.get("host", ""))
        if self.hosts and host not in self.hosts:
            raise ApiError(403, f"host: found {host[:60]!r}, expected one of {', '.join(self.hosts)}")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host", ""):
            raise ApiError(403, "origin: found a page of another site, expected the server's own")
        if self._token and not hmac.compare_digest(_token_of(headers.get("authorization", "")), self._token):
            raise ApiError(401, "authorization: expected the server's token, as `Authorization: Bearer TOKEN`")

    async def _with_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read a body within the limits, and hand it on whole."""
        headers = Headers(scope=scope)
        expected = "multipart/form-data" if scope["path"] in _MULTIPART else "application/json"
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != expected:
            raise ApiError(415, f"content-type: found {kind[:60] or 'none'}, expected {expected}")
        body = bytearray()
        try:
            declared = headers.get("content-length", "0")
            if declared.isdigit() and int(declared) > self.limits.body_bytes:
                raise self._too_large()
            self.worker.enter()
        except ApiError:
            await self._discard(receive)
            raise
        try:
            try:
                async with asyncio.timeout(self.limits.body_seconds):
                    await self._read(receive, body)
            except ApiError:
                await self._discard(receive)
                raise
            except TimeoutError:
                raise ApiError(408, f"the body did not arrive within {self.limits.body_seconds:g} s") from None
            except _LeftError:
                return
            await self.app(scope, _replay(bytes(body), receive), send)
        finally:
            self.held_bytes -= len(body)
            self.worker.leave()

    async def _read(self, receive: Receive, body: bytearray) -> None:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _LeftError
            piece: bytes = message.get("body", b"")
            body += piece
            self.held_bytes += len(piece)
            if len(body) > self.limits.body_bytes:
                raise self._too_large()
            if self.held_bytes > self.limits.held_bytes:
                message_ = "the requests that are waiting hold too much data together; try again in 5 s"
                raise ApiError(429, message_, code="queue_full", retry_after=5)
            if not message.get("more_body", False):
                return

    async def _discard(self, receive: Receive) -> None:
        """Let a refused client finish sending, within reason: while it still sends it does not hear the answer."""
        left = 2 * self.limits.body_bytes
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.limits.body_seconds / 6):
                while left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return

    def _too_large(self) -> ApiError:
        most = f"{self.limits.body_bytes / 2**20:g} MiB"
        return ApiError(413, f"the body is too large, expected at most {most}", code="body_too_large")


class _LeftError(Exception):
    """The client left while it was sending."""


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replay() -> dict[str, Any]:
        nonlocal given
        if given:
            return dict(await receive())  # that the client has left
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _host_name(host: str) -> str:
    """The name of a Host header, without its port."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.lower()


def _token_of(authorization: str) -> bytes:
    """The token that a header brings; b"" where there is none."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode("latin-1", "replace")  # the bytes that came
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""
