"""Configuration: one JSON file and the command line become one frozen dataclass.

Every key has a type and, where there is a sensible one, a default, in the dataclass that a stage script shows at
its top. Nothing is looked up by string later on, so a typo cannot silently become a default: it is reported here,
together with every other problem of the file, each on a line of its own as
``file: key: what was found, what was expected``.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

Config = TypeVar("Config")


class UserError(ValueError):
    """A mistake in what the user gave. The message is one sentence; ``exit_code`` is 1, or 2 for wrong usage."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Problem(NamedTuple):
    """One thing that is wrong with a configuration."""

    key: str
    found: str
    expected: str

    def line(self, where: str) -> str:
        """The problem as one line of an error message."""
        return f"{where}: {self.key}: found {self.found}, expected {self.expected}"


def _unfit(config: Any, keys: Sequence[str], fits: Callable[[Any], bool], expected: str) -> Iterator[Problem]:
    """A problem for every one of these keys whose value does not fit."""
    return (Problem(key, str(getattr(config, key)), expected) for key in keys if not fits(getattr(config, key)))


@dataclass(frozen=True)
class PhaseConfig:
    """The keys of one training phase: how long, how much at once, how fast."""

    max_steps: int
    batch_size: Annotated[int, "auto"]  # auto: as many as fit the memory; a number by the time that a run begins
    lr: float
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of the layers, adamw for all else
    muon_lr: float = 0.005
    gradient_accumulation_steps: int = 1
    warmup_steps: int = 50
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.05
    beta2: float = 0.98
    monitor: str = "loss"  # a figure of the validation, without "val_"
    monitor_mode: Literal["min", "max"] = "min"
    patience: int = 0  # validations without an improvement before stopping early; 0: never
    min_delta: float = 0.0  # in the monitor's own unit

    def problems(self) -> Iterator[Problem]:
        """Values that no training can run with."""
        yield from _unfit(self, ("max_steps", "gradient_accumulation_steps"), lambda value: value >= 1, "at least 1")
        yield from _unfit(self, ("batch_size",), lambda value: value == "auto" or value >= 1, 'at least 1, or "auto"')
        yield from _unfit(self, ("lr", "muon_lr"), lambda value: value > 0, "a positive learning rate")
        if not 0 <= self.min_lr_ratio <= 1:
            yield Problem("min_lr_ratio", str(self.min_lr_ratio), "a share from 0 to 1")
        counted = ("warmup_steps", "patience", "weight_decay", "min_delta")
        yield from _unfit(self, counted, lambda value: value >= 0, "0 or more")


@dataclass(frozen=True)
class RunConfig:
    """The keys that every stage has, whatever it trains."""

    seed: int = 0
    save_dir: str = ""  # empty: checkpoints/<name>
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    use_amp: bool = True
    deterministic: bool = False  # bit-identical resume on CUDA, at a cost in speed
    num_threads: int = 0  # 0: every core this process may use, or its part of them beside others (torchrun)
    num_workers: int = 0  # processes that prepare batches; 0: the training process itself
    rank_timeout: float = 1800.0  # seconds that a process of several (torchrun) waits for another one
    print_freq: int = 50
    val_freq: int = 200
    val_batches: int = 20
    checkpoint_freq: int = 500
    keep_last: int = 2
    activation_checkpointing: bool = False  # compute what backward needs of a block anew: less memory, a third slower
    compile: bool = False  # transformer blocks by torch.compile: faster steps after a minute or more of compiling
    max_grad_norm: float = 1.0
    max_grad_explosion: float = 100.0
    min_loss: float = -1e6
    max_loss: float = 1e6
    max_consecutive_skips: int = 20
    detect_anomaly: bool = False  # name the first module that gives NaN or Inf; slow
    tensorboard: bool = True  # used when the package is installed
    wandb: bool = False  # Weights & Biases as well; its package must be installed

    def problems(self) -> Iterator[Problem]:
        """Values that no run can work with."""
        counted = ("print_freq", "val_freq", "val_batches", "checkpoint_freq", "keep_last", "max_consecutive_skips")
        yield from _unfit(self, counted, lambda value: value >= 1, "at least 1")
        yield from _unfit(self, ("seed", "num_threads", "num_workers"), lambda value: value >= 0, "0 or more")
        yield from _unfit(self, ("max_grad_norm", "max_grad_explosion", "rank_timeout"), lambda x: x > 0, "more than 0")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The keys that every stage's data have: limits, and what to do about a sample that cannot be used."""

    on_bad_sample: Literal["error", "skip"] = "error"  # skip: leave it out, count it, and go on
    max_bad_fraction: float = 0.05  # of all samples; with more of them left out, a run stops
    max_audio_seconds: float = 30.0  # of a recording
    max_pixels: int = 64_000_000  # of a picture: 8000 x 8000, decoded 200 MB
    max_text_chars: int = 1_000_000  # of a line of text, a caption, a transcript, a message
    allow_outside_paths: bool = False  # manifests may name files outside of their own folder
    allow_leaks: bool = False  # the same recording or picture may be in training and validation

    def problems(self) -> Iterator[Problem]:
        """Limits that nothing passes."""
        limits = ("max_audio_seconds", "max_pixels", "max_text_chars")
        yield from _unfit(self, limits, lambda value: value > 0, "more than 0")
        if not 0 <= self.max_bad_fraction <= 1:
            yield Problem("max_bad_fraction", str(self.max_bad_fraction), "a share from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class SplitDataConfig(DataConfig):
    """Data of which a part is for validation: a file of its own, or a share of the training file."""

    train: str
    val: str | None = None
    val_split: float = 0.05

    def problems(self) -> Iterator[Problem]:
        """A share that leaves nothing on one side."""
        yield from super().problems()
        if not 0 < self.val_split < 1:
            yield Problem("val_split", str(self.val_split), "a share between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class RowsDataConfig(SplitDataConfig):
    """Data of rows, in one manifest or several."""

    also_train: tuple[str, ...] = ()  # manifests to train on as well; one named twice is seen twice in an epoch


@dataclass(frozen=True)
class StageConfig:
    """What the shared loop needs to know of any stage's configuration; each stage script extends it."""

    name: str
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def save_dir(self) -> Path:
        """The folder of this run's checkpoints."""
        return Path(self.run.save_dir or f"checkpoints/{self.name}")


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain dicts, lists, numbers and strings, ready for JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def changed_keys(config: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of a configuration that have no default, or another value than their default."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from changed_keys(value, f"{prefix}{item.name}.")
        elif value != (item.default_factory() if callable(item.default_factory) else item.default):
            yield f"{prefix}{item.name}"


def from_dict(cls: type[Config], values: dict[str, Any], where: str) -> Config:
    """Build the dataclass ``cls`` from plain values.

    Raises:
        UserError: listing every unknown, missing, mistyped or impossible key, one line each, prefixed by ``where``.
    """
    problems = list[Problem]()
    built = _build(cls, values, "", problems)
    if problems:
        raise UserError("\n".join(problem.line(where) for problem in problems))
    assert built is not None
    return built


def data_rules(values: dict[str, Any], where: str) -> DataConfig:
    """The rules among the keys of a stage's data, given as plain values; see :func:`from_dict`."""
    names = {item.name for item in dataclasses.fields(DataConfig)}
    return from_dict(DataConfig, {key: value for key, value in values.items() if key in names}, where)


def load_config(cls: type[Config], path: str | Path, overrides: Sequence[tuple[str, str | None]] = ()) -> Config:
    """Read a JSON configuration and apply ``(key, text)`` overrides from the command line; None switches a key on.

    Raises:
        UserError: for a missing or malformed file and for every problem of its keys; exit code 2 when a
            command-line key is unknown, ambiguous or of the wrong type.
    """
    values = _read_json(Path(path))
    # A configuration that is already wrong is reported as it stands in the file, before the command line's turn.
    if not overrides:
        return from_dict(cls, values, str(path))
    problems = list[Problem]()
    for name, text in overrides:
        for key in _matches(name, known := dict(leaves(cls, values)), problems):  # one may take away a section
            if text is None and known[key].type is not bool:
                problems.append(Problem(f"--{name}", "no value", f"--{name} VALUE"))
                continue
            try:
                _assign(values, key, _parse("true" if text is None else text, known[key].type))
            except ValueError as error:
                problems.append(Problem(f"--{name}", repr(text), str(error)))
    if problems:
        raise UserError("\n".join(problem.line("command line") for problem in problems), exit_code=2)
    return from_dict(cls, values, f"{path} with the command line's changes")


class Leaf(NamedTuple):
    """A settable key: its type and the dataclass that owns it."""

    type: Any
    owner: type


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.json")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"{path}: no such file, expected a JSON configuration{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a JSON configuration: {error}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: found a JSON {type(values).__name__}, expected an object {{...}}")
    return values


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"{key}: found twice in one object, expected once")
        values[key] = value
    return values


def leaves(cls: Any, given: Any = None, prefix: str = "") -> Iterator[tuple[str, Leaf]]:
    """Every settable key of a dataclass, dotted; of a section that may be null, where the ``given`` values have it."""
    for name, kind in typing.get_type_hints(cls, include_extras=True).items():
        inside = given.get(name) if isinstance(given, dict) else None
        sections = [option for option in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(option)]
        if not sections or sections[0] is not kind:
            yield f"{prefix}{name}", Leaf(kind, cls)
        if sections and (sections[0] is kind or isinstance(inside, dict)):
            yield from leaves(sections[0], inside, f"{prefix}{name}.")


def _matches(name: str, known: dict[str, Leaf], problems: list[Problem]) -> list[str]:
    """The full keys that a command-line name stands for; a problem is noted where there is none or no single one."""
    if name in known:
        return [name]
    found = [key for key in known if key.rpartition(".")[2] == name]
    if len(found) == 1 or (found and all(known[key].owner is PhaseConfig for key in found)):
        return found
    if found:
        problems.append(Problem(f"--{name}", "a name that several keys share", f"one of {', '.join(found)}"))
        return []
    names = [*known, *(key.rpartition(".")[2] for key in known)]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"a key of this configuration; did you mean --{near[0]}?" if near else "a key of this configuration"
    problems.append(Problem(f"--{name}", "an unknown key", hint))
    return []


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
    values[last] = value


def _parse(text: str, kind: Any) -> Any:
    """Command-line text as a value of the key's type. Raises ValueError saying what was expected."""
    expected = type_name(kind)
    if typing.get_origin(kind) is Annotated:
        kind, *words = typing.get_args(kind)
        if text in words:
            return text
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if text.lower() in ("none", "null"):
            return None
        kind = next(option for option in typing.get_args(kind) if option is not type(None))
    if kind is str or typing.get_origin(kind) is Literal:
        return text
    if kind is bool:
        if text.lower() in ("true", "yes", "on", "1", "false", "no", "off", "0"):
            return text.lower() in ("true", "yes", "on", "1")
        raise ValueError(type_name(kind))
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise ValueError(expected) from None
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise ValueError('JSON, such as [1, 2] or ["a", "b"]') from None


def _build(cls: type[Config], values: Any, prefix: str, problems: list[Problem]) -> Config | None:
    """Build one dataclass, adding to ``problems``; None when it cannot be built."""
    before = len(problems)
    if not isinstance(values, dict):
        problems.append(Problem(prefix.rstrip(".") or "(top)", short_json(values), "an object {...}"))
        return None
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            expected = f'"{near[0]}"' if near else "one of " + ", ".join(sorted(fields))
            problems.append(Problem(f"{prefix}{key}", "an unknown key", expected))
    arguments: dict[str, Any] = {}
    for key, item in fields.items():
        if key in values:
            arguments[key] = _convert(hints[key], values[key], f"{prefix}{key}", problems)
        elif dataclasses.is_dataclass(hints[key]) and item.default_factory is dataclasses.MISSING:
            arguments[key] = _build(hints[key], {}, f"{prefix}{key}.", problems)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            problems.append(Problem(f"{prefix}{key}", "nothing", f"a value ({type_name(hints[key])})"))
    if len(problems) > before:
        return None
    built = cls(**arguments)
    for problem in getattr(built, "problems", tuple)():
        problems.append(Problem(f"{prefix}{problem.key}", problem.found, problem.expected))
    return built


def _convert(kind: Any, value: Any, key: str, problems: list[Problem]) -> Any:
    """``value`` as the type ``kind``; adds a problem and returns None where it is not one."""
    if dataclasses.is_dataclass(kind):
        return _build(typing.cast(type, kind), value, f"{key}.", problems)
    origin, options, expected = typing.get_origin(kind), typing.get_args(kind), type_name(kind)
    if origin is Annotated:  # a type, or one of these words
        if value in options[1:]:
            return value
        kind = options[0]
    if origin in (typing.Union, types.UnionType):
        given = next(option for option in options if option is not type(None))
        return None if value is None else _convert(given, value, key, problems)
    if origin is Literal and value in options:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(options[0], item, f"{key}[{i}]", problems) for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {name: _convert(options[1], item, f"{key}.{name}", problems) for name, item in value.items()}
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    problems.append(Problem(key, short_json(value), expected))
    return None


def short_json(value: Any) -> str:
    """A plain value as it can stand in a message."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def type_name(kind: Any) -> str:
    """A type in words a user knows."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(json.dumps(option) for option in typing.get_args(kind))
    if typing.get_origin(kind) in (tuple, dict):
        return "a list" if typing.get_origin(kind) is tuple else "an object {...}"
    if typing.get_origin(kind) is Annotated:
        return " or ".join([type_name(typing.get_args(kind)[0]), *map(json.dumps, typing.get_args(kind)[1:])])
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return type_name(typing.get_args(kind)[0]) + " or null"
    return names.get(kind, "an object {...}")
