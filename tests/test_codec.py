"""Codec, quantizer, vocoder, speaker encoder: they learn, use every codebook, and resume exactly."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

from omni.audio import SILENCE, MelConfig, griffin_lim, log_mel
from omni.data.voices import CropBatch
from omni.models.audio_encoder import AudioEncoder, AudioEncoderConfig
from omni.models.codec import Codec, CodecConfig
from omni.models.quantizer import QuantizerConfig, ResidualQuantizer, code_usage, kmeans, neighbour_shares
from omni.models.speaker import SpeakerConfig, SpeakerEncoder, speaker_loss_sum
from omni.models.speech import SpeechConfig, SpeechModel
from omni.models.vocoder import Vocoder, VocoderConfig, inverse_stft, spectral_loss_sum
from train_talker import codec_loss as stage_loss


def small_codec(num_codebooks: int = 2) -> Codec:
    torch.manual_seed(0)
    quantizer = QuantizerConfig(num_codebooks=num_codebooks, codebook_size=16, dim=8)
    return Codec(CodecConfig(dim=16, num_layers=1, quantizer=quantizer))


def codec_loss(codec: Codec, frames: torch.Tensor) -> torch.Tensor:
    output = codec(frames)
    return (output.frames_BFM - frames).abs().mean() + 0.25 * output.commitment_sum / output.codes_BTK[..., 0].numel()


def test_gradient_reaches_every_parameter_of_the_codec() -> None:
    codec = small_codec().train()
    codec_loss(codec, torch.randn(4, 24, 80)).backward()
    for name, parameter in codec.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0, name


def test_what_is_heard_in_decoded_frames_teaches_the_codec_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    codec = small_codec()
    encoder = AudioEncoder(AudioEncoderConfig(dim=16, num_layers=1, num_heads=2, hidden_dim=32)).requires_grad_(False)
    encoder.eval()
    model = SpeechModel(SpeechConfig(codec=codec.config)).eval()
    crops = torch.randn(4, 24, 80)

    def heard(frames_BFM: torch.Tensor) -> torch.Tensor:
        return stage_loss(model, CropBatch({}, frames_BFM), encoder)["heard"]

    whole = heard(crops)
    torch.testing.assert_close(heard(crops[:1]) + heard(crops[1:]), whole, rtol=1e-4, atol=0.0)
    whole.backward()
    taught = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert "codec.out_proj.weight" in taught and all(name.startswith("codec.") for name in taught)
    assert stage_loss(model, CropBatch({}, crops)).keys() == {"mel", "commitment"}

    def perfect(frames_BFM: torch.Tensor) -> object:
        return dataclasses.replace(codec(frames_BFM), frames_BFM=frames_BFM)

    monkeypatch.setattr(model.codec, "forward", perfect)
    assert heard(crops).item() < 1e-3 < whole.item()


@pytest.mark.parametrize("num_codebooks", [1, 2, 4])
def test_every_code_of_every_codebook_is_used(num_codebooks: int) -> None:
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(QuantizerConfig(num_codebooks, codebook_size=64, dim=4)).train()
    quantizer.codebooks_KVD.mul_(100)  # a start far away from all vectors, which k-means must not need
    for _ in range(20):
        quantizer(torch.randn(8, 64, 4))
        quantizer.update()
    codes = quantizer.eval()(torch.randn(8, 512, 4)).codes_BTK
    usage, perplexity = code_usage(codes, 64)
    assert min(usage) > 0.9
    assert min(perplexity) > 32


def test_dead_codes_are_revived() -> None:
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(QuantizerConfig(1, codebook_size=8, dim=2)).train()
    quantizer(torch.zeros(1, 64, 2))  # k-means on a single point: all codes but one are useless
    quantizer.update()
    for _ in range(80):
        quantizer(torch.randn(4, 64, 2))
        quantizer.update()
    usage, _ = code_usage(quantizer.eval()(torch.randn(4, 256, 2)).codes_BTK, 8)
    assert usage == [1.0]


def test_statistics_of_micro_batches_count_together_and_skipped_ones_not() -> None:
    whole = ResidualQuantizer(QuantizerConfig(2, codebook_size=8, dim=4, revive_below=0)).train()
    torch.manual_seed(1)
    whole(torch.randn(4, 32, 4))
    whole.update()
    parts = copy.deepcopy(whole)
    x = torch.randn(4, 32, 4)
    whole(x)
    whole.update()
    parts(torch.randn(4, 32, 4))
    parts.discard()
    parts(x[:1])
    parts(x[1:])
    parts.update()
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, msg=name)


def test_quantizer_resumes_exactly() -> None:
    torch.manual_seed(0)
    config = QuantizerConfig(3, codebook_size=16, dim=4)

    def run(quantizer: ResidualQuantizer, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            quantizer(torch.randn(4, 16, 4))
            quantizer.update()

    straight, first = ResidualQuantizer(config).train(), ResidualQuantizer(config).train()
    run(straight, range(8))
    run(first, range(5))
    second = ResidualQuantizer(config).train()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second, range(5, 8))
    for name, value in straight.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_residual_codebooks_bring_the_codes_nearer() -> None:
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(QuantizerConfig(4, codebook_size=32, dim=4)).train()
    x = torch.randn(8, 64, 4)
    for _ in range(30):
        quantizer(x)
        quantizer.update()
    codes = quantizer.eval()(x).codes_BTK
    errors = [float((quantizer.decode(codes[..., :k]) - x).square().mean()) for k in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    torch.testing.assert_close(quantizer.decode(codes), quantizer(x).vectors_BTD)


@torch.no_grad()
def test_one_model_serves_every_number_of_codebooks() -> None:
    """Trained with quantizer dropout, the first codebooks alone decode as well as any; without it they do not."""
    errors = {}
    for share in (0.0, 0.7):
        torch.manual_seed(0)
        codec = Codec(CodecConfig(dim=24, num_layers=1, quantizer=QuantizerConfig(4, 32, 8, codebook_dropout=share)))
        sounds = torch.randn(12, 24, 4) @ torch.randn(4, 80) / 2  # the same for both: the seed is
        optimizer = torch.optim.AdamW(codec.train().parameters(), lr=5e-3)
        for step in range(150):
            with torch.enable_grad():
                picked = torch.randint(12, (8,), generator=torch.Generator().manual_seed(step))
                optimizer.zero_grad()
                codec_loss(codec, sounds[picked]).backward()
            optimizer.step()
            codec.quantizer.update()
        codec.eval()
        codes = codec.encode(sounds, torch.full((12,), 24))
        errors[share] = [float((codec.decode(codes[..., :n]) - sounds).abs().mean()) for n in (1, 2, 3, 4)]
    assert errors[0.7] == sorted(errors[0.7], reverse=True)  # each codebook helps
    assert errors[0.7][0] < errors[0.0][0]


def test_shares_reach_to_codes_that_sound_alike() -> None:
    torch.manual_seed(0)
    codebooks = torch.tensor([[[0.0], [1.0], [2.0], [9.0]]])
    shares = neighbour_shares(codebooks, 0.5)[0]
    torch.testing.assert_close(shares.sum(-1), torch.ones(4))
    assert shares[0, 0] > shares[0, 1] > shares[0, 2] > shares[0, 3]
    # squared distance 1 to the nearest, which is the median as well: exp(-1 / 0.5) as much as the code itself
    assert float(shares[0, 1] / shares[0, 0]) == pytest.approx(math.exp(-2), rel=1e-5)
    torch.testing.assert_close(neighbour_shares(codebooks, 1e-3)[0], torch.eye(4))


def test_padding_changes_no_code_and_no_frame() -> None:
    codec = small_codec().eval()
    frames = torch.randn(2, 40, 80)
    sizes = torch.tensor([40, 23])
    codes = codec.encode(frames, sizes)
    alone = codec.encode(frames[1:, :23], torch.tensor([23]))
    assert codec.num_codes(sizes).tolist() == [14, 8]
    assert torch.equal(codes[1, :8], alone[0])
    decoded = codec.decode(codes, codec.num_codes(sizes))
    torch.testing.assert_close(decoded[1, :24], codec.decode(alone)[0])


def test_codec_learns_a_few_sounds() -> None:
    codec = small_codec().train()
    optimizer = torch.optim.AdamW(codec.parameters(), lr=5e-3)
    sounds = torch.randn(4, 1, 80).expand(4, 24, 80)
    losses = []
    for _ in range(60):
        loss = codec_loss(codec, sounds + 0.1 * torch.randn(4, 24, 80))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        codec.quantizer.update()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]


def test_kmeans_finds_separate_clusters() -> None:
    torch.manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    found, load = kmeans(torch.cat([centre + 0.1 * torch.randn(50, 2) for centre in centres]), 6, rounds=20)
    assert float(load.sum()) == 150
    assert all(float((found - centre).norm(dim=1).min()) < 0.5 for centre in centres)


# ---- vocoder and speaker encoder ----


def test_the_constant_for_silence_is_what_silence_gives() -> None:
    frames = log_mel(MelConfig())(torch.zeros(1600))
    torch.testing.assert_close(frames, torch.full_like(frames, SILENCE), atol=1e-3, rtol=0)


def test_inverse_stft_undoes_the_stft() -> None:
    mel = MelConfig()
    wave = torch.randn(2, 160 * 50)
    window = torch.hann_window(mel.n_fft)
    spectrum = torch.stft(wave, mel.n_fft, mel.hop_length, window=window, return_complex=True)
    back = inverse_stft(spectrum.transpose(1, 2), window, mel.hop_length)
    torch.testing.assert_close(back[:, : wave.shape[1]], wave, atol=1e-4, rtol=1e-4)


def test_vocoder_gives_a_hop_of_samples_a_frame_and_learns() -> None:
    torch.manual_seed(0)
    mel = MelConfig()
    vocoder = Vocoder(VocoderConfig(dim=16, num_layers=1), mel)
    time = torch.arange(160 * 20) / mel.sample_rate
    wave = 0.3 * torch.sin(2 * torch.pi * torch.tensor([[220.0], [440.0]]) * time)
    frames = log_mel(mel)(wave)
    assert vocoder(frames).shape == wave.shape
    optimizer = torch.optim.AdamW(vocoder.parameters(), lr=5e-3)
    losses = []
    for _ in range(12):
        loss = spectral_loss_sum(vocoder(frames), wave)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None for parameter in vocoder.parameters())
    assert losses[-1] < 0.8 * losses[0]
    assert float(spectral_loss_sum(wave, wave)) < 1e-4


def test_griffin_lim_takes_batches_and_keeps_a_tone() -> None:
    mel = MelConfig()
    wave = 0.3 * torch.sin(2 * torch.pi * 440 * torch.arange(8000) / mel.sample_rate)
    frames = log_mel(mel)(wave)
    made = griffin_lim(torch.stack([frames, frames]), mel)
    torch.testing.assert_close(made[0], made[1])
    peak = torch.fft.rfft(made[0]).abs().argmax() * mel.sample_rate / made.shape[1]
    assert abs(float(peak) - 440) < 20


def test_speaker_encoder_ignores_padding_and_gives_unit_vectors() -> None:
    torch.manual_seed(0)
    encoder = SpeakerEncoder(SpeakerConfig(dim=16, embedding_dim=8)).eval()
    frames = torch.randn(2, 60, 80)
    together = encoder(frames, torch.tensor([60, 41]))
    torch.testing.assert_close(together[1:], encoder(frames[1:, :41]))
    torch.testing.assert_close(together.norm(dim=1), torch.ones(2))
    noisy = frames.clone()
    noisy[1, 41:] = SILENCE
    torch.testing.assert_close(encoder(noisy, torch.tensor([60, 41])), together)


def test_speaker_loss_prefers_the_right_speaker_and_reaches_every_parameter() -> None:
    encoder = SpeakerEncoder(SpeakerConfig(dim=16, embedding_dim=8))
    vectors, speakers = torch.eye(8)[:4], torch.tensor([0, 1, 2, 2])
    right = speaker_loss_sum(encoder, vectors, vectors, speakers)
    wrong = speaker_loss_sum(encoder, vectors, vectors.flip(0), speakers)
    assert float(right) < float(wrong)
    loss = speaker_loss_sum(encoder, encoder(torch.randn(4, 40, 80)), encoder(torch.randn(4, 40, 80)), speakers)
    loss.backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
