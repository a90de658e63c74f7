"""What the phases of speech output are validated by during training."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from omni.data.voices import CropBatch, PairBatch, SentenceBatch, Voices, WaveBatch
from omni.evaluate.audio_enc import hear
from omni.evaluate.talker import speak_again
from omni.generate_speech import Mind, speak
from omni.metrics import character_error_rate
from omni.models.audio_encoder import AudioEncoder
from omni.models.quantizer import code_usage
from omni.models.speaker import speaker_loss_sum
from omni.models.speech import SpeechModel
from omni.models.talker import talker_losses
from omni.models.vocoder import spectral_loss_sum
from omni.speech_text import spoken_words

_NUM_SHORT = 12  # texts that every voice says


def validate_codec(model: SpeechModel, batches: Iterable[CropBatch]) -> dict[str, float]:
    """L1 of log-mel frames; usage and perplexity of the worst codebook."""
    error, frames, codes = 0.0, 0, []
    for batch in batches:
        output = model.codec(batch.frames_BFM)
        error += float((output.frames_BFM.float() - batch.frames_BFM).abs().mean(-1).sum())
        frames += batch.counts["frames"]
        codes.append(output.codes_BTK.flatten(0, 1))
    usage, perplexity = code_usage(torch.cat(codes), model.config.codec.quantizer.codebook_size)
    return {"loss": error / frames, "mel_l1": error / frames, "usage": min(usage), "perplexity": min(perplexity)}


def validate_speaker(model: SpeechModel, batches: Iterable[PairBatch]) -> dict[str, float]:
    """Contrastive loss of the conditioning encoder; how often the nearest crop is of the same speaker."""
    loss = right = 0.0
    crops = 0
    for batch in batches:
        first_BE, second_BE = model.speaker(batch.first_BFM), model.speaker(batch.second_BFM)
        loss += float(speaker_loss_sum(model.speaker, first_BE, second_BE, batch.speaker_B))
        right += float((batch.speaker_B[(first_BE @ second_BE.T).argmax(1)] == batch.speaker_B).sum())
        crops += len(batch.speaker_B)
    return {"loss": loss / crops, "speaker_accuracy": right / crops}


def validate_vocoder(model: SpeechModel, batches: Iterable[WaveBatch]) -> dict[str, float]:
    """Spectral loss from true frames and from decoded ones."""
    assert model.vocoder is not None, "Griffin-Lim has nothing to validate"
    true = decoded = 0.0
    crops = 0
    for batch in batches:
        true += float(spectral_loss_sum(model.vocoder(batch.frames_BFM), batch.wave_BS))
        coded_BFM = model.codec(batch.frames_BFM).frames_BFM.float()
        decoded += float(spectral_loss_sum(model.vocoder(coded_BFM), batch.wave_BS))
        crops += len(batch.frames_BFM)
    return {"loss": decoded / crops, "spectral_loss": true / crops, "spectral_loss_coded": decoded / crops}


def validate_talker(model: SpeechModel, batches: Iterable[SentenceBatch]) -> dict[str, float]:
    """Loss and accuracy of the codes given the true ones before, and error of word durations in proportion."""
    codes = stop = durations = wrong = 0.0
    right_K: torch.Tensor | int = 0
    frames = num_units = words = 0
    for batch in batches:
        losses = talker_losses(model.talker, batch.text(), batch.plan(), batch.codes_BTK, batch.durations_BU)
        codes, stop, durations = (
            codes + float(losses.codes),
            stop + float(losses.stop),
            durations + float(losses.durations),
        )
        right_K = right_K + losses.right_K
        frames, num_units = frames + batch.counts["frames"], num_units + batch.counts["durations"]
        predicted_BU = model.talker.durations(
            model.talker.encode_text(batch.text()), batch.text(), batch.durations_BU.shape[1]
        )
        true_BW = batch.durations_BU[:, 1::2]
        spoken = true_BW > 0
        wrong += float(((predicted_BU[:, 1::2] - true_BW).abs() / true_BW.clamp(min=1))[spoken].sum())
        words += int(spoken.sum())
    accuracy = [float(right) / frames for right in torch.as_tensor(right_K)]
    return {
        "loss": codes / frames, "stop_loss": stop / frames, "duration_loss": durations / num_units,
        "base_accuracy": accuracy[0], "residual_accuracy": sum(accuracy[1:]) / max(1, len(accuracy) - 1),
        "duration_error": wrong / words,
    }  # fmt: skip


def clearest_voice(model: SpeechModel, encoder: AudioEncoder, texts: Iterable[str], mind: Mind | None) -> int:
    """The training voice in which the shortest of some texts are understood best.

    What is short, as most answers are, lacks the context that would help to understand it.
    """
    shortest = sorted(set(filter(spoken_words, texts)), key=lambda text: (len(text), text))[:_NUM_SHORT]
    num, num_voices = len(shortest), len(model.config.voices)
    spoken = speak(model, shortest * num_voices, model.voices_NE.repeat_interleave(num, dim=0), mind)
    heard = hear(encoder, [item.wave for item in spoken], model.config.mel.sample_rate)
    errors = [character_error_rate(shortest, heard[num * at : num * (at + 1)]).value for at in range(num_voices)]
    return errors.index(min(errors))


def grade_samples(
    model: SpeechModel, encoder: AudioEncoder, voices: Voices, mind: Mind | None, limit: int
) -> dict[str, float]:
    """Character error rate of the first sentences, generated with everything predicted."""
    spoken = speak_again(model, voices, mind, limit=limit)
    texts = [voices.text(index) for index in range(len(spoken))]
    heard = hear(encoder, [item.wave for item in spoken], model.config.mel.sample_rate)
    return {"cer": character_error_rate(texts, heard).value}
