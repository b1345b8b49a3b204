"""What only a GPU row needs: models made up on the device, and each side's best batch size."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from sides import Ours, Step, Theirs, rendered
from transformers import AutoModelForCausalLM, LlamaConfig
from workloads import texts

from ptuning.backbone.eight_bits import quantize
from ptuning.forward.prefix_store import PrefixStore

TOKENS = 256
_LLAMA = {"max_position_embeddings": 4096, "tie_word_embeddings": True}
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}


def made_up(shape: str, device: str = "cuda") -> Any:
    """A model of random weights in bfloat16, made on the device."""
    config = LlamaConfig(**{**_LLAMA, **SHAPES[shape]})
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def frozen(model: Any, kind: str) -> Any:
    """The model with its layers in eight bits."""
    quantize(model, kind)
    return model


def best_batch(
    make: Callable[[int], tuple[Step, Callable[[], None]]], runs: int, most: int = 512
) -> dict[str, float]:
    """Doubles the batch size until memory is full.

    Args:
        make: from a batch size to a step and what takes it off the model.
        runs: timed steps at each size.
        most: largest size.

    Returns:
        ``examples`` per second at the best ``batch``, and the ``memory`` of it in bytes above what
        was allocated before.
    """
    best: dict[str, float] = {"examples": 0.0, "batch": 0, "memory": 0}
    size = 8
    while size <= most:
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step, close = make(size)
        try:
            times = []
            for number in range(runs + 3):  # the first ones warm up, and capture graphs
                torch.cuda.synchronize()
                start = time.perf_counter()
                step()
                torch.cuda.synchronize()
                if number >= 3:
                    times.append(time.perf_counter() - start)
        except torch.cuda.OutOfMemoryError:
            break
        finally:
            close()
        memory = torch.cuda.max_memory_allocated() - before
        speed = size / statistics.median(times)
        if speed > best["examples"]:
            best = {"examples": speed, "batch": size, "memory": memory}
        del step, close
        size *= 2
    return best


def search_8b(runs: int) -> dict[str, dict[str, float]]:
    """`best_batch` of both sides at the 8B shape, prompt after the text, keys and values kept.

    One side after the other, so that each has the memory to itself.
    """

    def ours(size: int) -> tuple[Step, Callable[[], None]]:
        side, store = Ours(base), PrefixStore(base)
        examples = rendered(texts(base, size, TOKENS), after=True)
        return side.step(examples, lambda: store), side.population.close

    def peft(size: int) -> tuple[Step, Callable[[], None]]:
        return Theirs(base).step(texts(base, size, TOKENS)), lambda: None

    base = made_up("8b")
    return {"ours": best_batch(ours, runs), "peft": best_batch(peft, runs)}
