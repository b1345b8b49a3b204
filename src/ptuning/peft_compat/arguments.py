"""Which of a call's arguments have a value per token of the text, and which no prompt goes with.

Known names go by their meaning, others by their shape. What counts or names the text's tokens in
another way would be wrong with a prompt among them, so it is refused, never passed on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..backbone.upstream import BEFORE, CACHE
from ..errors import InputError

FILLERS: dict[str, int] = {
    "labels": -100,
    "shift_labels": -100,
    "mlm_labels": -100,
    "initial_token_labels": -100,
}
"""What inserted tokens get in arguments with a value per token; 0 in all others."""
_OWN = """
input_ids inputs_embeds attention_mask position_ids labels start_positions end_positions
logits_to_keep
"""
OWN = frozenset([*_OWN.split(), CACHE])
"""What `placing` treats by name."""
# Values per token, by the names that transformers' models give them; others go by their shape.
_PER_TOKEN = """
token_type_ids mm_token_type_ids moe_mm_token_type_ids global_attention_mask shift_labels bbox langs
p_mask mlm_labels images_seq_mask image_embeds_position_mask visual_pos_masks xpath_tags_seq
xpath_subs_seq
"""
# What each token may look at in the images ``(B, T, images, …)``; with other axes another thing.
_OF_IMAGES = ("image_attention_mask", "cross_attention_mask")
# How other inputs begin than the text: images, sounds, other texts, a decoder's, settings.
_OTHER_INPUTS = """
pixel_ image video audio visual vision speech spectrogram input_features input_values feature_
padding_mask flattened_patches high_res_ codebook_ bool_masked_pos mim_labels obj_labels decoder_
encoder_ cross_attn_ cross_attention_states head_mask mm_encoder_outputs deepstack_ entity_ qformer_
query_embeds text_embeds context_ attack_ labels_ protein_ structure_ msa_ moshi_ user_ speaker_
spatial_shapes
"""
_MADE_BEFORE = "it was made without the prompt, or with another"
_SEVERAL_TEXTS = "several texts in one row would share the prompt of the first"
_POSITIONS = "it names or counts the text's tokens"
_BETWEEN = "it relates the text's tokens to one another"
_REFUSED = {
    "encoder_outputs": _MADE_BEFORE,
    "cache_params": _MADE_BEFORE,
    "cache": _MADE_BEFORE,
    "mems": _MADE_BEFORE,
    "past_buckets_states": _MADE_BEFORE,
    "state": _MADE_BEFORE,
    "cu_seq_lens_q": _SEVERAL_TEXTS,
    "cu_seq_lens_k": _SEVERAL_TEXTS,
    "seq_idx": _SEVERAL_TEXTS,
    "cache_position": _POSITIONS,
    "cls_index": _POSITIONS,
    "mc_token_ids": _POSITIONS,
    "lengths": _POSITIONS,
    "patch_lengths": _POSITIONS,
    "question_lengths": _POSITIONS,
    "question_positions": _POSITIONS,
    "entity_position_ids": _POSITIONS,
    "entity_start_positions": _POSITIONS,
    "entity_end_positions": _POSITIONS,
    "image_input_idx": _POSITIONS,
    "subsequent_token_labels": _POSITIONS,
    "perm_mask": _BETWEEN,
    "target_mapping": _BETWEEN,
    "block_sequence_ids": _BETWEEN,
    "per_layer_inputs": "virtual tokens have none",
}


def renamed(given: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments, keys and values by the name that this release of transformers has.

    Raises:
        InputError: they are given by both names.
    """
    if given.get(BEFORE) is None or CACHE == BEFORE:
        return given
    if given.get(CACHE) is not None:
        raise InputError(f"{CACHE} and {BEFORE} are one argument; give {CACHE} alone")
    return {**{k: v for k, v in given.items() if k != BEFORE}, CACHE: given[BEFORE]}


def check(inputs: Mapping[str, Any]) -> None:
    """Refuse what no prompt goes with.

    Args:
        inputs: a call's arguments by name; None counts as not given.

    Raises:
        InputError: one of them cannot be given room for a prompt; the message names it.
    """
    for name, reason in _REFUSED.items():
        if inputs.get(name) is not None and name != CACHE:
            raise _refusal(name, reason)


def per_token(inputs: Mapping[str, Any], rows: int, length: int) -> list[str]:
    """The names of arguments, beside `OWN`, that have a value per token of the text.

    Args:
        inputs: a call's arguments.
        rows: B.
        length: T, the text's tokens.

    Returns:
        Names of tensors ``(B, T, …)`` or ``(1, T, …)``.

    Raises:
        InputError: a tensor that belongs to the text, but does not say how.
    """
    return [
        name
        for name, value in inputs.items()
        if isinstance(value, Tensor) and name not in OWN and _of_text(name, value, rows, length)
    ]


def _of_text(name: str, value: Tensor, rows: int, length: int) -> bool:
    shape = tuple(value.shape)
    fits = len(shape) > 1 and shape[0] in (1, rows) and shape[1] == length
    if name in _PER_TOKEN.split():
        if not fits:
            raise InputError(
                f"{name} has shape {shape}, and the input ({rows}, {length}): give one value per "
                "token of the text; virtual tokens are added here"
            )
        return True
    if name in _OF_IMAGES:
        return fits and len(shape) > 2
    if name.startswith(tuple(_OTHER_INPUTS.split())):
        return False
    if not fits:
        if "mask" in name and len(shape) > 2 and length in shape[1:]:
            raise _refusal(name, f"its shape {shape} relates the text's tokens to one another")
        return False
    if len(shape) > 2 and (value.is_floating_point() or length in shape[2:]):
        raise _refusal(name, f"its shape {shape} does not say which axis is the text's")
    return True


def _refusal(name: str, reason: str) -> InputError:
    return InputError(f"{name} does not go with a prompt: {reason}; leave it out")
