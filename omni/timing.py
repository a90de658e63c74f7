"""When every word is spoken: from a recording's alignment, and from predicted durations to code frames.

The unit of time is the word (and the pause between two words). Its frames are spread evenly over its characters.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from omni.audio import forced_align
from omni.tokenizer import Characters

NUM_PLACE_FEATURES = 4
_SHORTEST_PAUSE = 8  # mel frames, 80 ms: a shorter silence is the closure of a stop such as the "g d" of "big dog"
_SLACK = 6  # mel frames that a CTC peak may lie away from the sound


@dataclass
class TalkerText:
    """What is to be spoken, for a batch.

    Attributes:
        symbols_BC: characters of pauses and words in turn (:mod:`omni.speech_text`), padded.
        unit_BC: the unit (pause or word) that each character belongs to; the number of units at padding.
        speaker_BE: unit vector of the speaker.
        states_BUD: state of the Thinker for each unit, or None.
        has_states_B: False for the rows that have none.
    """

    symbols_BC: torch.Tensor
    unit_BC: torch.Tensor
    speaker_BE: torch.Tensor
    states_BUD: torch.Tensor | None = None
    has_states_B: torch.Tensor | None = None


@dataclass
class FramePlan:
    """Where each code frame stands in the text.

    Attributes:
        character_BT: its character.
        place_BTJ: its place in the unit and in the character, and how long both are.
        num_frames_B: frames of each row.
    """

    character_BT: torch.Tensor
    place_BTJ: torch.Tensor
    num_frames_B: torch.Tensor


# ---- from recordings ----


def silent_frames(frames_FM: torch.Tensor) -> torch.Tensor:
    """[F], True where a recording is silent: in the lower fifth of its own range of levels."""
    level_F = frames_FM.mean(dim=1)
    low, high = (float(level_F.quantile(q)) for q in (0.02, 0.9))
    return level_F < low + 0.2 * (high - low)


def word_spans(frames_FM: torch.Tensor, log_probs_SV: torch.Tensor, words: Sequence[str]) -> list[tuple[float, float]]:
    """First and one-past-last mel frame of each word.

    CTC says which sound belongs to which word, but its peaks are short. So two words meet at the peak of the space
    between them, unless there is a silence of 80 ms or more, which belongs to neither.

    Raises:
        ValueError: when the recording is too short for the words.
    """
    characters = Characters()
    spans = forced_align(log_probs_SV, characters.encode(" ".join(words)), characters.blank)
    scale = len(frames_FM) / len(log_probs_SV)
    firsts = list(itertools.accumulate((len(word) + 1 for word in words), initial=0))
    begins = [spans[first][0] * scale for first in firsts[:-1]]
    ends = [spans[first - 2][1] * scale for first in firsts[1:]]
    runs = _silences(silent_frames(frames_FM))
    for word in range(len(words) - 1):
        space = spans[firsts[word + 1] - 1]
        meeting = (space[0] + space[1]) / 2 * scale
        pause = _pause_between(runs, min(ends[word], meeting) - _SLACK, max(begins[word + 1], meeting) + _SLACK)
        ends[word], begins[word + 1] = pause or (meeting, meeting)
    lead = next((end for start, end in runs if start == 0), 0)
    trail = next((start for start, end in runs if end == len(frames_FM)), len(frames_FM))
    # silence ends where sound begins, and never inside what CTC heard
    begins[0] = min(begins[0], float(lead))
    ends[-1] = max(ends[-1], float(trail))
    return list(zip(begins, ends, strict=True))


def _silences(silent_F: torch.Tensor) -> list[tuple[int, int]]:
    """Runs of silent frames."""
    edges = torch.diff(silent_F.int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int))
    starts, ends = (edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()
    return list(zip(starts, ends, strict=True))


def _pause_between(runs: list[tuple[int, int]], low: float, high: float) -> tuple[float, float] | None:
    """The longest silence that overlaps a stretch of time, if it is long enough for a pause."""
    near = [(end - start, start, end) for start, end in runs if start < high and end > low]
    length, start, end = max(near, default=(0, 0, 0))
    return (float(start), float(end)) if length >= _SHORTEST_PAUSE else None


def unit_durations(
    spans: Sequence[tuple[float, float]], num_codes: int, reduction: int, longest_edge: int
) -> tuple[int, list[int]] | None:
    """The first code frame to keep and the code frames of every unit (pause, word, pause, ...) from there on.

    Silence at either end is cut to ``longest_edge`` code frames. None when the words do not fit into the recording.
    """
    edges, now = [], 0
    for begin, end in spans:
        now = max(now, round(begin / reduction))
        edges.append(now)
        now = max(now + 1, round(end / reduction))
        edges.append(now)
    if now > num_codes:
        return None
    first, last = max(0, edges[0] - longest_edge), min(num_codes, edges[-1] + longest_edge)
    return first, [after - before for before, after in itertools.pairwise([first, *edges, last])]


# ---- from predictions ----


def round_durations(durations_U: torch.Tensor, is_word_U: torch.Tensor) -> torch.Tensor:
    """Whole frames of each unit, rounded by the running sum so that the total is kept; a word has at least one."""
    kept = torch.where(is_word_U, durations_U.double().clamp(min=1.0), durations_U.double().clamp(min=0.0))
    ends = (kept.cumsum(0) + 0.5).floor().long()
    return torch.diff(ends, prepend=ends.new_zeros(1))


def plan_frames(characters_U: torch.Tensor, durations_U: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Character [T] and place features [T, J] of every frame of one sentence.

    Args:
        characters_U: characters of each unit.
        durations_U: frames of each unit, whole numbers.
    """
    unit_T = torch.repeat_interleave(durations_U)
    starts_U = durations_U.cumsum(0) - durations_U
    first_U = characters_U.cumsum(0) - characters_U
    frames_T, size_T = durations_U[unit_T].float(), characters_U[unit_T].float()
    place_T = (torch.arange(len(unit_T)) - starts_U[unit_T] + 0.5) / frames_T
    in_unit_T = (place_T * size_T).floor().clamp(max=size_T - 1)
    character_T = first_U[unit_T] + in_unit_T.long()
    # the logarithms are brought to the size of the other two
    features = [place_T, place_T * size_T - in_unit_T, (frames_T / size_T).log() / 2, frames_T.log() / 4]
    return character_T, torch.stack(features, dim=-1)


def plan_batch(plans: Sequence[tuple[torch.Tensor, torch.Tensor]], multiple: int = 1) -> FramePlan:
    """Pad the plans of several sentences to a multiple of frames."""
    sizes_B = torch.tensor([len(character_T) for character_T, _ in plans])
    longest = -(-int(sizes_B.max()) // multiple) * multiple
    character_BT = torch.zeros(len(plans), longest, dtype=torch.long)
    place_BTJ = torch.zeros(len(plans), longest, NUM_PLACE_FEATURES)
    for row, (character_T, place_TJ) in enumerate(plans):
        character_BT[row, : len(character_T)] = character_T
        place_BTJ[row, : len(place_TJ)] = place_TJ
    return FramePlan(character_BT, place_BTJ, sizes_B)


def unit_symbols(units: Sequence[Sequence[str]], multiple: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Characters [B, C] of several sentences' units, and the unit of each character, padded to a multiple.

    At padding the unit is one past the last of the longest sentence.
    """
    characters, most = Characters(), max(len(row) for row in units)
    longest = -(-max(sum(map(len, row)) for row in units) // multiple) * multiple
    symbols_BC = torch.full((len(units), longest), Characters.pad)
    unit_BC = torch.full((len(units), longest), most)
    for row, parts in enumerate(units):
        symbols = characters.encode("".join(parts))
        symbols_BC[row, : len(symbols)] = torch.tensor(symbols)
        unit_BC[row, : len(symbols)] = torch.repeat_interleave(torch.tensor([len(part) for part in parts]))
    return symbols_BC, unit_BC
