"""What each stage does, to see and hear: samples on a page of `omni inspect` and in the report, in a real Chromium."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from PIL import Image

from omni.cli import main
from omni.command_line import as_words
from omni.evaluate.sample_media import save_sound
from omni.evaluate.samples import Shown, make_samples
from omni.load import load_omni
from omni.metrics import ratio
from omni.models.vision_encoder import AttentionPool
from omni.report import Told, write_report
from omni.sample import Sample
from omni.stages import STAGES
from tests import toy_run
from tests.page_shots import chromium
from tests.test_inspect import make


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a toy run, as the current one."""
    folder = tmp_path_factory.mktemp("toy")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("omni.runtime.usable_cores", lambda: 1)
        toy_run.make(folder)
        yield folder


@pytest.fixture(scope="module")
def samples(place: Path) -> dict[str, list[Sample]]:
    """What every stage does."""
    kinds = [stage.kind for stage in STAGES]
    return {kind: make_samples(Shown(checkpoint(kind), place / "shown" / kind, 1)) for kind in kinds}


def checkpoint(kind: str) -> Path:
    stage = next(stage for stage in STAGES if stage.kind == kind)
    return Path(f"checkpoints/{stage.prefix}_toy/{kind}.pt")


# ---- what is shown ----


def test_every_stage_shows_what_it_does(samples: dict[str, list[Sample]]) -> None:
    for found in samples.values():
        for sample in found:
            assert Sample.from_dict(json.loads(json.dumps(sample.to_dict()))) == sample
            for _, path in sample.pictures:
                with Image.open(path) as picture:  # something was drawn
                    assert min(picture.size) >= 192 and len(picture.convert("RGB").getcolors(1 << 24)) > 1, path
            for _, path in sample.sounds:
                wave, rate = soundfile.read(path)
                assert rate == 16000 and len(wave) > 1000 and path.suffix == ".ogg"
            assert all(path.stat().st_size < 200_000 for path in sample.files)
    sizes = {kind: [(len(s.pictures), len(s.sounds)) for s in found] for kind, found in samples.items()}
    assert sizes == {
        "thinker": [(0, 0)] * 2, "audio_enc": [(1, 1)], "vision": [(2, 0), (1, 0)], "talker": [(1, 4), (1, 0)],
        "omni": [(0, 0), (1, 0), (0, 2), (1, 2)],
    }  # fmt: skip


def test_continuations_are_of_the_held_out_text(samples: dict[str, list[Sample]]) -> None:
    chat, text = (dict(sample.texts) for sample in samples["thinker"])
    assert chat["given"] + " " + chat["goes on in truth"] == toy_run.DOCUMENTS[0]
    assert text["given"] + " " + text["goes on in truth"] == toy_run.DOCUMENTS[1]
    assert text["sampled, temperature 0.8"] != text["most probable"]


def test_a_recording_is_shown_as_it_was_heard(samples: dict[str, list[Sample]], place: Path) -> None:
    (sample,) = samples["audio_enc"]
    wave, rate = soundfile.read(sample.sounds[0][1])
    assert dict(sample.texts)["said"] == toy_run.SENTENCES[0] and abs(len(wave) / rate - 0.6) < 0.02
    assert sample.right is False and float(dict(sample.texts)["character error rate"]) > 0


def test_the_attention_that_is_drawn_is_the_one_that_pools() -> None:
    torch.manual_seed(0)
    pool, x_BTD = AttentionPool(16, 2, 8).eval(), torch.randn(3, 9, 16)
    weights_BT = pool.weights(x_BTD)
    assert torch.allclose(weights_BT.sum(1), torch.ones(3)) and float(weights_BT.detach().std()) > 1e-4
    # with the weights of all heads the values give what the layer gives
    query = pool.query_1D.expand(3, 1, -1)
    values = pool.attention.v_proj(x_BTD).unflatten(-1, (2, -1)).transpose(1, 2)
    mixed = pool.attention.o_proj((pool.attention.weights(query, x_BTD) @ values).transpose(1, 2).flatten(2))
    assert torch.allclose(mixed, pool.attention(query, x_BTD), atol=1e-5)
    assert torch.allclose(weights_BT, pool.attention.weights(query, x_BTD)[:, :, 0].mean(1))


def test_every_position_of_a_prompt_has_its_modality(samples: dict[str, list[Sample]]) -> None:
    model, _ = load_omni(checkpoint("omni"))
    text, image, audio, both = samples["omni"]
    kinds = [[kind for kind, _ in sample.pieces] for sample in (text, image, audio, both)]
    assert "image" not in kinds[0] and "audio" not in kinds[0] and {"mark", "text", "answer"} == set(kinds[0])
    assert kinds[1].count("image") == 1 and kinds[2].count("audio") == 1
    assert [kind for kind in kinds[3] if kind in ("image", "audio")] == ["audio", "image"]
    shown = dict(image.pieces)["image"]
    assert shown.startswith(f"picture × {model.image_positions}, like: ")
    said = "".join(piece for kind, piece in image.pieces if kind == "text").strip()
    assert said == dict(image.texts)["question"]
    assert image.right == (dict(image.texts)["answer"] == "a ring")


# ---- omni inspect, omni samples ----


def test_a_page_of_inspect_holds_what_the_checkpoint_does(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(checkpoint("audio_enc")), "--html", "b.html"]) == 0
    page = Path("b.html").read_text()
    assert page.count("<audio") == 2 and page.count("data:image/jpeg") == 2 and "CTC" in page
    assert "heard" not in capsys.readouterr().out  # the terminal is asked for by --samples
    assert main(["inspect", str(checkpoint("thinker")), "--samples"]) == 0
    said = capsys.readouterr().out
    assert "most probable" in said and "what checkpoints/thinker_toy/thinker.pt" in said and "goes on in truth" in said


def test_a_trace_is_a_table_json_and_pictures(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(checkpoint("omni"))
    assert main(["inspect", path, "--trace"]) == 0
    said = capsys.readouterr().out
    assert "image projector: swiglu, 4 states a position" in said and "audio projector: linear" in said
    assert main(["inspect", path, "--trace", "--json", "--html", "e.html"]) == 0
    (doing,) = json.loads(capsys.readouterr().out)["does"]
    assert [trace["modality"] for trace in doing["trace"]] == ["image", "audio"] and doing["problem"] == ""
    page = Path("e.html").read_text()
    assert "what the image projector gives the Thinker" in page and "Through the projectors" in page
    assert main(["inspect", str(checkpoint("thinker")), "--trace"]) == 1
    assert "expected an omni.pt for --trace" in capsys.readouterr().err


def test_what_is_missing_is_a_sentence_on_the_page(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hidden = (place / "data").rename(place / "moved")
    try:
        assert main(["inspect", str(checkpoint("vision")), "--html", "c.html"]) == 0
    finally:
        hidden.rename(place / "data")
    assert "cannot be shown: data/images.json" in Path("c.html").read_text()


def test_samples_are_written_where_they_are_asked_for(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["samples", "--size", "toy", "--stage", "vision", "--out", "seen", "--count", "1"]
    assert main(words) == 0
    assert "seen/seeing_1_attention.jpg" in capsys.readouterr().out and Path("seen/seeing_1.png").exists()


def test_a_checkpoint_that_is_no_stages_is_a_sentence_too(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd: list[dict[str, Any]] = [
        {"config": {"name": "x", "data": {"test": 5, "val": []}}}, {"config": {"name": "x", "data": [1]}},
        {"model_config": {}}, {"kind": "mine"},
    ]  # fmt: skip
    for number, changes in enumerate(odd):
        path = place / f"odd_{number}.pt"
        make(path, changes.pop("kind", "thinker"), **changes)
        assert main(["inspect", str(path), "--html", "odd.html"]) == 0
        assert "cannot be shown: " in Path("odd.html").read_text()
        assert "Traceback" not in capsys.readouterr().err


# ---- the report, and pages in a browser ----


def test_the_command_of_a_changed_run_is_whole() -> None:
    shipped = {"name": "x", "train": {"lr": 0.1, "max_steps": 9}}
    train = {"lr": 0.2, "max_steps": 9, "optimizer": "muon"}
    resolved = {"name": "x", "train": train, "run": {"seed": 3, "device": "cpu"}}
    words = as_words(resolved, shipped, ("train.optimizer", "run.seed", "train.lr"))
    assert words == "--run.seed 3 --train.lr 0.2 --train.optimizer muon"
    assert as_words(shipped, shipped, ()) == ""


def report(place: Path, samples: dict[str, list[Sample]]) -> Path:
    figures = {"omni": {"image_qa": ratio([1, 0, 1, 1]).to_dict(), "image_qa_blind": ratio([0, 0, 1, 0]).to_dict()},
               "vision": {"caption_swap": ratio([1, 0.5]).to_dict()},
               "audio_enc": {"wer": ratio([0.1, 0.3]).to_dict()}}  # fmt: skip
    sets = {"data/<b>.csv": {"media": 4, "media_bytes": 99, "sha256": "ab" * 8}}
    first, *rest = samples["thinker"]
    odd = Sample("<script>alert(1)</script>", (("<i>", "</pre><img src=http://127.0.0.1:9/x>"),), right=True)
    told = Told(figures, sets, {**samples, "thinker": [odd, first, *rest]}, {"thinker": 75.0, "evaluation": 20.0}, 95.0)
    write_report(place / "report.html", "toy", told)
    return place / "report.html"


def test_the_report_says_what_was_trained_and_how_to_make_it_again(
    place: Path, samples: dict[str, list[Sample]]
) -> None:
    page = report(place, samples).read_text().replace("<wbr>", "")
    assert len(page) < 10_000_000 and "<script" not in page and "<img src=http" not in page
    assert "0.750 [" in page and "image_qa_blind 0.250 [" in page and "chance 0.5" in page
    for expected in ("python train_vision.py --config configs/vision_toy.json", "&lt;b&gt;.csv", "abababababababab",
                     "75 s", "evaluation 20 s", "torch 2.", "talker_ckpt&quot;"):  # fmt: skip
        assert expected in page, expected
    assert "the same weights" in page and "What stage E forgot" in page
    assert page.count("<audio") == sum(len(s.sounds) for found in samples.values() for s in found) == 9
    assert page.count("<svg") == 5  # a curve a stage


@pytest.mark.parametrize("name", ["report", "e"])
def test_pages_in_a_browser(name: str, place: Path, samples: dict[str, list[Sample]]) -> None:
    """No error, no request but for the file itself, every sound plays to its end, nothing is wider than a phone."""
    if name == "report":
        path = report(place, samples)
    else:
        path = place / "e.html"
        assert main(["inspect", str(checkpoint("omni")), "--html", str(path)]) == 0
    with chromium() as browser:
        if browser is None:
            pytest.skip("found no Chromium on PATH: apt-get install chromium")
        errors, asked = list[str](), list[str]()
        context = browser.new_context(viewport={"width": 360, "height": 740})
        context.on("console", lambda said: errors.append(said.text))
        context.on("weberror", lambda error: errors.append(str(error.error)))
        context.on("request", lambda sent: asked.append(sent.url))
        page: Any = context.new_page()
        page.goto(path.as_uri())
        sounds = page.locator("audio")
        assert sounds.count() >= 2
        for number in range(sounds.count()):
            played = """a => new Promise((done, fail) => { a.onended = () => done(a.duration); a.playbackRate = 16;
                a.onerror = () => fail(a.error.message); a.muted = true; a.play().catch(fail); })"""
            assert 0.1 < sounds.nth(number).evaluate(played) < 60
        broken = "() => [...document.images].filter(i => !i.complete || i.naturalWidth < 10).length"
        assert page.evaluate(broken) == 0 and page.evaluate("document.images.length") >= 2
        for width in (360, 1100):
            page.set_viewport_size({"width": width, "height": 740})
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert errors == [] and {url.split(":")[0] for url in asked} <= {"file", "data"}
        assert [url for url in asked if url.startswith("file")] == [path.as_uri()]
        context.close()


@pytest.mark.parametrize("rate", [16000, 22050])
def test_sounds_of_any_rate_are_written(rate: int, tmp_path: Path) -> None:
    path = save_sound(torch.sin(torch.arange(rate) * 0.05), rate, tmp_path / "x.ogg")
    found = soundfile.info(path)
    assert (found.format, found.subtype) == ("OGG", "OPUS") and found.duration == pytest.approx(1.0, abs=0.05)
