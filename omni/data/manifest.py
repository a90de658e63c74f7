"""Reading what the user brings: CSV, JSON and JSONL manifests and text files, with every problem named by its line."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni.config import UserError

_SHOWN = 20  # problems listed before "... and N more"


@dataclass(frozen=True)
class Row:
    """One line of a manifest. ``where`` is ``file:line`` for messages; paths in ``values`` are as written."""

    where: str
    folder: Path
    values: dict[str, Any]

    def path(self, key: str) -> Path:
        """A path of this row, relative to the manifest's folder."""
        return self.folder / str(self.values[key])


def raise_problems(problems: Sequence[str]) -> None:
    """Raise one error that lists every problem, capped with a count; does nothing without problems."""
    if problems:
        shown = list(problems[:_SHOWN])
        if len(problems) > _SHOWN:
            shown.append(f"... and {len(problems) - _SHOWN} more problems")
        raise UserError("\n".join(shown))


def read_text_file(path: Path) -> str:
    """A UTF-8 file, without a byte order mark.

    Raises:
        UserError: when it is missing, empty or not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; `omni data synth` writes the micro-world, docs/your-data.md the format"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8, expected UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}), expected a UTF-8 file") from None
    if not text.strip():
        raise UserError(f"{path}: empty, expected some text")
    return text


def read_csv(path: Path, columns: Sequence[str], file_columns: Sequence[str]) -> list[Row]:
    """Rows of a CSV file (comma, semicolon or tab).

    Args:
        path: the manifest.
        columns: columns that must be there and not empty.
        file_columns: those of them that name files, which must exist.

    Raises:
        UserError: listing every problem as ``file:line: what, expected what``.
    """
    text = read_text_file(path)
    head = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=head.count)
    lines = csv.DictReader(text.splitlines(keepends=True), delimiter=delimiter)
    found = [name.strip() for name in lines.fieldnames or []]
    lines.fieldnames = found
    missing = [column for column in columns if column not in found]
    if missing or len(set(found)) < len(found):
        raise UserError(f"{path}:1: found columns {', '.join(found)}, expected {', '.join(columns)}, each once")
    rows, problems = [], []
    try:
        for values in lines:
            row = Row(
                f"{path}:{lines.line_num}", path.parent, {k: (v or "") for k, v in values.items() if k is not None}
            )
            if None in values:
                problems.append(
                    f"{row.where}: more fields than columns, expected {len(found)}; quote a text with commas"
                )
            problems += _row_problems(row, columns, file_columns)
            rows.append(row)
    except csv.Error as error:
        problems.append(f"{path}:{lines.line_num}: not valid CSV ({error})")
    raise_problems(problems)
    if not rows:
        raise UserError(f"{path}: no rows after the header, expected at least one")
    return rows


def read_json_list(path: Path, columns: Sequence[str], file_columns: Sequence[str]) -> list[Row]:
    """Rows of a JSON list of objects; see :func:`read_csv`."""
    text = read_text_file(path)
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None
    if not isinstance(items, list):
        raise UserError(f"{path}: found a JSON {type(items).__name__}, expected a list of objects")
    return _rows(
        [(f"{path}: entry {number}", item) for number, item in enumerate(items, 1)], path, columns, file_columns
    )


def read_jsonl(path: Path, columns: Sequence[str]) -> list[Row]:
    """Rows of a file with one JSON object a line; see :func:`read_csv`."""
    items, problems = [], []
    for number, line in enumerate(read_text_file(path).split("\n"), 1):
        if line.strip():
            try:
                items.append((f"{path}:{number}", json.loads(line)))
            except json.JSONDecodeError as error:
                problems.append(f"{path}:{number}: not valid JSON ({error.msg})")
    raise_problems(problems)
    return _rows(items, path, columns, ())


def _rows(
    items: Sequence[tuple[str, Any]], path: Path, columns: Sequence[str], file_columns: Sequence[str]
) -> list[Row]:
    rows, problems = [], []
    for where, item in items:
        if not isinstance(item, dict):
            problems.append(f"{where}: found a JSON {type(item).__name__}, expected an object")
            continue
        row = Row(where, path.parent, item)
        problems += _row_problems(row, columns, file_columns)
        rows.append(row)
    raise_problems(problems)
    if not rows:
        raise UserError(f"{path}: no entries, expected at least one")
    return rows


def _row_problems(row: Row, columns: Sequence[str], file_columns: Sequence[str]) -> list[str]:
    problems = []
    for column in columns:
        value = row.values.get(column)
        if value is None or (isinstance(value, str) and not value.strip()):
            problems.append(f"{row.where}: found no {column}, expected one")
        elif column in file_columns and not isinstance(value, str):
            problems.append(f"{row.where}: {column}: found a {type(value).__name__}, expected a path")
        elif column in file_columns and not row.path(column).is_file():
            problems.append(f"{row.where}: {column}: no such file {row.path(column)}, expected an existing one")
    return problems


def hash_files(*paths: str | Path) -> str:
    """What tells two data sets apart: names, sizes and contents of manifests and text files (not of media)."""
    digest = hashlib.sha256()
    for path in sorted(Path(p) for p in paths):
        for file in sorted(path.glob("*.txt")) if path.is_dir() else [path]:
            digest.update(file.name.encode())
            if file.is_file():
                digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def split_rows(rows: list[Row], share: float) -> tuple[list[Row], list[Row]]:
    """Every n-th row for validation, the others for training; at least one on either side.

    Raises:
        UserError: for fewer than two rows.
    """
    if len(rows) < 2:
        raise UserError(f"{rows[0].where}: found one row, expected at least two to split off a validation part")
    every = max(2, round(1 / share))
    held_out = rows[every - 1 :: every] or rows[-1:]
    kept = {id(row) for row in held_out}
    return [row for row in rows if id(row) not in kept], held_out
