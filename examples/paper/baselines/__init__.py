"""Optimizers of the paper's comparisons that neither torch nor pytorch-optimizer has."""
