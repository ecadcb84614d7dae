"""Gram matrices and what is closed form in them."""

__all__: list[str] = []
