"""Where a run happens: device, precision, threads, random seeds, and what it says while it runs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from omni import ranks
from omni.config import RunConfig, UserError
from omni.console import log as log
from omni.models.layers import Block
from omni.processes import usable_cores


@dataclass(frozen=True)
class Precision:
    """How the forward pass computes: fp32 weights always, bf16 or fp16 autocast where it helps."""

    device: torch.device
    dtype: torch.dtype  # of autocast; float32 means that autocast is off

    @property
    def needs_scaler(self) -> bool:
        """Only fp16 has a range small enough to need loss scaling."""
        return self.dtype == torch.float16

    @property
    def name(self) -> str:
        """bf16, fp16 or fp32, as people say it."""
        return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(self.dtype, "fp32")

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The autocast context of this precision."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)


def pick_device(name: str) -> torch.device:
    """``auto`` is the first CUDA device, or the CPU. Of several ranks each has a CUDA device of its own.

    Raises:
        UserError: for a device that this machine does not have.
    """
    number, many = ranks.local()
    if many > 1 and (name == "cuda" or (name == "auto" and torch.cuda.is_available())):
        if torch.cuda.device_count() < many:
            raise UserError(
                f"device: found {many} ranks and {torch.cuda.device_count()} CUDA devices on this machine, "
                "expected a device for each rank; lower --nproc_per_node"
            )
        return torch.device("cuda", number)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device: found {name!r}, expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(f"device: found {name!r}, but this machine has {torch.cuda.device_count()} CUDA devices")
    if many > 1 and device.index is not None and device.type == "cuda":
        raise UserError(f"device: found {name!r} for {many} ranks, expected cuda: each takes a device of its own")
    return device


def pick_precision(device: torch.device, use_amp: bool) -> Precision:
    """bf16 where the hardware multiplies it, fp16 on older GPUs, fp32 elsewhere or with ``use_amp: false``."""
    if not use_amp:
        return Precision(device, torch.float32)
    otherwise = torch.float16 if device.type == "cuda" else torch.float32
    return Precision(device, torch.bfloat16 if multiplies_bf16(device) else otherwise)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware does: a GPU since Ampere, a CPU with AVX512-BF16 or AMX.

    Elsewhere bf16 is emulated, on a CPU with AVX2 60 to 150 times as slow as fp32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(False)
    if not torch.backends.mkldnn.is_available():
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take: of the device's memory, or of the main memory and its container's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    with contextlib.suppress(OSError, ValueError):  # a container without a limit says "max"
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        found.append(max(0, limit - used))
    return min(found) if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def keep_freed_memory() -> None:
    """Let the C library keep memory that tensors give back, instead of returning it to the system after every step.

    Each page that comes back costs a fault when it is next written: with glibc's defaults, forward and backward of one
    RMSNorm over 258,000 numbers took six times as long, a step of stage B one and a half times. Without effect where
    the C library is another one.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 - other libraries number their options differently
        library.mallopt(mmap_threshold, 32 << 20)  # the largest that glibc accepts
        library.mallopt(trim_threshold, 2**31 - 1)


def setup_compute(run: RunConfig) -> Precision:
    """Set threads, denormals and determinism once at start-up, and return device and precision."""
    device = pick_device(run.device)
    keep_freed_memory()
    # ever new lengths need more of the matrix library's plans than the 1,024 it keeps: a tenth of the Talker's step
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")
    torch.set_num_threads(run.num_threads or max(1, usable_cores() // ranks.local()[1]))
    if device.type == "cuda" and ranks.launched():
        torch.cuda.set_device(device)
    torch.set_flush_denormal(True)  # peaked logits underflow to denormals: measured 9 times slower without this
    torch.set_float32_matmul_precision("high")
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    return pick_precision(device, run.use_amp)


def prepare_blocks(model: nn.Module, run: RunConfig) -> None:
    """Let the transformer blocks of a model be compiled, or keep less for backward, as a configuration says."""
    for block in model.modules():
        if isinstance(block, Block):
            block.checkpointed = run.activation_checkpointing
            if run.compile:
                block.compile_training()


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (CPU and CUDA)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """All random states as ints, lists and tensors, which ``torch.load(weights_only=True)`` accepts."""
    version, internal, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    return {
        "python": [version, list(internal), gauss],
        "numpy": {
            "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": _cuda_random_state(),
    }


def _cuda_random_state() -> list[torch.Tensor]:
    """Of every device; of a rank's own alone, since a look at another one's takes hundreds of megabytes there."""
    if not torch.cuda.is_available():
        return []
    return torch.cuda.get_rng_state_all() if ranks.size() == 1 else [torch.cuda.get_rng_state()]


def restore_random_state(state: dict[str, Any]) -> None:
    """Put back what :func:`random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy_state = state["numpy"]
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": numpy_state["key"].numpy().astype(np.uint32), "pos": numpy_state["pos"]},
            "has_gauss": numpy_state["has_gauss"],
            "gauss": numpy_state["gauss"],
        }
    )
    torch.set_rng_state(state["torch"].cpu())
    if not state["cuda"] or not torch.cuda.is_available():
        return
    if ranks.size() > 1:
        torch.cuda.set_rng_state(state["cuda"][0].cpu())
    elif len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([item.cpu() for item in state["cuda"]])


@contextlib.contextmanager
def isolated_randomness(seed: int) -> Iterator[None]:
    """Run a block with its own random numbers, leaving the outer ones untouched: evaluation changes nothing."""
    state = random_state()
    seed_everything(seed)
    try:
        yield
    finally:
        restore_random_state(state)
