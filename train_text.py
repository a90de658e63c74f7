"""Stage A of five: the Thinker, a language model trained from random weights.

Why: everything the omni model will say about pictures and recordings, it says in language learned here.

    python train_text.py --config configs/thinker_nano.json

In: a UTF-8 text file, or a folder of ``*.txt`` (``data.train``; ``data.val``, or a share of it, ``data.val_split``);
if wanted, a text to begin with (``data.primer``), which asks for nothing but to look things up.
Out: ``tokenizer.model`` and ``thinker.pt`` in ``save_dir``.
Evaluated by: bits per byte of held-out text (``omni eval --stage thinker``), beside a 5-gram model's.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from omni import checkpoint
from omni.config import PhaseConfig, Problem, SplitDataConfig, StageConfig, to_dict
from omni.data.leaks import part_of_text, refuse_leaks
from omni.data.stream import BatchStream, ordered_batches
from omni.data.text import (
    Order,
    PackedDocuments,
    PackedText,
    TextBatch,
    beside,
    learn_tokenizer,
    packed,
    read_text,
    split_text,
    tokenize,
)
from omni.evaluate.thinker import TextLikelihood
from omni.lineage import data_fingerprint
from omni.load import load_tokenizer
from omni.losses import next_token_losses
from omni.models.thinker import Thinker, ThinkerConfig
from omni.runtime import Precision, log
from omni.training_utils import Run, Stage, run_stage


@dataclass(frozen=True, kw_only=True)
class TextData(SplitDataConfig):
    """Where the text is."""

    test: str | None = None  # for `omni eval`; by default the validation text
    primer: str | None = None  # a text beside `train`, read in its order; where there is none, `primer` is left out
    vocab_size: int = 1024  # of the tokenizer that is learned; fewer on a small corpus
    separate_documents: bool = False  # blank lines separate documents, which shall not see each other


@dataclass(frozen=True, kw_only=True)
class TextConfig(StageConfig):
    """Configuration of stage A."""

    data: TextData
    model: ThinkerConfig
    train: PhaseConfig
    primer: PhaseConfig | None = None  # phase 1, with data.primer: what has to be learned first
    answer_weight: float = 0.0  # of the assistant's tokens alone, beside the loss of all tokens; for text with chats
    thinker_ckpt: str | None = None  # whose tokenizer is taken instead of learning one: this one shall be its draft

    def problems(self) -> Iterator[Problem]:
        """A text without its phase."""
        if self.data.primer and self.primer is None:
            yield Problem("data.primer", "a text, and no phase `primer`", "how long and how fast to learn from it")


def loss(thinker: Thinker, batch: TextBatch) -> dict[str, torch.Tensor]:
    """Next-token cross-entropy of all tokens and of the assistant's, summed."""
    states_BTD = thinker(thinker.embed(batch.tokens_BT), mask=batch.segments).final_BTD
    nats_BT = next_token_losses(thinker, states_BTD, batch.labels_BT)
    return {"tokens": nats_BT.sum(), "answers": nats_BT[batch.answers_BT].sum()}


def build(config: TextConfig, precision: Precision) -> Run:
    """The Thinker and its phases."""
    data = config.data
    primer = beside(data.train, data.primer)
    paths = {"train": data.train} | {part: path for part, path in (("val", data.val), ("primer", primer)) if path}
    if data.primer and primer is None:
        log.info("no %s beside %s: phase primer is left out", data.primer, data.train)
    texts = {part: read_text(path, data) for part, path in paths.items()}
    if not data.val:
        texts["train"], texts["val"] = split_text(texts["train"], data.val_split)
    held_out = part_of_text(texts["val"], "validation")
    for part in texts.keys() - {"val"}:
        refuse_leaks(part_of_text(texts[part], "training" if part == "train" else part), held_out, data)
    larger = {}
    if config.thinker_ckpt is None:
        tokenizer = learn_tokenizer(texts["train"], data.vocab_size, config.save_dir / "cache")
    else:
        tokenizer = load_tokenizer(config.thinker_ckpt)
        larger = {"thinker": checkpoint.fingerprint(Path(config.thinker_ckpt))}
    model_config = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
    thinker = Thinker(model_config)

    def windows(part: str, order: Order) -> PackedText | PackedDocuments:
        tokens = tokenize(texts[part], tokenizer, config.save_dir / "cache")
        return packed(tokens, model_config.ctx_len, tokenizer, data.separate_documents, order)

    def stage(part: str, settings: PhaseConfig) -> Stage:
        val_windows = windows("val", "text")

        def evaluate(model: Thinker) -> dict[str, float]:
            likelihood = TextLikelihood(model, tokenizer)
            for batch in ordered_batches(val_windows, settings.batch_size, config.run.val_batches):
                likelihood.add(batch.to(precision.device))
            return likelihood.figures()

        lessons = part == "primer"
        stream = BatchStream(
            windows(part, "lessons" if lessons else "best"), settings.batch_size, config.run.seed,
            num_workers=config.run.num_workers, in_order=lessons,
        )  # fmt: skip
        weights = {"tokens": 1.0, "answers": config.answer_weight}
        return Stage([thinker], stream, loss, evaluate, settings, weights, unit="tokens")

    phases: list[tuple[str, Callable[[], Stage]]] = [("train", functools.partial(stage, "train", config.train))]
    if config.primer is not None and primer is not None:
        phases.insert(0, ("primer", functools.partial(stage, "primer", config.primer)))
    return Run(
        kind="thinker",
        model=thinker,
        phases=phases,
        model_config=to_dict(model_config),
        assets={"tokenizer.model": tokenizer.model},
        data_may_change=config.data.on_bad_sample == "skip",
        lineage={
            "tokenizer": tokenizer.hash,
            "data": {part: data_fingerprint(path) for part, path in paths.items()},
            **larger,
        },
    )


if __name__ == "__main__":
    sys.exit(run_stage(TextConfig, build))
