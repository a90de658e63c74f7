"""What the model does for a request, and its answer in the form of OpenAI's API, whole or as a stream of events."""

from __future__ import annotations

import base64
import json
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from omni.assistant import Assistant, Media, Result, Voice, longest_end
from omni.data.dialogue import Encoded, Message, TooLongError
from omni.generate import Answer, AnswerSettings
from omni.sampling import Sampling
from omni.server.errors import ApiError
from omni.server.queue import Emit
from omni.server.schema import ChatRequest, conversation
from omni.server.sounds import RawStream, sound_file

_FINISH = {"end": "stop", "stop": "stop", "length": "length"}


@dataclass
class ChatPlan:
    """A chat request, understood: what the worker needs of it.

    Attributes:
        assistant: who answers.
        messages: the conversation.
        media: its pictures and recordings.
        settings: how text is decoded.
        voice: how the answer sounds; None: it is not spoken.
        truncated: whether its oldest turns may be left out.
        num_left_out: oldest messages for which there is no room, as far as is known.
        prompt: what the model reads, once the work has begun.
    """

    assistant: Assistant
    messages: Sequence[Message]
    media: Media
    settings: AnswerSettings
    voice: Voice | None
    truncated: bool
    num_left_out: int
    prompt: Encoded = field(init=False)

    def work(self, emit: Emit) -> None:
        """Answer; hands out the prompt, pieces of text, samples [S], and at last the :class:`omni.generate.Answer`.

        Raises:
            ApiError: 400, before anything is handed out, when there is no room for the conversation.
        """
        try:  # what is in recordings and how lines are read is the model's to say
            self.prompt, kept = _fit(
                self.truncated, self.messages, lambda chat: self.assistant.prompt(chat, self.media)
            )
        except TooLongError as error:
            raise _too_long(error) from None
        self.num_left_out += len(self.messages) - len(kept)
        emit(self.prompt)
        generation = self.assistant.answer(self.prompt, self.media, self.settings)

        def shown() -> Iterator[str]:
            for (piece,) in generation:
                emit(piece)  # an empty one too: whether the client is still there is asked at each token
                if piece:
                    yield piece

        if self.voice is None:
            for _ in shown():
                pass
        else:
            for wave_S in self.assistant.say_answer(shown(), self.voice):
                emit(wave_S)
        emit(generation.answers[0])


def plan_chat(request: ChatRequest, assistant: Assistant) -> ChatPlan:
    """Understand a request and decode what it brings.

    Raises:
        ApiError: 400, saying what cannot be used.
        UserError: the same.
    """
    voice = None
    if request.aloud:
        audio = request.audio
        voice = Voice(audio.voice if audio else None, speed=audio.speed if audio else 1.0)
        assistant.check_voice(voice.name)
        if request.stream and audio and audio.format != "pcm16":
            raise ApiError(400, f"audio.format: found {audio.format!r}, expected 'pcm16' in a stream", "audio.format")
    elif request.audio is not None:
        raise ApiError(400, 'audio: found without modalities ["text", "audio"]', "audio")
    messages, sources = conversation(request)
    media, truncated = assistant.media(), request.truncation == "auto"
    try:
        _, kept = _fit(truncated, messages, assistant.check_size)  # before anything is decoded
    except TooLongError as error:
        raise _too_long(error) from None
    for part in (part for message in kept for part in message.parts if part.kind != "text"):
        sources[part.value](media)
    temperature = request.temperature or 0.0
    seed = random.getrandbits(63) if request.seed is None else request.seed % 2**63
    sampling = Sampling(temperature, request.top_k, 1.0 if request.top_p is None else request.top_p, seed)
    most = request.max_completion_tokens or request.max_tokens or assistant.ctx_len
    settings = AnswerSettings(most, sampling, tuple(request.stop or ()))
    return ChatPlan(assistant, kept, media, settings, voice, truncated, len(messages) - len(kept))


def _fit(
    truncated: bool, messages: Sequence[Message], fits: Callable[[Sequence[Message]], Result]
) -> tuple[Result, Sequence[Message]]:
    return longest_end(messages, fits) if truncated else (fits(messages), messages)


def _too_long(error: TooLongError) -> ApiError:
    return ApiError(400, str(error), "messages", "context_length_exceeded")


@dataclass
class ChatReply:
    """The answer to one chat request.

    Attributes:
        request: what was asked for.
        plan: how it was understood.
    """

    request: ChatRequest
    plan: ChatPlan
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    async def whole(self, events: AsyncIterator[Any]) -> dict[str, Any]:
        """The answer as one object."""
        waves: list[torch.Tensor] = []
        answer: Answer | None = None
        async for event in events:
            if isinstance(event, torch.Tensor):
                waves.append(event)
            elif isinstance(event, Answer):
                answer = event
        assert answer is not None
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if self.plan.voice is not None:
            kind = self.request.audio.format if self.request.audio else "wav"
            data = base64.b64encode(sound_file(waves, self.plan.assistant.sample_rate, kind)).decode()
            # it is not kept, so it expires at once
            audio = {"id": self._audio_id, "expires_at": self.created, "data": data, "transcript": answer.text}
            message |= {"content": None, "audio": audio}
        choice = {"index": 0, "message": message, "finish_reason": _FINISH[answer.finish], "logprobs": None}
        return self._object("chat.completion", [choice]) | {"usage": self._usage(answer)} | self._extras()

    async def stream(self, events: AsyncIterator[Any]) -> AsyncIterator[str]:
        """The answer as server-sent events; a failure is one of them, once the prompt is understood."""
        await anext(events)
        try:
            async for chunk in self._chunks(events):
                yield f"data: {json.dumps(chunk)}\n\n"
        except ApiError as error:
            yield f"data: {json.dumps(error.body())}\n\n"
        yield "data: [DONE]\n\n"

    async def _chunks(self, events: AsyncIterator[Any]) -> AsyncIterator[dict[str, Any]]:
        raw = RawStream(self.plan.assistant.sample_rate)
        aloud = self.plan.voice is not None
        begin = {"role": "assistant", "content": None if aloud else "", "refusal": None}
        yield self._chunk(begin) | self._extras()
        async for event in events:
            if isinstance(event, str) and event:
                yield self._chunk(
                    {"audio": {"id": self._audio_id, "transcript": event}} if aloud else {"content": event}
                )
            elif isinstance(event, torch.Tensor):
                yield self._sound(raw.push(event))
            elif isinstance(event, Answer):
                if aloud:
                    yield self._sound(raw.end())
                    yield self._chunk({"audio": {"expires_at": self.created}})
                yield self._chunk({}, _FINISH[event.finish])
                if self.request.stream_options and self.request.stream_options.include_usage:
                    yield self._object("chat.completion.chunk", []) | {"usage": self._usage(event)}

    @property
    def _audio_id(self) -> str:
        return self.id.replace("chatcmpl", "audio")

    def _sound(self, data: bytes) -> dict[str, Any]:
        return self._chunk({"audio": {"id": self._audio_id, "data": base64.b64encode(data).decode()}})

    def _chunk(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return self._object("chat.completion.chunk", [choice])

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        name = self.plan.assistant.name
        return {"id": self.id, "object": kind, "created": self.created, "model": name, "choices": choices}

    def _extras(self) -> dict[str, Any]:
        """What this server's own keys asked for."""
        found: dict[str, Any] = {}
        if self.request.show_prompt:
            pieces = self.plan.assistant.pieces(self.plan.prompt)
            found["prompt"] = [{"kind": p.kind, "text": p.text, "positions": p.positions} for p in pieces]
        if self.request.truncation == "auto":
            found["left_out"] = self.plan.num_left_out
        return found

    def _usage(self, answer: Answer) -> dict[str, Any]:
        """Positions of the prompt, tokens of the answer."""
        prompt, assistant = self.plan.prompt, self.plan.assistant
        size = len(prompt.tokens)
        heard = sum(prompt.audio_positions) + sum(prompt.num_words)
        seen = len(prompt.images) * assistant.model.image_positions
        details = {"audio_tokens": heard, "image_tokens": seen, "text_tokens": size - heard - seen, "cached_tokens": 0}
        return {
            "prompt_tokens": size,
            "completion_tokens": len(answer.tokens),
            "total_tokens": size + len(answer.tokens),
            "prompt_tokens_details": details,
        }
