"""The peers: Hugging Face `transformers` at the same shape, on the same data, in the same precision.

Each gets the batches of the stage it stands beside, through a loop of its own that is as short as it can be (``equal``:
the stage's precision, PyTorch's fused AdamW, attention by ``sdpa``, no compilation on either side), and as its user
gets it (``default``: the ``Trainer`` with its own settings, over the same rows in its own order). ``transformers`` is
in the development group alone; without it there are no peers.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from bench.measure import WARM_UP, Timed, wait_for
from omni.losses import contrastive_loss_sum
from omni.models.audio_encoder import AudioEncoderConfig
from omni.models.thinker import ThinkerConfig
from omni.models.vision_encoder import VisionConfig
from omni.tokenizer import Characters

Loss = Callable[[nn.Module, Any], torch.Tensor]
Row = dict[str, torch.Tensor]


def qwen3(config: ThinkerConfig) -> tuple[nn.Module, Loss]:
    """Stage A's peer: the Thinker's layout is Qwen3's. Documents in a window see each other; ours do not."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = Qwen3Config(
        vocab_size=config.vocab_size, hidden_size=config.dim, intermediate_size=config.hidden_dim,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads, head_dim=config.head_size,
        max_position_embeddings=config.ctx_len, tie_word_embeddings=True, use_cache=False, attn_implementation="sdpa",
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
    )  # fmt: skip

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return model(input_ids=batch.tokens_BT, labels=batch.tokens_BT).loss

    return Qwen3ForCausalLM(shape), loss


def parakeet(config: AudioEncoderConfig) -> tuple[nn.Module, Loss]:
    """Stage B's peer: a Conformer over log-mel frames with CTC. It emits a step for each state, as many as it has."""
    from transformers import ParakeetCTCConfig, ParakeetForCTC

    encoder = {
        "hidden_size": config.dim, "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "intermediate_size": config.hidden_dim, "conv_kernel_size": config.conv_kernel,
        "subsampling_factor": config.reduction, "subsampling_conv_channels": config.dim,
        "num_mel_bins": config.mel.num_mels, "dropout": config.dropout, "layerdrop": 0.0, "attn_implementation": "sdpa",
    }  # fmt: skip
    shape = ParakeetCTCConfig(
        vocab_size=Characters.size, encoder_config=encoder, pad_token_id=Characters.pad, ctc_loss_reduction="sum",
        ctc_zero_infinity=True,  # of 25 steps a second some of our transcripts have too many characters
    )  # fmt: skip

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        mask = torch.arange(batch.frames_BFM.shape[1], device=batch.frames_BFM.device) < batch.num_frames_B[:, None]
        output = model(input_features=batch.frames_BFM, attention_mask=mask, labels=batch.symbols_BS)
        return output.loss / batch.counts["characters"]

    return ParakeetForCTC(shape), loss


def clip(config: VisionConfig) -> tuple[nn.Module, Loss]:
    """Stage C's peer: pictures and captions. It has no wrong captions and writes none; here ours does neither."""
    from transformers import CLIPConfig, CLIPModel

    vision = {
        "hidden_size": config.dim, "intermediate_size": config.hidden_dim, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "image_size": config.image_size, "patch_size": config.patch_size,
    }  # fmt: skip
    text = {
        "vocab_size": config.vocab_size, "hidden_size": config.text_dim, "intermediate_size": config.text_hidden_dim,
        "num_hidden_layers": config.text_layers, "num_attention_heads": config.text_heads,
        "max_position_embeddings": config.max_text_len, "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1,
    }  # fmt: skip
    shape = CLIPConfig(
        vision_config=vision, text_config=text, projection_dim=config.embed_dim, attn_implementation="sdpa"
    )

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        B = len(batch.pixels_B3HW)
        pixels = batch.pixels_B3HW.float() / 127.5 - 1
        tokens, mask = batch.tokens_NT[:B], batch.valid_NT[:B].long()
        return model(input_ids=tokens, attention_mask=mask, pixel_values=pixels, return_loss=True).loss

    return CLIPModel(shape), loss


def _contrastive(encoder: Any, batch: Any) -> dict[str, torch.Tensor]:
    """Stage C's loss without the captioning."""
    image_BE = encoder.encode_image(batch.pixels_B3HW).pooled_BE
    text_NE = encoder.encode_text(batch.tokens_NT, batch.valid_NT, batch.words)
    own_B = torch.arange(len(image_BE), device=image_BE.device)
    return {"images": contrastive_loss_sum(image_BE, text_NE, encoder.scale, batch.same_BN, own_B)}


@dataclass(frozen=True)
class Peer:
    """What stands beside a stage.

    Attributes:
        name: its class.
        make: the model of a shape and its loss of one of our batches.
        rows: one of our batches as rows of a data set that the ``Trainer`` takes.
        collate: such rows as what its model takes.
        data: keys of our data without which it could not be compared.
        loss: what remains of our stage's loss where the peer has not all of it.
    """

    name: str
    make: Callable[[Any], tuple[nn.Module, Loss]]
    rows: Callable[[Any], Iterator[Row]]
    collate: Callable[[list[Row]], dict[str, Any]]
    data: dict[str, Any] = field(default_factory=dict)
    loss: Callable[[Any, Any], dict[str, torch.Tensor]] | None = None


def _windows(batch: Any) -> Iterator[Row]:
    for row_T in batch.tokens_BT:
        yield {"input_ids": row_T, "labels": row_T}


def _stacked(rows: list[Row]) -> dict[str, Any]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def _utterances(batch: Any) -> Iterator[Row]:
    sizes = zip(batch.num_frames_B.tolist(), batch.num_symbols_B.tolist(), strict=True)
    for row, (frames, symbols) in enumerate(sizes):
        yield {"input_features": batch.frames_BFM[row, :frames], "labels": batch.symbols_BS[row, :symbols]}


def _padded(rows: list[Row]) -> dict[str, Any]:
    frames = [row["input_features"] for row in rows]
    marks = [torch.ones(len(row_FM), dtype=torch.long) for row_FM in frames]
    symbols = pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=Characters.pad)
    return {
        "input_features": pad_sequence(frames, batch_first=True),
        "attention_mask": pad_sequence(marks, batch_first=True), "labels": symbols,
    }  # fmt: skip


def _captioned(batch: Any) -> Iterator[Row]:
    pixels = batch.pixels_B3HW.float() / 127.5 - 1
    for row, pixels_3HW in enumerate(pixels):
        yield {"pixel_values": pixels_3HW, "input_ids": batch.tokens_NT[row, batch.valid_NT[row]]}


def _pairs(rows: list[Row]) -> dict[str, Any]:
    marks = [torch.ones_like(row["input_ids"]) for row in rows]
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "input_ids": pad_sequence([row["input_ids"] for row in rows], batch_first=True),
        "attention_mask": pad_sequence(marks, batch_first=True), "return_loss": True,
    }  # fmt: skip


PEERS = {
    "thinker": Peer("Qwen3ForCausalLM", qwen3, _windows, _stacked),
    "audio_enc": Peer("ParakeetForCTC", parakeet, _utterances, _padded),
    "vision": Peer("CLIPModel", clip, _captioned, _pairs, {"num_negatives": 0}, _contrastive),
}


def measure_peer(loop: Timed, seconds: float) -> dict[str, Any]:
    """Throughput of a stage's peer and of the stage itself, step by step in turn, on the same batches."""
    peer, device = PEERS[loop.run.kind], loop.precision.device
    model, loss = peer.make(loop.run.model.config)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.98), weight_decay=0.05, fused=True)

    def step() -> float:
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        for batch in loop.kept:
            with loop.precision.autocast():
                value = loss(model, batch.to(device))
            (value / len(loop.kept)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        wait_for(device)
        return time.perf_counter() - started

    ours, theirs, targets = [], [], 0
    for number in range(WARM_UP + 10**6):
        mine, other = loop.looped(), step()
        if number >= WARM_UP:
            ours.append(mine)
            theirs.append(other)
            targets += sum(batch.counts[loop.stage.unit] for batch in loop.kept)
            if sum(ours) + sum(theirs) > seconds and len(ours) >= 5:
                break
    ratio = statistics.median(other / mine for other, mine in zip(theirs, ours, strict=True))
    return {
        "peer": peer.name, "setting": "equal", "unit": loop.stage.unit, "parameters": _count(model),
        "our_parameters": _count(loop.run.model), "peer_throughput": targets / sum(theirs),
        "throughput": targets / sum(ours), "ratio": ratio,
    }  # fmt: skip


def measure_trainer(loop: Timed, seconds: float) -> dict[str, Any]:
    """A stage's peer as its user gets it: the ``Trainer`` with its defaults, on the same rows in its own order."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    peer = PEERS[loop.run.kind]
    ours, rows, targets = [], list[Row](), 0
    for number in range(WARM_UP + 10**6):
        mine = loop.looped()
        if number >= WARM_UP:
            ours.append(mine)
            targets += sum(batch.counts[loop.stage.unit] for batch in loop.kept)
            rows += [row for batch in loop.kept for row in peer.rows(batch)]
            if sum(ours) > seconds / 2 and len(ours) >= 5:
                break
    model, _ = peer.make(loop.run.model.config)
    starts: list[float] = []

    class Clock(TrainerCallback):
        """The time at which each step begins; ends the training when it is enough."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            wait_for(loop.precision.device)
            starts.append(time.perf_counter())

        def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            if len(starts) > WARM_UP + 4 and starts[-1] - starts[WARM_UP] > seconds / 2:
                control.should_training_stop = True

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=loop.stage.config.batch_size, max_steps=10**6, report_to=[],
            gradient_accumulation_steps=loop.stage.config.gradient_accumulation_steps, disable_tqdm=True,
            save_strategy="no", use_cpu=loop.precision.device.type == "cpu", dataloader_drop_last=True,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows, callbacks=[Clock()], data_collator=peer.collate).train()
    # a step of theirs has as many rows, and so as many targets on average, as one of ours
    step = (starts[-1] - starts[WARM_UP]) / (len(starts) - 1 - WARM_UP)
    return {
        "peer": f"{peer.name} in the Trainer", "setting": "default", "unit": loop.stage.unit,
        "parameters": _count(model), "our_parameters": _count(loop.run.model),
        "peer_throughput": targets / len(ours) / step, "throughput": targets / sum(ours),
        "ratio": step * len(ours) / sum(ours),
    }  # fmt: skip


def _count(model: nn.Module) -> int:
    return sum(item.numel() for item in model.parameters())
