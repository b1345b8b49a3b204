"""Trained prompts behind HTTP: many on one base model, mixed in one batch."""
