"""`omni chat`: a conversation in the terminal, with text, pictures and recordings, answered in text and aloud."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from omni.assistant import Assistant, Voice, longest_end
from omni.audio import save_wav
from omni.config import UserError
from omni.data.dialogue import Encoded, Message, Part
from omni.data.images import read_image_size
from omni.generate import AnswerSettings
from omni.sound_device import NoSoundDeviceError, Player, Recorder

HELP = """\
a line of text     asks; an empty line sends what is attached, alone
/image PATH        attaches a picture to the next line
/audio PATH        attaches a recording (wav, flac, ogg, opus, mp3)
/record            records from the microphone until you press Enter, and attaches it
/speak on|off      answers aloud as well
/voice NAME        speaks in another voice; without a name: lists them
/reset             forgets the conversation and what is attached
/help              this
/quit              leaves, as the end of input does"""


@dataclass(frozen=True)
class ChatSettings:
    """How a chat answers.

    Attributes:
        answers: how text is decoded.
        voice: how it sounds, when it does.
        speak: whether answers are spoken from the start.
        out: folder for the answers' WAV files; None: they are played, and only written where nothing can play them.
    """

    answers: AnswerSettings
    voice: Voice
    speak: bool = False
    out: Path | None = None


class TerminalChat:
    """One conversation.

    Args:
        assistant: who answers.
        settings: how.
        read: gives the next line, given what to show before it; raises EOFError at the end of input.
        write: shows text as it is, without a line break.
    """

    def __init__(
        self, assistant: Assistant, settings: ChatSettings, read: Callable[[str], str], write: Callable[[str], None]
    ) -> None:
        self.assistant, self.settings, self._read, self._write = assistant, settings, read, write
        self._speaks, self._voice = settings.speak, settings.voice
        self._out, self._can_play = settings.out, settings.out is None
        self._num_media = self._num_waves = 0
        self._reset()
        self._commands: dict[str, Callable[[str], None]] = {
            "image": self._attach_image,
            "audio": self._attach_audio,
            "record": self._record,
            "speak": self._set_speak,
            "voice": self._set_voice,
            "reset": lambda _: self._forget(),
            "help": lambda _: self._line(HELP),
        }

    def run(self) -> None:
        """Talk until the input ends. What goes wrong with a line is one sentence, and the chat goes on."""
        if self._speaks:
            self.assistant.check_voice(self._voice.name)
        self._line(f"{self.assistant.name}: type a question; /help lists what else there is")
        while True:
            try:
                line = self._read("> ").strip()
            except EOFError:
                self._line("")
                return
            except UnicodeDecodeError:
                self._line("(that was no UTF-8)")
                continue
            if line in ("/quit", "/exit"):
                return
            try:
                self._do(line)
            except UserError as error:
                self._line(f"({error})")
            except FloatingPointError as error:
                self._line(f"({error}; the checkpoint may have diverged in training)")

    def _do(self, line: str) -> None:
        if not line.startswith("/"):
            self._ask(line)
            return
        name, _, rest = line[1:].partition(" ")
        if name not in self._commands:
            raise UserError(
                f"/{name}: no such command, expected one of {', '.join(f'/{key}' for key in self._commands)}"
            )
        self._commands[name](rest.strip())

    # ---- commands ----

    def _reset(self) -> None:
        self._messages: list[Message] = []
        self._attached: list[Part] = []
        self._media = self.assistant.media()
        self._said_cut = False

    def _forget(self) -> None:
        self._reset()
        self._line("(forgotten)")

    def _attach_image(self, words: str) -> None:
        path = _path(words, "/image")
        name = self._name(path)
        self._media.add_image(name, path)
        width, height = read_image_size(path)
        self._attach("image", name, f"a picture of {width} x {height}")

    def _attach_audio(self, words: str) -> None:
        path = _path(words, "/audio")
        name = self._name(path)
        seconds = self._media.add_audio(name, path)
        self._attach("audio", name, f"{seconds:.1f} s of sound")

    def _record(self, _: str) -> None:
        rate, limit = self.assistant.model.config.audio_encoder.mel.sample_rate, self.assistant.seconds_heard
        recorder = Recorder(rate, limit)
        try:
            self._read(f"recording, at most {limit:.0f} s; Enter ends it ")
        finally:
            wave_S = recorder.stop()
        name = self._name(Path("the recording"))
        seconds = self._media.add_wave(name, wave_S)
        self._attach("audio", name, f"{seconds:.1f} s of sound")

    def _attach(self, kind: str, name: str, what: str) -> None:
        self._attached.append(Part(kind, name))
        self._line(f"({what} attached; ask about it, or press Enter to send it alone)")

    def _set_speak(self, words: str) -> None:
        if words not in ("on", "off"):
            raise UserError(f"/speak: found {words!r}, expected on or off")
        if words == "on":
            self.assistant.check_voice(self._voice.name)
        self._speaks = words == "on"

    def _set_voice(self, words: str) -> None:
        self.assistant.check_voice(words or None)
        if not words:
            self._line(", ".join(self.assistant.voices))
            return
        self._voice = Voice(words, speed=self._voice.speed, sampling=self._voice.sampling)

    # ---- questions and answers ----

    def _ask(self, text: str) -> None:
        if not text and not self._attached:
            return
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError("that was no UTF-8") from None
        parts = [*self._attached, Part("text", text)] if text else list(self._attached)
        self._attached = []
        self._messages.append(Message("user", tuple(parts)))
        answer = ""
        try:
            answer = self._answer()
        except KeyboardInterrupt:
            self._line(" (stopped)")
        finally:
            if not answer:  # a question without an answer would stand between the others
                self._messages.pop()
        if answer:
            self._messages.append(Message("assistant", (Part("text", answer),)))

    def _answer(self) -> str:
        prompt = self._prompt()
        self._media.keep(part.value for message in self._messages for part in message.parts)
        generation = self.assistant.answer(prompt, self._media, self.settings.answers)
        if self._speaks:
            self._answer_aloud(self._shown(generation))
        else:
            for _ in self._shown(generation):
                pass
        answer = generation.answers[0].text
        self._line("" if answer else "(no answer)")
        return answer

    def _prompt(self) -> Encoded:
        """The conversation, from the oldest turn on that still fits."""
        prompt, kept = longest_end(self._messages, lambda messages: self.assistant.prompt(messages, self._media))
        if len(kept) < len(self._messages) and not self._said_cut:
            self._said_cut = True
            self._line(f"(the oldest turns no longer fit into {self.assistant.ctx_len} positions and are left out)")
        self._messages = list(kept)
        return prompt

    def _shown(self, generation: Iterable[list[str]]) -> Iterator[str]:
        for (piece,) in generation:
            if piece:
                self._write(piece)
                yield piece

    def _answer_aloud(self, pieces: Iterator[str]) -> None:
        player, waves = self._player(), list[torch.Tensor]()
        try:
            for wave_S in self.assistant.say_answer(pieces, self._voice):
                waves.append(wave_S.cpu())
                if player:
                    player.play(wave_S)
        finally:
            if player:
                player.close()
        if self._out is not None:
            self._num_waves += 1
            path = self._out / f"answer_{self._num_waves}.wav"
            try:
                self._out.mkdir(parents=True, exist_ok=True)
                save_wav(path, torch.cat(waves), self.assistant.sample_rate)
            except (OSError, RuntimeError) as error:
                raise UserError(f"{path}: cannot be written ({error})") from None
            self._write(f"  [{path}]")

    def _player(self) -> Player | None:
        if not self._can_play:
            return None
        try:
            return Player(self.assistant.sample_rate)
        except NoSoundDeviceError as error:
            self._can_play, self._out = False, self._out or Path("answers")
            self._line(f"(nothing can be played: {error}; answers go to {self._out}/)")
            return None

    # ---- small things ----

    def _name(self, path: Path) -> str:
        """What a picture or recording is called: the same file may be attached twice, and change in between."""
        self._num_media += 1
        return f"{path}" if f"{path}" not in self._media else f"{path} ({self._num_media})"

    def _line(self, text: str) -> None:
        self._write(f"{text}\n")


def _path(words: str, command: str) -> Path:
    """The path behind a command, as people type it and as terminals paste it: quoted, escaped, with ~, or plain."""
    if not words:
        raise UserError(f"{command}: found no path, expected {command} PATH")
    if Path(words).expanduser().exists():
        return Path(words).expanduser()
    try:
        return Path(" ".join(shlex.split(words))).expanduser()
    except ValueError:
        return Path(words)


def chat(checkpoint: Path, settings: ChatSettings, device: str, draft: Path | None = None) -> int:
    """Talk in the terminal, with a draft that guesses ahead where one is given; returns the exit code.

    Raises:
        UserError: when a checkpoint is missing, damaged or another stage's, the draft does not fit to it, or there is
            no such voice.
    """
    assistant = Assistant.load(checkpoint, device, draft)
    if sys.stdin.isatty():
        import readline  # noqa: F401 - line editing and history

    def write(text: str) -> None:
        print(text, end="", flush=True)

    TerminalChat(assistant, settings, input, write).run()
    return 0
