"""Every architecture that transformers lists, as a tiny random model: fast ways against plain ones.

For each, a prompt is trained with prefixes kept and without, in front and behind the text, alone
and in a population, and for free answers; a batch answers as its rows alone; and a merged model is
read again. Writes ``ARCHITECTURES.md`` beside this file. A configuration is its class's default,
made small by the names that configurations share; some cannot be made so, and are listed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

import ptuning

KINDS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "multimodal": "MODEL_FOR_MULTIMODAL_LM_MAPPING",
}
LIMIT = 3e-5
LARGEST = 40_000_000
"""Weights of a model that did not become small."""
SMALL: dict[str, Any] = {
    **{"vocab_size": 512, "max_position_embeddings": 512, "pad_token_id": 0},
    **{"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2},
    **dict.fromkeys(("hidden_size", "d_model", "embed_dim", "projection_dim"), 32),
    **dict.fromkeys(("out_hidden_size", "vision_output_dim", "moe_intermediate_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "encoder_layers", "decoder_layers", "depth"), 2),
    **dict.fromkeys(("num_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "num_experts", "num_local_experts"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **{"num_key_value_heads": 2, "num_experts_per_tok": 2, "n_routed_experts": 4, "patch_size": 4},
    **dict.fromkeys(("head_dim", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **{"v_head_dim": 8, "q_lora_rank": 16, "image_size": 16, "max_source_positions": 16},
    **{"num_mel_bins": 8, "deepstack_visual_indexes": [0], "initializer_range": 0.3},
    **{"init_std": 0.3, "shared_expert_intermediate_size": 32},
}
ALWAYS = ("pad_token_id", "decoder_start_token_id")
PLACES = ["image", "audio", "video", "vision_start", "vision_end", "image_start", "image_end"]
WORDS = {"city": "yes", "land": "no"}
ROWS = [
    {"text": f"{name} is a place in the north of it all", "kind": list(WORDS)[number % 2]}
    for number, name in enumerate(["Paris", "Rome", "France", "Oslo"] * 3)
]
FREE = [{**row, "kind": f"it is a {row['kind']}"} for row in ROWS]
SETTINGS: dict[str, Any] = {"epochs": 2, "batch_size": 6, "word_noise": 0.0, "refit": False}


def small(config: Any) -> Any:
    """The configuration, and those in it, with the sizes of `SMALL` that it has."""
    for name, value in SMALL.items():
        if getattr(config, name, None) is not None or name in ALWAYS:
            with contextlib.suppress(Exception):  # a name that only reads
                setattr(config, name, value)
    if kinds := list(getattr(config, "layer_types", None) or []):
        config.layer_types = (list(dict.fromkeys(kinds)) * 2)[:2]
    for place, ending in itertools.product(PLACES, ("token_id", "token_index")):
        if isinstance(getattr(config, f"{place}_{ending}", None), int):
            setattr(config, f"{place}_{ending}", 500)  # no word of the tokenizer's
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in rope:
        rope["mrope_section"] = [1, 1, 2]
    for value in list(vars(config).values()):
        if isinstance(value, transformers.PretrainedConfig):
            small(value)
    return config


def made(kind: type, mapping: Any) -> Any:
    """A random model.

    Raises:
        Exception: of many kinds, where the configuration cannot be made small so.
    """
    config = small(kind())
    if mapping is transformers.MODEL_FOR_CAUSAL_LM_MAPPING and hasattr(config, "is_decoder"):
        config.is_decoder = True
    architecture = mapping[kind]
    architecture = architecture[0] if isinstance(architecture, tuple) else architecture
    with torch.device("meta"):
        size = sum(weight.numel() for weight in architecture(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million weights are left")
    torch.manual_seed(0)
    model = architecture(config).eval()
    ids = torch.randint(5, 300, (2, 9))
    model(input_ids=ids, **({"decoder_input_ids": ids} if config.is_encoder_decoder else {}))
    return model


def tokenizer_of(masks: bool) -> Any:
    """Bytes and some words; a masked model's puts special tokens around."""
    own = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = tokenizers.decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    own.train_from_iterator([row["text"] + " yes no" for row in ROWS] * 20, trainer)
    if masks:
        own.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    names = ("pad_token", "bos_token", "eos_token", "unk_token", "mask_token")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=own, **dict(zip(names, special, strict=True))
    )


def differences(model: Any, tokenizer: Any, masks: bool) -> Iterator[tuple[str, float | str]]:
    """Column -> the largest difference between a fast way and its plain twin, or what was said."""

    def trained(template: str, rows: list[dict[str, str]] = ROWS, **options: Any) -> ptuning.Prompt:
        words = WORDS if rows is ROWS else None
        prompt = ptuning.Prompt(template, answer="kind", verbalizer=words, encoder="none")
        ptuning.train(
            model, tokenizer, prompt, rows, rows[:4], **{**SETTINGS, "seed": 1, **options}
        )
        return prompt

    def apart(one: ptuning.Prompt, other: ptuning.Prompt) -> float:
        return float((one.trained_vectors() - other.trained_vectors()).abs().max())

    behind, front = "{text} [P*3] kind: [MASK]", "[P*3] {text} kind: [MASK]"
    plain = trained(behind, prefix_cache="off")
    yield "behind", apart(plain, alone := trained(behind))
    yield "in front", apart(trained(front, prefix_cache="off"), first := trained(front))
    both = trained(behind, population=2)
    yield "population", min(apart(both, alone), apart(both, trained(behind, seed=2)))
    texts = [{"text": "it is " * count} for count in (1, 7, 3)]
    largest = 0.0
    for prompt in (alone, first):
        together = ptuning.predict_details(model, tokenizer, prompt, texts)
        for row, said in zip(texts, together, strict=True):
            (single,) = ptuning.predict_details(model, tokenizer, prompt, [row])
            gaps = [abs(said.probabilities[k] - single.probabilities[k]) for k in WORDS]
            largest = max(largest, *gaps)
    yield "batch", largest
    if not masks:
        free = trained("{text} [P*3] so", FREE, prefix_cache="off", epochs=1)
        yield "free", apart(free, trained("{text} [P*3] so", FREE, epochs=1))
        asked = [*texts, *ROWS[:3]]
        said_together = ptuning.predict(model, tokenizer, free, asked, answer_tokens=4)
        said_alone = [
            ptuning.predict(model, tokenizer, free, [row], answer_tokens=4)[0] for row in asked
        ]
        yield "said", float(sum(a != b for a, b in zip(said_together, said_alone, strict=True)))
    with tempfile.TemporaryDirectory() as folder:
        ptuning.merge(model, tokenizer, {"kind": alone}).save(folder)
        merged, _ = ptuning.load_model(folder, device="cpu")
        yield "merged", "yes" if type(merged) is type(model) else type(merged).__name__


def tried(kind: type, mapping: Any, tokenizer: Any, masks: bool) -> dict[str, float | str] | str:
    """The columns of an architecture, or why it could not be made."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            model = made(kind, mapping)
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
        found: dict[str, float | str] = {}
        try:
            found.update(differences(model, tokenizer, masks))
        except Exception as error:
            told = " ".join(str(error).split()).replace(tempfile.gettempdir(), "")[:100]
            name = "" if isinstance(error, ptuning.PtuningError) else f"{type(error).__name__}: "
            found["error"] = f"{name}{told}"
    return found


COLUMNS = ("behind", "in front", "population", "batch", "free", "said", "merged", "error")


def report(found: dict[str, dict[str, Any]], seconds: float) -> str:
    lines = [
        "# Architectures",
        "",
        f"`python benchmarks/architectures.py`, {time.strftime('%Y-%m-%d')}, {seconds / 60:.0f} "
        "minutes.",
        f"torch {torch.__version__}, transformers {transformers.__version__}, ptuning "
        f"{ptuning.__version__}. Tiny random models, float32, CPU.",
        "",
        "Largest differences of trained vectors, with prefixes kept and without (*behind* and *in "
        "front* of the text, *free* answers) and in a population of two; of a *batch*'s "
        "probabilities from its rows' alone; how many of six free answers a batch *said* "
        f"otherwise; whether a *merged* model is read again. Above {LIMIT:g} it is **bold**. "
        "Errors of StrictDataclass are of the small configuration.",
    ]
    for kind, rows in found.items():
        tested = {name: row for name, row in rows.items() if not isinstance(row, str)}
        lines += ["", f"## {kind}: {len(tested)} of {len(rows)} could be made so small", ""]
        lines += ["| model | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
        for name, row in tested.items():
            cells = [_cell(column, row.get(column)) for column in COLUMNS]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        left = sorted(set(rows) - set(tested))
        lines += ["", f"Not made: {', '.join(left) or 'none'}."]
    return "\n".join(lines) + "\n"


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value.replace("|", "\\|")
    text = f"{value:.0f}" if column == "said" or not value else f"{value:.0e}"
    return f"**{text}**" if value > LIMIT else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--only", nargs="+", help="names of configurations' classes")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "ARCHITECTURES.md")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    begun, found = time.monotonic(), {}
    for name in arguments.kind:
        mapping, masks = getattr(transformers, KINDS[name]), name == "masked"
        tokenizer, rows = tokenizer_of(masks), {}
        for kind in list(mapping.keys()):
            label = kind.__name__.removesuffix("Config")
            if arguments.only and kind.__name__ not in arguments.only:
                continue
            rows[label] = tried(kind, mapping, tokenizer, masks)
            print(name, label, rows[label], file=sys.stderr, flush=True)
        found[name] = rows
        arguments.output.write_text(report(found, time.monotonic() - begun), encoding="utf-8")


if __name__ == "__main__":
    main()
