"""Rows behind one prefix, one behind the other in a single row of the model.

    document | prompt A | prompt B | prompt C        one prefill, one copy of its keys and values

Each segment sees the prefix and itself: the mask is block diagonal behind the prefix, and positions
begin anew in each segment. So sixteen prompts on one document, or the candidates of one question,
cost one row.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from ..collate import Batch
from ..loss import Shortened

_WIDEST = 4096
"""Columns of a packed row: attention between segments is masked, but still computed."""


@dataclass(frozen=True)
class Packed:
    """A causal batch of R rows as G < R packed rows, one for each prefix.

    Attributes:
        prefixes: of the packed rows; each has one member's rows.
        input_ids: ``(G, W)`` the segments, without the prefixes.
        attention_mask: ``(G, 1, W, prefix + W)``, True where a column is seen.
        position_ids: ``(G, W)``.
        keep: ``(C,)`` the columns that predict an answer, of any row.
        group: ``(R,)`` the packed row of each row.
        answers: ``(R, K)`` the place in `keep` of each row's answer positions.
    """

    prefixes: tuple[tuple[int, ...], ...]
    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    keep: Tensor
    group: Tensor
    answers: Tensor

    def behind(self, cache: Cache) -> Shortened:
        """What is left to compute behind the prefixes' keys and values, each at the right end."""
        inputs = {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            "logits_to_keep": self.keep,
            "past_key_values": cache,
        }
        return Shortened(inputs, lambda logits: logits[self.group[:, None], self.answers])


def can_pack(model: nn.Module) -> bool:
    """The model's attention takes a mask of our own, and its positions are what it is told.

    So it is with rotary positions, full attention in every layer, and PyTorch's attention.
    """
    config = getattr(model, "config", None)
    if config is None or getattr(config, "_attn_implementation", None) != "sdpa":
        return False
    text = config.get_text_config()
    rotary = getattr(text, "rope_parameters", None) or getattr(text, "rope_theta", None)
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    window = getattr(text, "sliding_window", None) and not getattr(text, "layer_types", None)
    return bool(rotary) and kinds == {"full_attention"} and not window


def saves_padding(batch: Batch, width: int) -> bool:
    """Whether packed rows cost less than rows padded to the longest.

    Packing computes no padding, but attention between segments that do not see each other. A token
    costs as much in a layer's matrices as in attention to 6 x `width` keys, and half of that
    counted, since products as small as attention's run slower.

    Args:
        batch: with the prefixes behind which rows may be packed.
        width: the model's hidden size.
    """
    rests = [n - len(p) for n, p in zip(batch.lengths, batch.prefixes, strict=True)]
    packed: Counter[Any] = Counter()
    for owner, rest in zip(_owners(batch), rests, strict=True):
        packed[owner] += rest
    kept = max(map(len, batch.prefixes))

    def cost(rows: int, columns: int) -> int:
        return rows * columns * (3 * width + kept + columns)

    return cost(len(packed), max(packed.values())) < cost(len(rests), max(rests))


def pack(batch: Batch) -> Packed | None:
    """The batch with a member's rows of one prefix packed; None where nothing is shared or a row is
    too wide.

    The rows' prefixes are left out of the packed rows, and shorter ones stand at the right.
    """
    owners = _owners(batch)
    places = {owner: place for place, owner in enumerate(dict.fromkeys(owners))}
    if len(places) == len(owners):
        return None
    prefixes = tuple(prefix for prefix, _ in places)
    count = batch.answers.shape[1]
    ids: list[list[int]] = [[] for _ in prefixes]
    segments: list[list[int]] = [[] for _ in prefixes]
    offsets: list[list[int]] = [[] for _ in prefixes]
    group, columns = [], []
    for number, (row, length) in enumerate(
        zip(batch.input_ids.tolist(), batch.lengths, strict=True)
    ):
        place = places[owners[number]]
        suffix = row[len(row) - length + len(batch.prefixes[number]) :]
        start = len(ids[place])
        ids[place] += suffix
        segments[place] += [number] * len(suffix)
        offsets[place] += range(len(suffix))
        end = len(ids[place])
        group.append(place)
        columns.append([max(start, end - count + k) for k in range(count)])
    width = max(map(len, ids))
    if width > _WIDEST:
        return None
    device = batch.input_ids.device
    segment, offset = _filled(segments, width, -1), _filled(offsets, width, 0)
    lengths = torch.tensor([len(prefix) for prefix in prefixes])
    keep, answers = torch.tensor(columns).unique(return_inverse=True)
    return Packed(
        prefixes,
        _filled(ids, width, 0).to(device),
        _mask(segment, offset, lengths).to(device),
        (lengths[:, None] + offset).to(device),
        keep.to(device),
        torch.tensor(group, device=device),
        answers.to(device),
    )


def _owners(batch: Batch) -> list[tuple[tuple[int, ...], int]]:
    """Whose packed row each row belongs to: rows of one prefix and one member of a population, for
    what is not finite in one member would reach others in its row, masked or not."""
    return list(zip(batch.prefixes, batch.member[batch.example].tolist(), strict=True))


def _mask(segment: Tensor, offset: Tensor, lengths: Tensor) -> Tensor:
    own = segment[:, :, None] == segment[:, None, :]
    own = own & (offset[:, None, :] <= offset[:, :, None])
    kept = int(lengths.max())
    seen = torch.arange(kept) >= kept - lengths[:, None]
    prefix = seen[:, None, :].expand(-1, segment.shape[1], -1)
    return torch.cat([prefix, own], dim=2).unsqueeze(1)


def _filled(rows: list[list[int]], width: int, value: int) -> Tensor:
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])
