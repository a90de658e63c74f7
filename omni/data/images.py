"""Pictures with their captions, for stage C; any picture file as square RGB pixels, for everyone.

What a file's bytes mean must not depend on how it stores them: a photograph that was turned in the camera, a palette, a
CMYK print or a 16-bit grey scan all become what a viewer would show.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps

from omni.config import DataConfig, UserError
from omni.data.entries import type_name
from omni.data.manifest import RULES, Manifest, Row, manifest_of, raise_problems, scan_json_list, settle, text_problems
from omni.data.stream import Batch, pad_to
from omni.files import describe_content, file_problem
from omni.models.segments import Unpadded, unpadded
from omni.parallel import map_small
from omni.runtime import log
from omni.tokenizer import Tokenizer, plain_text

Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit; ours is asked for as soon as the header is read
_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "MPO")  # no EPS: opening one would run Ghostscript
CACHE_BYTES = 2**30  # of decoded pictures kept in memory: 87,000 of 64 x 64


def load_image(
    source: str | Path | BinaryIO, size: int, name: str = "", max_pixels: int = RULES.max_pixels
) -> torch.Tensor:
    """Read a picture as uint8 [3, size, size].

    The whole picture is kept, in its proportions: cropping could cut off what the caption names, stretching would turn
    circles into ellipses. What is left of the square takes the mean colour of the picture's border, which adds no edge
    that is not in the picture, as white around a dark photograph would. Transparency lies over white, an animation
    gives its first frame.

    Args:
        source: a path or an open binary file.
        size: pixels a side.
        name: what to call the picture in messages; the path by default.
        max_pixels: more are refused by the header, before they are decoded.

    Raises:
        UserError: for a file that is missing, truncated, no picture, or has more than ``max_pixels``.
    """
    name = name or str(source)
    with _opened(source, name, max_pixels) as image:
        # a JPEG is decoded at a half or a quarter where that is still larger than needed; never smaller
        image.draft("RGB", (2 * size, 2 * size))
        upright = ImageOps.exif_transpose(image)
        return torch.from_numpy(_square(_as_rgb(upright), size))


def read_image_size(path: Path, max_pixels: int = RULES.max_pixels) -> tuple[int, int]:
    """Width and height from a picture's header.

    Raises:
        UserError: for a file that is missing, no picture, or has more than ``max_pixels``.
    """
    with _opened(path, str(path), max_pixels) as image:
        return image.size


@contextlib.contextmanager
def _opened(source: str | Path | BinaryIO, name: str, max_pixels: int) -> Iterator[Image.Image]:
    """A picture whose header could be read and is not too large; whatever its decoder raises names the file."""
    source = Path(source) if isinstance(source, str) else source
    if isinstance(source, Path) and (problem := file_problem(source)):
        raise UserError(f"{name}: {problem.rstrip(':')}, expected a picture")
    try:
        with Image.open(source, formats=_FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                limit = f"expected at most {max_pixels} (data.max_pixels); reduce it first"
                raise UserError(f"{name}: found {width} x {height} pixels, {limit}")
            yield image
    except UserError:
        raise
    except Exception as error:  # decoders raise nearly anything on a damaged file
        kind = describe_content(source)
        reason = f"{kind}: {_short(error)}" if kind.endswith("picture") else kind
        what = "PNG, JPEG, GIF, WebP, BMP or TIFF"
        raise UserError(f"{name}: not a readable picture (found {reason}), expected a whole {what}") from None


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:100]}" if text else type(error).__name__


def _as_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB with the same meaning."""
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bits(np.asarray(image).astype(np.float64))).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _eight_bits(grey_HW: np.ndarray) -> np.ndarray:
    """Deep grey as 8 bits; Pillow's own conversion cuts at 255, which turns a 16-bit scan white."""
    grey_HW = np.nan_to_num(grey_HW)
    top = float(grey_HW.max(initial=0.0))
    white = next((white for white in (1.0, 255.0, 65535.0) if top <= white), top)
    if np.all(grey_HW == np.round(grey_HW)):
        white = max(white, 65535.0)  # whole numbers: 16 bits, however dark
    return np.clip(grey_HW * (255.0 / white), 0, 255).round().astype(np.uint8)


def _square(image: Image.Image, size: int) -> np.ndarray:
    """Fit a picture into a square [3, size, size], padded with the mean colour of its border."""
    factor = size / max(image.size)
    width, height = (max(1, round(side * factor)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    pixels = np.asarray(image)
    if (width, height) == (size, size):
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]).mean(axis=0)
    square = np.empty((size, size, 3), dtype=np.uint8)
    square[:] = border.round()
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = pixels
    return np.ascontiguousarray(square.transpose(2, 0, 1))


def scan_image_manifest(path: str | Path, rules: DataConfig = RULES) -> Manifest[Row]:
    """Rows and problems of a JSON list of ``{"image": path, "caption": text}``, optionally with ``negatives``."""

    def check(row: Row) -> Row:
        problems = text_problems(row, ["image", "caption"], ["image"], rules)
        negatives, swaps = row.values.get("negatives", []), row.values.get("swaps", {})
        if not isinstance(negatives, list) or not all(isinstance(text, str) for text in negatives):
            problems.append(f"negatives: found {type_name(negatives)}, expected a list of texts")
        if not isinstance(swaps, dict) or not all(isinstance(text, str) for text in swaps.values()):
            problems.append(f"swaps: found {type_name(swaps)}, expected an object of texts by kind")
        raise_problems(problems)
        return row

    return scan_json_list(Path(path), check)


def read_image_manifest(path: str | Path, rules: DataConfig = RULES) -> list[Row]:
    """Rows of a JSON list of ``{"image": path, "caption": text}``, optionally with ``negatives`` (a list of texts).

    Raises:
        UserError: listing every entry that is not like that, unless the rules leave them out.
    """
    return scan_image_manifest(path, rules).usable(rules)


class Pictures:
    """The pictures of a manifest as pixels: decoded once and kept in memory as far as they fit.

    All are decoded (beyond that, their headers read) before training begins, so that a damaged file is known before
    hours have passed, and every one of them is named. ``rows`` are those that the rules let pass.
    """

    def __init__(self, rows: Sequence[Row], size: int, rules: DataConfig = RULES) -> None:
        self.rows, self.size, self.max_pixels, self.left_out = list(rows), size, rules.max_pixels, 0
        kept = min(len(self.rows), CACHE_BYTES // (3 * size * size))
        if kept < len(self.rows):
            log.info("%d of %d pictures are kept in memory, the others decoded when needed", kept, len(self.rows))
        self._pixels = np.empty((kept, 3, size, size), dtype=np.uint8)
        # Pillow decodes outside of Python's lock
        found = map_small(self._read, range(len(self.rows)))
        problems = [problem for problem in found if problem]
        if problems:
            settle(problems, len(problems), len(rows), rules, manifest_of(rows[0]))
            good = [index for index, problem in enumerate(found) if not problem]
            self._pixels = self._pixels[[index for index in good if index < kept]]
            self.rows, self.left_out = [self.rows[index] for index in good], len(problems)

    def __len__(self) -> int:
        return len(self.rows)

    def _read(self, index: int) -> str:
        """Decode a picture into its place; returns what is wrong with it."""
        path = self.rows[index].path("image")
        try:
            if index < len(self._pixels):
                self._pixels[index] = load_image(path, self.size, max_pixels=self.max_pixels).numpy()
            else:
                read_image_size(path, self.max_pixels)
        except UserError as error:
            return f"{self.rows[index].where}: {error}"
        return ""

    def pixels(self, index: int) -> np.ndarray:
        """Pixels [3, H, W] of picture ``index``, uint8; not to be written to."""
        if index < len(self._pixels):
            return self._pixels[index]
        return load_image(self.rows[index].path("image"), self.size, max_pixels=self.max_pixels).numpy()


@dataclass
class ImageBatch(Batch):
    """Pictures and captions.

    Attributes:
        pixels_B3HW: uint8.
        tokens_NT: captions, each with its end token; the first B belong to the pictures, the others are captions that
            are wrong for one of them.
        valid_NT: False at padding.
        same_BN: True where text n is the caption of picture i, or is worded like it.
        words: where ``valid_NT`` is True.
        caption_words: where it is in the first B rows.
    """

    pixels_B3HW: torch.Tensor
    tokens_NT: torch.Tensor
    valid_NT: torch.Tensor
    same_BN: torch.Tensor
    words: Unpadded
    caption_words: Unpadded


@dataclass(frozen=True)
class ImageSample:
    """One picture, its caption's tokens, and those of a few captions that are wrong for it."""

    pixels: np.ndarray
    caption: list[int]
    negatives: list[list[int]]


def encode_caption(text: str, tokenizer: Tokenizer, max_text_len: int) -> list[int]:
    """Tokens of a caption, cut to ``max_text_len`` with the end token."""
    return [*tokenizer.encode(plain_text(text.strip()))[: max_text_len - 1], tokenizer.end_id]


def stack_captions(captions: Sequence[Sequence[int]], max_text_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and validity, each [N, T], padded to a multiple of 8, so that the CPU sees few shapes."""
    lengths_N1 = np.array([len(caption) for caption in captions])[:, None]
    longest = min(max_text_len, pad_to(int(lengths_N1.max()), 8))
    valid_NT = np.arange(longest) < lengths_N1
    tokens_NT = np.zeros(valid_NT.shape, dtype=np.int64)
    tokens_NT[valid_NT] = np.concatenate(captions)  # row by row, as both are
    return torch.from_numpy(tokens_NT), torch.from_numpy(valid_NT)


class Captioned:
    """Pictures and captions as the stream sees them."""

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: Tokenizer,
        size: int,
        max_text_len: int,
        num_negatives: int,
        augment: bool,
        rules: DataConfig = RULES,
    ) -> None:
        self.pictures = Pictures(rows, size, rules)
        rows = self.pictures.rows
        self.max_text_len, self.num_negatives, self.augment = max_text_len, num_negatives, augment
        self.captions = [encode_caption(row.values["caption"], tokenizer, max_text_len) for row in rows]
        self.negatives = [
            [encode_caption(text, tokenizer, max_text_len) for text in row.values.get("negatives", [])] for row in rows
        ]
        cut = sum(len(tokenizer.encode(row.values["caption"])) >= max_text_len for row in rows)
        if cut:
            log.warning("%d of %d captions are longer than max_text_len (%d) and are cut", cut, len(rows), max_text_len)

    def __len__(self) -> int:
        return len(self.captions)

    def where(self, index: int) -> str:
        """``file:line`` of a picture."""
        return self.pictures.rows[index].where

    def sample(self, index: int, rng: np.random.Generator | None) -> ImageSample:
        """A picture, moved and brightened a little in training, with ``num_negatives`` of its wrong captions."""
        pixels, negatives = self.pictures.pixels(index), self.negatives[index]
        if rng is None:
            return ImageSample(pixels, self.captions[index], negatives[: self.num_negatives])
        if len(negatives) > self.num_negatives:
            negatives = [negatives[i] for i in rng.permutation(len(negatives))[: self.num_negatives]]
        return ImageSample(vary(pixels, rng) if self.augment else pixels, self.captions[index], negatives)

    def collate(self, samples: list[Any]) -> ImageBatch:
        """Stack pictures; wrong captions follow the right ones."""
        captions = [sample.caption for sample in samples]
        texts = captions + [negative for sample in samples for negative in sample.negatives]
        tokens_NT, valid_NT = stack_captions(texts, self.max_text_len)
        # a text that is worded like a picture's caption describes it too, also when it is another one's wrong caption
        same_BN = (tokens_NT[: len(samples), None] == tokens_NT[None]).all(-1)
        counts = {"images": len(samples), "tokens": sum(len(caption) for caption in captions)}
        pixels_B3HW = torch.from_numpy(np.stack([sample.pixels for sample in samples]))
        words, caption_words = unpadded(valid_NT), unpadded(valid_NT[: len(samples)])
        return ImageBatch(counts, pixels_B3HW, tokens_NT, valid_NT, same_BN, words, caption_words)


def vary(pixels_3HW: np.ndarray, rng: np.random.Generator, max_shift: float = 1 / 16) -> np.ndarray:
    """Move a picture by up to ``max_shift`` of its side, repeating its border, and change its brightness by up to 6 %.

    Nothing that a caption may name changes: no flip, since left and right have meaning, no turn, and no hue.
    """
    size = pixels_3HW.shape[-1]
    reach = int(size * max_shift)
    down, right = (int(shift) for shift in rng.integers(-reach, reach + 1, 2))
    places = np.arange(size)
    moved = pixels_3HW.take(places - down, axis=1, mode="clip").take(places - right, axis=2, mode="clip")
    # 256 levels are brightened, not every pixel: a third of the time
    levels = np.clip(np.arange(256, dtype=np.float32) * rng.uniform(0.94, 1.06), 0, 255).astype(np.uint8)
    return levels[moved]
