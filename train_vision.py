"""Stage C of five: the vision encoder, trained from random weights to match pictures with their captions.

Why: its patch tokens are how the Thinker will see, so they must hold what a question can ask for.

    python train_vision.py --config configs/vision_nano.json

In: a JSON list of {"image", "caption"[, "negatives"]} (``data.train``; ``data.val``, or a share of it,
``data.val_split``), and the tokenizer of stage A (``thinker_ckpt``).
Out: ``vision.pt`` in ``save_dir``.
Evaluated by: recall@1 among 100 captions, and telling a caption from one with an attribute exchanged
(``omni eval --stage vision``).
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from omni import checkpoint
from omni.config import PhaseConfig, RowsDataConfig, StageConfig, to_dict
from omni.data.images import Captioned, ImageBatch, scan_image_manifest
from omni.data.parts import read_parts
from omni.data.stream import BatchStream, ordered_batches
from omni.evaluate.vision import match_rows
from omni.load import load_tokenizer
from omni.losses import contrastive_loss_sum, pairs_of_all_ranks
from omni.models.vision_encoder import VisionConfig, VisionEncoder
from omni.runtime import Precision
from omni.training_utils import Run, Stage, run_stage


@dataclass(frozen=True, kw_only=True)
class ImageData(RowsDataConfig):
    """Where the pictures are, and what is done with them."""

    test: str | None = None  # for `omni eval`; by default the validation part
    test_combinations: str | None = None  # combinations of attributes that training never shows
    num_negatives: int = 2  # wrong captions a picture in a batch, of those in the manifest
    augment: bool = True


@dataclass(frozen=True, kw_only=True)
class VisionStageConfig(StageConfig):
    """Configuration of stage C."""

    data: ImageData
    model: VisionConfig
    train: PhaseConfig
    thinker_ckpt: str = "checkpoints/thinker_nano/thinker.pt"  # for its tokenizer
    caption_weight: float = 1.0  # of the captioning loss, per token, beside the contrastive one, per picture


def loss(encoder: VisionEncoder, batch: ImageBatch) -> dict[str, torch.Tensor]:
    """Contrastive loss of the pooled pictures, captioning loss of the patch tokens; both summed."""
    image = encoder.encode_image(batch.pixels_B3HW)
    text_NE = encoder.encode_text(batch.tokens_NT, batch.valid_NT, batch.words)
    B = len(batch.pixels_B3HW)
    pairs = pairs_of_all_ranks(image.pooled_BE, text_NE, batch.same_BN, batch.tokens_NT)
    captions = batch.tokens_NT[:B], batch.valid_NT[:B], batch.caption_words
    return {
        "images": contrastive_loss_sum(pairs.image_BE, pairs.text_NE, encoder.scale, pairs.same_BN, pairs.mine),
        "tokens": encoder.caption_loss_sum(image.patches_BPD, *captions),
    }


def build(config: VisionStageConfig, precision: Precision) -> Run:
    """The encoder and its one phase."""
    parts = read_parts(scan_image_manifest, "image", "caption", config.data)
    tokenizer = load_tokenizer(config.thinker_ckpt)
    model_config = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
    encoder = VisionEncoder(model_config)
    weights = {"images": 1.0, "tokens": config.caption_weight}

    def train() -> Stage:
        shape = model_config.image_size, model_config.max_text_len, config.data.num_negatives
        training = Captioned(parts.training, tokenizer, *shape, augment=config.data.augment, rules=config.data)
        shown = parts.validation[: config.train.batch_size * config.run.val_batches]
        validation = Captioned(shown, tokenizer, *shape, augment=False, rules=config.data)

        def evaluate(model: VisionEncoder) -> dict[str, float]:
            sums, counts = dict.fromkeys(weights, 0.0), dict.fromkeys(weights, 0)
            right = 0
            for batch in ordered_batches(validation, config.train.batch_size, rules=config.data):
                batch = batch.to(precision.device)
                for term, value in loss(model, batch).items():
                    sums[term] += float(value)
                    counts[term] += batch.counts[term]
                B = len(batch.pixels_B3HW)
                right += model.count_right_tokens(batch.pixels_B3HW, batch.tokens_NT[:B], batch.valid_NT[:B])
            found = match_rows(model, tokenizer, validation.pictures.rows, validation.pictures).figures()
            return {
                "loss": sum(weights[term] * sums[term] / counts[term] for term in weights),
                "contrastive": sums["images"] / counts["images"],
                "caption": sums["tokens"] / counts["tokens"],
                "caption_accuracy": right / counts["tokens"],
                **{name: figure.value for name, figure in found.items()},
            }

        stream = BatchStream(
            training, config.train.batch_size, config.run.seed, num_workers=config.run.num_workers,
            rules=config.data, left_out=parts.left_out + training.pictures.left_out,
        )  # fmt: skip
        return Stage(
            [encoder], stream, loss, evaluate, config.train, weights, unit="images", after_update=encoder.clamp_scale
        )

    return Run(
        kind="vision",
        model=encoder,
        phases=[("train", train)],
        model_config=to_dict(model_config),
        assets={"tokenizer.model": tokenizer.model},
        data_may_change=config.data.on_bad_sample == "skip",
        lineage={
            "tokenizer": tokenizer.hash,
            "data": parts.fingerprint,
            "thinker": checkpoint.fingerprint(Path(config.thinker_ckpt)),
        },
    )


if __name__ == "__main__":
    sys.exit(run_stage(VisionStageConfig, build))
