"""What the tests of the server share: a server in this process, and what is sent to it."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn

from omni.assistant import Assistant
from omni.server.app import create_app
from omni.server.guard import LOOPBACK, Guard, Limits


@contextlib.contextmanager
def serving(
    assistant: Assistant, limits: Limits | None = None, token: str = "", hosts: tuple[str, ...] = LOOPBACK
) -> Iterator[tuple[int, Guard]]:
    """A server on a free port; its port and app."""
    app = create_app(assistant, limits, token, hosts)
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1], app
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()


def call(
    port: int, path: str, body: Any = None, kind: str = "application/json", **headers: str
) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON (or bytes) of one request; a body that is no bytes is sent as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("GET" if data is None else "POST", path, data, ({"Content-Type": kind} if data else {}) | sent)
    response = connection.getresponse()
    found = response.read()
    connection.close()
    told = {name.lower(): value for name, value in response.getheaders()}
    is_json = told.get("content-type", "").startswith("application/json")
    return response.status, told, json.loads(found) if is_json else found


def image_part(data: bytes, kind: str = "image/png") -> dict[str, Any]:
    """A picture as a part of a message."""
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{base64.b64encode(data).decode()}"}}


def audio_part(data: bytes, kind: str = "wav") -> dict[str, Any]:
    """A recording as a part of a message."""
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": kind}}


def text_part(text: str) -> dict[str, Any]:
    """A text as a part of a message."""
    return {"type": "text", "text": text}


def chat(*parts: dict[str, Any] | str, **values: Any) -> dict[str, Any]:
    """A request with one message."""
    content = [text_part(part) if isinstance(part, str) else part for part in parts]
    return {"model": "toy", "messages": [{"role": "user", "content": content}], "max_tokens": 8, **values}
