"""What people say and type, as the Thinker has read it: which words a recording holds, how a typed line is written.

Both choose the likeliest of some texts, by the Thinker's own probability of a user's turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from omni.models.audio_encoder import AudioEncoder
from omni.models.ctc import prefix_search
from omni.models.segments import Segments
from omni.models.thinker import Thinker
from omni.tokenizer import USER, Characters, Tokenizer, turn_text

# Measured with nano's stages A and B on 100 held-out transcripts, word error rates: CTC alone 0.092, 8 proposals 0.045,
# 16 0.036, 32 0.026, 64 0.022; with 32, proposals less than e^-6 or e^-5 times as probable as the best left out 0.026,
# e^-4 0.029, e^-3 0.039, in 28, 18, 13 and 11 ms of one thread. Weights of 0.2 to 0.8 are alike.
BEAM = 32
MARGIN = 5.0
WEIGHT = 0.3
ENDS = ("", ".", "?")  # the marks that a line may end with, of which nobody says any
_SURE = -1.0  # nats: mean of the most probable symbol's log-probability; of speech -0.06, of noise -0.4
_CLEARLY = 2.0  # nats by which a line must be more probable otherwise than as it was typed
_LONGEST_LINE = 200  # characters
_TOKENS = 4096  # that the Thinker reads at a time
_LOGITS = 512  # positions whose logits are there at a time
METHOD = repr((1, BEAM, MARGIN, WEIGHT, ENDS))  # the number is to be raised whenever the same settings hear otherwise


@torch.no_grad()
def words_heard(
    encoder: AudioEncoder, thinker: Thinker, tokenizer: Tokenizer, states: Sequence[torch.Tensor]
) -> list[str]:
    """What is said in recordings, given as encoder states [T, D], with the mark at its end that writing would have.

    The most probable texts by CTC are weighed anew by the Thinker, which has read what people ask and tell (n-best
    rescoring with a language model, as in Chan et al., 2016): log p(text | sound) + ``WEIGHT`` log p(text).
    """
    proposed = [_proposals(encoder, states_TD) for states_TD in states]
    unsure = [text for found in proposed if len(found) > 1 for text in found]
    likely = dict(zip(unsure, log_likelihoods(thinker, tokenizer, unsure), strict=True))
    said = [max(found, key=lambda text: found[text] + WEIGHT * likely.get(text, 0.0)) for found in proposed]
    return likeliest(thinker, tokenizer, [[text + end for end in ENDS] if text else [text] for text in said])


def as_written(thinker: Thinker, tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    """Lines that people typed, as the Thinker would expect them: capital letters or none, a mark at the end or none.

    A Thinker that has read a few million words of one hand knows one way to write. Nano's answers 0.85 of written
    questions as they are, 0.63 of those that begin with a capital letter, 0.61 without a mark at the end. A line stays
    as it is unless another way to write it is clearly more probable, and so does what is longer than a line.
    """
    found = []
    for text in texts:
        line = text.strip()
        if "\n" in line or len(line) > _LONGEST_LINE:
            found.append([text])
            continue
        cases = (line, line[:1].lower() + line[1:], line[:1].upper() + line[1:], line.lower())
        ends = ENDS if line[-1:].isalnum() else ("",)
        found.append([case + end for case in dict.fromkeys(cases) if len(case) == len(line) for end in ends])
    return likeliest(thinker, tokenizer, found, _CLEARLY)


def likeliest(
    thinker: Thinker, tokenizer: Tokenizer, choices: Sequence[Sequence[str]], favour: float = 0.0
) -> list[str]:
    """Of each row of texts the one that is most probable as a user's turn, the first of them by ``favour`` more."""
    scores = iter(log_likelihoods(thinker, tokenizer, [text for row in choices if len(row) > 1 for text in row]))
    found = []
    for row in choices:
        scored = [(next(scores) if len(row) > 1 else 0.0, text) for text in row]
        first = scored[0][0] + favour, row[0]
        found.append(max([first, *scored[1:]], key=lambda item: item[0])[1])
    return found


def _proposals(encoder: AudioEncoder, states_TD: torch.Tensor) -> dict[str, float]:
    """The most probable texts of a recording, and their log-probabilities."""
    weight = encoder.head.weight
    with torch.autocast(weight.device.type, enabled=False):
        log_probs_SV = encoder.read(states_TD[None].to(weight.device, weight.dtype))[0]
    # who is sure of nothing would propose anything, and take seconds for it
    sure = float(log_probs_SV.amax(dim=1).mean()) > _SURE
    found = dict[str, float]()
    for symbols, log_prob in prefix_search(log_probs_SV.cpu(), BEAM if sure else 1, margin=MARGIN):
        known = [symbol for symbol in symbols if symbol != Characters.unk]  # the Thinker could not read it either
        found.setdefault(" ".join(Characters().decode(known).split()), log_prob)
    return found


@torch.no_grad()
def log_likelihoods(thinker: Thinker, tokenizer: Tokenizer, texts: Sequence[str]) -> list[float]:
    """Log-probability of each text as a user's whole turn."""
    rows = [[tokenizer.special[USER], *tokenizer.encode(turn_text(text)), tokenizer.end_id] for text in texts]
    device, found = thinker.embed_tokens.weight.device, list[float]()
    for batch in _batches(rows):
        sizes = [len(row) - 1 for row in batch]
        tokens_1T = torch.tensor([[token for row in batch for token in row[:-1]]], device=device)
        labels_T = torch.tensor([token for row in batch for token in row[1:]], device=device)
        positions_1T = torch.cat([torch.arange(size) for size in sizes])[None].to(device)
        final_TD = thinker(thinker.embed(tokens_1T), positions_1T, Segments(sizes).to(device)).final_BTD[0]
        losses = [
            F.cross_entropy(thinker.logits(part).float(), labels, reduction="none")
            for part, labels in zip(final_TD.split(_LOGITS), labels_T.split(_LOGITS), strict=True)
        ]
        found += [-float(row.sum()) for row in torch.cat(losses).cpu().split(sizes)]
    return found


def _batches(rows: Sequence[list[int]]) -> Iterator[Sequence[list[int]]]:
    """Rows in their order, about ``_TOKENS`` tokens at a time."""
    ends = list(itertools.accumulate(map(len, rows)))
    for _, group in itertools.groupby(range(len(rows)), key=lambda row: ends[row] // _TOKENS):
        yield [rows[row] for row in group]
