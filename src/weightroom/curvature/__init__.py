"""Products with Fisher matrices and their inverses."""

__all__: list[str] = []
