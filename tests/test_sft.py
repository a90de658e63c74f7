"""Stage E as a whole: what each of its options trains, that a feature cache changes nothing, and exact resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from omni.checkpoint import load_checkpoint, read_summary
from omni.data.dialogue import read_chats
from omni.evaluate.omni import Examiner
from omni.features import FeatureStore
from omni.hearing import words_heard
from omni.inspection.trace import STACKS, as_text, trace_checkpoint
from omni.load import load_omni, load_thinker
from omni.models.lora import adapters
from omni.models.projector import build_projector
from omni.tokenizer import AUDIO
from tests.conftest import metrics
from tests.small_omni import make_world, train

LORA = ("--lora.rank", "4", "--lora.alpha", "8")
MIXED = ("--data.task_weights", '{"image_qa": 0.5, "text_qa": 1.7, "speech_qa": 0}', "--data.replay_anew")
RATES = ("--lr_ratios.projectors", "0.5", "--sft.optimizer", "muon")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("small_omni"))


@pytest.fixture(scope="module")
def trained(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Runs by their options, each trained once."""
    made: dict[tuple[str, ...], Path] = {}

    def run(*words: str) -> Path:
        if words not in made:
            folder = tmp_path_factory.mktemp("run")
            assert train(config, folder, *words) == 0
            made[words] = folder
        return made[words]

    return run


def weights(folder: Path, name: str = "omni.pt") -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / name)[0]["weights"]


def changed(folder: Path, part: str, source: Path, prefix: str = "") -> bool:
    """Whether a part is other than in the checkpoint that it came from."""
    before = load_checkpoint(source)[0]["weights"]
    after = weights(folder)
    return any(not torch.equal(before[prefix + k], after[f"{part}.{prefix}{k}"]) for k in _below(before, prefix))


def _below(state: dict[str, torch.Tensor], prefix: str) -> list[str]:
    return [key.removeprefix(prefix) for key in state if key.startswith(prefix)]


def assert_same(one: Path, other: Path) -> None:
    assert metrics(one) == metrics(other)
    for name in ("omni.pt", "omni_best.pt"):
        ours, theirs = weights(one, name), weights(other, name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


# ---- the feature cache ----


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("features-*.npz"))


def test_cold_warm_shared_and_no_cache_give_the_same_weights(config, trained, tmp_path):
    cold = trained()
    kept = shards(cold / "cache")
    assert {path.name.split("-")[1] for path in kept} == {"images", "audio", "lengths", "words"}
    shared = tmp_path / "shared"
    shutil.copytree(cold / "cache", shared)
    before = {path: path.read_bytes() for path in shards(shared)}
    assert train(config, tmp_path / "warm", "--data.feature_cache", str(shared)) == 0
    assert train(config, tmp_path / "off", "--data.feature_cache_gb", "0") == 0
    assert_same(cold, tmp_path / "warm")
    assert_same(cold, tmp_path / "off")
    assert {path: path.read_bytes() for path in shards(shared)} == before  # nothing was encoded again
    assert not shards(tmp_path / "warm" / "cache") and not shards(tmp_path / "off" / "cache")


def test_a_warm_cache_encodes_and_decodes_nothing(config, trained, tmp_path, monkeypatch):
    shared = trained() / "cache"
    for name in ("load_audio", "load_image"):
        monkeypatch.setattr(f"omni.features.{name}", lambda *args, **more: pytest.fail("decoded a cached file"))
    assert train(config, tmp_path / "run", "--data.feature_cache", str(shared)) == 0


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text"])
def test_damaged_shards_are_computed_again_with_a_warning(damage, config, trained, tmp_path, capfd):
    shared = tmp_path / "shared"
    shutil.copytree(trained() / "cache", shared)
    capfd.readouterr()
    whole = {path.name: path.read_bytes() for path in shards(shared)}
    for path in shards(shared):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 16
        path.write_bytes({"cut": data[: len(data) // 2], "flip": data, "empty": b"", "text": b"hello"}[damage])
    assert train(config, tmp_path / "run", "--data.feature_cache", str(shared)) == 0
    assert "".join(capfd.readouterr()).count(": damaged (") == len(whole)
    assert {path.name: path.read_bytes() for path in shards(shared)} == whole
    assert_same(trained(), tmp_path / "run")


# ---- what is trained ----


def test_adapters_alone_are_trained_and_merged_at_the_end(config, trained):
    apart, merged = trained(*LORA, *RATES, "--lora.keep_apart"), trained(*LORA, *RATES)
    folder = config.parent
    base, state = load_thinker(folder / "thinker.pt")[0].state_dict(), weights(apart)
    assert all(torch.equal(state[f"thinker.{key}"], value) for key, value in base.items())
    grown = [key for key in state if "b_proj" in key]
    assert len(grown) == 2 * 7 and all(state[key].abs().max() > 0 for key in grown)
    assert metrics(apart) == metrics(merged)
    one, tokenizer = load_omni(apart / "omni.pt")
    other, _ = load_omni(merged / "omni.pt")
    assert adapters(one.thinker) and not adapters(other.thinker)
    assert other.state_dict().keys() == {key for key in one.state_dict() if ".adapter." not in key}
    tokens = torch.tensor([tokenizer.encode("what is this? a red ring")])
    with torch.no_grad():
        logits = [model.thinker.logits(model.thinker(model.thinker.embed(tokens)).final_BTD) for model in (one, other)]
        plain = load_thinker(folder / "thinker.pt")[0]
        untrained = plain.logits(plain(plain.embed(tokens)).final_BTD)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)
    assert (logits[1] - untrained).abs().max() > 1e-2
    assert read_summary(merged / "omni.pt")["model_config"]["lora"] is None


def test_a_frozen_thinker_and_frozen_encoders_stay_as_they_are(config, trained):
    folder = config.parent
    frozen = trained("--freeze_thinker")
    for part, source in (("thinker", "thinker"), ("audio_encoder", "audio_enc"), ("vision_encoder", "vision")):
        assert not changed(frozen, part, folder / f"{source}.pt")
        assert changed(trained(), part, folder / f"{source}.pt") == (part == "thinker")


def test_encoders_are_trained_along(config, trained):
    folder = config.parent
    run = trained("--freeze_encoders", "false", "--num_workers", "1")
    assert not changed(run, "audio_encoder", folder / "audio_enc.pt")  # whose words the Thinker reads
    assert changed(run, "vision_encoder", folder / "vision.pt", "image.blocks.")
    run = trained("--freeze_encoders", "false", "--num_workers", "1", "--with_words", "false")
    assert changed(run, "audio_encoder", folder / "audio_enc.pt", "blocks.")
    assert not changed(run, "audio_encoder", folder / "audio_enc.pt", "head.")
    assert changed(run, "vision_encoder", folder / "vision.pt", "image.blocks.")
    assert not changed(run, "vision_encoder", folder / "vision.pt", "text.")
    losses = [line["loss"] for line in metrics(run) if line["event"] == "val"]
    assert all(0 < loss < 20 for loss in losses) and len(set(losses)) == len(losses)
    # what the frozen encoders of the first phase saw is kept; nothing of what they became is
    assert {path.name for path in shards(run / "cache")} == {
        path.name for path in shards(trained() / "cache") if "words" not in path.name
    }


LIVE = ("--freeze_encoders", "false", *MIXED)


@pytest.mark.parametrize(
    "words", [LORA + MIXED + RATES, LIVE, (*LIVE, "--with_words", "false")], ids=["lora", "free", "states"]
)
def test_resume_from_any_checkpoint_is_exact(words, config, trained, tmp_path):
    whole = trained(*words)
    for step in (2, 3, 5, 7):  # in the first phase, between the two, twice in the second
        run = tmp_path / str(step)
        shutil.copytree(whole, run)
        for path in run.glob("omni*.pt"):
            if path.name != f"omni_step_{step}.pt":
                path.unlink()
        assert (run / f"omni_step_{step}.pt").exists()
        assert train(config, run, *words) == 0
        assert_same(whole, run)
        # nothing is kept of what encoders were for a while
        assert [path.name for path in shards(run / "cache")] == [path.name for path in shards(whole / "cache")]


def test_a_finished_run_with_adapters_goes_on(config, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained(*LORA, *RATES), run)
    for path in run.glob("omni_step_*.pt"):
        path.unlink()
    assert train(config, run, *LORA, *RATES) == 0  # complete
    assert train(config, run, *LORA, *RATES, "--sft.max_steps", "8") == 0
    assert read_summary(run / "omni.pt")["total_step"] == 11


# ---- mistakes ----


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--lora.rank", "-1"), "lora.rank: found -1, expected at least 1, or 0"),
        (("--lora.rank", "33"), "lora.rank: found 33, expected at most 32, the width of layers.0.self_attn.q_proj"),
        (("--lora.rank", "2", "--lora.alpha", "0"), "lora.alpha: found 0.0, expected more than 0"),
        (("--lora.projections", '["q_prj"]'), "lora.projections: found 'q_prj', expected some of q_proj"),
        (("--lora.projections", "[]"), "lora.projections: found none"),
        (("--lora.rank", "2", "--freeze_thinker"), "freeze_thinker: found true with lora.rank 2, expected one"),
        (("--lr_ratios.encoders", "0"), "lr_ratios.encoders: found 0.0, expected more than 0"),
        (("--freeze_encoders", "maybe"), "--freeze_encoders: found 'maybe', expected true or false"),
        (("--data.task_weights", '{"imge_qa": 2}'), "data.task_weights.imge_qa: found no such task in"),
        (("--data.task_weights", '{"image_qa": -1}'), "data.task_weights.image_qa: found -1.0, expected 0 (never)"),
        (("--data.replay_share", "1"), "data.replay_share: found 1.0, expected a share from 0 to below 1"),
        (("--data.feature_cache_gb", "-1"), "data.feature_cache_gb: found -1.0, expected a number of gigabytes"),
        (("--data.feature_cache", __file__), "data.feature_cache: found a file"),
        (("--image_projector.hidden_dim", "0"), "image_projector.hidden_dim: found 0, expected at least 1"),
    ],
)  # fmt: skip
def test_every_mistake_is_one_sentence(words, expected, config, tmp_path, capfd):
    assert train(config, tmp_path / "run", *words) in (1, 2)
    said = "".join(capfd.readouterr())
    assert expected in said and "Traceback" not in said
    assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 1


def test_weights_that_leave_no_chat_are_refused(config, tmp_path, capfd):
    every = dict.fromkeys(("text_qa", "image_qa", "speech_qa", "image_speech_qa"), 0)
    assert train(config, tmp_path / "run", "--data.task_weights", json.dumps(every)) == 1
    assert "task_weights: found 0 for every task" in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--lora.rank", "2"), "lineage.lora.rank: 4 -> 2"),
        ((*LORA, "--lr_ratios.projectors", "1"), "sft.optimizer: found a checkpoint that trained other parameters"),
    ],
)
def test_a_resume_with_other_adapters_or_groups_is_refused(words, expected, config, trained, tmp_path, capfd):
    run = tmp_path / "run"
    shutil.copytree(trained(*LORA, *RATES), run)
    (run / "omni.pt").unlink()
    assert train(config, run, "--lora.alpha", "8", *RATES, *words) == 1
    assert expected in "".join(capfd.readouterr())


# ---- words that are heard ----


def test_words_that_are_heard_are_read_and_states_alone_can_be_had(config, trained, tmp_path):
    model, tokenizer = load_omni(trained() / "omni.pt")
    assert model.config.with_words
    features = FeatureStore(model, tokenizer)
    chat = next(chat for chat in read_chats(config.parent / "val.jsonl") if chat.task == "speech_qa")
    features.add([], chat.paths("audio"))
    (path,) = chat.paths("audio")
    heard = words_heard(model.audio_encoder, model.thinker, tokenizer, [features.audio(path)])[0]
    encoded = Examiner(model, tokenizer, features).encoder.prompt(chat.messages[:-1])
    assert heard and features.words(path) == heard
    begin = encoded.tokens.index(tokenizer.special[AUDIO]) + encoded.audio_positions[0]
    entered = encoded.tokens[begin : begin + encoded.num_words[0]]
    assert entered == tokenizer.encode(f" {heard}")[: model.thinker.config.ctx_len // 4] != []
    low = FeatureStore(model, tokenizer)
    with torch.autocast("cpu", torch.bfloat16):  # as on a CPU that is quick in it
        low.add([], chat.paths("audio"))
    assert low.words(path)
    states = tmp_path / "states"
    assert train(config, states, "--with_words", "false") == 0
    model, tokenizer = load_omni(states / "omni.pt")
    silent = FeatureStore(model, tokenizer)
    silent.add([], [path])
    assert silent.words(path) == "" and not any("words" in shard.name for shard in shards(states / "cache"))
    assert Examiner(model, tokenizer, silent).encoder.prompt(chat.messages[:-1]).num_words == [0]


def test_a_trained_thinker_changes_no_word_of_training(config, trained, tmp_path):
    """Words come from stage A's Thinker: a run that is resumed after the cache is gone hears the same."""
    run = tmp_path / "run"
    shutil.copytree(trained(), run)
    shutil.rmtree(run / "cache")
    for path in run.glob("omni*.pt"):
        if path.name != "omni_step_7.pt":
            path.unlink()
    assert train(config, run) == 0
    assert_same(trained(), run)
    assert {path.name: path.read_bytes() for path in shards(run / "cache")} == {
        path.name: path.read_bytes() for path in shards(trained() / "cache")
    }


# ---- the trace ----


def test_a_trace_says_what_the_projectors_do(config, trained):
    checkpoint = trained() / "omni.pt"
    image, audio = trace_checkpoint(checkpoint)
    model, _ = load_omni(checkpoint)
    assert list(image.after) == ["stacked", "pre_norm", "gated", "down", "post_norm"]
    assert list(audio.after) == ["stacked", "hidden", "down", "post_norm"]
    assert image.after["stacked"].shape == [model.image_positions, 3 * 16]
    assert image.after["post_norm"].shape == [model.image_positions, 32]
    for trace, projector in ((image, model.image_projector), (audio, model.audio_projector)):
        assert trace.parameters == sum(parameter.numel() for parameter in projector.parameters())
        for found in (*trace.after.values(), *trace.before.values(), trace.embeddings):
            assert sum(found.counts) == torch.Size(found.shape).numel() and found.min <= found.mean <= found.max
            assert found.edges[0] == pytest.approx(found.min) and found.edges[-1] == pytest.approx(found.max)
        assert trace.before["post_norm"].rms == pytest.approx(trace.embeddings.rms, rel=0.05)
        assert trace.before["stacked"] == trace.after["stacked"] and trace.before["down"] != trace.after["down"]
        assert len(trace.variances) == len(trace.embedding_variances) == 32 and min(trace.variances) >= 0
        assert [each.stack for each in trace.stackings] == list(STACKS)
        config_of = model.config.image_projector if trace is image else model.config.audio_projector
        for each in trace.stackings:
            built = build_projector(16, 32, type(config_of)(config_of.kind, each.stack, config_of.hidden_dim))
            assert each.parameters == sum(parameter.numel() for parameter in built.parameters())
    text = as_text([image, audio])
    for expected in ("image projector: swiglu, 3 states a position", "gated, now", "token embeddings", "variance"):
        assert expected in text
    assert json.loads(json.dumps(image.to_dict()))["stackings"][0]["stack"] == 2
