"""The README.md of a saved prompt: what it is, what it was trained on, how to use it."""

from __future__ import annotations

from typing import Any

from .template import parse

_USE = """```python
import ptuning

model, tokenizer = ptuning.load_model("{base}")
prompt = ptuning.Prompt.load("path/to/this/folder")
print(ptuning.predict(model, tokenizer, prompt, [{example}]))
```"""


def model_card(description: dict[str, Any]) -> str:
    """Markdown with the hub's metadata block, from the values of ``prompt.json``."""
    base = description["base_model"].get("name", "")
    template = description["template"]
    reads = "peft" if description.get("peft_config") and template is None else "ptuning"
    lines = ["---", f"library_name: {reads}"]
    # A local path means nothing on the hub, but PEFT's card of an adapter has it.
    if base and (reads == "peft" or not base.startswith(("/", "."))):
        lines.append(f"base_model: {base}")
    lines += ["tags:", "- p-tuning", "- prompt", "---", "", "# A P-tuned prompt", ""]
    lines.append(
        f"{description['num_virtual_tokens']} virtual tokens for the frozen model "
        f"`{base or 'unknown'}`, trained by P-tuning (arXiv 2103.10385)."
    )
    if template is None:
        lines += ["", "The virtual tokens stand in front of the whole input."]
    else:
        lines += ["", "Template:", "", "```text", template, "```"]
    if description["verbalizer"]:
        lines += ["", "| label | words |", "|---|---|"]
        lines += [f"| {k} | {', '.join(v)} |" for k, v in description["verbalizer"].items()]
    scores = {k: v for k, v in description["training"].items() if isinstance(v, int | float)}
    if scores:
        lines += ["", "| training | |", "|---|---|"]
        lines += [f"| {key.replace('_', ' ')} | {value:.6g} |" for key, value in scores.items()]
    if template is not None:
        example = {name: "…" for name in parse(template).fields}
        lines += ["", _USE.format(base=base or "base model", example=example)]
    return "\n".join(lines) + "\n"
