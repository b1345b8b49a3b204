"""Trained prompts in use: attaching, predicting, evaluating."""
