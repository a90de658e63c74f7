"""Three exchanges with a trained omni model, for the end of a run: by text, about a picture, and by voice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from omni.audio import save_wav
from omni.config import data_rules
from omni.data.dialogue import Chat, read_chats
from omni.evaluate.omni import Examiner, say
from omni.exchange import Exchange
from omni.features import FeatureStore, cache_of
from omni.load import load_omni
from omni.summary import read_summary


def example_exchanges(checkpoint: Path, manifest: Path, folder: Path) -> list[Exchange]:
    """Ask the first held-out question of each kind; the spoken question is answered aloud, as a WAV in ``folder``.

    Args:
        checkpoint: an ``omni.pt``.
        manifest: chats of the kind of ``sft_test.jsonl``; kinds that it does not hold are left out.
        folder: where the WAV goes.
    """
    model, tokenizer = load_omni(checkpoint)
    examiner = Examiner(model, tokenizer, FeatureStore(model, cache_of(checkpoint)))
    chats = read_chats(manifest, data_rules(read_summary(checkpoint)["config"]["data"], str(checkpoint)))
    found = []
    for kind, wanted in _KINDS.items():
        chat = next((chat for chat in chats if wanted(chat)), None)
        if chat is None:
            continue
        answer = examiner.ask([chat]).answers[0]
        spoken = None
        if kind == "speech" and answer and model.config.speech.voices:
            spoken = folder / "answer.wav"
            save_wav(spoken, say(model, tokenizer, [answer])[0], model.config.speech.mel.sample_rate)
        found.append(
            Exchange(
                kind,
                _question(chat) or chat.transcript,
                answer,
                chat.answer,
                image=_first(chat.paths("image")),
                audio=_first(chat.paths("audio")),
                answer_wav=spoken,
            )
        )
    return found


_KINDS: dict[str, Callable[[Chat], bool]] = {
    "text": lambda chat: chat.task == "text_qa",
    "image": lambda chat: chat.task == "image_qa",
    "speech": lambda chat: chat.speak and bool(chat.paths("audio")),
}


def _first(paths: list[str]) -> Path | None:
    return Path(paths[0]) if paths else None


def _question(chat: Chat) -> str:
    return " ".join(part.value for part in chat.messages[-2].parts if part.kind == "text" and not chat.paths("audio"))
