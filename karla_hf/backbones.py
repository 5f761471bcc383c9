"""Frozen backbones (L0): load them, their tokenizers, and find the folder of converted copies."""

from .modeling.backbone_karla import load_backbone, load_tokenizer
from .modeling.conversion_karla import backbone_cache_dir


__all__ = ["backbone_cache_dir", "load_backbone", "load_tokenizer"]
