"""Students that learn from teachers."""

__all__: list[str] = []
