"""What went wrong in speech: words said twice or left out, ends that came too soon or too late, and its sound."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jiwer
import numpy as np
import torch

from omni.audio import MelConfig, log_mel
from omni.metrics import Figure, ratio, said_and_true
from omni.tokenizer import spoken_text

_NUM_CEPSTRA = 13  # as usual; the zeroth, which is the level, is left out


def slips(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, Figure]:
    """Share of sentences with each kind of slip, by the recognizer's words aligned with those of the text.

    ``repeats``: a word was heard that is not in the text, and its neighbour in the text is the same word. ``skips``: a
    word was not heard. ``early_stops``: the last word was not. ``late_stops``: words were heard after the last one.
    """
    found: dict[str, list[float]] = {name: [] for name in ("repeats", "skips", "early_stops", "late_stops")}
    aligned: list[list[tuple[str, int, int, int, int]]] = []
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        said, heard = spoken_text(reference).split(), spoken_text(hypothesis).split()
        repeated = skipped = early = late = False
        chunks = _chunks(said, heard)
        aligned.append([(c.type, c.ref_start_idx, c.ref_end_idx, c.hyp_start_idx, c.hyp_end_idx) for c in chunks])
        for chunk in chunks:
            if chunk.type == "insert":
                at = chunk.ref_start_idx
                beside = set(said[max(0, at - 1) : at + 1])
                repeated |= bool(beside & set(heard[chunk.hyp_start_idx : chunk.hyp_end_idx]))
                late |= at == len(said)
            if chunk.type == "delete":
                skipped, early = True, early or chunk.ref_end_idx == len(said)
        for name, slip in zip(found, (repeated, skipped, early, late), strict=True):
            found[name].append(float(slip))
    texts = said_and_true(references, hypotheses)
    raw = [{**text, "alignment": steps} for text, steps in zip(texts, aligned, strict=True)]
    return {name: ratio(values, said=raw) for name, values in found.items()}


def _chunks(said: Sequence[str], heard: Sequence[str]) -> list[jiwer.AlignmentChunk]:
    if not heard:
        return [jiwer.AlignmentChunk("delete", 0, len(said), 0, 0)]
    return list(jiwer.process_words(" ".join(said), " ".join(heard)).alignments[0])


def mel_cepstral_distortion(made_FM: torch.Tensor, true_FM: torch.Tensor, mel: MelConfig) -> float:
    """Mel-cepstral distortion in dB (Kubichek, 1993) along the best alignment in time (dynamic time warping).

    Args:
        made_FM: normalized log-mel frames (:class:`omni.audio.LogMel`).
        true_FM: those of the recording.
        mel: how both were computed.
    """
    made, true = (_cepstra(frames_FM, mel) for frames_FM in (made_FM, true_FM))
    distances = np.sqrt(np.maximum(0, (made**2).sum(1)[:, None] + (true**2).sum(1)[None] - 2 * made @ true.T))
    path = _warped(distances)
    mean = float(np.mean([distances[at] for at in path]))
    return 10 / math.log(10) * math.sqrt(2) * mean


def _cepstra(frames_FM: torch.Tensor, mel: MelConfig) -> np.ndarray:
    """Mel cepstra 1 to 13 [F, 13] of the log magnitudes."""
    logs = (log_mel(mel).magnitudes(frames_FM).clamp(min=0) + 1e-5).log().double().numpy()
    num_mels = logs.shape[1]
    angles = np.pi * np.arange(1, _NUM_CEPSTRA + 1)[:, None] * (np.arange(num_mels) + 0.5)[None] / num_mels
    return np.asarray(logs @ np.cos(angles).T / num_mels)


def _warped(costs: np.ndarray) -> list[tuple[int, int]]:
    """The cheapest monotone path from the first pair to the last one (Sakoe and Chiba, 1978)."""
    height, width = costs.shape
    total = np.full((height + 1, width + 1), np.inf)
    total[0, 0] = 0
    for i in range(height):
        best = np.minimum(total[i, 1:], total[i, :-1])
        if i == 0:
            best[0] = 0
        # along a row: min over where it was entered, of the cost there plus all costs from there on
        sums = np.cumsum(costs[i])
        total[i + 1, 1:] = sums + np.minimum.accumulate(best - sums + costs[i])
        total[0, 0] = np.inf
    path, at = [], (height - 1, width - 1)
    while at != (0, 0):
        path.append(at)
        i, j = at
        steps = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
        at = min(steps, key=lambda step: total[step[0] + 1, step[1] + 1] if min(step) >= 0 else np.inf)
    return [(0, 0), *path[::-1]]
