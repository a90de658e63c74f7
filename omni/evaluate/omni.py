"""Stage E's figures: questions answered greedily, graded by exact match after normalization, beside honest baselines.

``blind`` and ``deaf`` ask the same questions with the picture or recording exchanged for another sample's of the same
question template; ``prior`` always gives the most frequent answer of the template. A model that sees beats both.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from omni.audio import load_audio, log_mel
from omni.data.dialogue import Chat, ChatEncoder, Message, Part
from omni.evaluate.audio_enc import hear, transcribe
from omni.features import FeatureStore
from omni.generate import AnswerSettings, generate
from omni.generate_speech import speak
from omni.metrics import Figure, accuracy, located, word_error_rate
from omni.models.omni import OmniModel
from omni.models.thinker import Thinker
from omni.tokenizer import Tokenizer, spoken_text


@dataclass
class Answers:
    """Raw results: the chats that were asked and what the model answered."""

    chats: list[Chat]
    answers: list[str]

    def accuracy(self) -> Figure:
        """Share of exact matches."""
        return located(accuracy([chat.answer for chat in self.chats], self.answers), self.where)

    @property
    def where(self) -> list[str]:
        """Places of the chats."""
        return [chat.where for chat in self.chats]

    def by_template(self) -> dict[str, Figure]:
        """Accuracy of each question template."""
        groups: dict[str, list[int]] = defaultdict(list)
        for index, chat in enumerate(self.chats):
            groups[str(chat.template)].append(index)
        return {
            name: accuracy([self.chats[i].answer for i in rows], [self.answers[i] for i in rows])
            for name, rows in sorted(groups.items())
        }


class Examiner:
    """Asks an omni model the last question of chats."""

    def __init__(self, model: OmniModel, tokenizer: Tokenizer, features: FeatureStore) -> None:
        self.model, self.tokenizer, self.features = model, tokenizer, features
        self.encoder = ChatEncoder(
            tokenizer, model.image_positions, features.audio_positions, features.words, model.thinker.config.ctx_len
        )

    def ask(self, chats: Sequence[Chat], max_new_tokens: int = 48) -> Answers:
        """Greedy answers to the last turn of each chat."""
        self.features.add(
            [path for chat in chats for path in chat.paths("image")],
            [path for chat in chats for path in chat.paths("audio")],
        )
        prompts = [self.encoder.prompt(chat.messages[:-1]) for chat in chats]
        found = generate(self.model, self.tokenizer, prompts, self.features, AnswerSettings(max_new_tokens))
        return Answers(list(chats), [answer.text for answer in found])


def exchanged(chats: Sequence[Chat], kind: str) -> list[Chat]:
    """The same chats, each with the pictures or recordings of the next chat of its template."""
    groups: dict[str, list[Chat]] = defaultdict(list)
    for chat in chats:
        groups[str(chat.template)].append(chat)
    partner: dict[str, list[str]] = {}
    for group in groups.values():
        for chat, other in zip(group, group[1:] + group[:1], strict=True):
            partner[chat.where] = other.paths(kind)
    result = []
    for chat in chats:
        media = iter(partner[chat.where])
        messages = [
            Message(m.role, tuple(Part(p.kind, next(media, p.value)) if p.kind == kind else p for p in m.parts))
            for m in chat.messages
        ]
        result.append(dataclasses.replace(chat, messages=messages))
    return result


def prior(chats: Sequence[Chat]) -> Figure:
    """Accuracy of always giving a template's most frequent answer."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for chat in chats:
        answers[str(chat.template)][spoken_text(chat.answer)] += 1
    best = {template: counts.most_common(1)[0][0] for template, counts in answers.items()}
    guesses = [best[str(chat.template)] for chat in chats]
    return located(accuracy([chat.answer for chat in chats], guesses), [chat.where for chat in chats])


def say(model: OmniModel, tokenizer: Tokenizer, texts: Sequence[str]) -> list[torch.Tensor]:
    """Waveforms of texts in the model's clearest voice, durations and codes predicted; silence for an empty text."""
    speech = model.speech
    voice_1E = speech.voice(None)[None]
    spoken = [index for index, text in enumerate(texts) if spoken_text(text)]
    waves = [torch.zeros(speech.config.mel.sample_rate) for _ in texts]
    found = speak(
        speech, [texts[index] for index in spoken], voice_1E.expand(len(spoken), -1), (model.thinker, tokenizer)
    )
    for index, item in zip(spoken, found, strict=True):
        waves[index] = item.wave
    return waves


def spoken_accuracy(examiner: Examiner, answered: Answers) -> Figure:
    """Share of answers that, spoken and recognized again by the model's own audio encoder, are the right ones."""
    model = examiner.model
    waves = say(model, examiner.tokenizer, answered.answers)
    heard = hear(model.audio_encoder, waves, model.speech.config.mel.sample_rate)
    return located(accuracy([chat.answer for chat in answered.chats], heard), answered.where)


def before_fusion(examiner: Examiner, thinker: Thinker | None, chats: Sequence[Chat]) -> dict[str, Figure]:
    """What the stages before could do with the same questions and recordings: what stage E forgot, or taught.

    Args:
        examiner: of the omni model.
        thinker: stage A's, with the same tokenizer; None where it is not there.
        chats: the test set.
    """
    model, figures = examiner.model, dict[str, Figure]()
    written = [chat for chat in chats if chat.task == "text_qa"]
    if written and thinker is not None:
        fused, model.thinker = model.thinker, thinker
        try:
            figures["text_qa_before"] = examiner.ask(written).accuracy()
        finally:
            model.thinker = fused
    recorded = [chat for chat in chats if chat.task == "asr"]
    if recorded:
        mel = model.audio_encoder.config.mel
        frames = [log_mel(mel)(load_audio(chat.paths("audio")[0], mel.sample_rate)) for chat in recorded]
        heard = transcribe(model.audio_encoder, frames)
        found = word_error_rate([chat.answer for chat in recorded], heard)
        figures["asr_wer_ctc"] = located(found, [chat.where for chat in recorded])
    return figures


@dataclass
class OmniResults:
    """Everything :func:`examine` found: figures by name and the raw answers behind them by task."""

    figures: dict[str, Figure]
    answers: dict[str, Answers]


def examine(examiner: Examiner, chats: Sequence[Chat]) -> OmniResults:
    """All question figures of a test set; tasks that it does not hold are left out."""
    tasks: dict[str, list[Chat]] = defaultdict(list)
    for chat in chats:
        combination = chat.task == "image_qa" and chat.held_out == "combination"
        tasks["image_qa_unseen_combinations" if combination else chat.task].append(chat)
    figures: dict[str, Figure] = {}
    answers: dict[str, Answers] = {}
    for name in ("text_qa", "image_qa", "image_qa_unseen_combinations", "speech_qa", "image_speech_qa"):
        if tasks[name]:
            answers[name] = examiner.ask(tasks[name])
            figures[name] = answers[name].accuracy()
    for name, kind, suffix in (("image_qa", "image", "blind"), ("speech_qa", "audio", "deaf")):
        if tasks[name]:
            answers[f"{name}_{suffix}"] = examiner.ask(exchanged(tasks[name], kind))
            figures[f"{name}_{suffix}"] = answers[f"{name}_{suffix}"].accuracy()
            figures[f"{name}_prior"] = prior(tasks[name])
    if tasks["speech_out"]:
        answers["speech_out"] = examiner.ask(tasks["speech_out"])
        figures["speech_out_accuracy"] = spoken_accuracy(examiner, answers["speech_out"])
    if tasks["asr"]:
        answers["asr"] = examiner.ask(tasks["asr"])
        found = word_error_rate([chat.answer for chat in tasks["asr"]], answers["asr"].answers)
        figures["asr_wer"] = located(found, answers["asr"].where)
        if examiner.model.config.with_words:
            heard = [examiner.features.words(chat.paths("audio")[0]) for chat in tasks["asr"]]
            found = word_error_rate([chat.answer for chat in tasks["asr"]], heard)
            figures["asr_wer_heard"] = located(found, answers["asr"].where)
    return OmniResults(figures, answers)
