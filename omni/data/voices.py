"""Recordings for stage D: crops for codec, vocoder and speaker encoder, and aligned sentences for the Talker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omni.audio import SILENCE, MelConfig, load_audio, log_mel
from omni.config import DataConfig, UserError
from omni.data.manifest import RULES, Row
from omni.data.speech import Recordings
from omni.data.stream import Batch, pad_to
from omni.speech_text import spoken_words, units
from omni.timing import FramePlan, TalkerText, plan_batch, plan_frames, unit_symbols


class Voices:
    """Recordings, who speaks in each, and what is said. Log-mel frames and samples are kept once read."""

    def __init__(self, rows: Sequence[Row], mel: MelConfig, rules: DataConfig = RULES, decode: bool = True) -> None:
        self.recordings = Recordings(rows, mel, rules, decode=decode)
        self.mel = mel
        self.speakers = [str(row.values.get("speaker") or "") for row in self.recordings.rows]
        self._samples: dict[int, np.ndarray] = {}
        self._of: dict[str, list[int]] = {}
        self._place: list[int] = []  # of each recording among its speaker's
        for index, speaker in enumerate(self.speakers):
            own = self._of.setdefault(speaker, [])
            self._place.append(len(own))
            own.append(index)
        self.names = sorted(self._of)
        self._number = {name: number for number, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.speakers)

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return [row.path("wav") for row in self.recordings.rows]

    def text(self, index: int) -> str:
        """What is said, as written in the manifest."""
        return str(self.recordings.rows[index].values["text"])

    def where(self, index: int) -> str:
        """``file:line`` of a recording."""
        return self.recordings.rows[index].where

    def frames(self, index: int) -> torch.Tensor:
        """Log-mel frames [F, M]."""
        return self.recordings.frames(index)

    def frames_as(self, mel: MelConfig, index: int) -> torch.Tensor:
        """Log-mel frames [F, M] of another front end, such as that of a recognizer with another sampling rate."""
        if mel == self.mel:
            return self.frames(index)
        return log_mel(mel)(load_audio(self.paths[index], mel.sample_rate))

    def of(self, speaker: str) -> list[int]:
        """The recordings of a speaker."""
        return self._of[speaker]

    def label(self, index: int) -> int:
        """What the speaker encoder shall tell apart: speakers, or recordings where there is only one speaker."""
        return self._number[self.speakers[index]] if len(self.names) > 1 else index

    def partner(self, index: int, rng: np.random.Generator | None) -> int:
        """Another recording of the same speaker; the next one without random numbers, itself if there is no other."""
        own = self._of[self.speakers[index]]
        if len(own) == 1:
            return index
        return own[(self._place[index] + (1 if rng is None else int(rng.integers(1, len(own))))) % len(own)]

    def samples(self, index: int) -> torch.Tensor:
        """The waveform, one hop for every log-mel frame."""
        kept = self._samples.get(index)
        if kept is None:
            wave = load_audio(self.recordings.rows[index].path("wav"), self.mel.sample_rate)
            kept = self._samples[index] = (wave * 32767).round().to(torch.int16).numpy()
        return torch.from_numpy(kept).float() / 32767

    def start(self, index: int, num_frames: int, rng: np.random.Generator | None) -> int:
        """Where a crop begins: anywhere in training, in the middle without random numbers."""
        room = max(0, self.recordings.num_frames[index] - num_frames)
        return room // 2 if rng is None else int(rng.integers(0, room + 1))

    def crop(self, index: int, start: int, num_frames: int) -> torch.Tensor:
        """``num_frames`` log-mel frames from ``start`` on, silence beyond the end."""
        frames = self.recordings.frames(index, start, start + num_frames)
        if len(frames) == num_frames:
            return frames
        return torch.nn.functional.pad(frames, (0, 0, 0, num_frames - len(frames)), value=SILENCE)


@dataclass
class CropBatch(Batch):
    """Crops of log-mel frames [B, F, M]."""

    frames_BFM: torch.Tensor


class _Recorded:
    """Samples that are crops of ``num_frames`` log-mel frames, as many as there are recordings."""

    def __init__(self, voices: Voices, num_frames: int) -> None:
        self.voices, self.num_frames = voices, num_frames

    def __len__(self) -> int:
        return len(self.voices)

    def where(self, index: int) -> str:
        """``file:line`` of a recording."""
        return self.voices.where(index)

    def _crop(self, index: int, rng: np.random.Generator | None) -> torch.Tensor:
        return self.voices.crop(index, self.voices.start(index, self.num_frames, rng), self.num_frames)


class Crops(_Recorded):
    """One crop of every recording, for the codec."""

    def sample(self, index: int, rng: np.random.Generator | None) -> torch.Tensor:
        """Log-mel frames [F, M]."""
        return self._crop(index, rng)

    def collate(self, samples: list[Any]) -> CropBatch:
        """Stack crops."""
        frames_BFM = torch.stack(samples)
        frames = frames_BFM.shape[0] * frames_BFM.shape[1]
        return CropBatch(dict.fromkeys(("frames", "mel", "commitment", "heard"), frames), frames_BFM)


@dataclass
class PairBatch(Batch):
    """Two crops of log-mel frames [B, F, M] by one speaker each, for the speaker encoders."""

    first_BFM: torch.Tensor
    second_BFM: torch.Tensor
    speaker_B: torch.Tensor


class Pairs(_Recorded):
    """One crop of every recording and one of another recording of its speaker (of the same, if all are one voice)."""

    def sample(self, index: int, rng: np.random.Generator | None) -> tuple[torch.Tensor, ...]:
        """Two crops [F, M] and the number of the speaker."""
        other = self.voices.partner(index, rng) if len(self.voices.names) > 1 else index
        return self._crop(index, rng), self._crop(other, rng), torch.tensor(self.voices.label(index))

    def collate(self, samples: list[Any]) -> PairBatch:
        """Stack crops."""
        first, second, speaker = (torch.stack(parts) for parts in zip(*samples, strict=True))
        counts = {"frames": 2 * first.shape[0] * first.shape[1], "speakers": len(first), "grader": len(first)}
        return PairBatch(counts, first, second, speaker)


@dataclass
class WaveBatch(Batch):
    """Crops of log-mel frames [B, F, M] and their samples [B, S], for the vocoder."""

    frames_BFM: torch.Tensor
    wave_BS: torch.Tensor


class WaveCrops(_Recorded):
    """One crop of every recording and its samples."""

    def sample(self, index: int, rng: np.random.Generator | None) -> tuple[torch.Tensor, ...]:
        """Frames [F, M] and samples [S]."""
        voices, hop = self.voices, self.voices.mel.hop_length
        start = voices.start(index, self.num_frames, rng)
        wave = voices.samples(index)[start * hop : (start + self.num_frames) * hop]
        wave = torch.nn.functional.pad(wave, (0, self.num_frames * hop - len(wave)))
        return voices.crop(index, start, self.num_frames), wave

    def collate(self, samples: list[Any]) -> WaveBatch:
        """Stack crops."""
        frames, wave = (torch.stack(parts) for parts in zip(*samples, strict=True))
        return WaveBatch({"frames": frames.shape[0] * frames.shape[1], "spectrum": len(frames)}, frames, wave)


@dataclass
class Aligned:
    """One sentence as the Talker learns it.

    Attributes:
        index: its recording.
        units: pauses and words in turn.
        durations: code frames of each unit.
        codes_TK: as many code frames.
        states_UD: the Thinker's state for each unit, or None.
    """

    index: int
    units: list[str]
    durations: list[int]
    codes_TK: torch.Tensor
    states_UD: torch.Tensor | None = None


@dataclass
class SentenceBatch(Batch):
    """Sentences with codes; see :class:`omni.timing.TalkerText` and :class:`omni.timing.FramePlan`."""

    symbols_BC: torch.Tensor
    unit_BC: torch.Tensor
    speaker_BE: torch.Tensor
    durations_BU: torch.Tensor  # -1 at padding
    codes_BTK: torch.Tensor
    character_BT: torch.Tensor
    place_BTJ: torch.Tensor
    num_frames_B: torch.Tensor
    states_BUD: torch.Tensor | None

    def text(self) -> TalkerText:
        """What is spoken."""
        return TalkerText(self.symbols_BC, self.unit_BC, self.speaker_BE, self.states_BUD)

    def plan(self) -> FramePlan:
        """When."""
        return FramePlan(self.character_BT, self.place_BTJ, self.num_frames_B)


class Sentences:
    """Aligned sentences, each with the speaker embedding of another recording of its speaker."""

    def __init__(self, voices: Voices, sentences: Sequence[Aligned], embeddings_NE: torch.Tensor) -> None:
        if not sentences:
            raise UserError("no recording could be aligned with its text; is the text in the right column?")
        self.voices, self.sentences, self.embeddings_NE = voices, list(sentences), embeddings_NE

    def __len__(self) -> int:
        return len(self.sentences)

    @property
    def lengths(self) -> list[int]:
        """Code frames of each sentence, for batches of similar length."""
        return [len(sentence.codes_TK) for sentence in self.sentences]

    def where(self, index: int) -> str:
        """``file:line`` of a sentence's recording."""
        return self.voices.where(self.sentences[index].index)

    def sample(self, index: int, rng: np.random.Generator | None) -> tuple[Aligned, torch.Tensor]:
        """The sentence and a speaker embedding."""
        sentence = self.sentences[index]
        return sentence, self.embeddings_NE[self.voices.partner(sentence.index, rng)]

    def collate(self, samples: list[Any]) -> SentenceBatch:
        """Pad to multiples of 8 frames, so that the CPU sees few shapes: 33 in nano's recordings, 8 % of padding."""
        sentences = [sentence for sentence, _ in samples]
        symbols_BC, unit_BC = unit_symbols([sentence.units for sentence in sentences], multiple=16)
        most = pad_to(max(len(sentence.units) for sentence in sentences), 8)
        plan = plan_batch(
            [
                plan_frames(torch.tensor([len(unit) for unit in sentence.units]), torch.tensor(sentence.durations))
                for sentence in sentences
            ],
            multiple=8,
        )
        codes_BTK = torch.zeros(*plan.character_BT.shape, sentences[0].codes_TK.shape[1], dtype=torch.long)
        durations_BU = torch.full((len(sentences), most), -1)
        for row, sentence in enumerate(sentences):
            codes_BTK[row, : len(sentence.codes_TK)] = sentence.codes_TK
            durations_BU[row, : len(sentence.durations)] = torch.tensor(sentence.durations)
        states_BUD = None
        if sentences[0].states_UD is not None:
            rows = [sentence.states_UD for sentence in sentences if sentence.states_UD is not None]
            states_BUD = torch.zeros(len(rows), most, rows[0].shape[1])
            for row, states in enumerate(rows):
                states_BUD[row, : len(states)] = states
        counts = dict.fromkeys(("frames", "codes", "stop"), int(plan.num_frames_B.sum()))
        counts["durations"] = sum(len(sentence.units) for sentence in sentences)
        return SentenceBatch(
            counts,
            symbols_BC, unit_BC, torch.stack([speaker for _, speaker in samples]), durations_BU, codes_BTK,
            plan.character_BT, plan.place_BTJ, plan.num_frames_B, states_BUD,
        )  # fmt: skip


def spoken_units(text: str) -> list[str]:
    """The units of a manifest's text; empty when nothing in it can be spoken."""
    words = spoken_words(text)
    return units(words) if words else []
