"""The only shared layers: RMSNorm, rotary positions, attention with a KV cache, SwiGLU, ConvLayer, Block.

Names and conventions are those of Qwen3 (half-split rotary positions, RMSNorm on queries and keys, no biases), so that
a Thinker's weights load into the stock Hugging Face class.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from omni.models.kv_cache import KVCache
from omni.models.segments import Segments

_kernels: list[str] = []  # the kind of device that operations are chosen for, where it is not the tensor's own
_PLAIN_LIMIT = 384 * 384  # scores a head; from 512 x 512 on the fused kernel is as fast and needs less memory


@contextlib.contextmanager
def kernels_of(device: str) -> Iterator[None]:
    """Compute by the operations that are used on this kind of device: what one needs can be counted on another."""
    _kernels.append(device)
    try:
        yield
    finally:
        _kernels.pop()


def _as_on_cpu(x: torch.Tensor) -> bool:
    return (_kernels[-1] if _kernels else x.device.type) == "cpu"


def check_finite(x: torch.Tensor, name: str) -> None:
    """Raise FloatingPointError when ``x`` holds NaN or Inf; one reduction, no mask in memory."""
    if not torch.isfinite(x.detach().float().sum()):
        raise FloatingPointError(f"{name} are not finite")


def init_weights(module: nn.Module) -> None:
    """Normal weights of variance 1 / fan-in, which keeps the variance of what passes through; biases are zero.

    Embeddings have a standard deviation of 0.02, so that tied logits start near zero. (With 0.02 for every matrix,
    which is usual at a width of 2,500, layers 200 wide hardly speak at first.)
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d):
            spread = 0.02 if isinstance(part, nn.Embedding) else 1 / math.sqrt(part.weight[0].numel())
            nn.init.normal_(part.weight, std=spread)
            if getattr(part, "bias", None) is not None:
                nn.init.zeros_(part.bias)  # type: ignore[arg-type]


def _rms_norm(x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm in fp32, and what each row was multiplied by."""
    wide = x.float()
    mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(wide.shape[-1])
    scale = mean_square.add_(eps).rsqrt_()
    return (wide * scale).mul_(weight_D).to(x.dtype), scale


class _CPUNorm(torch.autograd.Function):
    """RMSNorm in fp32, its backward written by hand: the CPU has no kernel of its own, F.rms_norm takes 14 passes.

    Forward and backward in bf16, 24 x 56 x 192 on two cores: 0.8 ms instead of 1.2; 16 x 256 x 4 x 32: 3.1 and 4.6.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        normed, scale = _rms_norm(x, weight_D, eps)
        ctx.save_for_backward(x, weight_D, scale)
        return normed

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight_D, scale = ctx.saved_tensors
        wide_ND, grad_ND = (part.float().reshape(-1, x.shape[-1]) for part in (x, grads[0]))
        scale_N1 = scale.reshape(-1, 1)
        products_ND = grad_ND * wide_ND
        grad_weight_D = (scale_N1.T @ products_ND)[0]
        along_N1 = (products_ND @ weight_D[:, None]).mul_(scale_N1.pow(3)).div_(x.shape[-1])
        grad_x = (grad_ND * weight_D).mul_(scale_N1).addcmul_(wide_ND, along_N1, value=-1)
        return grad_x.view(x.shape).to(x.dtype), grad_weight_D, None


class RMSNorm(nn.Module):
    """Root mean square layer normalization (Zhang and Sennrich, 2019)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps
        self.floor = torch.tensor(math.sqrt(dim * eps))  # of a row's length

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize over the last dimension."""
        if _as_on_cpu(x) and not torch.is_grad_enabled():
            # in as few operations as it takes: at a step of decoding they take longer to start than to compute
            length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
            return (x / length.hypot_(self.floor)).mul_(self.weight * math.sqrt(x.shape[-1])).to(x.dtype)
        if _as_on_cpu(x):
            normed: torch.Tensor = _CPUNorm.apply(x, self.weight, self.eps)
            return normed
        # under autocast an fp32 weight beside a bf16 input leaves the fused path
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class RotaryPositions(nn.Module):
    """Rotary position embedding (Su et al., 2021), half-split as in Qwen3."""

    def __init__(self, head_dim: int, theta: float = 10000.0) -> None:
        super().__init__()
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        frequencies = theta**-exponents
        # the first half turns the other way, which only the sine notices
        self.frequencies_d: torch.Tensor
        self.register_buffer("frequencies_d", torch.cat([-frequencies, frequencies]), persistent=False)

    def forward(self, positions_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine, each [B or 1, T, 1, head_dim], of integer positions [B or 1, T]; for :func:`rotate`."""
        angles = positions_BT[:, :, None, None].float() * self.frequencies_d
        return angles.cos(), angles.sin()


def rotate(x_BTHd: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary positions to queries or keys."""
    half = x_BTHd.shape[-1] // 2
    return x_BTHd * cos.to(x_BTHd.dtype) + x_BTHd.roll(half, -1) * sin.to(x_BTHd.dtype)


def attend(
    q_BHTd: torch.Tensor, k_BHSd: torch.Tensor, v_BHSd: torch.Tensor, mask: torch.Tensor | None, causal: bool
) -> torch.Tensor:
    """Scaled dot-product attention; keys and values may have fewer heads than queries.

    Args:
        q_BHTd: queries [B, H, T, d].
        k_BHSd: keys [B, H or a divisor of it, S, d].
        v_BHSd: values like the keys.
        mask: positive mask that broadcasts to [B, H, T, S], or None.
        causal: whether query t sees keys 0 to t alone; then ``mask`` is None.
    """
    groups, T, S = q_BHTd.shape[1] // k_BHSd.shape[1], q_BHTd.shape[2], k_BHSd.shape[2]
    if not _as_on_cpu(q_BHTd) or q_BHTd.dtype != torch.bfloat16 or T == 1 or T * S > _PLAIN_LIMIT:
        return F.scaled_dot_product_attention(
            q_BHTd, k_BHSd, v_BHSd, attn_mask=mask, is_causal=causal, enable_gqa=groups > 1
        )
    # the CPU's fused kernel computes bf16 slowly: forward and backward of 64 x 4 heads x 64 positions take 21 ms
    # there, 5 ms by plain products (T = 256: 25 and 17 ms)
    if groups > 1:
        k_BHSd, v_BHSd = k_BHSd.repeat_interleave(groups, dim=1), v_BHSd.repeat_interleave(groups, dim=1)
    scores_BHTS = (q_BHTd * q_BHTd.shape[-1] ** -0.5) @ k_BHSd.transpose(-1, -2)
    if causal:
        mask = torch.ones(T, S, dtype=torch.bool, device=q_BHTd.device).tril()
    if mask is not None:
        # added, not filled in: a sum needs no work in backward
        scores_BHTS = scores_BHTS + torch.zeros_like(mask, dtype=scores_BHTS.dtype).masked_fill_(~mask, float("-inf"))
    return scores_BHTS.softmax(dim=-1).to(v_BHSd.dtype) @ v_BHSd


class Attention(nn.Module):
    """Multi-head attention with grouped key/value heads and RMSNorm on queries and keys (as in Qwen3)."""

    def __init__(
        self, dim: int, num_heads: int, num_kv_heads: int, layer: int, causal: bool, head_dim: int | None = None
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim or dim // num_heads
        self.layer, self.causal = layer, causal
        self.q_proj = nn.Linear(dim, num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(dim, num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * self.head_dim, dim, bias=False)
        self.q_norm = RMSNorm(self.head_dim)
        self.k_norm = RMSNorm(self.head_dim)

    def forward(
        self,
        x_BTD: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        mask: torch.Tensor | Segments | None,
        cache: KVCache | None,
    ) -> torch.Tensor:
        """Attend; see :class:`Block` for the arguments."""
        B, T, _ = x_BTD.shape
        q = self.q_norm(self.q_proj(x_BTD).view(B, T, self.num_heads, self.head_dim))
        k = self.k_norm(self.k_proj(x_BTD).view(B, T, self.num_kv_heads, self.head_dim))
        v = self.v_proj(x_BTD).view(B, T, self.num_kv_heads, self.head_dim)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if isinstance(mask, Segments):
            assert cache is None, "segments are for learning; what is decoded has rows"
            return self.o_proj(mask.attend(attend, q, k, v.to(q.dtype), self.causal).flatten(2))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        y = attend(q, k, v.to(q.dtype), mask, causal=self.causal and mask is None and T > 1)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class SwiGLU(nn.Module):
    """Gated feed-forward layer (Shazeer, 2020)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to the last dimension."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TimeConv(nn.Conv1d):
    """Convolution over time of [B, T, D], with the parameters of ``nn.Conv1d``.

    Positions stay before width in memory ("channels last"), as in every layer around it. On two CPU cores in bf16,
    forward and backward of 15 x 192 depthwise take 2.0 ms instead of 7.1, of 5 x 80 x 192 with stride two 3.7 instead
    of 8.8, and the result is contiguous, which speeds up all that follows.

    oneDNN's depthwise kernel in bf16 never returns for some shapes of up to 16 channels a thread (torch 2.13, with
    AVX512-BF16; none found beyond, none in fp32), so narrow ones are computed in fp32.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[B, T, D] to [B, T', D'], padded with zeros as configured."""
        if self.groups > 1 and _as_on_cpu(input) and self.in_channels < 64 * torch.get_num_threads():
            with torch.autocast("cpu", enabled=False):
                return self._convolve(input.float()).to(input.dtype)
        return self._convolve(input)

    def _convolve(self, input: torch.Tensor) -> torch.Tensor:
        weight = self.weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)
        x = input.transpose(1, 2).unsqueeze(2).contiguous(memory_format=torch.channels_last)
        stride, padding = (1, self.stride[0]), (0, int(self.padding[0]))
        y = F.conv2d(x, weight, self.bias, stride, padding, groups=self.groups)
        return y.squeeze(2).transpose(1, 2)


def dropout(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """``F.dropout``; on the CPU from 16 random bits a number (``p`` is rounded to 1/65536), which takes a third."""
    if not training or p == 0:
        return x
    if not _as_on_cpu(x):
        return F.dropout(x, p)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    draws = words.view(torch.int16)[: x.numel()].view(x.shape)
    return x * (draws >= round(p * 65536) - 32768).to(x.dtype).mul_(1 / (1 - p))


class ConvModule(nn.Module):
    """Depthwise convolution over time with a gate, the local half of a Conformer block (Gulati et al., 2020)."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim)
        self.in_proj = nn.Linear(dim, 2 * dim, bias=False)
        self.depthwise = TimeConv(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.out_norm = RMSNorm(dim)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x_BTD: torch.Tensor, valid_BT: torch.Tensor | None) -> torch.Tensor:
        """Mix neighbouring positions; ``valid_BT`` is False where a position is padding."""
        h = F.glu(self.in_proj(self.norm(x_BTD)), dim=-1)
        if valid_BT is not None:
            h = h * valid_BT[:, :, None].to(h.dtype)  # padding must not leak into its neighbours
        return self.out_proj(F.silu(self.out_norm(self.depthwise(h))))


class ConvLayer(nn.Module):
    """Residual layer in the shape of ConvNeXt (Liu et al., 2022): mix in time, then in width."""

    def __init__(self, dim: int, kernel: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.depthwise = TimeConv(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.up_proj = nn.Linear(dim, hidden_dim)
        self.down_proj = nn.Linear(hidden_dim, dim)

    def forward(self, x_BTD: torch.Tensor, valid_BT: torch.Tensor | None = None) -> torch.Tensor:
        """Same shape; what is not valid is read as zeros, as at the ends."""
        if valid_BT is not None:
            x_BTD = x_BTD * valid_BT[:, :, None].to(x_BTD.dtype)
        update_BTD = self.down_proj(F.gelu(self.up_proj(self.norm(self.depthwise(x_BTD)))))
        return x_BTD + dropout(update_BTD, self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm transformer block: attention, an optional convolution module, SwiGLU.

    Attributes:
        checkpointed: whether what its inside made is computed anew in backward instead of kept (Chen et al., 2016).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden_dim: int,
        layer: int,
        causal: bool,
        num_kv_heads: int | None = None,
        conv_kernel: int = 0,
        dropout: float = 0.0,
        head_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(dim)
        self.self_attn = Attention(dim, num_heads, num_kv_heads or num_heads, layer, causal, head_dim)
        self.conv = ConvModule(dim, conv_kernel) if conv_kernel else None
        self.post_attention_layernorm = RMSNorm(dim)
        self.mlp = SwiGLU(dim, hidden_dim)
        self.dropout = dropout
        self.checkpointed = False
        self._compiled: Callable[..., torch.Tensor] | None = None

    @property
    def compiled(self) -> bool:
        """Whether it learns through ``torch.compile``."""
        return self._compiled is not None

    def compile_training(self) -> None:
        """From now on learn through ``torch.compile``; what is not learned from is computed as before."""
        self._compiled = torch.compile(self._compute)

    def forward(
        self,
        x_BTD: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        mask: torch.Tensor | Segments | None = None,
        cache: KVCache | None = None,
        valid_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One block.

        Args:
            x_BTD: positions [B, T, D].
            rotary: cosine and sine of the positions, or None without rotary positions.
            mask: positive mask [B or 1, 1, T, all positions], True where attention is allowed; or the segments that
                are attended over apart (causal or full); None: causal or full.
            cache: keys and values of earlier positions, extended in place.
            valid_BT: False at padding, for the convolution module.
        """
        if cache is not None or not torch.is_grad_enabled():
            return self._compute(x_BTD, rotary, mask, cache, valid_BT)
        compute = self._compiled or self._compute
        if self._compiled is not None and isinstance(mask, Segments):
            # it is compiled for one shape, where segments have ever others
            mask = mask.mask(len(x_BTD), x_BTD.shape[1], self.self_attn.causal)
        if self.checkpointed:
            y_BTD: torch.Tensor = checkpoint(compute, x_BTD, rotary, mask, None, valid_BT, use_reentrant=False)
            return y_BTD
        return compute(x_BTD, rotary, mask, None, valid_BT)

    def _compute(
        self,
        x_BTD: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        mask: torch.Tensor | Segments | None,
        cache: KVCache | None,
        valid_BT: torch.Tensor | None,
    ) -> torch.Tensor:
        x_BTD = x_BTD + self._drop(self.self_attn(self.input_layernorm(x_BTD), rotary, mask, cache))
        if self.conv is not None:
            x_BTD = x_BTD + self._drop(self.conv(x_BTD, valid_BT))
        return x_BTD + self._drop(self.mlp(self.post_attention_layernorm(x_BTD)))

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return dropout(x, self.dropout, self.training)


def scale_residual_outputs(blocks: nn.ModuleList) -> None:
    """Divide what each layer adds to the residual stream by sqrt(2 x depth), as in GPT-2, so its variance stays put."""
    factor = 1 / math.sqrt(2 * len(blocks))
    with torch.no_grad():
        for name, parameter in blocks.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "conv.out_proj.weight")):
                parameter.mul_(factor)


def quiet_residual_outputs(blocks: nn.ModuleList) -> None:
    """Let every layer add next to nothing to the residual stream at first; zero would cut its inside off."""
    with torch.no_grad():
        for name, parameter in blocks.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "conv.out_proj.weight")):
                parameter.mul_(0.01)


def padding_mask(lengths_B: torch.Tensor, T: int) -> torch.Tensor:
    """[B, T], True at the first ``lengths_B`` positions of each row."""
    return torch.arange(T, device=lengths_B.device)[None, :] < lengths_B[:, None]
