"""A frozen language model with a memory that learns by reading and a head that thinks."""

__version__ = "0.1.0"
