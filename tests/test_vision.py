"""Stage C: pictures, the vision encoder, its loss, its figures, and the script."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import train_vision
from omni import checkpoint
from omni.config import UserError, from_dict
from omni.data import images
from omni.data.images import Captioned, Pictures, load_image, read_image_manifest, vary
from omni.evaluate.vision import Matching, match_manifest, vision_figures
from omni.losses import contrastive_loss_sum
from omni.models.segments import unpadded
from omni.models.vision_encoder import VisionConfig, VisionEncoder
from omni.tokenizer import Tokenizer
from omni.training_utils import run_stage
from tests.forked import start_module

ROOT = Path(__file__).parent.parent
SMALL = VisionConfig(
    image_size=32, patch_size=8, dim=32, num_layers=1, num_heads=2, hidden_dim=48, stem_depth=2, vocab_size=50,
    max_text_len=16, text_dim=24, text_layers=1, text_heads=2, text_hidden_dim=32, caption_layers=2, embed_dim=16,
)  # fmt: skip
COLOURS = {"red": (220, 20, 20), "green": (20, 160, 40), "blue": (30, 50, 220), "yellow": (240, 220, 20)}
SHAPES = ("disc", "square")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    words = [
        f"a {colour} {shape} at the {side}" for colour in COLOURS for shape in SHAPES for side in ("left", "right")
    ]
    return Tokenizer.train(words * 20, 400)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pictures of one shape each; the folder of their manifests."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    entries = []
    for number in range(40):
        colour = list(COLOURS)[number % 4]
        shape, side = SHAPES[number // 4 % 2], ("left", "right")[number // 8 % 2]
        picture = Image.new("RGB", (64, 64), (128, 128, 128))
        x, y = (6 if side == "left" else 36) + int(rng.integers(0, 4)), 20 + int(rng.integers(-8, 8))
        pen = ImageDraw.Draw(picture)
        (pen.ellipse if shape == "disc" else pen.rectangle)((x, y, x + 20, y + 20), fill=COLOURS[colour])
        picture.save(folder / f"{number}.png")
        other = SHAPES[1 - SHAPES.index(shape)]
        wrong = {"shape": f"a {colour} {other} at the {side}"}
        entries.append(
            {
                "image": f"{number}.png",
                "caption": f"a {colour} {shape} at the {side}",
                "negatives": [*wrong.values(), f"a {list(COLOURS)[(number + 1) % 4]} {shape} at the {side}"],
                "swaps": wrong,
            }
        )
    (folder / "train.json").write_text(json.dumps(entries))
    plain = [{"image": entry["image"], "caption": entry["caption"]} for entry in entries]
    (folder / "plain.json").write_text(json.dumps(plain))
    return folder


# ---- reading pictures ----


def _gradient() -> np.ndarray:
    """A grey picture [48, 48] that is dark at the top and bright at the bottom right."""
    down, right = np.mgrid[0:48, 0:48]
    return (40 + 2.5 * down + 1.5 * right).astype(np.uint8)


def _close(found: torch.Tensor, expected_HW: np.ndarray, within: float) -> None:
    assert found.dtype == torch.uint8 and found.shape == (3, 48, 48)
    assert np.abs(found.numpy().astype(int) - expected_HW.astype(int)).mean() < within


def test_every_way_to_store_a_picture_means_the_same(tmp_path: Path) -> None:
    grey = _gradient()
    rgb = Image.fromarray(np.stack([grey] * 3, -1))
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned clockwise
    stored = {
        "rgb.png": lambda path: rgb.save(path),
        "grey.png": lambda path: Image.fromarray(grey).save(path),
        "grey16.png": lambda path: Image.fromarray(grey.astype(np.uint16) * 257).save(path),
        "grey16.tif": lambda path: Image.fromarray(grey.astype(np.uint16) * 257).save(path),
        "float.tif": lambda path: Image.fromarray(grey.astype(np.float32) / 255).save(path),
        "palette.gif": lambda path: rgb.quantize(256).save(path),
        "palette.png": lambda path: rgb.quantize(256).save(path),
        "cmyk.jpg": lambda path: rgb.convert("CMYK").save(path, quality=95),
        "alpha.png": lambda path: rgb.convert("RGBA").save(path),
        "photo.webp": lambda path: rgb.save(path, quality=95),
        "turned.jpg": lambda path: rgb.rotate(90).save(path, exif=turned, quality=95),
        "animated.gif": lambda path: rgb.save(path, save_all=True, append_images=[Image.new("RGB", (48, 48), "red")]),
    }
    for name, save in stored.items():
        save(tmp_path / name)
        _close(load_image(tmp_path / name, 48), grey, within=4 if name != "rgb.png" else 0.001)


def test_dark_sixteen_bit_scans_stay_dark(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 900, dtype=np.uint16)).save(tmp_path / "dark.png")
    assert int(load_image(tmp_path / "dark.png", 8).max()) == round(900 / 257)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_over_white(tmp_path: Path, mode: str) -> None:
    picture = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 4, 8))
    picture.convert(mode).save(tmp_path / "a.png")
    found = load_image(tmp_path / "a.png", 8)
    assert found[:, :, :4].max() < 10 and found[:, :, 4:].min() > 245


def test_proportions_are_kept_and_the_rest_takes_the_border_colour() -> None:
    buffer = io.BytesIO()
    picture = Image.new("RGB", (100, 50), (10, 200, 30))
    picture.paste((0, 0, 0), (40, 15, 60, 35))
    picture.save(buffer, "PNG")
    found = load_image(buffer, 50).permute(1, 2, 0).numpy()
    assert (found[0] == (10, 200, 30)).all() and (found[-1] == (10, 200, 30)).all()
    dark = found.max(-1) < 100
    assert abs(int(dark.any(0).sum()) - int(dark.any(1).sum())) <= 1  # the square is still one


def test_damaged_files_are_named(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for suffix in ("png", "jpg"):
        noise.save(tmp_path / f"whole.{suffix}")
        data = (tmp_path / f"whole.{suffix}").read_bytes()
        (tmp_path / f"torn.{suffix}").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for name in ("torn.png", "torn.jpg", "text.png", "empty.png", "page.eps", "missing.png"):
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            load_image(tmp_path / name, 64)
    with pytest.raises(UserError, match="64 x 64 pixels"):
        load_image(tmp_path / "whole.png", 64, max_pixels=64 * 64 - 1)


def test_all_bad_entries_are_listed_before_training(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    for name in ("one.png", "two.png"):
        (tmp_path / name).write_bytes((tmp_path / "good.png").read_bytes()[:40])
    entries = [{"image": name, "caption": "x"} for name in ("good.png", "one.png", "two.png")]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    with pytest.raises(UserError) as error:
        Pictures(read_image_manifest(tmp_path / "list.json"), 8)
    assert "entry 2" in str(error.value) and "entry 3" in str(error.value) and "good.png" not in str(error.value)
    (tmp_path / "list.json").write_text(json.dumps([{**entries[0], "negatives": "y"}, {**entries[0], "caption": 3}]))
    with pytest.raises(UserError, match=r"entry 1: negatives(.|\n)*entry 2: caption"):
        read_image_manifest(tmp_path / "list.json")


def test_pictures_beyond_the_memory_limit_are_the_same(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = read_image_manifest(world / "train.json")
    kept = Pictures(rows, 32)
    monkeypatch.setattr(images, "CACHE_BYTES", 3 * 32 * 32 * 5)
    some = Pictures(rows, 32)
    assert len(some._pixels) == 5
    assert all((kept.pixels(index) == some.pixels(index)).all() for index in range(len(rows)))


def test_augmentation_moves_and_brightens_only() -> None:
    picture = np.full((3, 32, 32), 100, dtype=np.uint8)
    picture[0, 10:14, 4:8] = 200  # left of the middle
    for seed in range(20):
        varied = vary(picture, np.random.default_rng(seed)).astype(int)
        assert (varied == vary(picture, np.random.default_rng(seed))).all()
        spot = np.argwhere(varied[0] > 150)
        assert len(spot) == 16 and np.abs(spot.mean(0) - (11.5, 5.5)).max() <= 2  # 1/16 of 32 pixels, never flipped
        assert np.ptp(varied[1]) == 0 and 93 <= varied[1, 0, 0] <= 106


# ---- batches and the loss ----


def _captioned(world: Path, tokenizer: Tokenizer, name: str = "train.json", num_negatives: int = 2) -> Captioned:
    return Captioned(read_image_manifest(world / name), tokenizer, 32, 16, num_negatives, augment=True)


def test_a_text_that_describes_another_picture_too_is_marked(world: Path, tokenizer: Tokenizer) -> None:
    samples = _captioned(world, tokenizer)
    batch = samples.collate([samples.sample(index, None) for index in (0, 16, 4)])  # 0 and 16 are worded alike
    assert batch.tokens_NT.shape[0] == 3 + 6
    assert batch.same_BN[0].tolist()[:3] == [True, True, False]
    # the wrong caption of 0 ("a red square ...") is the caption of 4 and so is no negative of it
    assert batch.same_BN[2].tolist() == [False, False, True, True, False, True, False, False, False]
    assert batch.counts["tokens"] == int(batch.valid_NT[:3].sum())


def test_entries_without_negatives_work(world: Path, tokenizer: Tokenizer) -> None:
    samples = _captioned(world, tokenizer, "plain.json")
    batch = samples.collate([samples.sample(index, np.random.default_rng(index)) for index in range(8)])
    assert batch.tokens_NT.shape[0] == 8 and batch.same_BN.shape == (8, 8)


def _slow_loss(logits_BN: torch.Tensor, same_BN: torch.Tensor) -> float:
    """InfoNCE picture by picture and text by text, leaving duplicates out of what stands against them."""
    total, B = 0.0, len(logits_BN)
    for i in range(B):
        texts = [n for n in range(logits_BN.shape[1]) if n == i or not same_BN[i, n]]
        pictures = [j for j in range(B) if j == i or not same_BN[j, i]]
        total += float(logits_BN[i, texts].logsumexp(0) + logits_BN[pictures, i].logsumexp(0) - 2 * logits_BN[i, i])
    return total / 2


def test_duplicates_are_neutral_and_hard_negatives_are_not() -> None:
    torch.manual_seed(0)
    image_BE, text_NE = (F.normalize(torch.randn(count, 8), dim=-1) for count in (4, 7))
    text_NE[3] = text_NE[0]  # picture 3 is worded like picture 0
    scale, same = torch.tensor(10.0), torch.eye(4, 7, dtype=torch.bool)
    same[0, 3] = same[3, 0] = True

    def loss(texts: int, same_BN: torch.Tensor) -> float:
        return float(contrastive_loss_sum(image_BE, text_NE[:texts], scale, same_BN[:, :texts]))

    for texts in (4, 7):
        assert loss(texts, same) == pytest.approx(_slow_loss((scale * image_BE @ text_NE.T)[:, :texts], same), rel=1e-5)
    assert loss(4, torch.eye(4, 7, dtype=torch.bool)) > loss(4, same)
    assert loss(7, same) > loss(4, same)  # hard negatives count
    same[:, 4:] = True
    assert loss(7, same) == pytest.approx(loss(4, same))  # ... unless they are true


def test_a_gradient_reaches_every_parameter(world: Path, tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    model = VisionEncoder(dataclasses.replace(SMALL, vocab_size=tokenizer.vocab_size))
    samples = _captioned(world, tokenizer)
    batch = samples.collate([samples.sample(index, None) for index in range(8)])
    terms = train_vision.loss(model, batch)
    assert set(terms) <= set(batch.counts)
    sum(terms.values(), torch.zeros(())).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        if name.endswith("positions_TD"):
            read = batch.valid_NT if name.startswith("text") else batch.valid_NT[:8]
            assert (parameter.grad[: int(read.any(0).sum())].abs().sum(1) > 0).all(), name


def test_padding_does_not_change_text(tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    model = VisionEncoder(dataclasses.replace(SMALL, vocab_size=tokenizer.vocab_size)).eval()
    tokens = torch.randint(1, tokenizer.vocab_size, (2, 6))
    valid = torch.ones(2, 6, dtype=torch.bool)
    longer, wider = F.pad(tokens, (0, 8), value=7), F.pad(valid, (0, 8))
    assert torch.allclose(model.encode_text(tokens, valid), model.encode_text(longer, wider), atol=1e-6)
    patches = torch.randn(2, SMALL.num_patches, SMALL.dim)
    loss = model.caption_loss_sum(patches, tokens, valid, unpadded(valid))
    assert torch.allclose(loss, model.caption_loss_sum(patches, longer, wider, unpadded(wider)), rtol=1e-5)


def test_texts_without_their_padding_teach_the_same(tokenizer: Tokenizer) -> None:
    """The text tower and the captions with padding computed along and without, backward included."""
    torch.manual_seed(0)
    model = VisionEncoder(dataclasses.replace(SMALL, vocab_size=tokenizer.vocab_size))
    valid = torch.arange(14)[None] < torch.tensor([5, 14, 9, 2])[:, None]
    tokens = torch.randint(1, tokenizer.vocab_size, (4, 14)) * valid
    patches, weights_D = torch.randn(4, SMALL.num_patches, SMALL.dim), torch.randn(SMALL.text_dim)
    ways = []
    for words in (unpadded(valid), None):
        model.zero_grad()
        text_BE = model.encode_text(tokens, valid, words)
        states = model.caption_states(patches, tokens, words)
        states_ND = states[valid] if words is None else states[0, : int(valid.sum())]
        (text_BE[:, 0].sum() + (states_ND * weights_D).sum()).backward()
        ways.append((text_BE, states_ND, {k: p.grad for k, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(ways[0][0], ways[1][0])
    torch.testing.assert_close(ways[0][1], ways[1][1])
    assert ways[0][2].keys() == ways[1][2].keys()
    for name, grad in ways[0][2].items():
        torch.testing.assert_close(grad, ways[1][2][name], rtol=1e-4, atol=1e-4 * float(grad.abs().max()), msg=name)


def test_the_model_is_what_it_says(tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    model = VisionEncoder(SMALL).eval()
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    output = model.encode_image(pixels)
    assert output.patches_BPD.shape == (3, SMALL.num_patches, SMALL.dim)
    assert torch.allclose(output.pooled_BE.norm(dim=-1), torch.ones(3))
    # greedy captions are those of the teacher-forced decoder, fed with its own guesses
    end = 7
    for row, caption in enumerate(model.caption(output.patches_BPD, end)):
        tokens = torch.tensor([[*caption, end][: SMALL.max_text_len]])
        logits = model.captioner.logits(model.caption_states(output.patches_BPD[row : row + 1], tokens))
        assert logits.argmax(-1).tolist() == tokens.tolist()
    model.log_scale.data.fill_(9.0)
    model.clamp_scale()
    assert model.scale.item() == pytest.approx(100)
    problems = list(dataclasses.replace(SMALL, num_heads=3, image_size=36, patch_size=8).problems())
    assert {problem.key for problem in problems} == {"dim", "image_size"}


# ---- figures ----


def test_figures_against_a_slow_computation() -> None:
    rng = np.random.default_rng(3)
    image, text = (rng.standard_normal((30, 6)) for _ in range(2))
    text += 0.8 * image
    captions = [f"caption {index % 25}" for index in range(30)]  # five captions stand twice
    swaps = [{"shape": text[(i + 1) % 30], "size": text[i] * (1.0 if i % 2 else 0.5)} for i in range(30)]
    found = Matching(captions, image, text, swaps).caption_swap()
    shape = [float(image[i] @ text[i] > image[i] @ text[(i + 1) % 30]) for i in range(30)]
    size = [0.5 if i % 2 else float(image[i] @ text[i] > 0) for i in range(30)]  # half of them are ties
    assert found["caption_swap_shape"].value == pytest.approx(np.mean(shape))
    assert found["caption_swap_size"].value == pytest.approx(np.mean(size))
    assert found["caption_swap"].value == pytest.approx((np.mean(shape) + np.mean(size)) / 2)
    assert found["caption_swap"].n == 30 and found["caption_swap"].low <= found["caption_swap"].value

    distinct = Matching([f"caption {index}" for index in range(30)], image, text)
    recall = distinct.retrieval(draws=3)
    hits = [max(range(30), key=lambda j: image[i] @ text[j]) == i for i in range(30)]
    back = [max(range(30), key=lambda j: image[j] @ text[i]) == i for i in range(30)]
    assert recall["image_to_text_r1"].value == pytest.approx(np.mean(hits))
    assert recall["text_to_image_r1"].value == pytest.approx(np.mean(back))
    assert "caption_swap" not in distinct.figures()
    # among five, each picture is found more easily than among thirty
    assert distinct.retrieval(size=5)["image_to_text_r1"].value > recall["image_to_text_r1"].value
    assert Matching(captions, image, text).retrieval(draws=1)["image_to_text_r1"].n == 25
    constant = Matching(captions, np.ones((30, 2)), np.ones((30, 2)), [{"shape": np.ones(2)}] * 30)
    assert {name: figure.value for name, figure in constant.figures().items()} == {
        "image_to_text_r1": 0.0, "text_to_image_r1": 0.0, "caption_swap": 0.5, "caption_swap_shape": 0.5,
    }  # fmt: skip


# ---- the script ----


def _train(path: Path, *words: str) -> None:
    """The script in this process, which saves the start of another."""
    assert run_stage(train_vision.VisionStageConfig, train_vision.build, ["--config", str(path), *words]) == 0


def test_a_run_learns_resumes_exactly_and_can_be_rebuilt(world: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    checkpoint.save_checkpoint(
        tmp_path / "thinker.pt",
        {"assets": {"tokenizer.model": checkpoint.as_tensor(tokenizer.model)}},
        {"kind": "thinker"},
    )
    shape = {key: value for key, value in dataclasses.asdict(SMALL).items() if key != "vocab_size"}
    config = {
        "name": "vision_small",
        "data": {"train": str(world / "train.json"), "val_split": 0.2},
        "thinker_ckpt": str(tmp_path / "thinker.pt"),
        "model": shape | {"dropout": 0.1},
        "train": {"max_steps": 30, "batch_size": 8, "lr": 0.003, "warmup_steps": 5, "min_lr_ratio": 1.0},
        "run": {"val_freq": 15, "checkpoint_freq": 15, "print_freq": 15, "tensorboard": False, "num_threads": 1},
    }
    path = tmp_path / "vision_small.json"
    path.write_text(json.dumps(config))
    _train(path, "--save_dir", str(tmp_path / "whole"))
    _train(path, "--save_dir", str(tmp_path / "parts"), "--max_steps", "15")
    words = ("--config", path, "--save_dir", tmp_path / "parts")
    again = start_module("train_vision", *words, log=tmp_path / "parts.log")  # another process
    assert again.wait() == 0 and "resuming" in again.log.read_text(), again.log.read_text()
    (whole, summary), (parts, _) = (
        checkpoint.load_checkpoint(tmp_path / name / "vision.pt") for name in ("whole", "parts")
    )
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["event"] == "val"]
    assert losses[-1] < losses[0]
    for name, weight in whole["weights"].items():
        assert torch.equal(weight, parts["weights"][name]), name  # a constant rate, so max_steps alters no update
    assert summary["kind"] == "vision" and set(summary["lineage"]) == {"tokenizer", "data", "thinker"}

    model = VisionEncoder(from_dict(VisionConfig, summary["model_config"], "vision.pt"))
    checkpoint.load_weights(model, whole["weights"], "vision.pt")
    rebuilt = Tokenizer(checkpoint.as_bytes(whole["assets"]["tokenizer.model"]))
    figures = vision_figures(model, rebuilt, world / "train.json", combinations=world / "plain.json")
    assert figures["caption_swap"].n == 40 and "image_to_text_r1_unseen_combinations" in figures
    raw = match_manifest(model, rebuilt, world / "train.json")
    assert raw.image_NE.shape == (40, SMALL.embed_dim)
