"""`Progress`: what a training tells its listener."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """What a listener hears: after each optimizer step, and with `record` after each epoch.

    Attributes:
        loss: mean over the members in training.
        record: of the member that is best so far.
        members: how many are in training.
        of: how many there were.
        note: what the user should know, said once.
    """

    step: int
    steps: int
    epoch: int
    loss: float
    record: dict[str, float] | None = None
    members: int = 1
    of: int = 1
    note: str = ""
