"""The text of an answer while its tokens arrive, in pieces that are never taken back."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from omni.tokenizer import Tokenizer


class AnswerText:
    """Tokens to text, piece by piece.

    Held back until it is certain: the bytes of half a character, white space that may be the last, and whatever may
    become a stop string. All pieces together are the answer without white space around it, up to the first stop
    string; bytes that are no UTF-8 are written as U+FFFD.

    Args:
        tokenizer: the Thinker's.
        stop: texts, none of them empty, before which the answer ends.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.text, self.stopped = "", False
        self._tokenizer, self._stop = tokenizer, stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # decoded, and not yet given out

    def push(self, token: int) -> str:
        """The piece, often empty, that a token makes certain."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(self._tokenizer.bytes_of(token))
        return self._give(len(self._held) - self._num_uncertain())

    def end(self) -> str:
        """The last piece: no token follows."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(b"", final=True)
        return self._give(len(self._held))

    def _num_uncertain(self) -> int:
        """Characters at the end with which a stop string may begin."""
        longest = max(map(len, self._stop), default=0)
        sizes = range(min(longest - 1, len(self._held)), 0, -1)
        return next((size for size in sizes if any(stop.startswith(self._held[-size:]) for stop in self._stop)), 0)

    def _give(self, size: int) -> str:
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        if found:
            self.stopped, size = True, min(found)
        piece = self._held[:size].rstrip()
        self._held = self._held[len(piece) :]
        piece = piece if self.text else piece.lstrip()
        self.text += piece
        return piece
