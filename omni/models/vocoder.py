"""The vocoder: log-mel frames to a waveform by predicting a complex spectrum (Vocos, Siuzdak, 2023).

Convolutions work at the frame rate and one inverse Fourier transform makes the samples, so it is far cheaper than a
vocoder that upsamples, and every frame's samples depend on a fixed neighbourhood only. What a mel filterbank loses of
the magnitudes is estimated by its pseudo-inverse; the network learns the correction, and the phases.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from omni.audio import MelConfig, log_mel
from omni.config import Problem
from omni.models.layers import ConvLayer, TimeConv, check_finite, init_weights

_LOG_FLOOR = 1e-4  # added to magnitudes before the logarithm, in the spectrum and in the losses


@dataclass(frozen=True)
class VocoderConfig:
    """Shape of a vocoder."""

    dim: int = 192
    num_layers: int = 4
    kernel: int = 7
    hidden_factor: int = 3

    def problems(self) -> Iterator[Problem]:
        """Shapes that cannot be built."""
        if self.kernel % 2 == 0:
            yield Problem("kernel", str(self.kernel), "an odd width")


class Vocoder(nn.Module):
    """ConvNeXt layers over log-mel frames, heads for log-magnitude and phase, inverse STFT."""

    window_N: torch.Tensor
    inverse_SM: torch.Tensor

    def __init__(self, config: VocoderConfig, mel: MelConfig) -> None:
        super().__init__()
        self.config, self.mel = config, mel
        self.num_bins = mel.n_fft // 2 + 1
        self.in_proj = TimeConv(mel.num_mels, config.dim, config.kernel, padding=config.kernel // 2)
        hidden = config.dim * config.hidden_factor
        self.layers = nn.ModuleList(ConvLayer(config.dim, config.kernel, hidden) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.dim)
        self.out_proj = nn.Linear(config.dim, 3 * self.num_bins)  # log-magnitude, and the phase as a vector
        init_weights(self)
        front = log_mel(mel)
        self.register_buffer("window_N", torch.hann_window(mel.n_fft), persistent=False)
        self.register_buffer("inverse_SM", torch.linalg.pinv(front.mel.mel_scale.fb.T), persistent=False)

    @property
    def look_ahead(self) -> int:
        """Mel frames that a frame's samples depend on beyond it, and as many before it."""
        overlap = -(-self.mel.n_fft // (2 * self.mel.hop_length))
        return (self.config.num_layers + 1) * (self.config.kernel // 2) + overlap

    def spectrum(self, frames_BFM: torch.Tensor) -> torch.Tensor:
        """Complex spectrum [B, F, bins] of log-mel frames.

        Raises:
            FloatingPointError: when it is not finite.
        """
        x = self.in_proj(frames_BFM)
        for layer in self.layers:
            x = layer(x)
        log_magnitude, real, imaginary = self.out_proj(self.norm(x)).float().chunk(3, dim=-1)
        check_finite(log_magnitude, "the vocoder's magnitudes")
        with torch.autocast(x.device.type, enabled=False):
            mel = log_mel(self.mel).magnitudes(frames_BFM)
            rough = (mel.clamp(min=0) @ self.inverse_SM.T).clamp(min=0) + _LOG_FLOOR
            magnitude = rough * log_magnitude.clamp(-8, 4).exp()
            # a vector of any length but zero has a phase; predicting an angle itself would have a jump at pi
            norm = (real.square() + imaginary.square() + 1e-6).rsqrt()
            return torch.complex(magnitude * real * norm, magnitude * imaginary * norm)

    def forward(self, frames_BFM: torch.Tensor) -> torch.Tensor:
        """Waveforms [B, F * hop_length] for log-mel frames [B, F, M]."""
        return inverse_stft(self.spectrum(frames_BFM), self.window_N, self.mel.hop_length)


def inverse_stft(spectrum_BFS: torch.Tensor, window_N: torch.Tensor, hop: int) -> torch.Tensor:
    """Overlap-add of windowed inverse transforms: [B, F, bins] to [B, F * hop], frame f centred on sample f * hop."""
    size, num_frames = len(window_N), spectrum_BFS.shape[1]
    pieces_BFN = torch.fft.irfft(spectrum_BFS, n=size) * window_N
    length = (num_frames - 1) * hop + size

    def overlap_add(x_BFN: torch.Tensor) -> torch.Tensor:
        return F.fold(x_BFN.transpose(1, 2), (1, length), (1, size), stride=(1, hop))[:, 0, 0]

    envelope = overlap_add(window_N.square().expand(1, num_frames, -1))
    start = size // 2
    wave = overlap_add(pieces_BFN)[:, start : start + num_frames * hop]
    return wave / envelope[:, start : start + num_frames * hop].clamp(min=1e-3)


@functools.lru_cache(maxsize=16)
def _window(size: int, device: torch.device) -> torch.Tensor:
    return torch.hann_window(size, device=device)


def _magnitudes(wave_BS: torch.Tensor, size: int) -> torch.Tensor:
    window = _window(size, wave_BS.device)
    # reflected here: CUDA's gradient of torch's own reflection adds up in any order
    half = size // 2
    before, after = wave_BS[:, 1 : half + 1].flip(1), wave_BS[:, -half - 1 : -1].flip(1)
    padded_BS = torch.cat([before, wave_BS, after], dim=1)
    spectrum = torch.stft(padded_BS, size, size // 4, window=window, center=False, return_complex=True)
    return (spectrum.real.square() + spectrum.imag.square() + 1e-9).sqrt()


def spectral_loss_sum(
    wave_BS: torch.Tensor, target_BS: torch.Tensor, sizes: tuple[int, ...] = (256, 512, 1024)
) -> torch.Tensor:
    """Multi-resolution STFT loss (Yamamoto et al., 2020): spectral convergence + log-magnitude L1, summed over B."""
    with torch.autocast(wave_BS.device.type, enabled=False):
        total = wave_BS.new_zeros(())
        for size in sizes:
            made, true = _magnitudes(wave_BS.float(), size), _magnitudes(target_BS.float(), size)
            norms = (true - made).flatten(1).norm(dim=1) / true.flatten(1).norm(dim=1).clamp(min=1e-2)
            logs = ((made + _LOG_FLOOR).log() - (true + _LOG_FLOOR).log()).abs().flatten(1).mean(1)
            total = total + (norms + logs).sum()
        return total / len(sizes)
