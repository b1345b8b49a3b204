"""LAMA: knowledge probing, the paper's section 4."""
