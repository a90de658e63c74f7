"""`omni serve`: the endpoints of OpenAI's API that one omni model can answer, and a page to talk to it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartParser

from omni.assistant import Assistant, Media, Voice
from omni.config import UserError
from omni.server.answers import ChatReply, plan_chat
from omni.server.errors import ApiError, add_handlers, validation_error
from omni.server.guard import LOOPBACK, Guard, Limits
from omni.server.page import load_page
from omni.server.queue import ClientLeftError, Emit, Job, Worker
from omni.server.schema import ChatRequest, SpeechRequest, TranscriptionRequest
from omni.server.sounds import RawStream, media_type, sound_file
from omni.speech_text import chunks

Result = TypeVar("Result")
_DECODERS = 2  # pictures and recordings that are decoded at a time: each may take 100 MB for a moment
_CONNECTIONS = 256
_LEFT = 499  # nginx's status for a client that did not wait


class Service:
    """The endpoints; each understands a request, lets the worker answer it, and puts the answer into form."""

    def __init__(self, assistant: Assistant, worker: Worker) -> None:
        self.assistant, self.worker = assistant, worker
        self._decoders = ThreadPoolExecutor(_DECODERS, "omni-decode")
        self._page, self._policy = load_page()

    def add_routes(self, app: FastAPI) -> None:
        """Put everything where the API has it."""
        app.get("/")(self.page)
        app.get("/healthz")(self.health)
        app.get("/v1/models")(self.models)
        app.get("/v1/models/{name:path}")(self.model)
        app.post("/v1/chat/completions", response_model=None)(self.chat)
        app.post("/v1/audio/speech")(self.speech)
        app.post("/v1/audio/transcriptions")(self.transcription)

    def close(self) -> None:
        """End the threads."""
        self.worker.stop()
        self._decoders.shutdown(wait=False, cancel_futures=True)

    async def page(self) -> Response:
        """The page."""
        return Response(self._page, media_type="text/html", headers={"Content-Security-Policy": self._policy})

    async def health(self) -> dict[str, Any]:
        """Whether the server lives, and how many requests are inside."""
        return {"status": "ok", "model": self.assistant.name, "requests": self.worker.num_requests}

    async def models(self) -> dict[str, Any]:
        """The only model there is, with what the page wants to know of it."""
        return {"object": "list", "data": [self._model()]}

    async def model(self, name: str) -> dict[str, Any]:
        """The same by its name."""
        self._check_model(name)
        return self._model()

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer a conversation, in text or aloud, whole or as a stream."""
        self._check_model(body.model)
        plan = await self._decoded(partial(plan_chat, body, self.assistant))
        reply = ChatReply(body, plan)
        job = self.worker.submit(plan.work)
        if body.stream:
            pieces = _followed(job, request, reply.stream)
            begin = await anext(pieces, None)  # what is wrong with the prompt has a status of its own
            if begin is None:
                raise ApiError(_LEFT, "the client left")  # which nobody reads
            return StreamingResponse(_after(begin, pieces), media_type="text/event-stream")
        async with _following(job, request):
            return JSONResponse(await reply.whole(job.events()))

    async def speech(self, body: SpeechRequest, request: Request) -> Response:
        """Speak a text."""
        self._check_model(body.model)
        voice = Voice(body.voice, speed=body.speed)
        kind, rate = body.response_format, self.assistant.sample_rate

        def check() -> None:
            self.assistant.check_voice(voice.name)
            chunks(body.input)  # whether there is anything to speak

        await self._decoded(check)

        def work(emit: Emit) -> None:
            for wave_S in self.assistant.say([body.input], voice):
                emit(wave_S)

        job = self.worker.submit(work)
        if kind == "pcm":
            return StreamingResponse(_followed(job, request, partial(_raw, rate)), media_type=media_type(kind))
        async with _following(job, request):
            waves: list[torch.Tensor] = [wave_S async for wave_S in job.events()]
            data = await self._decoded(partial(sound_file, waves, rate, kind))
            return Response(data, media_type=media_type(kind))

    async def transcription(self, request: Request) -> Response:
        """Write down what is said in a recording."""
        async with request.form(max_files=1, max_fields=16) as form:
            fields = {key: value for key, value in form.multi_items() if key != "file"}
            file = form.get("file")
            try:
                wanted = TranscriptionRequest.model_validate(fields)
            except ValidationError as error:
                raise validation_error(error.errors()) from None
            if not isinstance(file, UploadFile):
                raise ApiError(400, "file: missing, expected a recording", "file")
            self._check_model(wanted.model)
            media = self.assistant.media()
            await self._decoded(partial(_listen, media, file))
        job = self.worker.submit(lambda emit: emit(self.assistant.transcribe(media.frames("file"))))
        async with _following(job, request):
            (text,) = [event async for event in job.events()]
        return PlainTextResponse(text + "\n") if wanted.response_format == "text" else JSONResponse({"text": text})

    def _check_model(self, name: str) -> None:
        if name != self.assistant.name:
            message = f"model: found {ascii(name)[:60]}, expected {self.assistant.name!r}"
            raise ApiError(404, message, "model", "model_not_found")

    def _model(self) -> dict[str, Any]:
        assistant = self.assistant
        own = {
            "voices": list(assistant.voices),
            "context_length": assistant.ctx_len,
            "seconds_heard": assistant.seconds_heard,
        }
        return {"id": assistant.name, "object": "model", "created": 0, "owned_by": "omni"} | own

    async def _decoded(self, function: Callable[[], Result]) -> Result:
        """What a function that decodes returns, run beside the event loop; few of them at a time."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._decoders, function)
        except UserError as error:
            raise ApiError(400, str(error)) from None


def _listen(media: Media, file: UploadFile) -> None:
    media.add_audio("file", file.file)


async def _after(begin: str, pieces: AsyncGenerator[str]) -> AsyncIterator[str]:
    """The pieces of a stream whose first is at hand."""
    async with contextlib.aclosing(pieces):
        yield begin
        async for piece in pieces:
            yield piece


async def _raw(rate: int, waves: AsyncIterator[torch.Tensor]) -> AsyncIterator[bytes]:
    raw = RawStream(rate)
    async for wave_S in waves:
        yield raw.push(wave_S)
    yield raw.end()


@contextlib.asynccontextmanager
async def _following(job: Job, request: Request) -> AsyncIterator[None]:
    """Drop the job as soon as its client leaves."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        job.leave()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except ClientLeftError:
        raise ApiError(_LEFT, "the client left") from None  # which nobody reads
    finally:
        watcher.cancel()
        job.leave()


async def _followed(
    job: Job, request: Request, form: Callable[[AsyncIterator[Any]], AsyncIterator[Any]]
) -> AsyncGenerator[Any]:
    """The pieces of a streamed answer."""
    try:
        async with _following(job, request):
            async for piece in form(job.events()):
                yield piece
    except ApiError as error:
        if error.status != _LEFT:
            raise  # the connection breaks off, so that nobody takes half an answer for a whole one


def create_app(
    assistant: Assistant, limits: Limits | None = None, token: str = "", hosts: tuple[str, ...] = LOOPBACK
) -> Guard:
    """The whole server as an ASGI app.

    Args:
        assistant: who answers.
        limits: how much is let in.
        token: what every request must bring; "": nothing.
        hosts: names under which it may be addressed; empty: any.
    """
    limits = limits or Limits()
    service = Service(assistant, Worker(limits.queue_size))

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    # uploads stay in memory, which the limit of a body bounds; by default they go to the disk from 1 MiB on
    MultiPartParser.spool_max_size = limits.body_bytes
    app = FastAPI(title="omni", openapi_url=None, lifespan=lifespan)  # no pages of documentation from elsewhere
    add_handlers(app)
    service.add_routes(app)
    return Guard(app, service.worker, limits, token, hosts)


def serve(checkpoint: Path, host: str, port: int, token: str, device: str, draft: Path | None = None) -> int:
    """Serve a checkpoint until Ctrl-C, with a draft that guesses ahead where one is given; returns the exit code.

    Raises:
        UserError: when others could reach the server without a token, the address cannot be had, or the checkpoint
            cannot be used.
    """
    local = host in LOOPBACK
    if not local and not token:
        raise UserError(
            f"--host: {host} can be reached by others, expected --token (or OMNI_TOKEN) as well", exit_code=2
        )
    listener = _listen_at(host, port)
    assistant = Assistant.load(checkpoint, device, draft)
    app = create_app(assistant, token=token, hosts=LOOPBACK if local else ())
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=3,
    )  # fmt: skip
    shown = f"[{host}]" if ":" in host else host
    print(f"{assistant.name} at http://{shown}:{listener.getsockname()[1]} (Ctrl-C ends it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn hands it on once the server has ended
        uvicorn.Server(config).run(sockets=[listener])
    return 0


def _listen_at(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        raise UserError(f"{host}:{port}: cannot listen there ({error})") from None
