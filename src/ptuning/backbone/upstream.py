"""Every touch of a private name of torch, transformers or accelerate: why, and since when.

Where a public way exists it is taken; a test finds private names of others anywhere else. What
breaks with a release of theirs is looked for here first.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import nn


def uncompiled(model: Any) -> Any:
    """The model inside ``torch.compile``'s wrapper, whose signature and hooks are the real ones.

    torch 2.0: ``OptimizedModule._orig_mod``; there is no public way back.
    """
    return getattr(model, "_orig_mod", model)


def is_compiled(model: Any) -> bool:
    """``torch.compile`` wraps the model."""
    return hasattr(model, "_orig_mod")


def is_offloaded(module: nn.Module) -> bool:
    """accelerate moves the module's weights in and out around its forward.

    accelerate 0.10: ``add_hook_to_module`` leaves ``_hf_hook``; nothing public tells.
    """
    return hasattr(module, "_hf_hook")


def attention_of(config: Any) -> str | None:
    """The name of the attention that a model's layers look up.

    transformers 4.36: ``_attn_implementation``; only setting it has become public.
    """
    return getattr(config, "_attn_implementation", None)


def is_stateful(model: nn.Module) -> bool:
    """A recurrent state stands beside keys and values, so that a cache cannot be cut or shared.

    transformers 4.45: the class attribute that ``generate`` asks.
    """
    return bool(getattr(model, "_is_stateful", False))


def commit_of(config: Any) -> str | None:
    """The hub commit that a configuration was read from; transformers 4.20, never public."""
    return getattr(config, "_commit_hash", None)


def forget_accelerate() -> None:
    """Let the next training have another precision.

    accelerate 0.12: its state is one for the process, and only ``_reset_state`` lets go of it.
    """
    AcceleratorState._reset_state()


def end_capture_pool(device: int, pool: Any) -> None:
    """Let go of the memory pool of a CUDA graph whose capture failed.

    torch 2.1: ``torch.cuda.graph`` leaves the allocator in the pool then.
    """
    with suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(device, pool)
