"""Stage E of five: projectors and fine-tuning make one model of the four before it.

Why: only here do pictures and recordings become something the Thinker can talk about, and its answers audible.

    python sft_omni.py --config configs/omni_sft_nano.json

In: ``sft.jsonl``, a chat a line, with text, pictures and recordings (``data.train``); the checkpoints of stages A to D.
Out: ``omni.pt`` in ``save_dir``: everything that inference needs, tokenizer included.
Evaluated by: answers to questions about unseen pictures and recordings, beside a model that cannot see or hear and
the most frequent answer (``omni eval --stage omni``).
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from omni.cache import FeatureCache, FeatureCacheConfig
from omni.checkpoint import fingerprint, read_summary
from omni.config import DataConfig, PhaseConfig, Problem, StageConfig, UserError, to_dict
from omni.data.chat_batch import ChatBatch, collate_chats
from omni.data.dialogue import Chat, ChatEncoder, Encoded
from omni.data.manifest import settle
from omni.data.mixture import ChatSamples, replayed
from omni.data.parts import ChatParts, read_chat_parts
from omni.data.stream import BatchStream, ordered_batches
from omni.data.text import read_text, tokenize
from omni.data.voices import Voices
from omni.evaluate.omni import Examiner
from omni.features import FeatureStore, UnusableMediaError, collate_media, perceive, with_media
from omni.load import load_audio_encoder, load_speech, load_thinker, load_vision
from omni.losses import next_token_loss_sum
from omni.models.lora import LoRAConfig, adapters, add_adapters, merged
from omni.models.omni import OmniConfig, OmniModel
from omni.models.projector import ProjectorConfig, match_rms
from omni.runtime import Precision, log
from omni.talker_stage import talker_stage
from omni.tokenizer import AUDIO, IGNORE, IMAGE, Tokenizer
from omni.training_utils import Run, Stage, run_stage


@dataclass(frozen=True, kw_only=True)
class ChatData(DataConfig, FeatureCacheConfig):
    """Where the chats are, and how they are mixed."""

    train: str
    val: str
    test: str | None = None  # for `omni eval`
    replay_text: str | None = None  # stage A's text, so that the Thinker does not forget it
    replay_share: float = 0.1  # of all samples
    replay_weight: float = 0.3  # of their loss, per token, beside that of the answers
    replay_anew: bool = False  # each epoch replays other documents of the text; false: always the first ones
    task_weights: dict[str, float] = field(default_factory=dict)  # how often a task occurs in an epoch; 1 by default
    val_questions: int = 64  # asked at each validation, of each task
    speech_train: str | None = None  # recordings on which the Talker follows the fine-tuned Thinker: wav,text,speaker
    speech_val: str | None = None

    def problems(self) -> Iterator[Problem]:
        """Limits that nothing passes, and mixtures that cannot be."""
        yield from DataConfig.problems(self)
        yield from FeatureCacheConfig.problems(self)
        if not 0 <= self.replay_share < 1:
            yield Problem("replay_share", str(self.replay_share), "a share from 0 to below 1")
        for task, weight in self.task_weights.items():
            if not 0 <= weight < float("inf"):
                yield Problem(f"task_weights.{task}", str(weight), "0 (never) or more")
        if not self.replay_weight >= 0:
            yield Problem("replay_weight", str(self.replay_weight), "0 or more")


@dataclass(frozen=True)
class LRRatios:
    """Learning rates of phase `sft` over that phase's ``lr`` (and ``muon_lr``)."""

    projectors: float = 1.0
    thinker: float = 1.0  # or of its adapters
    encoders: float = 0.1  # at the full rate they lose what they know (docs/log.md)

    def problems(self) -> Iterator[Problem]:
        """What is no ratio."""
        for key, value in vars(self).items():
            if not 0 < value < float("inf"):
                yield Problem(
                    key, str(value), "more than 0; freeze_thinker and freeze_encoders train nothing of a part"
                )


@dataclass(frozen=True, kw_only=True)
class OmniSFTConfig(StageConfig):
    """Configuration of stage E."""

    thinker_ckpt: str
    audio_ckpt: str
    vision_ckpt: str
    talker_ckpt: str
    data: ChatData
    image_projector: ProjectorConfig
    audio_projector: ProjectorConfig
    projectors: PhaseConfig  # the projectors alone
    sft: PhaseConfig  # projectors and what is not frozen
    talker: PhaseConfig  # for a Talker that gets states: on those of the Thinker as it is now
    freeze_thinker: bool = False  # phase `sft` leaves the Thinker as it is
    freeze_encoders: bool = True  # false: phase `sft` trains them along (with words that of pictures alone)
    lora: LoRAConfig = field(default_factory=LoRAConfig)  # phase `sft` trains adapters of the Thinker instead of it
    lr_ratios: LRRatios = field(default_factory=LRRatios)
    with_words: bool = True  # behind a recording's projected states stand the words that were heard in it
    ctx_len: int = 0  # 0: the Thinker's
    val_sentences: int = 16  # generated and graded at each validation of the Talker

    def problems(self) -> Iterator[Problem]:
        """What a phase lacks, and what it cannot train."""
        if self.freeze_thinker and self.lora.rank:
            yield Problem("freeze_thinker", f"true with lora.rank {self.lora.rank}", "one of the two")
        if (self.data.speech_train is None) != (self.data.speech_val is None):
            yield Problem("data.speech_val", "speech_train without speech_val or the reverse", "both or neither")
        if self.image_projector.context:
            yield Problem("image_projector.context", str(self.image_projector.context), "0: only recordings have one")


def loss(model: OmniModel, batch: ChatBatch) -> dict[str, torch.Tensor]:
    """Cross-entropy of the assistant's tokens and of replayed text; summed.

    Answers and replay are two terms: a window of text has ten times the labels of an answer, and in one sum would be
    most of the gradient.
    """
    patches_NPD, states_NTD = perceive(model, batch)
    x = model.embed(batch.tokens_BT, patches_NPD, states_NTD, batch.positions_N)
    final_BTD = model.thinker(x, batch.positions_BT, batch.segments).final_BTD
    labels = {
        "answers": batch.labels_BT.masked_fill(batch.replay_BT, IGNORE),
        "replay": batch.labels_BT.masked_fill(~batch.replay_BT, IGNORE),
    }
    return {term: next_token_loss_sum(model.thinker, final_BTD, labels_BT) for term, labels_BT in labels.items()}


class ChatPhases:
    """What the two phases on chats share: encoder features, encoded chats, validation."""

    def __init__(
        self, model: OmniModel, tokenizer: Tokenizer, parts: ChatParts, config: OmniSFTConfig, precision: Precision
    ) -> None:
        self.model, self.tokenizer, self.config, self.precision = model, tokenizer, config, precision
        self.features = FeatureStore(
            model,
            tokenizer,
            FeatureCache.of(config.data, config.save_dir / "cache"),
            config.data,
            lambda: load_thinker(config.thinker_ckpt)[0].to(precision.device),
        )
        ctx_len = config.ctx_len or model.thinker.config.ctx_len
        self.encoder = ChatEncoder(
            tokenizer, model.image_positions, self.features.audio_positions, self.features.words, ctx_len
        )
        self.collate = functools.partial(
            collate_chats,
            image_features=self.features.image,
            audio_features=self.features.audio,
            pad_id=tokenizer.pad_id,
            joined=not config.run.compile,  # blocks are compiled for rows
        )
        self._chats = {"training": parts.training, "validation": parts.validation}
        self._num_read = {part: len(found) for part, found in self._chats.items()}
        self._left_out = parts.left_out
        tasks = sorted({chat.task for chat in parts.training})
        for task in config.data.task_weights:
            if task not in tasks:
                raise UserError(
                    f"data.task_weights.{task}: found no such task in {config.data.train}, expected one of "
                    f"{', '.join(tasks)}"
                )

    def chats(self, part: str, encoded: bool = True) -> list[Chat]:
        """The chats of a part, those with unusable media as the rules say.

        Their media are ``encoded``; or only recordings, for their words; or only the lengths of these are known.
        """
        while True:
            found = self._chats[part]
            media = [[path for chat in found for path in chat.paths(kind)] for kind in ("image", "audio")]
            try:
                if encoded:
                    self.features.add(*media)
                elif self.config.with_words:
                    self.features.add([], media[1])
                else:
                    self.features.measure(media[1])
                return found
            except UnusableMediaError as error:
                bad = {id(chat): chat for chat in found if error.problems.keys() & chat.media}
                lines = [
                    f"{chat.where}: {error.problems[path]}"
                    for chat in bad.values() for path in chat.media if path in error.problems
                ]  # fmt: skip
                self._chats[part] = [chat for chat in found if id(chat) not in bad]
                num_read = self._num_read[part]
                settle(lines, num_read - len(self._chats[part]), num_read, self.config.data, part)

    def training(self, thinker: bool, live: bool) -> ChatSamples:
        """The training chats, mixed with stage A's text; only those with media unless the Thinker is trained.

        With ``live`` they carry their media themselves, for encoders that are trained.
        """
        found, data = self.chats("training", encoded=not live), self.config.data
        if not thinker:  # text alone would teach the projectors nothing
            found = [chat for chat in found if chat.media]
        self.encoder.begin_count()
        encoded = [self.encoder.example(chat.messages, chat.where) for chat in found]
        cuts, ctx_len, report = self.encoder.cuts, self.encoder.ctx_len, self.encoder.report
        if cuts:
            log.warning("%d of %d chats were cut to %d positions: %s", cuts, len(found), ctx_len, report)
        replay = list[Encoded]()
        if thinker and data.replay_text is not None:
            text, cache = read_text(data.replay_text, data), self.config.save_dir / "cache"
            replay = replayed(data.replay_text, tokenize(text, self.tokenizer, cache), self.tokenizer, ctx_len)
        tasks = [chat.task for chat in found]
        weights = {task: weight for task, weight in data.task_weights.items() if task in tasks}
        collate, load = self.collate, None
        if live:
            pad_id, joined = self.tokenizer.pad_id, not self.config.run.compile
            collate = functools.partial(collate_media, audio_features=self.features.audio, pad_id=pad_id, joined=joined)
            load = functools.partial(with_media, model=self.model, max_pixels=data.max_pixels)
        share, anew = data.replay_share, data.replay_anew
        return ChatSamples(encoded, tasks, weights, collate, replay, share, anew, load)

    def evaluate(self, model: OmniModel, live: bool) -> dict[str, float]:
        """Loss of the validation chats, and some of their questions asked aloud."""
        if live:  # the encoders are others than at the last validation
            self.features.forget()
        chats = self.chats("validation")
        encoded = [self.encoder.example(chat.messages) for chat in chats]
        samples = ChatSamples(encoded, ["all"] * len(chats), {}, self.collate)
        total, targets = 0.0, 0
        for batch in ordered_batches(samples, 32, self.config.run.val_batches, samples.lengths):
            total += float(loss(model, batch.to(self.precision.device))["answers"])
            targets += batch.counts["answers"]
        return {"loss": total / targets, **quiz(Examiner(model, self.tokenizer, self.features), chats, self.config)}

    def projectors(self) -> Stage:
        """The projectors alone."""
        parts: list[torch.nn.Module] = _projectors(self.model)
        return self._stage(parts, [], self.config.projectors, thinker=False, live=False)

    def sft(self) -> Stage:
        """The projectors and what is not frozen."""
        model, config, ratios = self.model, self.config, self.config.lr_ratios
        parts = _projectors(model)
        rates = [ratios.projectors] * len(parts)
        if not config.freeze_thinker:
            minds = adapters(model.thinker) or [model.thinker]
            parts, rates = [*parts, *minds], rates + [ratios.thinker] * len(minds)
        if not config.freeze_encoders:
            # what CTC reads would go wrong with an encoder that is trained along without its transcripts
            encoders = [model.vision_encoder.image, *([] if config.with_words else [model.audio_encoder])]
            parts, rates = [*parts, *encoders], [*rates, *[ratios.encoders] * len(encoders)]
        return self._stage(parts, rates, config.sft, not config.freeze_thinker, live=not config.freeze_encoders)

    def _stage(
        self, trains: list[torch.nn.Module], lr_ratios: list[float], settings: PhaseConfig, thinker: bool, live: bool
    ) -> Stage:
        """A phase that trains ``trains`` on the chats; see :meth:`training`."""
        samples, run = self.training(thinker, live), self.config.run
        left_out = self._left_out + self._num_read["training"] - len(self._chats["training"])
        data = self.config.data
        stream = BatchStream(
            samples, settings.batch_size, run.seed, samples.lengths, run.num_workers, rules=data, left_out=left_out,
            quotas=samples.quotas,
        )  # fmt: skip
        weights = {"answers": 1.0, "replay": data.replay_weight}
        evaluate = functools.partial(self.evaluate, live=live)
        return Stage(trains, stream, loss, evaluate, settings, weights, unit="tokens", lr_ratios=lr_ratios)


def _projectors(model: OmniModel) -> list[torch.nn.Module]:
    return [model.image_projector, model.audio_projector]


def build(config: OmniSFTConfig, precision: Precision) -> Run:
    """The fused model and its phases."""
    data = config.data
    speech = (data.speech_train, data.speech_val) if data.speech_train and data.speech_val else None
    parts = read_chat_parts(data.train, data.val, speech, data.replay_text, data)
    model, tokenizer, lineage = assemble(config)
    chats = ChatPhases(model, tokenizer, parts, config, precision)

    def talker() -> Stage:
        assert parts.speech is not None
        mel, both = model.speech.config.mel, (parts.speech.training, parts.speech.validation)
        voices = [Voices(rows, mel, data, decode=False) for rows in both]  # stage D has read them
        return talker_stage(
            model.speech,
            # trained along without its transcripts, the model's own would not say any more when a word is spoken
            model.audio_encoder
            if config.freeze_encoders
            else load_audio_encoder(config.audio_ckpt).to(precision.device),
            (model.thinker, tokenizer),
            (voices[0], voices[1]),
            config.talker,
            config.run,
            # stage D aligned and encoded the same recordings
            [config.save_dir / "cache", Path(config.talker_ckpt).parent / "cache"],
            config.val_sentences,
            parts.speech.left_out,
        )

    phases: list[tuple[str, Callable[[], Stage]]] = [("projectors", chats.projectors), ("sft", chats.sft)]
    if parts.speech and model.speech.config.talker.state_dim:  # without states there is nothing new for it to learn
        phases.append(("talker", talker))
    return Run(
        kind="omni",
        model=model,
        phases=phases,
        model_config=to_dict(model.config),
        assets={"tokenizer.model": tokenizer.model},
        data_may_change=config.data.on_bad_sample == "skip",
        lineage={**lineage, "data": parts.fingerprint},
        export=functools.partial(merged, model) if adapters(model) and model.config.lora is None else None,
    )


def assemble(config: OmniSFTConfig) -> tuple[OmniModel, Tokenizer, dict[str, Any]]:
    """The four earlier stages as one model, with new projectors; its tokenizer; and the hashes it was built from.

    Raises:
        UserError: when a checkpoint is missing, or was trained with another tokenizer than the Thinker.
    """
    thinker, tokenizer = load_thinker(config.thinker_ckpt)
    audio_encoder, vision_encoder = load_audio_encoder(config.audio_ckpt), load_vision(config.vision_ckpt)
    speech = load_speech(config.talker_ckpt)
    refuse_other_tokenizer(config, tokenizer.hash)
    omni_config = OmniConfig(
        thinker.config,
        audio_encoder.config,
        vision_encoder.config,
        speech.config,
        config.image_projector,
        config.audio_projector,
        config.with_words,
    )
    model = OmniModel(omni_config, tokenizer.special[IMAGE], tokenizer.special[AUDIO])
    parts = {"thinker": thinker, "audio_encoder": audio_encoder, "vision_encoder": vision_encoder, "speech": speech}
    for name, part in parts.items():
        model.get_submodule(name).load_state_dict(part.state_dict())
    trained = {}
    if config.lora.rank:
        add_adapters(model.thinker, config.lora)
        trained = {"lora": to_dict(config.lora)}  # a run goes on with the same adapters
        if config.lora.keep_apart:
            model.config = dataclasses.replace(model.config, lora=config.lora)
    for projector in (model.image_projector, model.audio_projector):
        match_rms(projector, thinker.embed_tokens.weight)
    paths = {"thinker": config.thinker_ckpt, "audio_enc": config.audio_ckpt, "vision": config.vision_ckpt}
    lineage = {name: fingerprint(Path(path)) for name, path in {**paths, "talker": config.talker_ckpt}.items()}
    return model, tokenizer, {"tokenizer": tokenizer.hash, **lineage, **trained}


def refuse_other_tokenizer(config: OmniSFTConfig, tokenizer: str) -> None:
    """Raise UserError when the vision encoder or the Talker was trained with another tokenizer than the Thinker's."""
    for path in (config.vision_ckpt, config.talker_ckpt):
        theirs = read_summary(path)["lineage"]["tokenizer"]
        if theirs not in (None, tokenizer):  # a Talker that does without the Thinker has none
            raise UserError(
                f"{path}: trained with tokenizer {theirs}, but {config.thinker_ckpt} has tokenizer {tokenizer}; "
                "train that stage again on this Thinker"
            )


def quiz(examiner: Examiner, chats: Sequence[Chat], config: OmniSFTConfig) -> dict[str, float]:
    """Share of exact answers to the last question of some validation chats of each kind."""
    figures = {}
    for task in ("text_qa", "image_qa", "speech_qa"):
        some = [chat for chat in chats if chat.task == task][: config.data.val_questions]
        if some:
            figures[task] = examiner.ask(some).accuracy().value
    return figures


if __name__ == "__main__":
    sys.exit(run_stage(OmniSFTConfig, build))
