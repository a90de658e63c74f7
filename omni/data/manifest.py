"""Reading what the user brings: CSV, JSON and JSONL manifests and text files, with every problem named by its line.

A reader gives a :class:`Manifest`: what can be used, and every problem. Training asks for ``usable`` samples, which by
the data's rules is an error or leaves the bad ones out; `omni data check` lists the problems of all files.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from omni.config import DataConfig, UserError
from omni.console import log
from omni.data.entries import Entry, UnreadableError, parse_csv, parse_json_list, parse_jsonl, type_name
from omni.files import LFS_POINTER, describe_content, file_problem, is_inside, shown

RULES = DataConfig()  # the limits where a caller has none of its own
_SHOWN = 20  # problems listed before "... and N more"
_SHOWN_SKIPPED = 3

Sample = TypeVar("Sample")


class BadSamplesError(UserError):
    """Problems of data, one line each; the message shows the first of them."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(first_problems(problems)))
        self.problems = list(problems)


def problems_of(error: ValueError) -> list[str]:
    """Everything that an error of a reader says, one problem a line."""
    return error.problems if isinstance(error, BadSamplesError) else str(error).splitlines()


@dataclass(frozen=True)
class Row:
    """One line of a manifest. ``where`` is ``file:line`` for messages; paths in ``values`` are as written."""

    where: str
    folder: Path
    values: dict[str, Any]

    def path(self, key: str) -> Path:
        """A path of this row, relative to the manifest's folder."""
        return self.folder / str(self.values[key])


def manifest_of(row: Row) -> str:
    """The manifest that a row is from, for messages about all of its rows."""
    return row.where.split(": entry ")[0].rpartition(":")[0]


@dataclass
class Manifest(Generic[Sample]):
    """What a file holds.

    Attributes:
        name: of the file, for messages.
        samples: those without a problem.
        problems: as ``file:line: what, expected what``; a sample may have several.
        num_bad: samples that have any.
    """

    name: str
    samples: list[Sample] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    num_bad: int = 0

    def usable(self, rules: DataConfig) -> list[Sample]:
        """The samples to work with.

        Raises:
            BadSamplesError: when the rules do not allow to leave the bad ones out, or none is left.
        """
        settle(self.problems, self.num_bad, self.num_bad + len(self.samples), rules, self.name)
        if not self.samples:
            raise UserError(f"{self.name}: no rows, expected at least one after a CSV's header or in a list")
        return self.samples


def first_problems(problems: Sequence[str]) -> list[str]:
    """The first problems of a list and how many more there are."""
    rest = len(problems) - _SHOWN
    return [*problems[:_SHOWN], *([f"... and {rest} more problems"] if rest > 0 else [])]


def raise_problems(problems: Sequence[str]) -> None:
    """Raise one error that lists every problem, capped with a count; does nothing without problems."""
    if problems:
        raise BadSamplesError(problems)


def settle(problems: Sequence[str], num_bad: int, num_samples: int, rules: DataConfig, name: str) -> None:
    """Do about bad samples what the rules say: an error that lists them, or a warning that counts them.

    Args:
        problems: of the bad samples, one line each.
        num_bad: how many are bad, of ``num_samples``.
        rules: ``on_bad_sample`` says what to do, ``max_bad_fraction`` up to how many.
        name: of the file or part that they are from.

    Raises:
        BadSamplesError: unless they may be left out.
    """
    if not problems:
        return
    share = f"{num_bad} of {num_samples} samples cannot be used"
    if rules.on_bad_sample == "error":
        raise BadSamplesError(problems)
    if num_bad > rules.max_bad_fraction * num_samples:
        limit = f"expected at most {rules.max_bad_fraction:g} of them (data.max_bad_fraction)"
        raise BadSamplesError([f"{name}: {share}, {limit}", *problems])
    log.warning("%s: %s and are left out: %s", name, share, "; ".join(problems[:_SHOWN_SKIPPED]))


# ---- text ----


def read_text_file(path: Path) -> str:
    """A UTF-8 file, without a byte order mark and with ``\\n`` at the end of every line.

    Raises:
        UserError: when it is missing or empty, or listing every line that is not UTF-8 or has a NUL byte.
    """
    if problem := file_problem(path):
        hint = "; `omni data synth` writes the micro-world, docs/your-data.md the format"
        if problem == "found an empty file":
            raise UserError(f"{path}: empty, expected some text")
        raise UserError(f"{path}: {problem.rstrip(':')}, expected a UTF-8 file{hint if 'no such' in problem else ''}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}), expected a UTF-8 file") from None
    if data.startswith(LFS_POINTER):
        raise UserError(f"{path}: found {describe_content(path)}, expected a UTF-8 file")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{path}:1: not UTF-8 but UTF-16, expected UTF-8; save it as such")
    data = data.removeprefix(codecs.BOM_UTF8)
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = None
    if text is None or b"\0" in data:
        kind = describe_content(path)
        hint = "" if "text" in kind or "no kind" in kind else f"; this is {kind}"
        raise_problems([f"{path}:{line}: {problem}{hint}" for line, problem in _bad_bytes(data)])
    if not text or not text.strip():
        raise UserError(f"{path}: empty, expected some text")
    return text


def _bad_bytes(data: bytes) -> Iterable[tuple[int, str]]:
    """(line, what is wrong) of every line that is no text."""
    for number, line in enumerate(data.split(b"\n"), 1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            yield number, f"not UTF-8 (byte 0x{line[error.start]:02x} after {error.start} others), expected UTF-8 text"
            continue
        if b"\0" in line:
            yield number, "found a NUL byte, expected text"


# ---- rows ----


def scan_csv(
    path: Path, columns: Sequence[str], file_columns: Sequence[str], rules: DataConfig = RULES
) -> Manifest[Row]:
    """Rows and problems of a CSV file (comma, semicolon or tab).

    Args:
        path: the manifest.
        columns: columns that must be there and not empty.
        file_columns: those of them that name files, which must exist.
        rules: the limits of texts and paths.

    Raises:
        UserError: when the file cannot be read, or from a line on cannot.
    """

    def check(row: Row) -> Row:
        raise_problems(text_problems(row, columns, file_columns, rules))
        return row

    return _scan(parse_csv(read_text_file(path), columns), path, "{path}:{line}", check)


def scan_json_list(path: Path, convert: Callable[[Row], Sample]) -> Manifest[Sample]:
    """Samples and problems of a JSON list of objects; ``convert`` makes a sample of one or raises a ValueError.

    Raises:
        UserError: when the file cannot be read, or from a line on cannot.
    """
    # a list may be written on one line, so that its line does not tell an entry
    return _scan(parse_json_list(read_text_file(path)), path, "{path}:{line}: entry {number}", convert)


def scan_jsonl(path: Path, convert: Callable[[Row], Sample]) -> Manifest[Sample]:
    """Samples and problems of a file with one JSON object a line; see :func:`scan_json_list`."""
    return _scan(parse_jsonl(read_text_file(path)), path, "{path}:{line}", convert)


def _scan(entries: Iterable[Entry], path: Path, pattern: str, convert: Callable[[Row], Sample]) -> Manifest[Sample]:
    found: Manifest[Sample] = Manifest(str(path))
    try:
        for number, entry in enumerate(entries, 1):
            row = Row(pattern.format(path=path, line=entry.line, number=number), path.parent, entry.value)
            try:
                if entry.problem:
                    raise ValueError(entry.problem)
                found.samples.append(convert(row))
            except ValueError as error:
                found.problems += [f"{row.where}: {problem}" for problem in problems_of(error)]
                found.num_bad += 1
    except UnreadableError as error:
        raise BadSamplesError([*found.problems, f"{path}:{error.line}: {error.problem}"]) from None
    return found


def text_problems(row: Row, columns: Sequence[str], file_columns: Sequence[str], rules: DataConfig) -> list[str]:
    """What is wrong with a row whose ``columns`` are texts, those of ``file_columns`` names of files that exist."""
    problems = []
    for column in columns:
        value = row.values.get(column)
        if value is None or (isinstance(value, str) and not value.strip()):
            problems.append(f"found no {column}, expected one")
        elif not isinstance(value, str):
            expected = "a path" if column in file_columns else "a text"
            problems.append(f"{column}: found {type_name(value)}, expected {expected}")
        elif column in file_columns:
            problem = path_problem(value, row.folder, row.folder, rules)
            problems += [f"{column}: {problem}"] if problem else []
        elif len(value) > rules.max_text_chars:
            problems.append(f"{column}: {too_long(len(value), rules)}")
    return problems


def too_long(length: int, rules: DataConfig) -> str:
    """The problem of a text of ``length`` characters."""
    return f"found {length} characters, expected at most {rules.max_text_chars} (data.max_text_chars)"


def path_problem(name: str, folder: Path, data_folder: Path, rules: DataConfig) -> str:
    """What is wrong with a file that a manifest names; "" if nothing is.

    Args:
        name: as written.
        folder: of the manifest, which ``name`` is relative to.
        data_folder: what the file must lie in, unless the rules allow others.
        rules: ``allow_outside_paths``.
    """
    path = folder / name
    outside = f"expected a path inside of {data_folder} (or set data.allow_outside_paths)"
    if Path(name).is_absolute() and not rules.allow_outside_paths:
        return f"found the absolute path {shown(name)}, {outside}"
    if problem := file_problem(path):
        hint = "; write its path with /" if "\\" in name and not file_problem(folder / name.replace("\\", "/")) else ""
        return f"{problem} {shown(str(path))}, expected an existing file{hint}"
    if not rules.allow_outside_paths and not is_inside(path, data_folder):
        return f"found {shown(str(path))}, which lies elsewhere, {outside}"
    return ""


def split_rows(rows: list[Row], share: float, contents: Sequence[Hashable]) -> tuple[list[Row], list[Row]]:
    """Every n-th content for validation, the others for training; at least one on either side.

    Args:
        rows: of one manifest.
        share: of the contents that go to validation.
        contents: what each row shows or says; rows of one content, such as a picture's captions, stay together.

    Raises:
        UserError: for fewer than two contents.
    """
    distinct = list(dict.fromkeys(contents))
    if len(distinct) < 2:
        raise UserError(f"{rows[0].where}: found one file, expected at least two to split off a validation part")
    every = max(2, round(1 / share))
    held_out = set(distinct[every - 1 :: every] or distinct[-1:])
    parts: tuple[list[Row], list[Row]] = [], []
    for row, content in zip(rows, contents, strict=True):
        parts[content in held_out].append(row)
    return parts
