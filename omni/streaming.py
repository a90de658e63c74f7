"""Speech that begins before its text is complete, and is the same as if the text had been there from the start.

How far each part looks ahead decides how soon a sound can be made. A word is timed and written once
``TalkerConfig.look_ahead`` more characters of its chunk are known (or the chunk has ended), and a word is known once
the next one begins, since a dash between them would make the pause longer. A code frame is decoded once
``CodecConfig.look_ahead`` more of them are there, and a mel frame becomes sound once
``SpeechModel.vocoder_look_ahead`` more are.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator

import torch

from omni.generate_codes import CodeWriter, conditions, talker_text, whole_durations
from omni.generate_speech import Mind, gap
from omni.models.speech import SpeechModel
from omni.sampling import GREEDY, Sampling
from omni.speech_text import SpokenWord, ends_chunk, nothing_to_speak, spoken_words, units
from omni.thinker_states import StateReader

_FRAMES_A_PIECE = 4  # code frames written before the next piece of sound is made: 0.12 s


@torch.no_grad()
def stream_speech(
    model: SpeechModel,
    pieces: Iterable[str],
    speaker_E: torch.Tensor,
    mind: Mind | None = None,
    sampling: Sampling = GREEDY,
    speed: float = 1.0,
) -> Iterator[torch.Tensor]:
    """Yield the samples of a text, piece by piece, while the text itself still arrives.

    All pieces together are what :func:`omni.generate_speech.speak` makes of the whole text.

    Args:
        model: what speaks.
        pieces: the text, cut anywhere.
        speaker_E: of the voice.
        mind: Thinker and tokenizer, where the Talker shall get states.
        sampling: how codes are drawn.
        speed: 2.0 halves every duration.

    Raises:
        UserError: when the text ends without anything that can be spoken.
    """
    reader, text, number = _WordReader(model, mind), "", 0
    chunk: _Chunk | None = None
    for piece in itertools.chain(pieces, [None]):
        text += piece or ""
        for word, states_2D in reader.words(text, ended=piece is None):
            if chunk is None:
                chunk = _Chunk(model, speaker_E, reader.before, sampling, speed, number)
                number += 1
                if number > 1:
                    yield speaker_E.new_zeros(gap(model) * model.config.mel.hop_length)
            chunk.add(word, states_2D)
            ended = ends_chunk(chunk.num_words, word.pause)
            yield from chunk.sound(ended)
            chunk = None if ended else chunk
    if chunk is not None:
        yield from chunk.sound(ended=True)
    if number == 0:
        raise nothing_to_speak(text)


class _WordReader:
    """The words of a growing text, each once, with the Thinker's states for it and for the pause after it."""

    def __init__(self, model: SpeechModel, mind: Mind | None) -> None:
        with_states = mind is not None and model.config.talker.state_dim > 0
        self._states = StateReader(*mind, model.config.thinker_layer) if mind is not None and with_states else None
        self._num_given = self._num_read = 0  # words given, characters read
        self.before: torch.Tensor | None = None  # state [D] for a pause before the word given last

    def words(self, text: str, ended: bool) -> Iterator[tuple[SpokenWord, torch.Tensor | None]]:
        """Yield the words that nothing can change any more, with states [2, D]."""
        if not ended:  # the last token may go on
            text = text[: len(text) - len(re.split(r"\s", text)[-1])].rstrip()
            if len(text) == self._num_read:
                return
        self._num_read = len(text)
        words = spoken_words(text)
        if not ended and words:  # a mark that stands alone may follow the last word
            words = [word for word in words if word.end < words[-1].end]
        new = words[self._num_given :]
        if not new:
            return
        states_UD = self._states.read(text[: words[-1].end], words) if self._states else None
        for number, word in enumerate(new, self._num_given):
            self._num_given = number + 1
            if states_UD is not None:
                self.before = states_UD[2 * number]
            yield word, states_UD[2 * number + 1 : 2 * number + 3] if states_UD is not None else None


class _Chunk:
    """One chunk of a text: its units so far, the frames written so far, and what has become sound."""

    def __init__(
        self,
        model: SpeechModel,
        speaker_E: torch.Tensor,
        state_D: torch.Tensor | None,
        sampling: Sampling,
        speed: float,
        number: int,
    ) -> None:
        self.model, self.speed, self.num_words = model, speed, 0
        self._speaker_1E = speaker_E[None]
        self._units = units([])
        self._states = [] if state_D is None else [state_D]
        self._writer = CodeWriter(model.talker, model.codebooks, sampling, [number])
        codec, mel = model.codec, model.config.mel
        self._vectors = model.codebooks.new_zeros(0, model.codebooks.shape[2])  # written, and not yet handed on
        self._decoder = WindowedStream(codec.render, codec.config.look_ahead, codec.config.reduction, (mel.num_mels,))
        self._vocoder = WindowedStream(model.waveforms, model.vocoder_look_ahead, mel.hop_length)

    def add(self, word: SpokenWord, states_2D: torch.Tensor | None) -> None:
        """Append a word and the pause after it."""
        self._units += [word.letters, word.pause]
        self._states += [] if states_2D is None else list(states_2D)
        self.num_words += 1

    def sound(self, ended: bool) -> Iterator[torch.Tensor]:
        """Yield the samples that can be made by now."""
        condition_TD, end = self._conditions(ended)
        for t in range(self._writer.num_frames, len(condition_TD)):
            _, vectors_1D, stops = self._writer.write(condition_TD[t : t + 1])
            self._vectors = torch.cat([self._vectors, vectors_1D])
            if ended and t >= end and bool(stops):
                break
            if len(self._vectors) >= _FRAMES_A_PIECE:
                yield from self._hand_on(last=False)
        if ended:
            yield from self._hand_on(last=True)

    def _conditions(self, ended: bool) -> tuple[torch.Tensor, int]:
        """What every frame [T, D] is to be that can be written by now, and where the last pause begins."""
        talker, sizes = self.model.talker, [len(unit) for unit in self._units]
        text = talker_text(
            talker, [self._units], self._speaker_1E, [torch.stack(self._states)] if self._states else None
        )
        encoded_1CD = talker.encode_text(text)
        after = [sum(sizes[number + 1 :]) for number in range(len(sizes))]  # characters known beyond each unit
        ready = len(sizes) if ended else sum(count >= talker.config.look_ahead for count in after)
        if ready == 0:
            return encoded_1CD[0, :0], 0
        durations_U = whole_durations(talker, encoded_1CD, text, [len(sizes)], self.speed)[0][:ready]
        condition_1TD, _ = conditions(talker, encoded_1CD, text, [self._units[:ready]], [durations_U])
        return condition_1TD[0], int(durations_U[:-1].sum())

    def _hand_on(self, last: bool) -> Iterator[torch.Tensor]:
        """Yield what becomes sound by the vectors that are waiting."""
        frames_FM = self._decoder.push(self._vectors, last)
        self._vectors = self._vectors[:0]
        if len(frames_FM) or last:
            wave_S = self._vocoder.push(frames_FM, last)
            if len(wave_S):
                yield wave_S


class WindowedStream:
    """A function that sees so far and no further, of a sequence in pieces: the outputs are those of the whole.

    What lies within its sight is computed anew for each piece, so pieces grow: each is at least as long as all before
    it, until it is as long as what the function sees on either side.

    Args:
        function: [1, T, ...] to [1, T * ratio, *shape].
        context: positions on either side that an output depends on.
        ratio: outputs a position.
        shape: of an output.
    """

    def __init__(
        self,
        function: Callable[[torch.Tensor], torch.Tensor],
        context: int,
        ratio: int,
        shape: tuple[int, ...] = (),
    ) -> None:
        self.function, self.context, self.ratio, self.shape = function, context, ratio, shape
        self._kept: torch.Tensor | None = None  # the inputs that are still needed
        self._first = self._done = 0  # position of the first one kept, and of the next output

    def push(self, x: torch.Tensor, last: bool = False) -> torch.Tensor:
        """Outputs that are certain once ``x`` [T, ...] has arrived, none if they are few; with the last piece all."""
        self._kept = x if self._kept is None else torch.cat([self._kept, x])
        end = self._first + len(self._kept)
        ready = end if last else end - self.context
        if ready <= self._done or (not last and ready - self._done < min(self._done, self.context)):
            return x.new_zeros(0, *self.shape)
        start, stop = ((position - self._first) * self.ratio for position in (self._done, ready))
        result = self.function(self._kept[None])[0, start:stop]
        first = max(0, ready - self.context)
        self._kept, self._first, self._done = self._kept[first - self._first :], first, ready
        return result
