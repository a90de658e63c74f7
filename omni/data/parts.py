"""The training and the validation part of a stage's rows: files of their own, or each file is split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from omni.config import DataConfig, RowsDataConfig, data_rules
from omni.data.dialogue import Chat, scan_chats
from omni.data.leaks import contents_of, part_of_chats, part_of_rows, refuse_leaks
from omni.data.manifest import Manifest, Row, split_rows
from omni.data.speech import scan_speech_manifest
from omni.lineage import data_fingerprint


@dataclass(frozen=True)
class Parts:
    """Rows to train on, rows to validate on, and what tells this data from other data.

    ``left_out`` rows of the training files cannot be used.
    """

    training: list[Row]
    validation: list[Row]
    left_out: int
    fingerprint: dict[str, Any]


def read_parts(
    scan: Callable[[str, DataConfig], Manifest[Row]], media_column: str, text_column: str, data: RowsDataConfig
) -> Parts:
    """Read the manifests of a stage.

    Args:
        scan: reads one manifest.
        media_column: the column that names recordings or pictures.
        text_column: the column that says what is in them.
        data: which manifests, and the rules for them.

    Raises:
        UserError: for bad rows, and for a recording or picture that is in both parts, as the rules say.
    """
    fingerprint: dict[str, Any] = {}
    training, validation, num_bad = list[Row](), list[Row](), 0
    for number, path in enumerate((data.train, *data.also_train)):
        manifest = scan(path, data)
        rows, num_bad = manifest.usable(data), num_bad + manifest.num_bad
        media = [row.path(media_column) for row in rows]
        name = f"also_train.{number - 1}" if number else "train"
        fingerprint[name] = data_fingerprint(path, media)
        if data.val is None:
            fingerprint[name]["val_split"] = data.val_split
            rows, held_out = split_rows(rows, data.val_split, contents_of(media))
            validation += [] if path in (data.train, *data.also_train)[:number] else held_out
        training += rows
    if data.val is not None:
        validation = scan(data.val, data).usable(data)
        fingerprint["val"] = data_fingerprint(data.val, (row.path(media_column) for row in validation))
    parts = [part_of_rows(part, media_column, text_column) for part in (training, validation)]
    refuse_leaks(parts[0], parts[1], data)
    return Parts(training, validation, num_bad, fingerprint)


@dataclass(frozen=True)
class ChatParts:
    """What stage E reads: chats and, for its last phase, recordings; see :class:`Parts`."""

    training: list[Chat]
    validation: list[Chat]
    left_out: int
    speech: Parts | None
    fingerprint: dict[str, Any]


def read_chat_parts(
    train: str,
    val: str,
    speech: tuple[str, str] | None,
    replay_text: str | None,
    rules: DataConfig,
) -> ChatParts:
    """Read the chats of stage E; see :func:`read_parts`.

    Args:
        train: the training chats.
        val: the validation chats.
        speech: manifests of recordings for the Talker's phase, to train on and to validate on.
        replay_text: the text that is mixed in, for the fingerprint.
        rules: limits, and what to do about bad rows.
    """
    manifests = [scan_chats(path, rules) for path in (train, val)]
    chats = [manifest.usable(rules) for manifest in manifests]
    refuse_leaks(part_of_chats(chats[0]), part_of_chats(chats[1]), rules)
    fingerprint = {
        name: data_fingerprint(path, [media for chat in part for media in chat.media])
        for name, path, part in zip(("train", "val"), (train, val), chats, strict=True)
    }
    if replay_text is not None:
        fingerprint["replay_text"] = data_fingerprint(replay_text)
    found = None
    if speech is not None:
        data = RowsDataConfig(train=speech[0], val=speech[1], **vars(data_rules(vars(rules), "rules")))
        found = read_parts(scan_speech_manifest, "wav", "text", data)
        fingerprint |= {f"speech_{name}": value for name, value in found.fingerprint.items()}
    return ChatParts(chats[0], chats[1], manifests[0].num_bad, found, fingerprint)
