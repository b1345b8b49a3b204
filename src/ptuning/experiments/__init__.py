"""The paper's experiments, on any model: what the command line's `lama` and `superglue` run."""
