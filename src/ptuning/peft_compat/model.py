"""``PeftModel``: a base model with P-tuned prompts on it, under the reference's names.

Prompts are token ids here as everywhere in this package (`injection`): a call's ids get virtual ids
placed among them, and the base model does the rest. One class serves every task; `tasks` gives it
the names that people import.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.utils.hub import PushToHubMixin

from ..backbone.injection import Injector
from ..backbone.kinds import reads_left_to_right
from ..backbone.lookups import input_embedding, looks_up_on, vectors_of
from ..backbone.spans import Span
from ..errors import InputError
from ..prompts.encoder import PromptEncoder
from ..prompts.encoder_config import PeftType, PromptEncoderConfig, TaskType
from ..prompts.recognised import Recognised
from ..threads import CHANGING
from . import calls, modules_to_save
from .adapter_names import AdapterDict, check_name
from .adapters import Adapter, checked, completed, tell_of_untrained
from .insertion import Insertion, from_template
from .placing import Base, Traits
from .saving import Saving, expect_no_base
from .signature import Forward
from .summary import Summary


class PeftModel(Recognised, Summary, Saving, PushToHubMixin, nn.Module):  # type: ignore[misc]
    """A base model with adapters.

    Args:
        model: a transformers model; its weights are frozen, and its input embedding gets the hooks
            of `injection`.
        peft_config: of the first adapter.
        adapter_name: of the first adapter.
        template: where the virtual tokens and anchors stand around a row's text, such as
            ``[P*3] {text} [P*3]``; by default in front of the whole input, as the reference.
        tokenizer: needed with a template.
        reference_layout: compute what the reference computes, also where that depends on padding
            (``docs/peft_compat.md`` has the list).
        drop_virtual_positions: outputs per token have the text's positions only.
        autocast_adapter_dtype, low_cpu_mem_usage: the reference's, without effect.

    Attributes:
        base_model: the model.
        peft_config: adapter name -> configuration.
        prompt_encoder: adapter name -> `PromptEncoder`.
        active_adapter: the name of the adapter that calls use.

    Raises:
        InputError: configuration, template or model do not fit; the model is left as it was.
    """

    by_task: ClassVar[dict[Any, Any]] = {}
    """The class of each task."""
    task_type: ClassVar[TaskType | None] = None
    peft_names: ClassVar[tuple[str, ...]] = ("PeftModel",)
    arguments: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask", "inputs_embeds")
    """The order of a call's positional arguments."""
    _hf_peft_config_loaded = True  # transformers.Trainer asks it before it trains a quantized model

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "task_type" in cls.__dict__:
            PeftModel.by_task.setdefault(cls.task_type, cls)
            cls.peft_names = (cls.__name__, "PeftModel")
            if "forward" not in cls.__dict__:
                cls.forward = Forward(calls.forward, cls.arguments)

    def __init__(
        self,
        model: nn.Module,
        peft_config: PromptEncoderConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        *,
        template: str | None = None,
        tokenizer: Any = None,
        reference_layout: bool = False,
        drop_virtual_positions: bool = False,
    ):
        super().__init__()
        input_embedding(model)
        self.base_model = model
        self.peft_type = PeftType.P_TUNING
        self.prompt_encoder = AdapterDict()
        self.active_adapter: Any = adapter_name
        self.reference_layout = reference_layout
        self.drop_virtual_positions = drop_virtual_positions
        self.special_peft_forward_args = {"adapter_names"}
        self._adapters: dict[str, Adapter] = {}
        self._adapters_disabled = False
        self._traits = Traits.of(model)
        self._twin: Span | None = None
        # Now it knows the base model's arguments, which no captured graph can look at.
        _ = self.forward
        self.add_adapter(adapter_name, peft_config, template=template, tokenizer=tokenizer)
        for name, parameter in model.named_parameters():
            if ".modules_to_save." not in name:
                parameter.requires_grad_(False)
        self._activate_modules()
        self.register_load_state_dict_post_hook(expect_no_base)

    @property
    def peft_config(self) -> dict[str, PromptEncoderConfig]:
        """Adapter name -> configuration."""
        return {name: adapter.config for name, adapter in self._adapters.items()}

    @property
    def active_peft_config(self) -> PromptEncoderConfig:
        """The active adapter's configuration."""
        return self.adapter(self.active_adapter).config

    @property
    def active_adapters(self) -> list[str]:
        """The active adapter in a list; empty when all are deleted."""
        return [self.active_adapter] if self.active_adapter else []

    @property
    def prompt_tokens(self) -> dict[str, torch.Tensor]:
        """Adapter name -> the numbers of its virtual tokens, which its encoder takes."""
        encoders = self.prompt_encoder.items()
        return {name: torch.arange(encoder.total_virtual_tokens) for name, encoder in encoders}

    @property
    def modules_to_save(self) -> set[str] | None:
        """The names of all modules that adapters train, or None."""
        names = {n for c in self.peft_config.values() for n in c.modules_to_save or ()}
        return names or None

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Calls have a prompt in them."""
        return not self._adapters_disabled and bool(self.active_adapters)

    def adapter(self, name: str) -> Adapter:
        """The adapter of a name.

        Raises:
            InputError: there is none.
        """
        if name not in list(self._adapters):  # a name may be anything, such as a list
            raise InputError(f"Adapter {name} not found; there are {list(self._adapters)}")
        return self._adapters[name]

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PromptEncoderConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        *,
        template: str | None = None,
        tokenizer: Any = None,
    ) -> None:
        """Add an untrained adapter, which is not made active.

        Args:
            adapter_name: a new name.
            peft_config: of the adapter; what is missing in it is filled in.
            low_cpu_mem_usage: without effect; prompts are small.
            autocast_adapter_dtype: without effect; encoders are float32 whatever the model is.
            template: as for the class.
            tokenizer: as for the class.

        Raises:
            InputError: the name is taken, or the configuration does not fit; nothing is changed.
        """
        check_name(adapter_name)
        if adapter_name in self._adapters:
            raise InputError(
                f"Adapter with name '{adapter_name}' already exists; delete it, or give another"
            )
        config, insertion = checked(peft_config), None
        if template is not None:
            causal = reads_left_to_right(self.base_model)
            insertion = from_template(template, tokenizer, causal=causal)
        values = completed(config, self.base_model, insertion, self.task_type)
        trained = config.replace(**values)
        names = trained.modules_to_save or ()
        embedding = input_embedding(self.base_model)
        encoder = PromptEncoder(trained).float()
        # Where both are made without memory the whole model is to be counted, or filled later.
        if not (embedding.weight.is_meta and encoder.embedding.weight.is_meta):
            encoder.to(self._device())
        if hasattr(encoder, "words") and not embedding.weight.is_meta:  # a mixture's
            ids = torch.randint(embedding.num_embeddings, (len(encoder.words),))
            encoder.words.copy_(vectors_of(embedding, ids))
        paths = modules_to_save.find(self.base_model, names, embedding)
        if not config.inference_mode:
            tell_of_untrained(self.base_model, names)
        for name, value in values.items():
            setattr(config, name, value)
        for wrapper in modules_to_save.wrap(self.base_model, paths):
            wrapper.add(adapter_name)
        count = trained.num_virtual_tokens or 0
        with CHANGING:
            if not self._adapters:  # the hooks may have left, and others come
                self._injector = Injector.on(self.base_model)
            span = self._injector.add(torch.zeros(count, encoder.token_dim, device=self._device()))
            self._claim_twin()
        insertion = insertion or Insertion.in_front(count)
        self._adapters[adapter_name] = Adapter(config, insertion, span)
        self.prompt_encoder[adapter_name] = encoder.requires_grad_(not config.inference_mode)
        encoder.train(self.training)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Make an adapter the one that calls use, and its modules the ones that are trained."""
        self.adapter(adapter_name)
        self.active_adapter = adapter_name
        self._activate_modules(inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off; another one becomes active where it was.

        Raises:
            InputError: there is no such adapter.
        """
        if adapter_name not in list(self._adapters):
            raise InputError(
                f"Adapter {adapter_name} does not exist; there are {list(self._adapters)}"
            )
        self._injector.remove(self._adapters.pop(adapter_name).span)
        if not self._adapters and self._twin is not None:
            self._injector.remove(self._twin)
            self._twin = None
        del self.prompt_encoder[adapter_name]
        if self.active_adapter == adapter_name:
            self.active_adapter = next(iter(self._adapters), [])
        for path, wrapper in modules_to_save.wrappers(self.base_model).items():
            if adapter_name in wrapper.modules_to_save:
                del wrapper.modules_to_save[adapter_name]
            if not wrapper.modules_to_save:
                modules_to_save.unwrap(self.base_model, path, wrapper)
        self._activate_modules()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Calls use the base model as it was, its own modules too, inside the ``with``."""
        before, self._adapters_disabled = self._adapters_disabled, True
        try:
            yield
        finally:
            self._adapters_disabled = before

    def _activate_modules(self, inference_mode: bool = False) -> None:
        active = self.active_adapter or None
        if active:
            inference_mode = inference_mode or self.active_peft_config.inference_mode
        for wrapper in modules_to_save.wrappers(self.base_model).values():
            wrapper.activate(active, trainable=not inference_mode)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """transformers' Trainer may give ``num_items_in_batch``: the base model takes it."""
        own = getattr(self.base_model, "accepts_loss_kwargs", None)
        return self._traits.any_keyword if own is None else bool(own)

    forward = Forward(calls.forward, arguments)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's ``generate`` with the prompts in front of what is generated.

        Takes ``adapter_names`` too. Sequences hold the text's ids and the new ones, as the
        reference's do.
        """
        base: Any = self.base_model
        names = ["input_ids", *list(inspect.signature(base.generate).parameters)[1:]]
        return calls.generate(self, {**dict(zip(names, args, strict=False)), **kwargs})

    def base(self) -> Base:
        """What placing inputs needs to know of the base model."""
        self._injector.follow(self.base_model)
        return Base(
            model=self.base_model,
            injector=self._injector,
            task=self.task_type,
            traits=self._traits,
            reference_layout=self.reference_layout,
            twin=self._twin,
        )

    def _spans(self) -> list[Span]:
        """The ids of the adapters, and of a twin."""
        spans = [adapter.span for adapter in self._adapters.values()]
        return spans if self._twin is None else [*spans, self._twin]

    def _claim_twin(self) -> None:
        """An id of its own for a real token that has the padding's, where that is looked at."""
        if self._twin is None and self.task_type == TaskType.SEQ_CLS and self._traits.causal:
            self._twin = self._injector.add(torch.zeros(1, self._injector.width))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def _device(self) -> torch.device:
        return looks_up_on(input_embedding(self.base_model))
