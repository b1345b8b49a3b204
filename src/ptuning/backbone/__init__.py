"""The frozen model: loading it, what it is, and the hooks that put prompts into it."""
