"""`omni data check`: read and decode everything that configurations name, and list all problems, not only the first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omni.audio import MelConfig, load_audio
from omni.config import DataConfig, UserError, data_rules, from_dict
from omni.data.dialogue import scan_chats
from omni.data.entries import type_name
from omni.data.images import load_image, scan_image_manifest
from omni.data.leaks import Leaks, Part, find_leaks, part_of_chats, part_of_rows, part_of_text
from omni.data.manifest import Row, first_problems, problems_of
from omni.data.speech import scan_speech_manifest
from omni.data.text import beside, scan_text
from omni.models.audio_encoder import AudioEncoderConfig
from omni.parallel import map_small
from omni.speech_text import spoken_words
from omni.stages import StageInfo, read_raw_config, stage_of_config
from omni.tokenizer import Characters, needed_steps, spoken_text

# what each key of a stage's data names; of several of one kind the first is for training, and those of _ALSO_TRAINING;
# the others are held out
_SPEECH = {
    "train": "speech",
    "also_train": "speech",
    "val": "speech",
    "test": "speech",
    "test_words": "speech",
    "test_shuffled": "speech",
    "test_voices": "speech",
}
_ALSO_TRAINING = ("also_train", "primer", "speech_train")
_MANIFESTS = {
    "thinker": {"train": "text", "primer": "text", "val": "text", "test": "text"},
    "audio_enc": _SPEECH,
    "vision": {
        "train": "images", "also_train": "images", "val": "images", "test": "images", "test_combinations": "images",
    },
    "talker": _SPEECH,
    "omni": {
        "train": "chats", "val": "chats", "test": "chats", "replay_text": "text",
        "speech_train": "speech", "speech_val": "speech",
    },
}  # fmt: skip


@dataclass
class Findings:
    """What is wrong (problems) or worth a look (warnings), a line each; of each file the first ones and how many more.

    Attributes:
        lines: to be shown.
        num_problems: all of them, those that are not shown included.
        num_warnings: the same of warnings.
    """

    lines: list[str] = field(default_factory=list)
    num_problems: int = 0
    num_warnings: int = 0

    def add(self, problems: Sequence[str], warnings: Sequence[str] = ()) -> None:
        """The problems and warnings of one file."""
        self.lines += [*first_problems(problems), *first_problems(warnings)]
        self.num_problems += len(problems)
        self.num_warnings += len(warnings)

    def add_leaks(self, leaks: Leaks, rules: DataConfig) -> None:
        """What training and held-out data share."""
        if rules.allow_leaks:
            self.add([], [line.replace(": ", ": warning: ", 1) for line in leaks.media])
        else:
            self.add(leaks.media)
        self.add([], leaks.texts)


@dataclass
class _Checked:
    """One file: what is wrong with it, and what it holds."""

    part: Part = field(default_factory=lambda: Part([], []))
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Task:
    """One configuration: its stage, its rules, and for stage B its model."""

    stage: StageInfo
    rules: DataConfig
    encoder: AudioEncoderConfig | None
    manifests: list[tuple[str, str, bool]]  # (kind, path, whether it is for training), in the order of the stage's keys


def check_configs(paths: Sequence[Path]) -> Findings:
    """Everything that is wrong with the data of some configurations; a file that several name is read once."""
    findings, checker, known = Findings(), Checker(), dict[object, _Checked]()
    for path in paths:
        try:
            task = _read_task(path)
        except UserError as error:
            findings.add(problems_of(error))
            continue
        training: dict[str, Part] = {}
        for kind, manifest, trains in task.manifests:
            key = kind, manifest, task.stage.kind, task.rules, task.encoder
            if key not in known:
                known[key] = checker.check(kind, manifest, task)
                findings.add(known[key].problems, known[key].warnings)
            part = known[key].part
            if not trains:
                findings.add_leaks(find_leaks(training[kind], part), task.rules)
            elif kind in training:
                training[kind] = Part([*training[kind].media, *part.media], [*training[kind].texts, *part.texts])
            else:
                training[kind] = part
    return findings


def _read_task(path: Path) -> _Task:
    values = read_raw_config(path)
    stage = stage_of_config(path, values)
    data = values.get("data")
    if not isinstance(data, dict):
        raise UserError(f"{path}: data: found {type_name(data)}, expected an object {{...}}")
    rules = data_rules(data, f"{path}: data")
    encoder = None
    if stage.kind == "audio_enc":
        encoder = from_dict(AudioEncoderConfig, values.get("model", {}), f"{path}: model")
    found = {key: data[key] for key in _MANIFESTS[stage.kind] if key in data and data[key] is not None}
    if "train" not in found:
        raise UserError(f"{path}: data: names no train, expected a manifest")
    if "primer" in found:
        found["primer"] = beside(str(found["train"]), str(found["primer"]))
        found = {key: named for key, named in found.items() if named is not None}  # without its text, no phase
    manifests: list[tuple[str, str, bool]] = []
    for key, named in found.items():
        kind = _MANIFESTS[stage.kind][key]
        if key == "also_train" and not isinstance(named, list):
            raise UserError(f"{path}: data.{key}: found {named!r}, expected a list of paths")
        for manifest in named if key == "also_train" else [named]:
            if not isinstance(manifest, str) or not manifest:
                raise UserError(f"{path}: data.{key}: found {manifest!r}, expected a path")
            first = all(known != kind for known, *_ in manifests)
            manifests.append((kind, manifest, first or key in _ALSO_TRAINING))
    return _Task(stage, rules, encoder, manifests)


class Checker:
    """Checks files of data; a recording or picture that several of them name is decoded once."""

    def __init__(self) -> None:
        self._decoded: dict[tuple[Path, float, int], int | str] = {}

    def check(self, kind: str, manifest: str, task: _Task) -> _Checked:
        """Read a file and decode what it names."""
        checks = {"text": self._text, "speech": self._speech, "images": self._images, "chats": self._chats}
        try:
            return checks[kind](manifest, task)
        except UserError as error:
            return _Checked(problems=problems_of(error))

    def _text(self, manifest: str, task: _Task) -> _Checked:
        text, problems = scan_text(manifest, task.rules)
        return _Checked(part_of_text(text, manifest), problems)

    def _speech(self, manifest: str, task: _Task) -> _Checked:
        found = scan_speech_manifest(manifest, task.rules)
        mel = task.encoder.mel if task.encoder else MelConfig()
        sizes = self._decode([row.path("wav") for row in found.samples], _samples, task.rules.max_audio_seconds, mel)
        problems, warnings = list(found.problems), list[str]()
        for row, size in zip(found.samples, sizes, strict=True):
            problems += [f"{row.where}: {problem}" for problem in _utterance_problems(row, size, mel, task.encoder)]
        if task.encoder:
            warnings = _unknown_characters(found.samples)
        return _Checked(part_of_rows(found.samples, "wav", "text"), problems, warnings)

    def _images(self, manifest: str, task: _Task) -> _Checked:
        found = scan_image_manifest(manifest, task.rules)
        part = part_of_rows(found.samples, "image", "caption")
        decoded = self._decode([medium.path for medium in part.media], _pixels, task.rules.max_pixels)
        pairs = zip(part.media, decoded, strict=True)
        return _Checked(
            part, found.problems + [f"{medium.where}: {item}" for medium, item in pairs if isinstance(item, str)]
        )

    def _chats(self, manifest: str, task: _Task) -> _Checked:
        found = scan_chats(manifest, task.rules)
        checked = _Checked(part_of_chats(found.samples), list(found.problems))
        for kind, decode, limit in (
            ("image", _pixels, task.rules.max_pixels),
            ("audio", _samples, task.rules.max_audio_seconds),
        ):
            places = {Path(path): chat.where for chat in reversed(found.samples) for path in chat.paths(kind)}
            decoded = zip(places.items(), self._decode(list(places), decode, limit), strict=True)
            checked.problems += [f"{where}: {item}" for (_, where), item in decoded if isinstance(item, str)]
        return checked

    def _decode(
        self,
        paths: Sequence[Path],
        decode: Callable[[Path, float, int], int],
        limit: float,
        mel: MelConfig = MelConfig(),  # noqa: B008 - frozen
    ) -> list[int | str]:
        """What ``decode`` finds in each file, or what is wrong with it; each is decoded once."""

        def attempt(path: Path) -> int | str:
            try:
                return decode(path, limit, mel.sample_rate)
            except UserError as error:
                return str(error)

        keys = [(path, limit, mel.sample_rate) for path in paths]
        new = [path for path, key in dict(zip(paths, keys, strict=True)).items() if key not in self._decoded]
        for path, found in zip(new, map_small(attempt, new), strict=True):
            self._decoded[path, limit, mel.sample_rate] = found
        return [self._decoded[key] for key in keys]


def _samples(path: Path, limit: float, sample_rate: int) -> int:
    return len(load_audio(path, sample_rate, normalize=False, max_seconds=limit))


def _pixels(path: Path, limit: float, sample_rate: int) -> int:
    return load_image(path, 8, max_pixels=int(limit)).numel()


def _utterance_problems(row: Row, size: int | str, mel: MelConfig, encoder: AudioEncoderConfig | None) -> Iterable[str]:
    """What is wrong with a recording of ``size`` samples and its transcript."""
    text = str(row.values["text"])
    if isinstance(size, str):
        yield size
    if not (spoken_text(text) if encoder else spoken_words(text)):
        yield f"text: found nothing to speak in {text[:40]!r}, expected words"
    elif encoder and isinstance(size, int):
        needed = needed_steps(Characters().encode(spoken_text(text)))
        steps = encoder.num_steps(size // mel.hop_length)
        if needed > steps:
            yield (
                f"text: found {len(text)} characters that need {needed} CTC steps, expected at most {steps} for "
                f"{size / mel.sample_rate:.2f} s of sound; is it this text? If so, raise model.steps_per_state"
            )


def _unknown_characters(rows: Sequence[Row]) -> list[str]:
    """One line for all transcripts with characters that stage B has no symbol for."""
    unknown = {
        row.where: {c for c in spoken_text(str(row.values["text"])) if not Characters().knows(c)} for row in rows
    }
    places = [where for where, characters in unknown.items() if characters]
    if not places:
        return []
    characters = "".join(sorted(set.union(*unknown.values())))
    share = f"{len(places)} of {len(rows)} transcripts have characters that the audio encoder does not know"
    return [f"{places[0]}: warning: {share} ({characters[:40]}), expected ASCII; all of them are learned as one symbol"]
