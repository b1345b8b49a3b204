"""`Prompt`: template + vectors (+ verbalizer). What is trained, saved and shared.

A prompt does not hold the base model. Its folder is described in ``docs/checkpoint_format.md``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import formats, places, storage
from ..backbone.identity import fingerprint
from ..data import Rows, as_rows, optional_rows
from ..errors import InputError, PromptFileError, warn
from . import peft_files, prompt_files
from .consistency import check_alike, check_vectors
from .encoder_config import CONFIG_NAME, PromptEncoderConfig, PromptEncoderReparameterizationType
from .encoder_width import hidden_size
from .from_table import ENCODER, from_table
from .label_matrix import LabelMatrix, check_matrix
from .label_names import as_verbalizer
from .prompt_settings import PromptSettings
from .task import check_type
from .transfer import groups_of, resampled
from .upload import upload

_NOT_DESCRIBED = {"modules", "others", "label_matrix", "name_words", "nameless"}
_OF_ALL = ("members", "dev_accuracy", "dev_loss", "calibrate")  # facts of an ensemble


@dataclass(eq=False)
class Prompt(PromptSettings):
    """A prompt for a frozen language model; takes all that `Task` and `PromptSettings` take.

    Attributes:
        vectors: ``(num_virtual_tokens, embedding width)`` float32; None before training.
        encoder_weights: the encoder's state dict, so that training can continue.
        base_model: name and fingerprints of the model that it was trained on.
        training: facts of the training (examples, majority answer, scores).
        modules: tensors of modules trained with the prompt, such as a classifier's head, by their
            names in the model (`peft_compat`); empty for most prompts.
        peft_config: the configuration that `peft_compat` made it from; empty for others.
        others: further members of an ensemble, which answer together with this one; empty for a
            prompt alone.
        label_matrix: what each label word's score gets of the others' (`LabelMatrix`), trained with
            the vectors; None for prompts without.
        name_words: where its label words are the labels' own names (`for_rows`): the words of each
            name, the most telling first. The first tokenizer that the prompt meets may bring words
            of one token in the names' place.
        nameless: these names say nothing (`for_rows`, labels 0 and 1): the training looks for words
            that do (`training.found_words`).

    Raises:
        InputError, TemplateError: settings that contradict each other or the template language.

    Example:
        >>> prompt = Prompt("[P*3] {country} [P*3] [MASK]", answer="capital")
        >>> prompt.num_virtual_tokens
        6
    """

    vectors: Tensor | None = field(default=None, repr=False)
    encoder_weights: dict[str, Tensor] | None = field(default=None, repr=False)
    base_model: dict[str, Any] = field(default_factory=dict, repr=False)
    training: dict[str, Any] = field(default_factory=dict, repr=False)
    modules: dict[str, Tensor] = field(default_factory=dict, repr=False)
    peft_config: dict[str, Any] = field(default_factory=dict, repr=False)
    others: Sequence[Prompt] = field(default=(), repr=False)
    label_matrix: LabelMatrix | None = field(default=None, repr=False)
    name_words: dict[str, tuple[str, ...]] | None = field(default=None, repr=False)
    nameless: bool = field(default=False, repr=False)
    _begins = False  # at vectors of another prompt, before its own words are tokens

    def __post_init__(self) -> None:
        check_type(self, dict, "base_model", "training", "peft_config")
        super().__post_init__()
        if not isinstance(self.others, list | tuple):
            raise InputError(f"others is {self.others!r}; expected a list of trained prompts")
        self.others = tuple(self.others)
        for other in self.others:
            check_alike(self, other)
        if self.vectors is not None:
            check_vectors(self.vectors, self.num_virtual_tokens)
        check_matrix(self.label_matrix, self.labels)

    @property
    def members(self) -> list[Prompt]:
        """The prompts that answer together, the best first; alone it is this one. The first has
        the label bias of all together, and its answer column and length are those of all."""
        if not self.others:
            return [self]
        first, *others = (copy.copy(member) for member in (self, *self.others))
        first.others = ()
        for other in others:
            other.answer, other.answer_tokens = self.answer, self.answer_tokens
        return [first, *others]

    def alone(self) -> Prompt:
        """The first member of an ensemble as a prompt of its own, with the same vectors; a label
        bias and dev figures were measured for all together and are left out."""
        alone = self.members[0]
        facts = {name: fact for name, fact in self.training.items() if name not in _OF_ALL}
        return replace(alone, label_bias=None, training=facts) if self.others else alone

    def check_alone(self, what: str) -> None:
        """Refuse an ensemble where only one prompt has a meaning.

        Args:
            what: cannot be done, such as ``"merged into a model"``.

        Raises:
            InputError: this is an ensemble; says what to do.
        """
        if self.others:
            raise InputError(
                f"this prompt is an ensemble of {len(self.members)} members, which answer "
                f"together, and an ensemble cannot be {what}; take its best member alone "
                "(prompt.alone(), or --alone on the command line), or make one of all (distill)"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the template names, or the templates of all members."""
        named = (name for member in self.members for name in member.parsed.fields)
        return tuple(dict.fromkeys(named))

    @classmethod
    def for_rows(
        cls,
        rows: Rows,
        answer: str | None = None,
        template: str | None = None,
        verbalizer: Mapping[str, str | Sequence[str]] | None = None,
        *,
        dev: Rows | None = (),
        **settings: Any,
    ) -> Prompt:
        """A prompt for a table: its template is made of the columns' names, its label words of the
        labels. In training they become words of one token each, where these differ.

        Args:
            rows: examples with their answers, as `train` takes them.
            answer: the answer's column; by default ``answer``, else ``label``, else the one column
                with few values.
            template: one of your own instead.
            verbalizer: label words of your own instead.
            dev: examples that choose the epoch, where they are not of `rows`: their labels count
                too, and only columns that they have are read.
            settings: others of the prompt, such as ``encoder``, which is ``none`` where the
                template is made.

        Raises:
            DataError: the table does not say what is the answer, or what to read.

        Example:
            >>> rows = [{"text": "a joy", "label": "good"}, {"text": "dull", "label": "bad"}] * 9
            >>> Prompt.for_rows(rows).template
            '[P*20] {text} [P*20] Type: [MASK]'
        """
        virtual = settings.get("num_virtual_tokens")
        if template is None:
            settings = {"encoder": ENCODER, **settings}
        found = from_table(as_rows(rows), answer, template, virtual, optional_rows(dev))
        prompt = cls(found.template, found.columns.answer, verbalizer, **settings)
        if verbalizer is None and found.words is not None:
            names = {label: [name] for label, name in found.words.items()}
            prompt.verbalizer = as_verbalizer(names)
            prompt.name_words, prompt.nameless = found.telling, found.nameless
        return prompt

    def encoder_config(self, token_dim: int) -> PromptEncoderConfig:
        """The configuration of this prompt's encoder for an embedding of width `token_dim`."""
        kind = PromptEncoderReparameterizationType(self.encoder.upper())
        usual = hidden_size(kind, token_dim, self.num_virtual_tokens, self.encoder_weights)
        return PromptEncoderConfig(
            num_virtual_tokens=self.num_virtual_tokens,
            token_dim=token_dim,
            num_transformer_submodules=1,
            base_model_name_or_path=self.base_model.get("name"),
            encoder_reparameterization_type=kind,
            encoder_hidden_size=self.encoder_hidden_size or usual,
            encoder_num_layers=self.encoder_num_layers,
            encoder_dropout=self.encoder_dropout,
        )

    def trained_vectors(self) -> Tensor:
        """The vectors ``(virtual tokens, width)``.

        Raises:
            InputError: the prompt is not trained yet.
        """
        if self.vectors is None:
            raise InputError("this prompt has no vectors yet: train it, or load a trained one")
        return self.vectors

    def begin_from(self, start: Prompt) -> None:
        """Let training begin at another prompt's vectors, and at its encoder's weights and its
        label matrix where they fit.

        Where there are more or fewer virtual tokens here, each begins at one that stands at a like
        place there (`transfer`).

        Raises:
            InputError: `start` is not trained.
        """
        vectors = start.trained_vectors()
        count = self.num_virtual_tokens or len(vectors)
        fits = count == len(vectors)
        if not fits:
            groups = groups_of(start, len(vectors)), groups_of(self, count)
            vectors = resampled(vectors, *groups)
        shape = ("encoder", "encoder_hidden_size", "encoder_num_layers")
        fits &= all(getattr(self, name) == getattr(start, name) for name in shape)
        self.vectors, self.base_model = vectors, start.base_model
        self.encoder_weights = start.encoder_weights if fits else None
        if self.labels == start.labels:
            self.label_matrix = start.label_matrix
        self._begins = self.num_virtual_tokens is None

    def set_count(self, count: int) -> None:
        """As of `PromptSettings`; vectors that another prompt gave become so many."""
        super().set_count(count)
        if self.vectors is not None:
            if self._begins and len(self.vectors) != count:
                self.vectors = resampled(self.vectors, [len(self.vectors)], [count])
                self.encoder_weights = None
            self._begins = False
            check_vectors(self.vectors, count)

    def set_words(self, verbalizer: Mapping[str, Sequence[str]]) -> None:
        """Let the labels have other words; a label matrix of those before has to go."""
        before, self.verbalizer = self.labels, verbalizer
        self.label_matrix = self.label_matrix if self.labels == before else None

    def become(self, other: Prompt) -> None:
        """Take over another prompt's settings, such as the winner's of a population."""
        for name in (*other.settings(), "num_virtual_tokens", "name_words", "nameless"):
            setattr(self, name, getattr(other, name))

    def save(
        self, folder: str | Path, *, keep_encoder: bool = True, peft: bool | None = None
    ) -> None:
        """Write the prompt to a folder, atomically; other files there stay, a README.md of your own
        too.

        Args:
            folder: made if need be.
            keep_encoder: also save the encoder's weights, so that training can continue.
            peft: write PEFT's two files as well. By default where they mean the same: PEFT puts
                virtual tokens in front of everything.
        """
        content = self.files(folder, keep_encoder=keep_encoder, peft=peft)
        storage.write_folder(folder, content, remove=peft_files.NAMES)

    def files(
        self, folder: str | Path, *, keep_encoder: bool = True, peft: bool | None = None
    ) -> dict[str, bytes]:
        """What `save` writes into `folder`: name -> content. PEFT's files of an earlier save, where
        they are not among them, have to go."""
        folder = places.named(folder)
        content = self.contents(keep_encoder=keep_encoder, folder=folder)
        if prompt_files.has_other_card(folder):
            del content[prompt_files.CARD]
        vectors = self.trained_vectors().float()
        kind = self.base_model.get("kind", "causal")
        fits_peft = self.special_tokens == "after" and kind in peft_files.TASK_TYPES
        scaled = bool(self.label_bias) or self.label_matrix is not None
        means_the_same = fits_peft and not self.others and not scaled
        if means_the_same if peft is None else peft:
            self.check_alone("written in PEFT's form")
            peft_files.tell_of_labels(self.label_bias, self.label_matrix)
            config = self.encoder_config(vectors.shape[1])
            content |= peft_files.pack(vectors, config, kind)
        return content

    def contents(
        self, *, keep_encoder: bool = True, folder: str | Path | None = None
    ) -> dict[str, bytes]:
        """The files of a saved prompt, without PEFT's: name -> content.

        Raises:
            PromptFileError: vectors or weights that are not finite.
            InputError: settings that were assigned since and contradict each other.
        """
        vectors = self.trained_vectors()
        self.checked()
        formats.check_numbers(vectors, "the prompt: vectors")
        tensors = {"vectors": vectors.float()}
        kept = prompt_files.beside(vectors, self.encoder_weights) if keep_encoder else {}
        tensors |= {f"encoder.{name}": w for name, w in kept.items()}
        tensors |= {f"module.{name}": w for name, w in self.modules.items()}
        for number, other in enumerate(self.others, 1):
            formats.check_numbers(other.trained_vectors(), f"member {number}: vectors")
            own = other.trained_vectors().float().clone()  # members may share a tensor
            tensors[prompt_files.of_member(number)] = own
        tensors |= prompt_files.matrices(
            [(one.label_matrix, one.labels) for one in (self, *self.others)]
        )
        base = self.base_model
        description = {
            **_described(self),
            "base_model": base if folder is None else prompt_files.seen_from(Path(folder), base),
            "training": self.training,
        }
        if self.peft_config:
            description["peft_config"] = self.peft_config
        if self.others:
            description[prompt_files.ENSEMBLE] = [
                {**_described(other), "training": other.training} for other in self.others
            ]
        return prompt_files.pack(description, tensors)

    @classmethod
    def load(cls, path: str | Path, *, revision: str | None = None) -> Prompt:
        """Read a prompt from a folder or a hub repository; PEFT's P-tuning folders too.

        Raises:
            PromptFileError: missing, damaged, unsafe, or of another method.
        """
        folder = places.local_folder(path, revision)
        with storage.reading(folder):
            if prompt_files.are_in(folder) or not (folder / CONFIG_NAME).is_file():
                return cls._from_saved(folder, *prompt_files.read(folder))
            rows, config, modules = peft_files.read(folder)
        prompt = cls.of_config(config)
        prompt.vectors, prompt.modules = rows[: config.num_virtual_tokens], modules
        return prompt

    @classmethod
    def _from_saved(
        cls,
        folder: Path,
        description: dict[str, Any],
        tensors: dict[str, Tensor],
        copy: dict[str, Any],
    ) -> Prompt:
        edited = prompt_files.edited(description, copy)
        known = {f.name for f in fields(cls)} - _NOT_DESCRIBED
        members = description.pop(prompt_files.ENSEMBLE, [])
        described = set(description).union(*members) - known
        if ignored := sorted(described - set(prompt_files.OF_FILES)):
            warn(f"{folder}: unknown keys are ignored: {ignored}")
        try:
            prompt = cls(**{k: v for k, v in description.items() if k in known})
            others = [cls(**{k: v for k, v in m.items() if k in known}) for m in members]
            prompt = replace(prompt, others=others)
        except InputError as error:
            raise PromptFileError(f"{folder}/prompt.json: {error}") from error
        if prompt.base_model:
            prompt.base_model = prompt_files.found_in(folder, prompt.base_model)
            fingerprint(prompt.base_model)
        for number, other in enumerate(prompt.others, 1):
            other.base_model, other.encoder_weights = prompt.base_model, None
            other.vectors = tensors[prompt_files.of_member(number)]
        for n, one in enumerate((prompt, *prompt.others)):
            one.label_matrix = prompt_files.matrix(folder, tensors, n, one.labels, copy)
        prompt.vectors = tensors["vectors"]
        prompt.encoder_weights = prompt_files.starting(tensors, "encoder.") or None
        prompt.modules = prompt_files.starting(tensors, "module.")
        if edited:
            warn(
                f"{folder}/prompt.json has another {edited[0]} than its copy in "
                "prompt.safetensors: it was edited, or is damaged; what stands in prompt.json is "
                "used"
            )
        return prompt

    @classmethod
    def of_config(cls, config: PromptEncoderConfig, template: str | None = None) -> Prompt:
        """An untrained prompt with a configuration's encoder."""
        return cls(
            template,
            num_virtual_tokens=config.num_virtual_tokens,
            encoder=str(config.encoder_reparameterization_type).lower(),
            encoder_hidden_size=config.encoder_hidden_size,
            encoder_num_layers=config.encoder_num_layers,
            encoder_dropout=config.encoder_dropout,
        )

    def push_to_hub(self, repository: str, *, private: bool | None = None, **options: Any) -> str:
        """Upload the saved prompt to the hub; gives the address of the commit.

        Raises:
            PtuningError: no connection, no permission, or no such name.
        """
        return upload(self.save, repository, private=private, **options)


def _described(prompt: Prompt) -> dict[str, Any]:
    """Count and settings as ``prompt.json`` has them; older readers know no label bias."""
    settings = {"num_virtual_tokens": len(prompt.trained_vectors()), **prompt.settings()}
    if not prompt.label_bias:
        del settings[prompt_files.BIAS]
    return settings
