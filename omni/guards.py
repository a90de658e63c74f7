"""Guards of the training loop: what is wrong with a loss or a gradient."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def clip_gradients(parameters: Iterable[nn.Parameter], max_grad_norm: float) -> float:
    """Scale the gradients down to a total norm of at most ``max_grad_norm``; returns the norm before.

    Where it is not finite they stay as they are, so that the one that is not can be found.
    """
    given = [parameter for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in given if parameter.grad is not None])
    if bool(norm.isfinite()):
        nn.utils.clip_grads_with_norm_(given, max_grad_norm, norm)
    return float(norm)


def check_gradient_explosion(norm: float, max_grad_explosion: float) -> str | None:
    """What is wrong with a gradient norm (not finite, or above ``max_grad_explosion``), or None."""
    if not norm < float("inf"):
        return f"gradient norm {norm}"
    return f"gradient norm {norm:.4g} above {max_grad_explosion:g}" if norm > max_grad_explosion else None


def validate_loss(loss: float, min_loss: float, max_loss: float) -> str | None:
    """What is wrong with a loss (not finite, or outside its bounds), or None."""
    if not min_loss <= loss <= max_loss:  # false for NaN too
        return f"loss {loss:.4g} outside {min_loss:g} to {max_loss:g}"
    return None
