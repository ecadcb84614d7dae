"""What a trained network looks like inside."""

__all__: list[str] = []
