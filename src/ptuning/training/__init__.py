"""From rows to trained prompts: one loop, always over a population."""
