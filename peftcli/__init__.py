"""Fine-tune a language model on one GPU from one YAML recipe."""

__version__ = "0.1.0"
