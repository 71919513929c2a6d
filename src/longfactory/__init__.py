"""LongFactory: post-train any Hugging Face language model on sequences of any length."""

__version__ = "0.1.0"
