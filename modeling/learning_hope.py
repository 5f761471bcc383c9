from __future__ import annotations

LEARNING_FILE = "learning.safetensors"


def load_learning(model, path): ...
def save_learning(model, path): ...


class HopeLearningMixin:
    """Learning while reading."""

    has_learned = False
