"""Stage C, to be seen: captions nearest to a picture, pictures nearest to a caption, and where the encoder looks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from omni.data.images import Pictures
from omni.evaluate.sample_media import label, new_figure, save_figure, save_pixels
from omni.evaluate.vision import match_rows
from omni.models.vision_encoder import VisionEncoder
from omni.sample import Sample
from omni.tokenizer import Tokenizer

_NEAREST = 3
MOST_PICTURES = 200  # among which the nearest ones are looked for


@torch.no_grad()
def show_seeing(model: VisionEncoder, tokenizer: Tokenizer, pictures: Pictures, count: int, out: Path) -> list[Sample]:
    """The first ``count`` pictures with their nearest captions, and captions with their nearest pictures."""
    matched = match_rows(model, tokenizer, pictures.rows, pictures)
    similarity_NN = matched.image_NE @ matched.text_NE.T
    found = []
    for index in range(min(count, len(pictures))):
        pixels_3HW = pictures.pixels(index)
        pixels_13HW = torch.from_numpy(pixels_3HW.copy())[None].to(model.log_scale.device)
        patches_1PD = model.encode_image(pixels_13HW).patches_BPD
        weights_P = model.image.pool.weights(patches_1PD)[0].float().cpu().numpy()
        written = tokenizer.decode(model.caption(patches_1PD, tokenizer.end_id)[0])
        captions = list(dict.fromkeys(matched.captions[at] for at in (-similarity_NN[index]).argsort()))
        place = captions.index(matched.captions[index]) + 1
        picture = save_pixels(pixels_3HW, out / f"seeing_{index + 1}.png")
        attention = _draw_attention(pixels_3HW, weights_P, out / f"seeing_{index + 1}_attention.jpg")
        texts = (
            ("its caption", matched.captions[index]),
            ("written from the patch tokens", written),
            *((f"nearest caption {number}", text) for number, text in enumerate(captions[:_NEAREST], 1)),
            ("the true one is", f"number {place} of {len(captions)}"),
        )
        media = (("as the encoder sees it", picture), ("what the pooled token takes from each patch", attention))
        found.append(Sample("a held-out picture", texts, media, right=place == 1))
    return found + [_nearest_pictures(pictures, similarity_NN[:, at], at, out) for at in range(len(found))]


def _draw_attention(pixels_3HW: np.ndarray, weights_P: np.ndarray, path: Path) -> Path:
    """A picture, and the same under the attention of the pooled token."""
    side = round(len(weights_P) ** 0.5)
    size = pixels_3HW.shape[-1]
    figure = new_figure(2.7)
    left, right = figure.subplots(1, 2)
    for axis in (left, right):
        axis.imshow(pixels_3HW.transpose(1, 2, 0), extent=(0, size, size, 0))
        axis.set_xticks([])
        axis.set_yticks([])
    shown = right.imshow(weights_P.reshape(side, side), cmap="magma", alpha=0.7, extent=(0, size, size, 0), vmin=0)
    figure.colorbar(shown, ax=right, shrink=0.8).ax.tick_params(labelsize=7)
    label(left, "picture")
    label(right, f"attention (even: {1 / len(weights_P):.3f})")
    return save_figure(figure, path)


def _nearest_pictures(pictures: Pictures, similarity_N: np.ndarray, index: int, out: Path) -> Sample:
    """The pictures that lie nearest to a caption."""
    caption = str(pictures.rows[index].values["caption"])
    nearest = (-similarity_N).argsort()[:_NEAREST]
    figure = new_figure(2.1)
    axes = np.atleast_1d(figure.subplots(1, len(nearest)))
    for axis, at in zip(axes, nearest, strict=True):
        axis.imshow(pictures.pixels(int(at)).transpose(1, 2, 0))
        axis.set_xticks([])
        axis.set_yticks([])
        true = pictures.rows[int(at)].values["caption"] == caption
        label(axis, f"{similarity_N[at]:.2f}{', the right one' if true else ''}")
    picture = save_figure(figure, out / f"nearest_{index + 1}.jpg")
    right = pictures.rows[int(nearest[0])].values["caption"] == caption
    media = (("the nearest pictures, with the cosine of each", picture),)
    return Sample(f"a held-out caption among {len(pictures)} pictures", (("caption", caption),), media, right=right)
