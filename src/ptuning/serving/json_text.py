"""JSON that every client can read, whatever a prompt's files or a model's numbers hold."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse

from ..data.writing import finite


class Json(JSONResponse):
    """A response in ASCII: half a surrogate pair is an escape, and what is not finite is null."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return json.dumps(finite(content), separators=(",", ":")).encode()


def event(value: Any) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(finite(value))}\n\n"
