"""The command line of a stage script: a configuration file, and changes to it.

Every key can be set as ``--key value`` or ``--key=value``: dotted (``--train.max_steps 30``) or by its last name alone
where that is unique (``--ctx_len 128``); ``--key`` alone switches on what is true or false. The keys of
:class:`PhaseConfig` set every phase of a stage when given by their last name (``--max_steps 30`` with three phases sets
three).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any, TypeVar

from omni.config import UserError, leaves, load_config, type_name

Config = TypeVar("Config")


def read_command_line(cls: type[Config], words: Sequence[str]) -> tuple[Config, bool]:
    """The configuration that ``--config FILE [--key value ...] [--fresh]`` describes, and whether to start afresh.

    Raises:
        UserError: see :func:`load_config`; ``--help`` leaves with the list of keys.
    """
    rest = list(words)
    if "--help" in rest or "-h" in rest or not rest:
        print("usage: --config FILE.json [--fresh] [--key value ...]\n\nkeys, each also by its last name:")
        for key, leaf in leaves(cls):
            print(f"  --{key}  ({type_name(leaf.type)})")
        raise SystemExit(0 if rest else 2)
    fresh = "--fresh" in rest
    pairs = parse_overrides([word for word in rest if word != "--fresh"])
    paths = [text for key, text in pairs if key == "config" and text is not None]
    if len(paths) != 1:
        raise UserError(f"command line: found {len(paths)} --config, expected one --config FILE.json", exit_code=2)
    return load_config(cls, paths[0], [pair for pair in pairs if pair[0] != "config"]), fresh


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, str | None]]:
    """Split ``--key value``, ``--key=value`` and ``--key`` alone (a switch; its value is None) into pairs.

    Raises:
        UserError: (exit code 2) for a word that is not an option.
    """
    pairs: list[tuple[str, str | None]] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise UserError(f"command line: found {word!r}, expected --key value", exit_code=2)
        key, equals, text = word[2:].partition("=")
        alone = not equals and (not rest or rest[0].startswith("--"))
        pairs.append((key.replace("-", "_"), None if alone else text if equals else rest.pop(0)))
    return pairs


def flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested plain values by their dotted keys."""
    found: list[tuple[str, Any]] = []
    for key, item in values.items():
        found += flat(item, f"{prefix}{key}.") if isinstance(item, dict) else [(f"{prefix}{key}", item)]
    return found


def differing_keys(
    resolved: dict[str, Any], given: dict[str, Any], changed: Sequence[str]
) -> list[tuple[str, Any, Any]]:
    """``(key, in the file, in the run)`` of every key of a run that differs from a configuration file.

    Args:
        resolved: the run's whole configuration.
        given: what the file says; a key that it does not name stands at its default there, shown as ``...``.
        changed: keys of the run that are not at their default.
    """
    ours, theirs = dict(flat(resolved)), dict(flat(given))
    different = [(key, theirs[key], ours.get(key)) for key in theirs if key not in ours or ours[key] != theirs[key]]
    others = [key for key in changed if key not in theirs and key in ours]
    return sorted([*different, *((key, ..., ours[key]) for key in others)], key=lambda item: item[0])


def as_words(resolved: dict[str, Any], given: dict[str, Any], changed: Sequence[str]) -> str:
    """What to write behind ``--config FILE`` to have a run's configuration again; see :func:`differing_keys`."""
    words = []
    for key, _, value in differing_keys(resolved, given, changed):
        text = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
        words += [f"--{key}", text]
    return shlex.join(words)
