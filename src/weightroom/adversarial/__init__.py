"""Attacks, and training objectives that need the model."""

__all__: list[str] = []
