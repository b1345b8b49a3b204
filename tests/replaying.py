"""Stand-ins for a captured graph, where there is no GPU or where one is to fail; what trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

FRONT = "[P*3] {text} [P*2] is [MASK]"
AFTER = "Question about {text}: [P*3] is [P*2] [MASK]"
WORDS = {"yes": ["Paris", "Rome"], "no": "Ra"}
ROWS = [
    {"text": f"{n} " + "France and the cities " * (1 + n % 3), "answer": word, "label": label}
    for n, (word, label) in enumerate([("Paris", "yes"), ("Rome", "no"), ("Oslo", "yes")] * 7)
]


class Again:
    """Runs the function on the static buffers, as a replayed graph does."""

    def capture(self, function: Callable[[], Any]) -> None:
        self.function = function

    def replay(self) -> Any:
        return self.function()


class Stale(Again):
    """Gives what the first batch gave, whatever is in the buffers."""

    def replay(self) -> Any:
        if not hasattr(self, "outputs"):
            self.outputs = self.function()
        return self.outputs


class Failing(Again):
    def capture(self, function: Callable[[], Any]) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


class FailingAtItsEnd(Again):
    """As CUDA: what breaks a capture makes its end fail too."""

    def capture(self, function: Callable[[], Any]) -> None:
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        finally:
            raise RuntimeError("failed due to a previous error during capture")
