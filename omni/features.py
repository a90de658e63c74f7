"""Encoder features of pictures and recordings, computed once while the encoders are frozen."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from omni import ranks
from omni.audio import load_audio, log_mel
from omni.cache import FeatureCache, FeatureCacheConfig, cache_key
from omni.config import DataConfig, UserError, from_dict
from omni.data.chat_batch import ChatBatch, Features, collate_chats
from omni.data.dialogue import Encoded
from omni.data.images import load_image
from omni.data.manifest import RULES
from omni.data.speech import pad_frames
from omni.hearing import METHOD, words_heard
from omni.models.audio_encoder import AudioEncoder
from omni.models.layers import padding_mask
from omni.models.omni import OmniModel
from omni.models.thinker import Thinker
from omni.models.vision_encoder import VisionEncoder
from omni.parallel import map_small
from omni.summary import read_summary
from omni.tokenizer import Tokenizer

_PREPROCESSING = 2  # to be raised whenever load_image, load_audio, log_mel or an encoder change what they return
_HEARD_TOGETHER = 128  # recordings whose words are chosen, and kept, at a time
_NO_CACHE = FeatureCache()


class UnusableMediaError(UserError):
    """Pictures or recordings that cannot be read, by path."""

    def __init__(self, problems: dict[str, str]) -> None:
        super().__init__("\n".join(problems.values()))
        self.problems = problems


class FeatureStore:
    """Features by path, kept in memory as fp16, and on disk with a ``cache``; of recordings their words as well.

    For another encoder, a changed file or another precision they are encoded anew; what is found on disk is, bit for
    bit, what would be computed (:class:`omni.cache.FeatureCache`).

    Args:
        model: whose encoders they are of.
        tokenizer: its own.
        cache: where they are kept.
        rules: limits of pictures.
        thinker: gives the one that chooses among the words that may have been said; by default the model's. One that is
            trained meanwhile would hear otherwise in a run that is resumed.
    """

    def __init__(
        self,
        model: OmniModel,
        tokenizer: Tokenizer,
        cache: FeatureCache = _NO_CACHE,
        rules: DataConfig = RULES,
        thinker: Callable[[], Thinker] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.cache, self.rules = model, tokenizer, cache, rules
        self._thinker = thinker or (lambda: model.thinker)
        self._images: dict[str, torch.Tensor] = {}
        self._audios: dict[str, torch.Tensor] = {}
        self._num_states: dict[str, int] = {}
        self._words: dict[str, str] = {}

    def add(self, images: Iterable[str], audios: Iterable[str]) -> None:
        """Encode what is not there yet.

        Raises:
            UnusableMediaError: when some of it cannot be read.
        """
        seeing, hearing, pixels = self.model.vision_encoder, self.model.audio_encoder, self.rules.max_pixels
        new = _new(images, self._images)
        self._images |= zip(new, encode_images(seeing, new, max_pixels=pixels, cache=self.cache), strict=True)
        new = _new(audios, self._audios)
        self._audios |= zip(new, encode_recordings(hearing, new, cache=self.cache), strict=True)
        self._num_states |= {path: len(self._audios[path]) for path in new}
        if new and self.model.config.with_words:
            self._words |= zip(new, self._hear(new), strict=True)

    def _hear(self, paths: Sequence[str]) -> list[str]:
        """The words of recordings that are encoded."""
        encoder, thinker, tokenizer = self.model.audio_encoder, self._thinker(), self.tokenizer
        made_by = cache_key([thinker], (), [_made_by(encoder, encoder.config), tokenizer.hash, METHOD])
        found, mine = list[str](), ranks.share(paths)

        def hear(rows: Sequence[str]) -> list[torch.Tensor]:
            said = words_heard(encoder, thinker, tokenizer, [self._audios[path] for path in rows])
            return [torch.tensor(list(text.encode()), dtype=torch.uint8) for text in said]

        for start in range(0, len(mine), _HEARD_TOGETHER):
            rows = mine[start : start + _HEARD_TOGETHER]
            states = hashlib.sha256()  # they differ in their last bits with what else was encoded beside them
            for path in rows:
                states.update(self._audios[path].numpy().tobytes())
            key = made_by + states.hexdigest()
            bytes_of = self.cache.get("words", key, rows, functools.partial(hear, rows))
            found += [bytes(item.tolist()).decode() for item in bytes_of]
        return ranks.merged(ranks.gather("the words of recordings", found))

    def measure(self, audios: Iterable[str]) -> None:
        """Learn how many states recordings have, without encoding them. Raises UnusableMediaError."""
        encoder, new = self.model.audio_encoder, _new(audios, self._num_states)
        if new:
            num_frames = frame_counts(encoder, new, self.cache)
            self._num_states |= zip(new, encoder.num_states(torch.tensor(num_frames)).tolist(), strict=True)

    def forget(self) -> None:
        """Let go of features, and keep none on disk from here on: the encoders have changed, and will again.

        That of recordings stands still where their words are heard.
        """
        self._images, self.cache = {}, _NO_CACHE
        if not self.model.config.with_words:
            self._audios = {}

    def image(self, path: str) -> torch.Tensor:
        """Patch tokens [P, D]."""
        return self._images[path].float()

    def audio(self, path: str) -> torch.Tensor:
        """Audio encoder states [T, D]."""
        return self._audios[path].float()

    def audio_positions(self, path: str) -> int:
        """Positions that a recording's projected states take in the Thinker's sequence."""
        return self.model.audio_positions(self._num_states[path])

    def words(self, path: str) -> str:
        """What is said in a recording (:mod:`omni.hearing`); nothing where the model does not take it."""
        return self._words[path] if self.model.config.with_words else ""


def cache_of(checkpoint: Path) -> FeatureCache:
    """The feature cache of the run that left an ``omni.pt``."""
    keys = FeatureCacheConfig.__dataclass_fields__
    data = read_summary(checkpoint)["config"]["data"]
    config = from_dict(FeatureCacheConfig, {key: data[key] for key in keys if key in data}, str(checkpoint))
    return FeatureCache.of(config, checkpoint.parent / "cache")


def _new(paths: Iterable[str], known: Container[str]) -> list[str]:
    return sorted({path for path in paths if path not in known})


def _made_by(encoder: nn.Module, config: object) -> str:
    """A key of an encoder, of what is done before it, and of how it computes."""
    device = next(encoder.parameters()).device.type
    texts = [repr(config), str(_PREPROCESSING), device, str(torch.get_autocast_dtype(device)), torch.__version__]
    return cache_key([encoder], (), texts)


def _load(load: Callable[[str], torch.Tensor], paths: Sequence[str]) -> tuple[list[torch.Tensor], dict[str, str]]:
    """Read files; what was read, and what is wrong with the others."""

    def attempt(path: str) -> torch.Tensor | UserError:
        try:
            return load(path)
        except UserError as error:
            return error

    found = map_small(attempt, paths)
    problems = {path: str(item) for path, item in zip(paths, found, strict=True) if isinstance(item, UserError)}
    return [item for item in found if isinstance(item, torch.Tensor)], problems


def encode_images(
    encoder: VisionEncoder,
    paths: Sequence[str],
    batch_size: int = 128,
    max_pixels: int = RULES.max_pixels,
    cache: FeatureCache = _NO_CACHE,
) -> list[torch.Tensor]:
    """Patch tokens [P, D] of each picture, fp16 on the CPU."""
    found, problems = list[torch.Tensor](), dict[str, str]()
    read = functools.partial(load_image, size=encoder.config.image_size, max_pixels=max_pixels)
    made_by = _made_by(encoder, encoder.config) if paths else ""

    def encode(rows: Sequence[str]) -> list[torch.Tensor]:
        pixels, bad = _load(read, rows)
        if bad or problems:  # then it is enough to know what else is wrong
            raise UnusableMediaError(bad)
        return encode_pixels(encoder, pixels)

    for start in range(0, len(paths), batch_size):
        rows = paths[start : start + batch_size]
        try:
            found += cache.get("images", made_by, rows, functools.partial(encode, rows))
        except UnusableMediaError as error:
            problems |= error.problems
    if problems:
        raise UnusableMediaError(problems)
    return found


def frame_counts(encoder: AudioEncoder, paths: Sequence[str], cache: FeatureCache = _NO_CACHE) -> list[int]:
    """Mel frames of each recording. Raises UnusableMediaError when some cannot be read."""
    return _lengths(encoder, paths, cache, functools.partial(_frames, encoder))


def _lengths(
    encoder: AudioEncoder,
    paths: Sequence[str],
    cache: FeatureCache,
    frames: Callable[[Sequence[str]], list[torch.Tensor]],
) -> list[int]:
    made_by = cache_key([], (), [repr(encoder.config.mel), str(_PREPROCESSING)])
    found: list[int] = cache.get(
        "lengths", made_by, paths, lambda: [torch.tensor([len(item) for item in frames(paths)])]
    )[0].tolist()
    return found


def _frames(encoder: AudioEncoder, paths: Sequence[str]) -> list[torch.Tensor]:
    """Log-mel frames [F, M] of recordings. Raises UnusableMediaError when some cannot be read."""
    front = log_mel(encoder.config.mel)
    found, problems = _load(lambda path: front(load_audio(path, encoder.config.mel.sample_rate)), paths)
    if problems:
        raise UnusableMediaError(problems)
    return found


@torch.no_grad()
def encode_pixels(encoder: VisionEncoder, pixels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Patch tokens [P, D], fp16 on the CPU, of pictures given as uint8 [3, image_size, image_size]."""
    device = next(encoder.parameters()).device
    patches_BPD = encoder.encode_image(torch.stack(list(pixels)).to(device)).patches_BPD
    return [item.clone() for item in patches_BPD.float().half().cpu()]


@torch.no_grad()
def encode_frames(encoder: AudioEncoder, frames: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """States [T, D], fp16 on the CPU, of recordings given as log-mel frames [F, M], encoded together."""
    device = next(encoder.parameters()).device
    frames_BFM, num_frames_B = pad_frames(frames)
    output = encoder(frames_BFM.to(device), num_frames_B.to(device))
    states = zip(output.states_BTD.float().half().cpu(), output.num_states_B.tolist(), strict=True)
    return [states_TD[:size].clone() for states_TD, size in states]


def encode_recordings(
    encoder: AudioEncoder, paths: Sequence[str], batch_size: int = 32, cache: FeatureCache = _NO_CACHE
) -> list[torch.Tensor]:
    """States [T, D] of each recording, fp16 on the CPU; batches hold recordings of similar length."""
    if not paths:
        return []
    decoded = dict[str, torch.Tensor]()

    def frames(rows: Sequence[str]) -> list[torch.Tensor]:
        new = [path for path in rows if path not in decoded]
        decoded.update(zip(new, _frames(encoder, new), strict=True))
        return [decoded[path] for path in rows]

    def encode(rows: Sequence[str]) -> list[torch.Tensor]:
        return encode_frames(encoder, frames(rows))

    # the lengths say what is encoded together, and are known without decoding once they are kept
    order = sorted(range(len(paths)), key=_lengths(encoder, paths, cache, frames).__getitem__)
    made_by = _made_by(encoder, encoder.config)
    found: list[torch.Tensor] = [torch.empty(0)] * len(paths)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        picked = [paths[index] for index in rows]
        states = cache.get("audio", made_by, picked, functools.partial(encode, picked))
        for index, states_TD in zip(rows, states, strict=True):
            found[index] = states_TD
            decoded.pop(paths[index], None)
    return found


def with_media(chat: Encoded, model: OmniModel, max_pixels: int = RULES.max_pixels) -> Encoded:
    """A chat with its pictures and recordings themselves, for encoders that are trained.

    Raises:
        UserError: when one of them cannot be read.
    """
    if not chat.images and not chat.audios:
        return chat
    size, mel = model.config.vision_encoder.image_size, model.config.audio_encoder.mel
    audios = [] if model.config.with_words else chat.audios  # else their encoder is not trained
    return dataclasses.replace(
        chat,
        pixels=[load_image(path, size, max_pixels=max_pixels) for path in chat.images],
        frames=[log_mel(mel)(load_audio(path, mel.sample_rate)) for path in audios],
    )


def collate_media(chats: Sequence[Encoded], audio_features: Features, pad_id: int, joined: bool = False) -> ChatBatch:
    """One batch of chats from :func:`with_media`, nothing of it encoded but recordings that have no frames there."""
    nothing = torch.zeros(0, 0)
    live = any(chat.frames for chat in chats)
    hear = (lambda path: nothing) if live else audio_features
    batch = collate_chats(chats, lambda path: nothing, hear, pad_id, joined=joined)
    pixels = [item for chat in chats for item in chat.pixels]
    frames = [item for chat in chats for item in chat.frames]
    frames_NFM, num_frames_N = pad_frames(frames) if frames else (None, None)
    pixels_N3HW = torch.stack(pixels) if pixels else None
    return dataclasses.replace(batch, pixels_N3HW=pixels_N3HW, frames_NFM=frames_NFM, num_frames_N=num_frames_N)


def perceive(model: OmniModel, batch: ChatBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Patch tokens [N, P, D] and audio states [N, T, D] of a batch, encoded here where they are not yet."""
    patches_NPD, states_NTD = batch.patches_NPD, batch.states_NTD
    if batch.pixels_N3HW is not None:
        patches_NPD = model.vision_encoder.encode_image(batch.pixels_N3HW).patches_BPD
    if batch.frames_NFM is not None and batch.num_frames_N is not None:
        heard = model.audio_encoder(batch.frames_NFM, batch.num_frames_N)
        valid_NT = padding_mask(heard.num_states_B, heard.states_BTD.shape[1])
        states_NTD = heard.states_BTD * valid_NT[..., None].to(heard.states_BTD.dtype)
    return patches_NPD, states_NTD
