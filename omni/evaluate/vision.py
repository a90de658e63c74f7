"""Stage C's figures: finding a picture's caption among a hundred, and telling it from an almost identical one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omni.config import DataConfig
from omni.data.images import Pictures, encode_caption, read_image_manifest, stack_captions
from omni.data.manifest import RULES, Row
from omni.metrics import Figure, located, ratio
from omni.models.vision_encoder import VisionEncoder
from omni.tokenizer import Tokenizer


@dataclass
class Matching:
    """Raw results: unit vectors of pictures, of their captions, and of their captions with something exchanged.

    Attributes:
        captions: the caption of each picture, as written.
        image_NE: unit vectors of the pictures.
        text_NE: unit vectors of the captions.
        swaps: per picture, the unit vector [E] of its wrong caption of each kind.
        where: ``file:line`` of each picture.
    """

    captions: list[str]
    image_NE: np.ndarray
    text_NE: np.ndarray
    swaps: list[dict[str, np.ndarray]] = field(default_factory=list)
    where: list[str] = field(default_factory=list)

    def retrieval(self, size: int = 100, draws: int = 10, seed: int = 0) -> dict[str, Figure]:
        """Recall@1 in both directions among ``size`` pictures with distinct captions, over ``draws`` draws of them.

        With fewer distinct captions all of them are used. The interval resamples pictures, each with all of its draws.
        """
        rng = np.random.default_rng(seed)
        groups: dict[str, list[int]] = {}
        for index, caption in enumerate(self.captions):
            groups.setdefault(caption, []).append(index)
        distinct = sorted(groups)
        # what was found for each picture in each draw that it is in: the caption, or of that caption the picture
        found: dict[str, list[list[str | None]]] = {
            name: [[] for _ in self.captions] for name in ("image_to_text_r1", "text_to_image_r1")
        }
        for _ in range(draws):
            chosen = rng.permutation(len(distinct))[:size]
            indices = np.array([groups[distinct[i]][rng.integers(len(groups[distinct[i]]))] for i in chosen])
            similarity = self.image_NE[indices] @ self.text_NE[indices].T
            for name, scores in (("image_to_text_r1", similarity), ("text_to_image_r1", similarity.T)):
                for index, first in zip(indices, _first(scores), strict=True):
                    found[name][index].append(None if first is None else self.captions[indices[first]])
        return {name: self._recall(rows) for name, rows in found.items()}

    def _recall(self, found: list[list[str | None]]) -> Figure:
        """Share of right captions (each stands for one picture of its draw) among those that were found first."""
        seen = [index for index, row in enumerate(found) if row]
        said = [{"reference": self.captions[index], "found": found[index]} for index in seen]
        hits = [float(found[index].count(self.captions[index])) for index in seen]
        return self._located(ratio(hits, [float(len(found[index])) for index in seen], said=said), seen)

    def _located(self, figure: Figure, rows: Sequence[int]) -> Figure:
        return located(figure, [self.where[row] for row in rows]) if self.where else figure

    def caption_swap(self) -> dict[str, Figure]:
        """How often a picture lies nearer to its caption than to a wrong one (a tie is half): overall and by kind.

        The overall interval resamples pictures, since the wrong captions of one picture are not independent cases.
        """
        asked = [index for index, swaps in enumerate(self.swaps) if swaps]
        if not asked:
            return {}
        said = [self._similarities(index) for index in asked]
        scores = [{kind: _nearer(item["true"], wrong) for kind, wrong in item["wrong"].items()} for item in said]
        right, each = [sum(item.values()) for item in scores], [float(len(item)) for item in scores]
        figures = {"caption_swap": self._located(ratio(right, each, said=said), asked)}
        for kind in sorted({kind for item in scores for kind in item}):
            rows = [row for row, item in enumerate(scores) if kind in item]
            raw = [{"true": said[row]["true"], "wrong": said[row]["wrong"][kind]} for row in rows]
            figure = ratio([scores[row][kind] for row in rows], said=raw)
            figures[f"caption_swap_{kind}"] = self._located(figure, [asked[row] for row in rows])
        return figures

    def _similarities(self, index: int) -> dict[str, Any]:
        """Cosines of a picture with its caption and with its wrong ones."""
        image_E = self.image_NE[index]
        wrong = {kind: float(image_E @ swap_E) for kind, swap_E in self.swaps[index].items()}
        return {"true": float(image_E @ self.text_NE[index]), "wrong": wrong}

    def figures(self) -> dict[str, Figure]:
        """All of them; ``caption_swap`` only where the manifest has swaps."""
        return {**self.retrieval(), **(self.caption_swap() if self.swaps else {})}


def _first(similarity: np.ndarray) -> list[int | None]:
    """The column that is the largest of each row; None where several are: a constant model finds nothing."""
    alone = (similarity == similarity.max(axis=1)[:, None]).sum(axis=1) == 1
    return [int(column) if one else None for column, one in zip(similarity.argmax(axis=1), alone, strict=True)]


def _nearer(true: float, wrong: float) -> float:
    return 0.5 if true == wrong else float(true > wrong)


@torch.no_grad()
def embed_pictures(model: VisionEncoder, pictures: Pictures, batch_size: int = 100) -> np.ndarray:
    """Unit vectors [N, E]."""
    device, found = model.log_scale.device, []
    for start in range(0, len(pictures), batch_size):
        pixels = [pictures.pixels(index) for index in range(start, min(start + batch_size, len(pictures)))]
        found.append(model.encode_image(torch.from_numpy(np.stack(pixels)).to(device)).pooled_BE.float().cpu())
    return torch.cat(found).numpy()


@torch.no_grad()
def embed_texts(model: VisionEncoder, tokenizer: Tokenizer, texts: Sequence[str], batch_size: int = 200) -> np.ndarray:
    """Unit vectors [N, E]."""
    device, limit, found = model.log_scale.device, model.config.max_text_len, []
    for start in range(0, len(texts), batch_size):
        tokens = [encode_caption(text, tokenizer, limit) for text in texts[start : start + batch_size]]
        tokens_NT, valid_NT = stack_captions(tokens, limit)
        found.append(model.encode_text(tokens_NT.to(device), valid_NT.to(device)).float().cpu())
    return torch.cat(found).numpy()


def match_rows(model: VisionEncoder, tokenizer: Tokenizer, rows: Sequence[Row], pictures: Pictures) -> Matching:
    """Embed pictures, captions and swaps."""
    captions = [str(row.values["caption"]) for row in rows]
    wrong = [
        (index, kind, text) for index, row in enumerate(rows) for kind, text in row.values.get("swaps", {}).items()
    ]
    texts = embed_texts(model, tokenizer, [*captions, *(text for _, _, text in wrong)])
    swaps: list[dict[str, np.ndarray]] = [{} for _ in rows]
    for (index, kind, _), vector_E in zip(wrong, texts[len(rows) :], strict=True):
        swaps[index][kind] = vector_E
    where = [row.where for row in rows]
    return Matching(captions, embed_pictures(model, pictures), texts[: len(rows)], swaps, where)


def match_manifest(
    model: VisionEncoder, tokenizer: Tokenizer, manifest: str | Path, rules: DataConfig = RULES
) -> Matching:
    """Embed every entry of a manifest."""
    pictures = Pictures(read_image_manifest(manifest, rules), model.config.image_size, rules)
    return match_rows(model.eval(), tokenizer, pictures.rows, pictures)


def vision_figures(
    model: VisionEncoder,
    tokenizer: Tokenizer,
    test: str | Path,
    combinations: str | Path | None = None,
    rules: DataConfig = RULES,
) -> dict[str, Figure]:
    """The figures of ``omni eval``: of the test manifest, and of unseen combinations where there is such a file."""
    figures = match_manifest(model, tokenizer, test, rules).figures()
    if combinations is not None:
        unseen = match_manifest(model, tokenizer, combinations, rules).figures()
        figures |= {f"{name}_unseen_combinations": figure for name, figure in unseen.items()}
    return figures
