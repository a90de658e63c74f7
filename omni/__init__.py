"""μOmni: train a whole omni model from random weights."""

__version__ = "0.1.0"
