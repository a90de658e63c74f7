"""Requests in the form of OpenAI's API: what is understood, what is refused, and what it means here."""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from omni.assistant import Media
from omni.config import UserError
from omni.data.dialogue import Message, Part
from omni.server.errors import ApiError

_DATA_URL = re.compile(r"data:(?P<type>[^;,]*)(?:;[^;,]*)*;base64,", re.IGNORECASE)
_SPACE = str.maketrans("", "", " \t\r\n")


def _plain(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("found half of a surrogate pair, expected text") from None
    return text


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _voice_name(value: Any) -> Any:
    return value["id"] if isinstance(value, dict) and "id" in value else value


Text = Annotated[str, BeforeValidator(lambda value: _plain(value) if isinstance(value, str) else value)]
VoiceName = Annotated[Text, BeforeValidator(_voice_name)]


class Strict(BaseModel):
    """A key that is not known is refused: a typo must not silently become the default."""

    model_config = ConfigDict(extra="forbid")


class TextPart(Strict):
    """A piece of text."""

    type: Literal["text"]
    text: Text


class ImageURL(Strict):
    """A picture; ``detail`` changes nothing here."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(Strict):
    """A picture as a part of a message."""

    type: Literal["image_url"]
    image_url: ImageURL


class InputAudio(Strict):
    """A recording in base64."""

    data: str
    format: Literal["wav", "mp3", "flac", "ogg"]


class AudioPart(Strict):
    """A recording as a part of a message."""

    type: Literal["input_audio"]
    input_audio: InputAudio


ContentPart = Annotated[TextPart | ImagePart | AudioPart, Field(discriminator="type")]


class ChatMessage(Strict):
    """One turn. Of an answer that is sent back, its transcript is what was said."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[ContentPart], BeforeValidator(_as_parts)] = Field(max_length=512)
    name: str | None = None
    # an answer of the client library, sent back as it is
    refusal: None = None
    function_call: None = None
    tool_calls: None = None
    annotations: list[Any] | None = None
    audio: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _spoken(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("content") is not None:
            return values
        audio = values.get("audio")
        if isinstance(audio, dict) and isinstance(audio.get("transcript"), str):
            return {**values, "content": audio["transcript"]}
        raise ValueError("expected content: a text or a list of parts; spoken answers are not kept here")


class AudioOutput(Strict):
    """How an answer is spoken; ``speed`` is this server's own."""

    voice: VoiceName | None = None
    format: Literal["wav", "mp3", "flac", "opus", "pcm16"] = "wav"
    speed: float = Field(1.0, ge=0.25, le=4)


class StreamOptions(Strict):
    """What a stream holds besides the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ResponseFormat(Strict):
    """Plain text is the only one."""

    type: Literal["text"]


class ChatRequest(Strict):
    """``POST /v1/chat/completions``. ``top_k``, ``show_prompt`` and ``truncation`` are this server's own."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1, max_length=512)
    modalities: list[Literal["text", "audio"]] = Field(default=["text"], min_length=1)
    audio: AudioOutput | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=1_000_000)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[Annotated[Text, Field(min_length=1, max_length=256)]], BeforeValidator(_as_list)] | None = (
        Field(None, max_length=4)
    )
    show_prompt: bool = False
    truncation: Literal["disabled", "auto"] = "disabled"  # as OpenAI's newer endpoint has it
    # of these, only what they are anyway
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    response_format: ResponseFormat | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    # of no meaning to one model on one machine, which keeps nothing
    user: str | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None

    @property
    def aloud(self) -> bool:
        """Whether the answer is spoken."""
        return "audio" in self.modalities


class SpeechRequest(Strict):
    """``POST /v1/audio/speech``."""

    model: str
    input: Text = Field(min_length=1, max_length=4096)
    voice: VoiceName | None = None
    response_format: Literal["mp3", "wav", "flac", "opus", "pcm"] = "mp3"
    speed: float = Field(1.0, ge=0.25, le=4)
    stream_format: Literal["audio"] = "audio"


class TranscriptionRequest(Strict):
    """The fields of ``POST /v1/audio/transcriptions`` but for its file. The recognizer draws nothing."""

    model: str
    response_format: Literal["json", "text"] = "json"
    language: Literal["en"] | None = None
    temperature: float = Field(0, ge=0, le=1)


Source = Callable[[Media], object]


def conversation(request: ChatRequest) -> tuple[list[Message], dict[str, Source]]:
    """The messages of a request, and what decodes each of its pictures and recordings, by name.

    Raises:
        ApiError: naming the part that cannot be used.
    """
    messages: list[Message] = []
    sources: dict[str, Source] = {}
    for number, message in enumerate(request.messages):
        parts = []
        for place, part in enumerate(message.content):
            name = f"messages.{number}.content.{place}"
            if isinstance(part, TextPart):
                parts.append(Part("text", part.text))
                continue
            if message.role != "user":
                raise ApiError(400, f"{name}: found {part.type} of the {message.role}, expected text", name)
            parts.append(Part("image" if isinstance(part, ImagePart) else "audio", name))
            sources[name] = _source(part, name)
        messages.append(Message("system" if message.role == "developer" else message.role, tuple(parts)))
    if messages[-1].role != "user":
        role = request.messages[-1].role
        raise ApiError(400, f"messages: found the {role}'s as the last one, expected the user's", "messages")
    return messages, sources


def _source(part: ImagePart | AudioPart, name: str) -> Source:
    """What decodes a part of a message."""
    if isinstance(part, ImagePart):
        url = part.image_url.url
        return lambda media: media.add_image(name, io.BytesIO(_data_url(url, name)))
    data = part.input_audio.data
    return lambda media: media.add_audio(name, io.BytesIO(_from_base64(data, name)))


def _data_url(url: str, name: str) -> bytes:
    match = _DATA_URL.match(url)
    if match is None:
        what = url[:40].partition(":")[0] if ":" in url[:40] else "something else"
        fetched = "; this server fetches nothing" if what.lower() in ("http", "https", "ftp", "file") else ""
        raise UserError(f"{name}: found {what[:20]!r}, expected data:image/...;base64,...{fetched}")
    if not match["type"].lower().startswith("image/"):
        raise UserError(f"{name}: found the type {match['type'][:40]!r}, expected image/...")
    return _from_base64(url[match.end() :], name)


def _from_base64(text: str, name: str) -> bytes:
    try:
        data = base64.b64decode(text.translate(_SPACE), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{name}: not valid base64 ({error})") from None
    if not data:
        raise UserError(f"{name}: found an empty file")
    return data
