"""`omni samples`, the pages of `omni inspect` and the report: what a checkpoint does, stage by stage.

Every stage shows its own with the first cases of its held-out set, as :class:`omni.sample.Sample`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omni.config import DataConfig, RunConfig, UserError, data_rules
from omni.runtime import setup_compute
from omni.sample import Sample
from omni.stages import stage_of
from omni.summary import read_summary


@dataclass(frozen=True)
class Shown:
    """What shall be shown.

    Attributes:
        checkpoint: of any stage, also one that was written in the middle of a run.
        out: a folder for pictures and sounds.
        count: cases; of stages A and E, as many of each kind.
        manifest: a held-out set instead of the configuration's.
        inputs: checkpoints by kind that are not where the configuration names them.
    """

    checkpoint: Path
    out: Path
    count: int = 3
    manifest: str | None = None
    inputs: dict[str, Path] = field(default_factory=dict)

    @property
    def summary(self) -> dict[str, Any]:
        """What the checkpoint says of itself."""
        return read_summary(self.checkpoint)

    @property
    def rules(self) -> DataConfig:
        """The limits of its data."""
        return data_rules(self.summary["config"]["data"], str(self.checkpoint))

    @property
    def held_out(self) -> str:
        """The set that is shown."""
        data = self.summary["config"]["data"]
        found = self.manifest or data["test"] or data["val"]
        if not found:
            raise UserError(f"{self.checkpoint}: its configuration names no data.test and no data.val, expected one")
        return str(found)

    def input(self, kind: str) -> Path:
        """A checkpoint that this one was trained on."""
        key = {"audio_enc": "audio_ckpt", "thinker": "thinker_ckpt"}[kind]
        return self.inputs.get(kind) or Path(self.summary["config"][key])


def make_samples(shown: Shown) -> list[Sample]:
    """What a checkpoint does with held-out data.

    Raises:
        UserError: when the checkpoint is of no stage, or its data or what it was trained on are not here.
    """
    setup_compute(RunConfig(device="cpu"))
    kind = str(shown.summary.get("kind"))
    if kind not in _MAKERS:
        raise UserError(f"{shown.checkpoint}: found a checkpoint of {kind}, expected one of {', '.join(_MAKERS)}")
    if not isinstance(shown.summary.get("config", {}).get("data"), dict):
        raise UserError(f"{shown.checkpoint}: its configuration names no data")
    shown.out.mkdir(parents=True, exist_ok=True)
    return _MAKERS[kind](shown)


def samples_of_size(size: str, kind: str, out: Path, count: int, manifest: str | None = None) -> list[Sample]:
    """The same of the final checkpoint of a size."""
    return make_samples(Shown(stage_of(kind).checkpoint(size), out, count, manifest))


def _thinker(shown: Shown) -> list[Sample]:
    from omni.data.text import read_text
    from omni.evaluate.sample_text import continue_texts
    from omni.load import load_thinker

    return continue_texts(*load_thinker(shown.checkpoint), read_text(shown.held_out, shown.rules), shown.count)


def _audio_enc(shown: Shown) -> list[Sample]:
    from omni.data.speech import Recordings, read_speech_manifest
    from omni.evaluate.sample_speech import show_hearing
    from omni.load import load_audio_encoder

    encoder = load_audio_encoder(shown.checkpoint)
    rows = read_speech_manifest(shown.held_out, shown.rules)[: shown.count]
    return show_hearing(encoder, Recordings(rows, encoder.config.mel, shown.rules), shown.out)


def _vision(shown: Shown) -> list[Sample]:
    from omni.data.images import Pictures, read_image_manifest
    from omni.evaluate.sample_pictures import MOST_PICTURES, show_seeing
    from omni.load import load_vision_and_tokenizer

    model, tokenizer = load_vision_and_tokenizer(shown.checkpoint)
    rows = read_image_manifest(shown.held_out, shown.rules)[:MOST_PICTURES]
    pictures = Pictures(rows, model.config.image_size, shown.rules)
    return show_seeing(model, tokenizer, pictures, shown.count, shown.out)


def _talker(shown: Shown) -> list[Sample]:
    from omni.data.speech import read_speech_manifest
    from omni.data.voices import Voices
    from omni.evaluate.sample_speech import show_speaking
    from omni.load import load_audio_encoder, load_speech, load_thinker

    model, encoder = load_speech(shown.checkpoint), load_audio_encoder(shown.input("audio_enc"))
    # a Talker without the Thinker's states was made from no Thinker, whatever its configuration names
    mind = load_thinker(shown.input("thinker")) if shown.summary["lineage"].get("thinker") else None
    rows = read_speech_manifest(shown.held_out, shown.rules)[: shown.count]
    return show_speaking(model, encoder, Voices(rows, model.config.mel, shown.rules), shown.out, mind)


def _omni(shown: Shown) -> list[Sample]:
    from omni.data.dialogue import read_chats
    from omni.evaluate.omni import Examiner
    from omni.evaluate.sample_chats import show_exchanges
    from omni.features import FeatureStore, cache_of
    from omni.load import load_omni

    model, tokenizer = load_omni(shown.checkpoint)
    examiner = Examiner(model, tokenizer, FeatureStore(model, tokenizer, cache_of(shown.checkpoint), shown.rules))
    return show_exchanges(examiner, read_chats(shown.held_out, shown.rules), shown.count, shown.out)


_MAKERS: dict[str, Callable[[Shown], list[Sample]]] = {
    "thinker": _thinker,
    "audio_enc": _audio_enc,
    "vision": _vision,
    "talker": _talker,
    "omni": _omni,
}
