"""The fused model: what pictures and recordings do to it, and that decoding is the same however it is batched."""

from types import SimpleNamespace

import pytest
import torch

import sft_omni
from omni.checkpoint import save_checkpoint
from omni.config import UserError
from omni.data.chat_batch import collate_chats
from omni.data.dialogue import Encoded
from omni.decoding import Decoding, Prompts
from omni.generate import embed_batch
from omni.losses import next_token_loss_sum
from omni.models.omni import OmniConfig, OmniModel, replace_at
from omni.models.projector import (
    ProjectorConfig,
    build_projector,
    match_rms,
    num_stacked,
    patch_rectangle,
    stack_patches,
    stack_states,
)
from omni.models.thinker import ThinkerConfig
from tests.small_shapes import AUDIO_SHAPE, speech_shape, vision_shape

IMAGE, AUDIO, END = 2, 3, 4


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = OmniConfig(
        ThinkerConfig(ctx_len=96, vocab_size=50, dim=32, num_layers=2, num_heads=2, num_kv_heads=1, hidden_dim=64),
        AUDIO_SHAPE,
        vision_shape(50),
        speech_shape(),
        ProjectorConfig(stack=4, hidden_dim=24),
        ProjectorConfig(kind="linear", stack=3, hidden_dim=24),
    )
    model = OmniModel(config, IMAGE, AUDIO).eval()
    for projector in (model.image_projector, model.audio_projector):
        match_rms(projector, model.thinker.embed_tokens.weight)
    return model


def test_another_tokenizer_is_refused(tmp_path):
    """Its tokens would mean something else to the vision tower and to the Talker."""

    def config(**paths):
        return SimpleNamespace(thinker_ckpt="thinker.pt", **{key: str(path) for key, path in paths.items()})

    ours, theirs, without = (tmp_path / f"{name}.pt" for name in ("ours", "theirs", "without"))
    for path, tokenizer in ((ours, "aaaa"), (theirs, "bbbb"), (without, None)):
        save_checkpoint(path, {}, {"lineage": {"tokenizer": tokenizer}})
    sft_omni.refuse_other_tokenizer(config(vision_ckpt=ours, talker_ckpt=without), "aaaa")
    for paths in ({"vision_ckpt": theirs, "talker_ckpt": ours}, {"vision_ckpt": ours, "talker_ckpt": theirs}):
        with pytest.raises(UserError, match=r"theirs\.pt: trained with tokenizer bbbb, but thinker\.pt has .* aaaa"):
            sft_omni.refuse_other_tokenizer(config(**paths), "aaaa")


def features(seed, shape):
    return lambda path: torch.randn(shape, generator=torch.Generator().manual_seed(seed + ord(path)))


def chats():
    picture = Encoded([1, IMAGE, IMAGE, IMAGE, IMAGE, 10, 11, 4, 5], [-100] * 8 + [12], images=["a"])
    sound = Encoded([1, AUDIO, AUDIO, AUDIO, 4, 5], [-100] * 5 + [13], audios=["b"], audio_positions=[3])
    text = Encoded([1, 10, 4, 5], [-100] * 3 + [14])
    return [picture, sound, text]


def batch_of(model, chosen, **layout):
    return collate_chats(chosen, features(0, (16, 16)), features(1, (8, 16)), pad_id=0, **layout)


def test_every_picture_patch_and_audio_state_reaches_the_logits(model):
    batch = batch_of(model, chats())
    batch.patches_NPD.requires_grad_(True)
    batch.states_NTD.requires_grad_(True)
    loss = next_token_loss_sum(model.thinker, model.thinker(embed(model, batch)).final_BTD, batch.labels_BT)
    loss.backward()
    assert (batch.patches_NPD.grad.abs().sum(-1) > 0).all()
    assert (batch.states_NTD.grad.abs().sum(-1) > 0).all()


def embed(model, batch):
    return model.embed(batch.tokens_BT, batch.patches_NPD, batch.states_NTD, batch.positions_N)


def test_zeroed_image_tokens_change_the_answers_logits_and_no_other_row(model):
    batch = batch_of(model, chats())
    with torch.no_grad():
        seen = model.thinker.logits(model.thinker(embed(model, batch)).final_BTD)
        batch.patches_NPD.zero_()
        blind = model.thinker.logits(model.thinker(embed(model, batch)).final_BTD)
    assert (seen[0, 8] - blind[0, 8]).abs().max() > 1e-4
    assert torch.equal(seen[1:], blind[1:])


def test_a_gradient_reaches_every_projector_and_thinker_parameter(model):
    model.zero_grad()
    batch = batch_of(model, chats())
    next_token_loss_sum(model.thinker, model.thinker(embed(model, batch)).final_BTD, batch.labels_BT).backward()
    for part in (model.thinker, model.image_projector, model.audio_projector):
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_projected_features_have_the_rms_of_token_embeddings(model):
    wanted = model.thinker.embed_tokens.weight.square().mean().sqrt()
    projected = model.project_images(torch.randn(3, 16, 16)), model.project_audio(torch.randn(2, 7, 16))
    for found in projected:
        assert torch.isclose(found.square().mean().sqrt(), wanted, rtol=0.02)
    assert projected[0].shape[1] == model.image_positions == 4
    assert projected[1].shape[1] == model.audio_positions(7) == 3


def test_stacking_keeps_neighbours_together():
    patches = torch.arange(16.0).view(1, 16, 1)
    assert stack_patches(patches, 4)[0].tolist()[:2] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    states = torch.arange(1.0, 6.0).view(1, 5, 1)
    assert stack_states(states, 2)[0].tolist() == [[1, 2], [3, 4], [5, 0]]


@pytest.mark.parametrize("stack", range(1, 18))
def test_every_patch_has_one_place_in_any_stack(stack):
    patches = torch.arange(1.0, 17.0).view(1, 16, 1)
    stacked = stack_patches(patches, stack)
    assert stacked.shape == (1, num_stacked(16, stack), stack)
    assert sorted(value for value in stacked.flatten().tolist() if value) == patches.flatten().tolist()
    rows, columns = patch_rectangle(stack)
    for group in stacked[0].int().tolist():
        places = [divmod(value - 1, 4) for value in group if value]
        for line, most in zip(zip(*places, strict=True), (rows, columns), strict=True):
            assert max(line) - min(line) < most


@pytest.mark.parametrize("kind", ["linear", "swiglu"])
@pytest.mark.parametrize("stack", [1, 2, 3, 5, 8])
def test_projectors_of_every_kind_and_stack(kind, stack):
    projector = build_projector(6, 10, ProjectorConfig(kind=kind, stack=stack, hidden_dim=8))
    assert projector(stack_states(torch.randn(2, 7, 6), stack)).shape == (2, -(-7 // stack), 10)


def test_a_position_sees_the_groups_beside_it():
    states = torch.tensor([[[1.0], [2.0], [3.0], [4.0], [5.0]]])
    assert stack_states(states, 2, 1)[0].tolist() == [[0, 0, 1, 2, 3, 4], [1, 2, 3, 4, 5, 0], [3, 4, 5, 0, 0, 0]]
    config = ProjectorConfig(stack=2, hidden_dim=8, context=1)
    assert build_projector(1, 10, config)(stack_states(states, 2, 1)).shape == (1, 3, 10)


def test_placeholders_and_features_must_agree():
    with pytest.raises(ValueError, match="2 placeholders for 3 features"):
        replace_at(torch.zeros(1, 4, 2), torch.tensor([[True, True, False, False]]), torch.ones(3, 2))


def test_cached_decoding_is_the_argmax_of_a_full_pass(model):
    batch = batch_of(model, chats()[:1], left=True)
    x = embed_batch(model, batch)
    found = torch.tensor([run[0] for (run,) in Decoding(model.thinker, Prompts(x, batch.valid_BT)).runs(8)])
    for token in found:
        with torch.no_grad():
            logits = model.thinker.logits(model.thinker(x).final_BTD[:, -1])
        assert logits.argmax().item() == token.item()
        x = torch.cat([x, model.thinker.embed(token[None, None])], dim=1)


def test_replayed_text_and_answers_are_loss_terms_of_their_own(model):
    text = Encoded([5, 6, 7, 8], [6, 7, 8, 9], replay=True)
    mixed = batch_of(model, [*chats(), text])
    terms = sft_omni.loss(model, mixed)
    assert mixed.counts["replay"] == 4
    assert mixed.counts["answers"] == batch_of(model, chats()).counts["answers"]
    alone = sft_omni.loss(model, batch_of(model, chats()))
    torch.testing.assert_close(terms["answers"], alone["answers"], rtol=1e-4, atol=1e-4)
    assert float(alone["replay"]) == 0.0 < float(terms["replay"])


def test_chats_behind_one_another_teach_what_rows_do(model):
    """Losses and all gradients of chats in one row and of padded ones."""
    mixed, found = [*chats(), Encoded([5, 6, 7, 8], [6, 7, 8, 9], replay=True)], []
    for joined in (True, False):
        batch = batch_of(model, mixed, joined=joined)
        assert (len(batch.tokens_BT) == 1) == joined
        model.zero_grad()
        terms = sft_omni.loss(model, batch)
        sum(terms.values()).backward()
        grads = {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}
        found.append((batch.counts, {term: value.detach() for term, value in terms.items()}, grads))
    (counts, terms, grads), (rows_counts, rows_terms, rows_grads) = found
    assert counts == rows_counts and grads.keys() == rows_grads.keys()
    torch.testing.assert_close(terms, rows_terms, rtol=1e-4, atol=1e-4)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, rows_grads[name], rtol=1e-3, atol=1e-4 * float(grad.abs().max()), msg=name)
