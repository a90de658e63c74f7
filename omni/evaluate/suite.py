"""`omni eval`: the held-out figures of every stage, each from its checkpoint alone.

The test sets are those that the configuration inside the checkpoint names; a person's own sets take their place.
torch is imported when a stage is evaluated, so that `omni --help` is instant.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omni.config import DataConfig, RunConfig, UserError, data_rules
from omni.console import log
from omni.predictions import Predictions, Sets
from omni.stages import JUDGE, STAGES, StageInfo, stage_of, stages_of
from omni.summary import read_summary

if TYPE_CHECKING:
    from omni.evaluate.thinker import TextLikelihood
    from omni.generate_speech import Mind
    from omni.metrics import Figure
    from omni.models.audio_encoder import AudioEncoder
    from omni.models.speech import SpeechModel
    from omni.models.thinker import Thinker
    from omni.tokenizer import Tokenizer

NAMES = tuple(name for stage in STAGES for name in stage.figures)


@dataclass(frozen=True)
class OwnSets:
    """Test sets that take the place of the configuration's; None keeps those."""

    text: str | None = None
    asr: str | None = None
    images: str | None = None
    tts: str | None = None
    sft: str | None = None


@dataclass
class Results:
    """Figures by stage as plain values, a line for each stage that could not be evaluated, and the raw predictions."""

    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    predictions: Predictions = field(default_factory=Predictions)


# what else an evaluation reads, and where the stage's configuration names it: stage B grades speech output
_TRAINED_ON = {
    "codec": {"audio_enc": "audio_ckpt"},
    "talker": {"audio_enc": "audio_ckpt", "thinker": "thinker_ckpt"},
}


@dataclass(frozen=True)
class _Case:
    """What an evaluation is given."""

    size: str
    own: OwnSets
    limit: int | None
    sets: Sets = field(default_factory=dict)  # fingerprints of the test sets that were read

    def path(self, kind: str) -> Path:
        """The final checkpoint of a kind."""
        return stage_of(kind).checkpoint(self.size)

    def inputs(self, name: str, stage: StageInfo) -> dict[str, Path]:
        """The checkpoints that an evaluation reads: for speech output also those that the Talker was trained on."""
        own = self.path(stage.kind)
        if name not in _TRAINED_ON or not own.exists():
            return {stage.kind: own}
        config, lineage = (read_summary(own)[part] for part in ("config", "lineage"))
        # a Talker without the Thinker's states was made from no Thinker, whatever its configuration names
        others = {kind: config[key] for kind, key in _TRAINED_ON[name].items() if lineage.get(kind)}
        return {stage.kind: own, **{kind: Path(path) for kind, path in others.items()}}

    def data(self, kind: str) -> dict[str, Any]:
        """The data section of the configuration that a checkpoint was trained with."""
        return dict(read_summary(self.path(kind))["config"]["data"])

    def rules(self, kind: str) -> DataConfig:
        """The limits of the data that a checkpoint was trained on."""
        return data_rules(self.data(kind), str(self.path(kind)))

    def test_set(self, kind: str, own: str | None, option: str) -> str:
        """The person's own set, or the one that the checkpoint's configuration names."""
        data = self.data(kind)
        found = own or data["test"] or data["val"]
        if not found:
            raise UserError(
                f"{self.path(kind)}: its configuration names no data.test and no data.val, expected one; "
                f"give a set with {option} FILE"
            )
        self.note(kind, str(found))
        return str(found)

    def note(self, kind: str, path: str) -> None:
        """Keep the fingerprint of a test set, its recordings or pictures included."""
        from omni.lineage import data_fingerprint

        if path not in self.sets:
            self.sets[path] = data_fingerprint(path, _media(kind, path, self.rules(kind)))


def _media(kind: str, path: str, rules: DataConfig) -> list[Path]:
    """The recordings and pictures that a test set of a kind of checkpoint names."""
    from omni.data.dialogue import read_chats
    from omni.data.images import read_image_manifest
    from omni.data.speech import read_speech_manifest

    if kind == "thinker":
        return []
    if kind == "omni":
        return [Path(media) for chat in read_chats(path, rules) for media in chat.media]
    if kind == "vision":
        return [row.path("image") for row in read_image_manifest(path, rules)]
    return [row.path("wav") for row in read_speech_manifest(path, rules)]


def evaluate(size: str, names: Sequence[str] = (), own: OwnSets | None = None, limit: int | None = None) -> Results:
    """Evaluate the stages named, or all of them; those without a checkpoint are reported, not raised.

    Args:
        size: of the configurations whose checkpoints are meant.
        names: of :data:`NAMES`; empty: all.
        own: test sets that take the place of the configuration's.
        limit: sentences of each speech-output set; None: all.

    Raises:
        UserError: when a test set is missing or malformed.
    """
    from omni.runtime import setup_compute

    setup_compute(RunConfig(device="cpu"))
    case, results = _Case(size, own or OwnSets(), limit), Results()
    results.predictions.sets = case.sets
    for name in names or NAMES:
        stage = next(stage for stage in STAGES if name in stage.figures)
        inputs = case.inputs(name, stage)
        lacking = [kind for kind, path in inputs.items() if not path.exists()]
        if lacking:
            command = stage_of(lacking[0]).command(size)
            results.missing.append(f"{name}: no {inputs[lacking[0]]}; run `{command}` first")
            continue
        started = time.perf_counter()
        found = _EVALUATIONS[name](case, inputs)
        results.figures[name] = {key: figure.to_dict() for key, figure in found.items()}
        for key, figure in found.items():
            results.predictions.add(name, key, (item.to_dict() for item in figure.cases))
        log.info("%s evaluated in %.1f s", name, time.perf_counter() - started)
    return results


def _thinker(case: _Case, inputs: dict[str, Path]) -> dict[str, Any]:
    from omni.data.text import read_text
    from omni.evaluate.ngram import KneserNey
    from omni.load import load_thinker
    from omni.metrics import located, ratio

    thinker, tokenizer = load_thinker(inputs["thinker"])
    likelihood, text, path = _likelihood(thinker, tokenizer, case)
    # of a larger corpus the n-grams alone would take gigabytes
    training = read_text(case.data("thinker")["train"], case.rules("thinker"))[:_NGRAM_CHARACTERS]
    yardstick = ratio(*KneserNey(training).bits_per_byte(text))
    return {
        "bits_per_byte": _windows(likelihood.bits_per_byte(), path),
        "bits_per_byte_5gram": located(yardstick, [f"{path}:block {i}" for i in range(1, yardstick.n + 1)]),
        "perplexity": _windows(likelihood.perplexity(), path),
    }


def _windows(figure: Figure, path: str) -> Figure:
    """A figure over the windows of a text, with their numbers."""
    from omni.metrics import located

    return located(figure, [f"{path}:window {number}" for number in range(1, figure.n + 1)])


_NGRAM_CHARACTERS = 20_000_000


def _likelihood(thinker: Thinker, tokenizer: Tokenizer, case: _Case) -> tuple[TextLikelihood, str, str]:
    """How well a Thinker predicts stage A's test text, the very part of the text that it predicted, and its path."""
    import numpy as np

    from omni.data.stream import ordered_batches
    from omni.data.text import packed, read_text
    from omni.evaluate.thinker import TextLikelihood

    path = case.test_set("thinker", case.own.text, "--text")
    text = read_text(path, case.rules("thinker"))
    tokens = np.array([token for line in text.splitlines(keepends=True) for token in tokenizer.encode(line)])
    likelihood = TextLikelihood(thinker, tokenizer)
    separate = case.data("thinker")["separate_documents"]
    windows = packed(tokens, thinker.config.ctx_len, tokenizer, separate, order="text")
    for batch in ordered_batches(windows, 16):
        likelihood.add(batch)
    if separate:  # all but the first token of each window
        return likelihood, text, path
    first = tokenizer.num_bytes(int(tokens[0]))  # is context and not predicted, as are the tokens of no whole window
    predicted = text.encode()[first : first + int(sum(likelihood.bytes))]
    return likelihood, predicted.decode(errors="ignore"), path


def _audio_enc(case: _Case, inputs: dict[str, Path]) -> dict[str, Any]:
    from omni.data.speech import Recordings, read_speech_manifest
    from omni.evaluate.audio_enc import infeasible, recognize
    from omni.load import load_audio_encoder

    encoder = load_audio_encoder(inputs["audio_enc"])
    test = case.test_set("audio_enc", case.own.asr, "--asr")
    rules, mel = case.rules("audio_enc"), encoder.config.mel
    recordings = Recordings(read_speech_manifest(test, rules), mel, rules)
    found = recognize(encoder, recordings)
    figures = {"wer": found.wer(), "cer": found.cer()}
    voices = case.data("audio_enc")["test_voices"]
    if voices and not case.own.asr:
        case.note("audio_enc", voices)
        strangers = Recordings(read_speech_manifest(voices, rules), mel, rules)
        figures["wer_unseen_voices"] = recognize(encoder, strangers).wer()
    return {**figures, "infeasible": infeasible(encoder, recordings)}


def _vision(case: _Case, inputs: dict[str, Path]) -> dict[str, Any]:
    from omni.evaluate.vision import vision_figures
    from omni.load import load_vision_and_tokenizer

    encoder, tokenizer = load_vision_and_tokenizer(inputs["vision"])
    test = case.test_set("vision", case.own.images, "--images")
    combinations = None if case.own.images else case.data("vision")["test_combinations"]
    if combinations is not None:
        case.note("vision", combinations)
    return vision_figures(encoder, tokenizer, test, combinations, case.rules("vision"))


def _codec(case: _Case, inputs: dict[str, Path]) -> dict[str, Any]:
    from omni.evaluate.codec import codec_figures
    from omni.load import load_audio_encoder, load_speech

    test = case.test_set("talker", case.own.tts, "--tts")
    model, encoder = load_speech(inputs["talker"]), load_audio_encoder(inputs["audio_enc"])
    return codec_figures(model, encoder, test, case.limit, case.rules("talker"))


def _speaker(inputs: dict[str, Path]) -> tuple[SpeechModel, Mind | None, AudioEncoder]:
    """The Talker's model, the Thinker where the Talker gets its states, and stage B's recognizer."""
    from omni.load import load_audio_encoder, load_speech, load_thinker

    model = load_speech(inputs["talker"])
    mind = load_thinker(inputs["thinker"]) if "thinker" in inputs else None
    return model, mind, load_audio_encoder(inputs["audio_enc"])


def _talker(case: _Case, inputs: dict[str, Path]) -> dict[str, Any]:
    from omni.evaluate.talker import Graders, SpeechSets, talker_figures

    model, mind, encoder = _speaker(inputs)
    data, test = case.data("talker"), case.test_set("talker", case.own.tts, "--tts")
    keys = () if case.own.tts else ("test_words", "test_voices", "test_shuffled")
    others = {key.removeprefix("test_"): data.get(key) for key in keys}
    for path in filter(None, others.values()):
        case.note("talker", path)
    sets = SpeechSets(test, **others, limit=case.limit, rules=case.rules("talker"))
    return talker_figures(model, Graders(encoder, _judge(case.size)), sets, mind)


def _judge(size: str) -> AudioEncoder | None:
    """The judge of a size, where it has one and it is trained."""
    from omni.load import load_audio_encoder

    if JUDGE not in stages_of(size) or not JUDGE.checkpoint(size).exists():
        return None
    return load_audio_encoder(JUDGE.checkpoint(size))


def _omni(case: _Case, inputs: dict[str, Path]) -> dict[str, Any]:
    from omni.data.dialogue import read_chats
    from omni.evaluate.omni import Examiner, before_fusion, examine
    from omni.features import FeatureStore, cache_of
    from omni.load import load_omni, load_thinker

    model, tokenizer = load_omni(inputs["omni"])
    chats = read_chats(case.test_set("omni", case.own.sft, "--sft"), case.rules("omni"))
    features = FeatureStore(model, tokenizer, cache_of(inputs["omni"]), case.rules("omni"))
    examiner, thinker = Examiner(model, tokenizer, features), None
    figures: dict[str, Any] = dict(examine(examiner, chats).figures)
    if case.path("thinker").exists():
        thinker, own = load_thinker(case.path("thinker"))
        thinker = thinker if own.hash == tokenizer.hash else None
    figures |= before_fusion(examiner, thinker, chats)
    if case.path("thinker").exists():
        likelihood, _, path = _likelihood(model.thinker, tokenizer, case)
        figures["bits_per_byte"] = _windows(likelihood.bits_per_byte(), path)
    return figures


_EVALUATIONS: dict[str, Callable[[_Case, dict[str, Path]], dict[str, Any]]] = {
    "thinker": _thinker,
    "audio_enc": _audio_enc,
    "vision": _vision,
    "codec": _codec,
    "talker": _talker,
    "omni": _omni,
}
