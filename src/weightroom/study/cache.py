"""Tensors that several trials start from, made once per store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor

from weightroom.study.fingerprint import fingerprint, versions

__all__ = ["cached"]


def cached(
    folder: Path | None, name: str, make: Callable[[], dict[str, Tensor]], decides: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Returns ``make()``, from disk where another trial has made it; see ``Trial.cached``."""
    if folder is None:
        return make()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{fingerprint(make, closures=False)[:8]}{fingerprint(dict(decides), versions())}.safetensors"
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            part = path.with_suffix(".part")
            save_file({key: tensor.detach().cpu().contiguous().clone() for key, tensor in make().items()}, part)
            part.replace(path)
    return load_file(path)
