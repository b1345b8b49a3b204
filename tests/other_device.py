"""A device of torch that computes on the CPU and, as a GPU does, refuses the CPU's tensors.

What forgets to bring a tensor along passes every test on a CPU and fails on the first GPU. Here it
fails too. The device is one of the whole process: `test_other_device` runs this file in one of its
own, which prints for each case a JSON line with what came out on the CPU and on the device.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import torch
from accelerate.state import PartialState
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils import backend_registration

import ptuning
from ptuning import peft_compat
from ptuning.training import loop
from ptuning.training.cuda_graphs import GraphedStep

from . import tiny
from .replaying import AFTER, FRONT, ROWS, WORDS, Again

NAME = "other"
_ATEN = torch.ops.aten
_MIX = {_ATEN.copy_.default, _ATEN.index.Tensor, _ATEN.index_put_.default}
"""What a GPU takes the CPU's tensors in, too: copies, and indices."""
_MAKE = (
    *("empty.memory_format", "empty_strided", "zeros", "ones", "full", "scalar_tensor", "eye"),
    *("arange", "arange.start", "arange.start_step", "rand", "randn", "randint", "randint.low"),
    *("randperm", "linspace"),
)


class There(Tensor):
    """A tensor of the device; `here` is what it holds."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=torch.device(NAME, 0),
        )
        made.here = here
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(op, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = There(self.here.clone())
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    def tolist(self) -> Any:
        """Its numbers."""
        return self.here.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        """Refused, as for a GPU's tensor."""
        raise TypeError(f"a tensor of {NAME} has no numpy array")

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """The tensor without its gradient's path."""
        return self.detach()

    @data.setter
    def data(self, value: There) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.here = value.here


def _computed(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given, form = pytree.tree_flatten((args, kwargs))
    tensors = [value for value in given if isinstance(value, Tensor)]
    there = {id(t.here): t for t in tensors if isinstance(t, There)}
    if op is _ATEN.copy_.default:
        return _copied(args[1], args[0])
    apart = [t for t in tensors if not isinstance(t, There) and t.dim()]
    if there and apart and op not in _MIX:
        raise RuntimeError(f"{op}: a tensor {tuple(apart[0].shape)} of the CPU among the device's")
    device = kwargs.get("device")
    on_device = bool(there) if device is None else torch.device(device).type == NAME
    here = [
        value.here if isinstance(value, There)
        else torch.device("cpu") if isinstance(value, torch.device)
        else value
        for value in given
    ]  # fmt: skip
    args, kwargs = pytree.tree_unflatten(here, form)
    if op is _ATEN._to_copy.default:
        kwargs = {k: v for k, v in kwargs.items() if k not in ("non_blocking", "pin_memory")}

    def back(value: Any) -> Any:
        if not isinstance(value, Tensor) or not on_device:
            return value
        known = there.get(id(value))
        return There(value) if known is None else known

    return pytree.tree_map(back, op(*args, **kwargs))


def _copied(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    source, held = (t.here if isinstance(t, There) else t for t in (source, target))
    held.copy_(source)
    return target


def begin() -> torch.library.Library:
    """Make the device known to torch; it stays while what is given back does."""

    class Module(backend_registration._DummyBackendModule):  # type: ignore[misc]
        def get_rng_state(self, device: Any = None) -> Tensor:
            return torch.get_rng_state()

        def set_rng_state(self, state: Tensor, device: Any = None) -> None:
            pass

        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16]

    backend_registration._setup_privateuseone_for_python_backend(NAME, Module())
    library = torch.library.Library("aten", "IMPL")
    for name in _MAKE:
        operator, _, overload = name.partition(".")
        makes = getattr(getattr(_ATEN, operator), overload or "default")

        def made(*args: Any, makes: Any = makes, **kwargs: Any) -> Tensor:
            plain = {k: v for k, v in kwargs.items() if k not in ("pin_memory", "layout")}
            return There(makes(*args, **{**plain, "device": "cpu"}))

        library.impl(name, made, "PrivateUse1")
    library.impl("_copy_from", _copied, "PrivateUse1")
    return library


def moved(model: Any) -> Any:
    """The model on the device."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                there = nn.Parameter(There(parameter.data), parameter.requires_grad)
                module._parameters[name] = there
        for name, buffer in list(module._buffers.items()):
            module._buffers[name] = None if buffer is None else There(buffer)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model


# The cases, each a function of where it is to run.

TOKENIZER = tiny.tokenizer()
Case = Callable[[str], Any]


def _model(where: str, family: str) -> Any:
    model = tiny.model(family)
    return model if where == "cpu" else moved(model)


def _prompt(template: str, words: Any = None, **settings: Any) -> ptuning.Prompt:
    answer = "label" if words else "answer"
    return ptuning.Prompt(template, answer=answer, verbalizer=words, **settings)


def _trained(
    where: str,
    template: str = FRONT,
    words: Any = None,
    family: str = "llama",
    graphs: bool = False,
    **options: Any,
) -> Any:
    model, prompt = _model(where, family), _prompt(template, words)
    own, made = loop.graphs_or_plain, []

    def replayed(population: Any, plain: Any, *_: Any) -> Any:
        made.append(GraphedStep(population, plain, nullcontext, Again, 1e-2, lambda _: None))
        return made[-1]

    loop.graphs_or_plain = replayed if graphs else own
    try:
        with torch.random.fork_rng(devices=[]):
            settings: dict[str, Any] = {"epochs": 2, "batch_size": 4, "verbose": False, **options}
            result = ptuning.train(model, TOKENIZER, prompt, ROWS[:15], ROWS[15:], **settings)
    finally:
        loop.graphs_or_plain = own
    replays = sum(step.replays for step in made)
    if graphs and not replays:
        raise AssertionError("no step was replayed")
    return [result.best["dev_loss"], replays, ptuning.predict(model, TOKENIZER, prompt, ROWS[:4])]


def _asked(where: str, family: str = "llama", free: bool = False, **options: Any) -> Any:
    model, words = _model(where, family), None if free else WORDS
    prompts = [_prompt(text, words, answer_tokens=5 if free else None) for text in (FRONT, AFTER)]
    for number, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(number)
        prompt.vectors = torch.randn(5, 32, generator=generator)
    found = ptuning.predict_details(model, TOKENIZER, prompts, ROWS[:9], **options)
    return [[(one.answer, one.probability) for one in of_prompt] for of_prompt in found]


def _distilled(where: str, words: Any = None) -> Any:
    model, most = _model(where, "llama"), None if words else 4
    prompt = _prompt(FRONT, words, answer_tokens=most)
    said = ptuning.distill(
        model, TOKENIZER, prompt, ROWS[:12], ROWS[12:], teacher="France and {text}: it is [MASK]",
        epochs=2, batch_size=4, calibrate_teacher=bool(words), verbose=False,
    )  # fmt: skip
    return [said.training.best["dev_loss"], said.agreement.agreement, said.agreement.examples]


def _table(where: str) -> Any:
    rows = [{"text": row["text"], "label": str(n % 2)} for n, row in enumerate(ROWS)]
    model, prompt = _model(where, "llama"), ptuning.Prompt.for_rows(rows)
    settings: dict[str, Any] = {"epochs": 2, "batch_size": 4, "folds": 2, "verbose": False}
    result = ptuning.train(model, TOKENIZER, prompt, rows, **settings)
    figures = ptuning.evaluate(model, TOKENIZER, prompt, rows[:6])
    return [result.best["dev_loss"], sorted(prompt.verbalizer), figures.loss]


def _attached(where: str) -> Any:
    model, prompt = _model(where, "llama"), _prompt(FRONT)
    prompt.vectors = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[5, 9, 7], [8, 6, 4]]).to(where)
    with ptuning.attach(model, TOKENIZER, prompt) as attached:
        inputs = attached.prepend(prompt, ids)
        said: list[list[int]] = model.generate(**inputs, max_new_tokens=4, do_sample=False).tolist()
    return said


def _compat(where: str, family: str, task: str) -> Any:
    config = peft_compat.PromptEncoderConfig(
        task_type=task, num_virtual_tokens=4, encoder_hidden_size=16
    )
    model = peft_compat.get_peft_model(_model(where, family), config)
    ids = torch.tensor([[1, 5, 9, 7], [0, 0, 8, 6]]).to(where)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]).to(where)
    loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
    loss.backward()
    model.eval()
    said = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    return [float(loss), said.tolist()]


CASES: dict[str, Case] = {
    "a prompt in front": _trained,
    "a prompt behind kept text": partial(_trained, template=AFTER),
    "a small store of kept text": partial(_trained, template=AFTER, prefix_cache="3K"),
    "label words, members, an ensemble": partial(
        _trained, words=WORDS, template=AFTER, population=3, ensemble=2, calibrate="batch"
    ),
    "noise, and on with all": partial(_trained, words=WORDS, refit=True, word_noise=0.2),
    "every encoder without a recurrence": partial(
        _trained, grid={"encoder": ["mlp", "none", "residual", "mixture"]}
    ),
    "a label matrix": partial(_trained, words=WORDS, label_matrix=True, population=2),
    "starts at examples": partial(_trained, words=WORDS, init="examples"),
    "the model too": partial(_trained, tune_model=True),
    "a masked model": partial(_trained, family="bert", words=WORDS),
    "an encoder-decoder": partial(_trained, family="t5"),
    "replayed steps": partial(_trained, graphs=True),
    "replayed steps behind kept text": partial(
        _trained, graphs=True, template=AFTER, population=3
    ),
    "replayed steps and noise": partial(
        _trained, graphs=True, words=WORDS, refit=True, word_noise=0.2
    ),
    "replayed steps and label matrices": partial(
        _trained, graphs=True, words=WORDS, label_matrix=True, population=2
    ),
    **{
        f"predictions of two prompts, {family}": partial(_asked, family=family)
        for family in ("llama", "gpt2", "gemma2", "bert", "t5")
    },
    "free answers": partial(_asked, free=True),
    "candidates": partial(_asked, free=True, candidates=["Paris", "Rome", "Oslo now"]),
    "the model's own generate": _attached,
    "a table of labels without names, in folds": _table,
    "a long prompt distilled": _distilled,
    "a long prompt distilled, label words": partial(_distilled, words=WORDS),
    "peft_compat, causal": partial(_compat, family="llama", task="CAUSAL_LM"),
    "peft_compat, encoder-decoder": partial(_compat, family="t5", task="SEQ_2_SEQ_LM"),
}  # fmt: skip


def main() -> None:
    """Run every case on both."""
    warnings.simplefilter("ignore")
    library = begin()
    torch.__future__.set_swap_module_params_on_conversion(True)
    with suppress(RuntimeError):
        torch.ones(3, device=NAME) + torch.ones(3)
        raise AssertionError("the device takes the CPU's tensors: no case can fail")
    for name, case in CASES.items():
        found: dict[str, Any] = {}
        for where in ("cpu", NAME):
            PartialState._reset_state()
            PartialState.default_device = property(lambda _, where=where: torch.device(where))
            torch.manual_seed(0)
            try:
                found[where] = case(where)
            except Exception:
                found[where] = traceback.format_exc()
        sys.stdout.write(json.dumps({"case": name, **found}) + "\n")
        sys.stdout.flush()
    del library


if __name__ == "__main__":
    main()
