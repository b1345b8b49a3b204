"""Every touch of a private name of torch, transformers or accelerate: why, and since when.

Where a public way exists it is taken; a test finds private names of others anywhere else. What
breaks with a release of theirs is looked for here first.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, suppress
from dataclasses import fields
from typing import Any, Protocol

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.fx.experimental import _config as symbolic_shapes
from transformers.modeling_outputs import CausalLMOutputWithPast

BEFORE = "past_key_values"
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else BEFORE
"""What models, their layers and outputs call keys and values: since transformers 5.24 `cache`."""


def uncompiled(model: Any) -> Any:
    """The model inside ``torch.compile``'s wrapper, whose signature and hooks are the real ones.

    torch 2.0: ``OptimizedModule._orig_mod``; there is no public way back.
    """
    return getattr(model, "_orig_mod", model)


def uncompiled_name(name: str) -> str:
    """A tensor's name in a model without the wrappers of ``torch.compile`` (see `uncompiled`)."""
    return name.replace("_orig_mod.", "")


def is_compiled(model: Any) -> bool:
    """``torch.compile`` wraps the model."""
    return hasattr(model, "_orig_mod")


def is_offloaded(module: nn.Module) -> bool:
    """accelerate moves the module's weights in and out around its forward."""
    return offloading_of(module) is not None


def offloading_of(module: nn.Module) -> Any:
    """What moves a module's weights, and holds those of the whole model; or None.

    accelerate 0.10: ``add_hook_to_module`` leaves ``_hf_hook``; nothing public tells.
    """
    return getattr(module, "_hf_hook", None)


def works_on(module: nn.Module) -> torch.device:
    """The device on which a module's forward works: offloaded weights come there, and inputs too.

    accelerate 0.10: ``execution_device`` of the hook, or of one of its ``hooks``.
    """
    hook = offloading_of(module)
    hooks = getattr(hook, "hooks", (hook,))
    devices = (getattr(one, "execution_device", None) for one in hooks)
    return torch.device(next((one for one in devices if one is not None), "cpu"))


def hook_owners(module: nn.Module) -> list[Any]:
    """The objects whose methods are hooks in front of a module's forward.

    torch 1.2: ``_forward_pre_hooks``. A handle would do for one's own hooks, but a copied or
    unpickled model has hooks of another object, and no handle of theirs.
    """
    return [getattr(hook, "__self__", None) for hook in list(module._forward_pre_hooks.values())]


def has_foreign_hooks(model: nn.Module) -> bool:
    """Somebody's hooks are around the forwards of its modules: neither ours nor transformers',
    which leaves some on models that were once asked for hidden states."""
    for module in model.modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if getattr(hook, "__module__", "").split(".")[0] not in ("ptuning", "transformers"):
                return True
    return False


def has_hooks(module: nn.Module) -> bool:
    """Somebody's hooks are around its forward."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


def remove_hooks_of(owner: Any, module: nn.Module) -> None:
    """Take an object's methods from the hooks around a module's forward (see `hook_owners`)."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [k for k, h in hooks.items() if getattr(h, "__self__", None) is owner]:
            del hooks[key]


def checkpointing_of(layer: nn.Module) -> Any:
    """What a layer with gradient checkpointing runs itself through, or None.

    transformers 4.35: ``_gradient_checkpointing_func``; only switching it on is public.
    """
    return getattr(layer, "_gradient_checkpointing_func", None)


def set_checkpointing(layer: Any, function: Any) -> None:
    """Let a layer run itself through `function` (see `checkpointing_of`)."""
    layer._gradient_checkpointing_func = function


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


def forget_rows(model: nn.Module) -> None:
    """Before text is generated behind known keys and values: what a generation before has left of
    its own rows' positions (Qwen2-VL) is not theirs. transformers counts them anew without it.

    transformers 4.45: the attribute that ``generate`` looks at where a cache is given.
    """
    module: Any
    for module in model.modules():
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None


def commit_of(config: Any) -> str | None:
    """The hub commit that a configuration was read from; transformers 4.20, never public."""
    return getattr(config, "_commit_hash", None)


def different_keys(missing: list[str], unexpected: list[str]) -> Any:
    """What ``load_state_dict`` returns, for code that expects it; torch 1.2, a named tuple."""
    return torch.nn.modules.module._IncompatibleKeys(missing, unexpected)


def forget_accelerate() -> None:
    """Let the next training have another precision.

    accelerate 0.12: its state is one for the process, and only ``_reset_state`` lets go of it.
    """
    AcceleratorState._reset_state()


def end_capture_pool(device: int, pool: Any) -> None:
    """Let go of the memory pool of a CUDA graph whose capture failed.

    torch 2.1: ``torch.cuda.graph`` leaves the allocator in the pool then, and counts the graph as
    one that holds it for ever. Where torch has ended it itself the first call fails.
    """
    with suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)


class ReadsOtherwise(Protocol):
    """What a model shall read in place of what ``generate`` has (see `generating_view`).

    Attributes:
        inserted: how many tokens a row may get beside its own.
    """

    inserted: int

    def step(self, text: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """The ids and further arguments of one step of a model that only decodes."""

    def encoder(self, text: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any], str]:
        """An encoder's main input, its further arguments, and the main input's name."""


def generating_view(model: nn.Module, reads: ReadsOtherwise) -> Any:
    """A view of a model: its weights, hooks and settings, but what it reads goes through `reads`.

    The model itself is not changed, so several threads may generate from it. transformers 4.50:
    ``generate`` prepares each step with the public ``prepare_inputs_for_generation``; how long a
    cache has to be, and what an encoder reads (5.20 gave that another name), are private methods.
    """
    config: Any = model.config
    made = _encoding_view if config.is_encoder_decoder else _decoding_view
    model_class: Any = type(model)
    result: Any = object.__new__(made(model_class))
    result.__dict__.update(model.__dict__)
    result.__dict__.update(_reads=reads)
    return result


_ENCODES = (
    "_maybe_prepare_encoder_kwargs_for_generation",
    "_prepare_encoder_decoder_kwargs_for_generation",
)


@functools.cache
def _decoding_view(model_class: Any) -> type:
    class View(model_class):
        _reads: ReadsOtherwise

        def prepare_inputs_for_generation(
            self, input_ids: Tensor, next_sequence_length: int | None = None, **kwargs: Any
        ) -> dict[str, Any]:
            ids, kwargs = self._reads.step(input_ids, kwargs)
            cache = kwargs.get(CACHE)
            if next_sequence_length is not None and cache is not None:
                next_sequence_length = ids.shape[1] - int(cache.get_seq_length())
            elif next_sequence_length == input_ids.shape[1]:  # a state, in its first step
                next_sequence_length = ids.shape[1]
            return super().prepare_inputs_for_generation(
                ids, next_sequence_length=next_sequence_length, **kwargs
            )

        def _prepare_cache_for_generation(self, *args: Any) -> Any:
            *others, length = args  # a static cache must have room for what is inserted too
            return super()._prepare_cache_for_generation(*others, length + self._reads.inserted)

    return _as(model_class, View)


@functools.cache
def _encoding_view(model_class: Any) -> type:
    class View(model_class):
        _reads: ReadsOtherwise

    name = next(name for name in _ENCODES if hasattr(model_class, name))

    def encode(
        self: Any,
        inputs_tensor: Tensor,
        model_kwargs: dict[str, Any],
        model_input_name: str | None,
        generation_config: Any,
    ) -> Any:
        if model_kwargs.get("encoder_outputs") is None:
            found = self._reads.encoder(inputs_tensor, model_kwargs)
            inputs_tensor, model_kwargs, model_input_name = found
        run = getattr(super(View, self), name)
        return run(inputs_tensor, model_kwargs, model_input_name, generation_config)

    setattr(View, name, encode)
    return _as(model_class, View)


def _as(model_class: Any, view: Any) -> Any:
    view.__name__, view.__qualname__ = model_class.__name__, model_class.__qualname__
    view.__module__ = model_class.__module__
    return view


def skip_failed_steps(optimizer: torch.optim.Optimizer, failed: torch.Tensor) -> None:
    """A fused optimizer's steps change nothing while `failed`, a number on its device, is 1.

    torch 2.0: fused optimizers look at ``found_inf``, by which ``GradScaler`` tells them. The other
    name keeps one that may be captured from warning where it is not.
    """
    optimizer.found_inf = failed  # type: ignore[attr-defined]
    optimizer._warned_capturable_if_run_uncaptured = True


def sizes_apart() -> AbstractContextManager[None]:
    """What is compiled meanwhile takes no two sizes for one because they are equal this time: a
    layer would be compiled anew for the first batch whose sizes differ.

    torch 2.1: ``torch.fx.experimental._config.use_duck_shape``; there is no public way.
    """
    settings: Any = symbolic_shapes
    return settings.patch(use_duck_shape=False)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def cpu_has_amx() -> bool:
    """This processor has matrix units for bfloat16, and torch the library that uses them.

    torch 2.6: ``torch.cpu._is_amx_tile_supported``; the public way,
    `torch.cpu.get_capabilities`, is not in every release that is admitted here.
    """
    return torch.backends.mkldnn.is_available() and torch.cpu._is_amx_tile_supported()


_FEWEST_ROWS = 17


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _adds_in_16_bits() -> bool:
    """``_int_mm`` is wrong on this processor."""
    return _tried_product() != 64 * 127**2


@functools.cache
def _tried_product() -> int:
    rows = torch.full((32, 64), 127, dtype=torch.int8)
    return int(torch._int_mm(rows, rows.T)[0, 0])


def whole_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right.T`` of whole numbers.

    torch 2.2: ``_int_mm``; there is no public product of int8. On CUDA it wants 17 rows at least;
    on processors without VNNI it adds pairs up in 16 bits, which cannot hold them, so that float32
    multiplies there (exactly up to sums of 2^24).

    Args:
        left: ``(M, K)`` int8.
        right: ``(N, K)`` int8.

    Returns:
        ``(M, N)`` int32.
    """
    rows = len(left)
    if left.device.type == "cpu" and _adds_in_16_bits():
        return (left.float() @ right.T.float()).to(torch.int32)
    if left.is_cuda and rows < _FEWEST_ROWS:
        left = nn.functional.pad(left, (0, 0, 0, _FEWEST_ROWS - rows))
    return torch._int_mm(left, right.T)[:rows]


def float_product(left: Tensor, right: Tensor, of_left: Tensor, of_right: Tensor) -> Tensor:
    """``(left * of_left) @ (right * of_right.T).T`` of 8-bit floats.

    torch 2.5: ``_scaled_mm`` with a scale for each row; ``torch.nn.functional.scaled_mm`` is not
    in every release that is admitted here. On CUDA its results are bfloat16 then.

    Args:
        left: ``(M, K)``.
        right: ``(N, K)``.
        of_left: ``(M, 1)`` float32.
        of_right: ``(1, N)`` float32.

    Returns:
        ``(M, N)``, float32 on a CPU.
    """
    dtype = torch.bfloat16 if left.is_cuda else torch.float32
    return torch._scaled_mm(left, right.T, scale_a=of_left, scale_b=of_right, out_dtype=dtype)
