"""`omni chat`: questions of every kind, a conversation that is cut, and mistakes after which it goes on."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile

from omni import chat as chat_module
from omni.assistant import Assistant, Voice, longest_end
from omni.chat import ChatSettings, TerminalChat
from omni.cli import main
from omni.config import UserError
from omni.data.dialogue import Message, Part, TooLongError
from omni.decoding import Decoding
from omni.generate import AnswerSettings, generate
from omni.hearing import as_written
from omni.models.thinker import Thinker
from omni.sound_device import NoSoundDeviceError
from omni.tokenizer import Tokenizer
from tests import toy_omni
from tests.conftest import write_tone
from tests.toy_omni import picture

Talk = Callable[..., str]


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return Assistant(*toy_omni.build(), "toy")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "red circle.png").write_bytes(picture())
    write_tone(tmp_path / "a.wav", 0.6)
    return tmp_path


def typed(*lines: str) -> Callable[[str], str]:
    """What a person types, line by line, and then the end of the input."""
    left = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    return read


def talk(assistant: Assistant, lines: list[str], **changes: object) -> str:
    """Everything that a chat shows for these lines."""
    shown: list[str] = []
    given = typed(*lines)

    def read(prompt: str) -> str:
        line = given(prompt)
        shown.append(f"{prompt}{line}\n")
        return line

    settings = ChatSettings(AnswerSettings(10), Voice(), **changes)  # type: ignore[arg-type]
    TerminalChat(assistant, settings, read, shown.append).run()
    return "".join(shown)


def answers(said: str, question: str) -> str:
    """The line after a question."""
    return said.partition(f"> {question}\n")[2].partition("\n")[0]


def expected(assistant: Assistant, *messages: Message, folder: Path | None = None) -> str:
    media = assistant.media()
    if folder:
        media.add_image("x", folder / "red circle.png")
        media.add_audio("y", folder / "a.wav")
    prompt = assistant.prompt(messages, media)
    return generate(assistant.model, assistant.tokenizer, [prompt], media, AnswerSettings(10))[0].text


def user(*parts: Part) -> Message:
    return Message("user", parts)


def test_text_pictures_and_recordings(assistant: Assistant, folder: Path) -> None:
    lines = ["who ?", "/reset", f"/image '{folder}/red circle.png'", f"/audio {folder}/a.wav", "what is it ?"]
    said = talk(assistant, lines)
    assert answers(said, "who ?") == expected(assistant, user(Part("text", "who ?")))
    assert "picture of 40 x 40 attached" in said and "0.6 s of sound attached" in said
    parts = Part("image", "x"), Part("audio", "y"), Part("text", "what is it ?")
    assert answers(said, "what is it ?") == expected(assistant, user(*parts), folder=folder)
    # what is attached may be sent alone
    said = talk(assistant, [f"/audio {folder}/a.wav", ""])
    assert answers(said, "") == expected(assistant, user(Part("audio", "y")), folder=folder)


def test_the_words_of_a_recording_are_read_behind_it(folder: Path) -> None:
    model, tokenizer = toy_omni.build()
    model.config = dataclasses.replace(model.config, with_words=True)
    assistant = Assistant(model, tokenizer, "toy")
    media = assistant.media()
    write_tone(folder / "short.wav", 0.3)  # untrained, it hears something all the time
    media.add_audio("y", folder / "short.wav")
    heard = assistant.transcribe(media.frames("y"))
    assert heard and media.words("y") == heard
    prompt = assistant.prompt([user(Part("audio", "y"), Part("text", "what is it ?"))], media)
    pieces = assistant.pieces(prompt)
    said = tokenizer.decode(tokenizer.encode(f" {heard}")[: assistant.ctx_len // 4])
    assert "".join(piece.text for piece in pieces if piece.kind == "words") == said
    kinds = [kind for kind, _ in itertools.groupby(piece.kind for piece in pieces)]
    assert kinds == ["mark", "audio", "words", "text", "mark"]


def test_what_is_typed_is_read_as_the_thinker_would_write_it(assistant: Assistant) -> None:
    said = ["What is THIS", "No. I Said It", "two"]
    roles = ["user", "assistant", "user"]
    messages = [Message(role, (Part("text", text),)) for role, text in zip(roles, said, strict=True)]
    written = as_written(assistant.model.thinker, assistant.tokenizer, said)
    prompt = assistant.prompt(messages, assistant.media())
    expected = f"<|user|> {written[0]}<|end|><|assistant|> {said[1]}<|end|><|user|> {written[2]}<|end|><|assistant|>"
    assert assistant.tokenizer.decode(prompt.tokens) == expected
    assert written[0] != said[0]


def test_each_line_is_read_once_and_texts_in_parts_stay(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def counted(thinker: Thinker, tokenizer: Tokenizer, texts: list[str]) -> list[str]:
        asked.extend(texts)
        return as_written(thinker, tokenizer, texts)

    monkeypatch.setattr("omni.assistant.as_written", counted)
    lines = [f"What is the number {number}" for number in range(12)]
    messages = [Message(role, (Part("text", line),)) for line in lines for role in ("user", "assistant")][:-1]
    media = assistant.media()
    with pytest.raises(TooLongError):
        assistant.prompt(messages, media)
    _, kept = longest_end(messages, lambda some: assistant.prompt(some, media))
    assert len(kept) < len(messages) and asked == lines
    parts = user(Part("text", "WHAT is"), Part("text", "this"))
    found = assistant.tokenizer.decode(assistant.prompt([parts], media).tokens)
    assert found == "<|user|> WHAT is this<|end|><|assistant|>" and asked == lines


def test_the_conversation_is_remembered_and_forgotten(assistant: Assistant) -> None:
    said = talk(assistant, ["who ?", "and what ?", "/reset", "and what ?"])
    first = expected(assistant, user(Part("text", "who ?")))
    history = user(Part("text", "who ?")), Message("assistant", (Part("text", first),))
    assert answers(said, "and what ?") == expected(assistant, *history, user(Part("text", "and what ?")))
    assert said.rpartition("> and what ?\n")[2].partition("\n")[0] == expected(
        assistant, user(Part("text", "and what ?"))
    )


def test_the_oldest_turns_are_left_out_and_that_is_said_once(assistant: Assistant) -> None:
    said = talk(assistant, [f"what is the number {number} ?" for number in range(12)])
    assert said.count("the oldest turns no longer fit into 128 positions") == 1
    assert all(answers(said, f"what is the number {number} ?") for number in range(12))


def test_mistakes_are_one_sentence_and_the_chat_goes_on(assistant: Assistant, folder: Path) -> None:
    (folder / "bad.png").write_text("hello")
    (folder / "cut.wav").write_bytes((folder / "a.wav").read_bytes()[:9000])
    write_tone(folder / "long.wav", 25)
    mistakes = {
        "/image": "found no path",
        "/image nowhere.png": "nowhere.png: no such file",
        "/image 'half": "no such file",
        f"/image {folder}": "found a folder",
        f"/image {folder}/bad.png": "not a readable picture",
        f"/audio {folder}/cut.wav": "cut off",
        f"/audio {folder}/red circle.png": "a PNG picture",
        "/fly": "/fly: no such command",
        "/speak loudly": "expected on or off",
        "/voice zoe": "expected one of ann, bob",
        " ".join(["word"] * 100): "positions",
        "\udce4": "no UTF-8",
    }
    said = talk(assistant, [*mistakes, f"/audio {folder}/long.wav", "", "/voice", "/help", "who ?", "/quit", "never"])
    for line, sentence in mistakes.items():
        assert sentence in answers(said, line), line
    assert "recordings are too long" in said and "\nann, bob\n" in said and "/image PATH" in said
    assert answers(said, "who ?") == expected(assistant, user(Part("text", "who ?")))
    assert "never" not in said


def test_answers_aloud(assistant: Assistant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = talk(assistant, ["who ?", "/voice bob", "/reset", "who ?"], speak=True, out=tmp_path / "new")
    ann, bob = (soundfile.read(tmp_path / "new" / f"answer_{number}.wav") for number in (1, 2))
    assert ann[1] == 16000 and len(ann[0]) > 1600 and (len(ann[0]) != len(bob[0]) or (ann[0] != bob[0]).any())
    assert f"[{tmp_path}/new/answer_2.wav]" in said

    def no_device(_: int) -> None:
        raise NoSoundDeviceError("found no loudspeaker")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chat_module, "Player", no_device)
    said = talk(assistant, ["who ?", "/speak on", "who ?", "what ?"])
    assert said.count("nothing can be played: found no loudspeaker; answers go to answers/") == 1
    assert (tmp_path / "answers" / "answer_2.wav").exists() and not (tmp_path / "answers" / "answer_3.wav").exists()


def test_recording(assistant: Assistant, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    import torch

    class Microphone:
        def __init__(self, sample_rate: int, max_seconds: float) -> None:
            assert sample_rate == 16000 and 4 < max_seconds < 10

        def stop(self) -> torch.Tensor:
            return torch.from_numpy(soundfile.read(folder / "a.wav", dtype="float32")[0]) * 0.3

    monkeypatch.setattr(chat_module, "Recorder", Microphone)
    said = talk(assistant, ["/record", "", ""])
    assert "recording, at most" in said and "0.6 s of sound attached" in said
    answer = said.rpartition("> \n")[2].partition("\n")[0]
    assert answer == expected(assistant, user(Part("audio", "y")), folder=folder)


def test_without_a_microphone(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "sounddevice", None)
    said = talk(assistant, ["/record", "who ?"])
    assert "sounddevice is not installed" in said and answers(said, "who ?")


def test_stopping_an_answer(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = expected(assistant, user(Part("text", "who ?"))), []

    def interrupted(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return Assistant.answer(assistant, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(assistant, "answer", interrupted)
    said = talk(assistant, ["what ?", "who ?"])
    assert "(stopped)" in said and answers(said, "who ?") == plain  # the first one is forgotten


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = toy_omni.save(tmp_path / "omni.pt", "griffin_lim")
    read = typed("who ?")
    monkeypatch.setattr("builtins.input", read)
    words = ["--checkpoint", str(checkpoint), "--device", "cpu"]
    assert main(["chat", *words, "--speak", "--out", str(tmp_path), "--max-tokens", "6"]) == 0
    assert "toy: type a question" in capsys.readouterr().out and len(soundfile.read(tmp_path / "answer_1.wav")[0])
    assert main(["chat", *words, "--temperature", "-1"]) == 2
    assert main(["chat", "--checkpoint", str(tmp_path / "none.pt")]) == 1
    assert "none.pt: no such checkpoint" in capsys.readouterr().err
    with pytest.raises(UserError, match="expected one of ann, bob"):
        main_chat = TerminalChat(
            Assistant.load(checkpoint, "cpu"), ChatSettings(AnswerSettings(), Voice("zoe"), True), read, print
        )
        main_chat.run()


def test_with_a_draft_the_chat_says_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, (_, tokenizer) = toy_omni.save(tmp_path / "omni.pt"), toy_omni.build()
    drafts = {
        "draft.pt": toy_omni.save_draft(tmp_path / "draft.pt", tokenizer),
        "other.pt": toy_omni.save_draft(tmp_path / "other.pt", Tokenizer.train(toy_omni.TEXT, 350)),
        "short.pt": toy_omni.save_draft(tmp_path / "short.pt", tokenizer, 64),
    }
    guessed = []
    plainly = Decoding.runs
    monkeypatch.setattr(Decoding, "runs", lambda self, most: (guessed.append(self), plainly(self, most))[1])

    def said(*words: str) -> str:
        monkeypatch.setattr("builtins.input", typed("how many squares are there ?", "who has the ball ?"))
        assert main(["chat", "--checkpoint", str(checkpoint), "--device", "cpu", "--max-tokens", "12", *words]) == 0
        return capsys.readouterr().out

    for more in ([], ["--temperature", "1", "--seed", "3"]):
        assert said(*more) == said(*more, "--draft", str(drafts["draft.pt"]))
    assert [decoding.tally.guessed > 0 for decoding in guessed] == [False, False, True, True] * 2
    for name, expected in (("other.pt", "with tokenizer"), ("short.pt", "ctx_len 64, expected at least 128")):
        assert main(["chat", "--checkpoint", str(checkpoint), "--device", "cpu", "--draft", str(drafts[name])]) == 1
        error = capsys.readouterr().err
        assert f"{name}: found a Thinker " in error and expected in error and error.count("\n") == 1
    monkeypatch.chdir(tmp_path)
    assert main(["chat", "--checkpoint", str(checkpoint), "--draft"]) == 1
    assert "configs/draft_nano.json: no such configuration" in capsys.readouterr().err
