"""Stage E, to be read and heard: questions by text, picture and voice, what each position was, and the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from omni.audio import load_audio
from omni.data.chat_batch import collate_chats
from omni.data.dialogue import Chat, Encoded
from omni.data.images import load_image
from omni.evaluate.omni import Examiner, say
from omni.evaluate.sample_media import save_pixels, save_sound
from omni.generate import embed_batch
from omni.prompt_pieces import prompt_pieces
from omni.sample import Sample
from omni.tokenizer import AUDIO, IMAGE, spoken_text

_KINDS: dict[str, Callable[[Chat], bool]] = {
    "asked by text": lambda chat: not chat.media,
    "asked about a picture": lambda chat: bool(chat.paths("image")) and not chat.paths("audio"),
    "asked by voice": lambda chat: bool(chat.paths("audio")) and not chat.paths("image"),
    "asked by voice about a picture": lambda chat: bool(chat.paths("audio")) and bool(chat.paths("image")),
}


def show_exchanges(examiner: Examiner, chats: Sequence[Chat], count: int, out: Path) -> list[Sample]:
    """The first ``count`` chats of each kind that a set holds; what was asked by voice is answered aloud as well."""
    found: list[Sample] = []
    for name, wanted in _KINDS.items():
        # questions first: they have one right answer
        fitting = [chat for chat in chats if wanted(chat)]
        picked = sorted(fitting, key=lambda chat: not chat.task.endswith("_qa"))[:count]
        found += [_exchange(examiner, name, chat, out, len(found) + at) for at, chat in enumerate(picked, 1)]
    return found


def _exchange(examiner: Examiner, name: str, chat: Chat, out: Path, number: int) -> Sample:
    model, size = examiner.model, examiner.model.config.vision_encoder.image_size
    answer = examiner.ask([chat]).answers[0]
    pictures = [
        ("picture, as the encoder sees it", save_pixels(load_image(path, size).numpy(), out / f"chat_{number}_{i}.png"))
        for i, path in enumerate(chat.paths("image"))
    ]
    rate = model.config.audio_encoder.mel.sample_rate
    sounds = [
        ("recording", save_sound(load_audio(path, rate), rate, out / f"chat_{number}_{i}.ogg"))
        for i, path in enumerate(chat.paths("audio"))
    ]
    if sounds and spoken_text(answer) and model.config.speech.voices:
        wave = say(model, examiner.tokenizer, [answer])[0]
        path = save_sound(wave, model.config.speech.mel.sample_rate, out / f"chat_{number}_answer.ogg")
        sounds.append(("spoken answer", path))
    prompt = examiner.encoder.prompt(chat.messages[:-1])
    heard = " / ".join(examiner.features.words(path) for path in chat.paths("audio"))
    texts = [("question", _question(chat)), ("said", chat.transcript), ("heard", heard)]
    texts += [("expected", chat.answer), ("answer", answer)]
    return Sample(
        name,
        tuple((key, text) for key, text in texts if text),
        tuple(pictures),
        tuple(sounds),
        (*_pieces(examiner, prompt), ("answer", answer)),
        spoken_text(answer) == spoken_text(chat.answer),
    )


def _question(chat: Chat) -> str:
    parts = [part for message in chat.messages[-2:-1] for part in message.parts]
    return " ".join(part.value for part in parts if part.kind == "text")


@torch.no_grad()
def _pieces(examiner: Examiner, prompt: Encoded) -> list[tuple[str, str]]:
    """What the Thinker reads, in order; of pictures and recordings the tokens that their positions are most like."""
    model, tokenizer = examiner.model, examiner.tokenizer
    batch = collate_chats([prompt], examiner.features.image, examiner.features.audio, tokenizer.pad_id, left=True)
    embeddings_VD = model.thinker.embed_tokens.weight
    x_TD = embed_batch(model, batch.to(embeddings_VD.device))[0].float()
    cosines_TV = torch.nn.functional.normalize(x_TD, dim=-1) @ torch.nn.functional.normalize(embeddings_VD, dim=-1).T
    cosines_TV[:, list(tokenizer.special.values())] = -1  # no word is a mark of the template
    nearest_T = cosines_TV.argmax(dim=1).tolist()
    pieces, at = list[tuple[str, str]](), len(x_TD) - len(prompt.tokens)
    for piece in prompt_pieces(prompt, tokenizer, model.image_positions):
        text = piece.text
        if piece.kind in ("image", "audio"):
            words = [tokenizer.decode([token]).strip() or "\u2423" for token in nearest_T[at : at + piece.positions]]
            shown = " ".join(words[:12]) + (" ..." if len(words) > 12 else "")
            text = f"{ {'image': 'picture', 'audio': 'sound'}[piece.kind] } \u00d7 {piece.positions}, like: {shown}"
        pieces.append((piece.kind, text))
        at += piece.positions
    assert prompt.tokens.count(tokenizer.special[IMAGE]) == len(prompt.images) * model.image_positions
    assert prompt.tokens.count(tokenizer.special[AUDIO]) == sum(prompt.audio_positions)
    return pieces
