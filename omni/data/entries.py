"""CSV, JSON and JSONL text as entries with their lines. Knows the formats alone: no file and no column is asked for."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

csv.field_size_limit(2**31 - 1)  # the readers have a limit of their own, max_text_chars

_SPACE = re.compile(r"[ \t\n\r]*")
_TRAILING_COMMA = re.compile(r",\s*[}\]]")
_TYPES = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object"}


class Entry(NamedTuple):
    """One row or object: the line on which it begins, its value, and what is wrong with how it is written."""

    line: int
    value: Any
    problem: str = ""


class UnreadableError(ValueError):
    """From a line on nothing can be read, so that no entry can be left out instead."""

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(problem)
        self.line, self.problem = line, problem


def type_name(value: Any) -> str:
    """What a JSON value is, in words a user knows."""
    return "null" if value is None else _TYPES[type(value)]


# ---- CSV ----


def parse_csv(text: str, columns: Iterable[str]) -> Iterator[Entry]:
    """Rows of a table as objects of texts by column; blank rows and rows of delimiters alone are passed over.

    Args:
        text: with ``\\n`` at the end of its lines; comma, semicolon or tab, as the header has it.
        columns: that the header must have.

    Raises:
        UnreadableError: for a header without one of ``columns`` or with one twice.
    """
    lines = text.split("\n")
    header = re.sub(r'"[^"]*"', "", next(filter(str.strip, lines), ""))
    delimiter = max(",;\t", key=header.count)

    def rows_from(start: int) -> Any:
        # strict: a quote that is never closed, or closed in the middle of a field, is a mistake
        rest = (lines[index] + "\n" for index in range(start, len(lines)))
        return csv.reader(rest, delimiter=delimiter, strict=True, skipinitialspace=True)

    rows, start, names = rows_from(0), 0, list[str]()
    while True:
        line = start + rows.line_num + 1
        try:
            fields = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            problem = f"not valid CSV ({error}), expected quotes around a whole field, doubled inside it"
            if not names:
                raise UnreadableError(line, problem) from None
            yield Entry(line, None, problem)
            # an open quote takes the lines after it along: they are read again, as rows of their own
            rows, start = rows_from(line), line
            continue
        if not any(field.strip() for field in fields):
            continue
        if not names:
            names = _header(line, fields, list(columns))
        elif any(field.strip() for field in fields[len(names) :]):
            quote = f"expected {len(names)}; put quotes around a text that has {delimiter!r} in it"
            yield Entry(line, None, f"more fields than columns ({len(fields)}), {quote}")
        else:
            yield Entry(line, {name: field for name, field in zip(names, fields, strict=False) if name})


def _header(line: int, fields: list[str], columns: list[str]) -> list[str]:
    names = [field.strip() for field in fields]
    times = Counter(names)
    if any(times[column] != 1 for column in {*columns, *filter(None, names)}):
        found = ", ".join(names)
        found = ascii(found)[:160] if not found.isprintable() or len(found) > 160 else found
        raise UnreadableError(line, f"found columns {found}, expected {', '.join(columns)}, each once")
    return names


# ---- JSON ----


class _Decoder:
    """JSON values, with a note of everything that Python would take and that means something else elsewhere."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_int=self._integer
        )

    def decode(self, text: str, start: int) -> tuple[Any, int]:
        """The value that begins at ``start`` and its end; :attr:`notes` are about it.

        Raises:
            UnreadableError: saying where and why the text is no JSON.
        """
        self.notes = []
        try:
            value, end = self._decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise UnreadableError(error.lineno, f"not valid JSON ({_reason(text, error)}), expected JSON") from None
        except RecursionError:
            line = text.count("\n", 0, start) + 1
            raise UnreadableError(line, "nested too deeply, expected an object of a few levels") from None
        if "\\u" in text[start:end] and any(map(_is_broken, _strings(value))):
            self.notes.append("found \\u0000 or half of a \\ud800-\\udfff pair, expected characters of a text")
        return value, end

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            self.notes.append(f"{ascii(twice)[1:-1][:80]}: found twice in one object, expected once")
        return values

    def _constant(self, name: str) -> None:
        self.notes.append(f"found {name}, expected a number that JSON knows")

    def _integer(self, digits: str) -> int:
        try:
            return int(digits)
        except ValueError:
            self.notes.append(f"found a number of {len(digits)} digits, expected a shorter one")
            return 0


def _reason(text: str, error: json.JSONDecodeError) -> str:
    """What is wrong, with the most frequent mistake by its name."""
    comma = text.rfind(",", 0, error.pos + 1)
    found = _TRAILING_COMMA.match(text, comma) if comma >= 0 else None
    return "a comma before the closing bracket" if found and found.end() > error.pos else error.msg


def _strings(value: Any) -> Iterator[str]:
    """Every string of a JSON value, keys included; without recursion, since a value may be nested deeply."""
    rest = [value]
    while rest:
        item = rest.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            rest += [*item, *item.values()]
        elif isinstance(item, list):
            rest += item


def _is_broken(text: str) -> bool:
    return any(c == "\0" or "\ud800" <= c <= "\udfff" for c in text)


def _entry(line: int, value: Any, notes: list[str]) -> Entry:
    if not isinstance(value, dict):
        return Entry(line, None, f"found {type_name(value)}, expected an object {{...}}")
    return Entry(line, value, "; ".join(notes))


def parse_json_list(text: str) -> Iterator[Entry]:
    """The objects of a JSON list.

    Raises:
        UnreadableError: where the text is no JSON, or no list.
    """
    decoder, line, counted = _Decoder(), 1, 0

    def skip_space(at: int) -> int:
        nonlocal line, counted
        match = _SPACE.match(text, at)
        end = match.end() if match else at
        line, counted = line + text.count("\n", counted, end), end
        return end

    at = skip_space(0)
    if not text.startswith("[", at):
        value, _ = decoder.decode(text, at)
        raise UnreadableError(line, f"found {type_name(value)}, expected a list of objects [{{...}}, {{...}}]")
    at = skip_space(at + 1)
    closed = text.startswith("]", at)
    while not closed:
        began = line
        value, at = decoder.decode(text, at)
        yield _entry(began, value, decoder.notes)
        at = skip_space(at)
        closed = text.startswith("]", at)
        if closed:
            break
        if not text.startswith(",", at):
            raise UnreadableError(line, "not valid JSON, expected a comma or the list's ]")
        comma, at = line, skip_space(at + 1)
        if text.startswith("]", at):
            raise UnreadableError(comma, "not valid JSON (a comma before the closing bracket), expected none")
    if skip_space(at + 1) < len(text):
        raise UnreadableError(line, "found more after the list's ], expected nothing")


def parse_jsonl(text: str) -> Iterator[Entry]:
    """The objects of a text that has one on each line; blank lines are passed over."""
    decoder = _Decoder()
    for number, line in enumerate(text.split("\n"), 1):
        start = len(line) - len(line.lstrip(" \t"))
        if start == len(line):
            continue
        try:
            value, end = decoder.decode(line, start)
        except UnreadableError as error:
            yield Entry(number, None, error.problem)
            continue
        if line[end:].strip(" \t"):
            yield Entry(number, None, "found more after the object, expected one object a line")
        else:
            yield _entry(number, value, decoder.notes)
