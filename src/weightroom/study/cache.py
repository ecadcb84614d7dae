"""Tensors that several trials start from, made once per store."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from weightroom.errors import StoreError
from weightroom.study.fingerprint import fingerprint, versions

__all__ = ["cached", "writing"]


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what goes wrong with the disk into a ``StoreError``."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{path} cannot be written ({error}): free some space or mend the permissions, and run again") from error


def cached(
    folder: Path | None, name: str, make: Callable[[], dict[str, Tensor]], decides: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Returns ``make()``, from disk where another trial has made it; see ``Trial.cached``."""
    if folder is None:
        return make()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{fingerprint(make, closures=False)[:8]}{fingerprint(dict(decides), versions())}.safetensors"
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            part = path.with_suffix(".part")
            tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in make().items()}
            with writing(path):
                save_file(tensors, part)
                part.replace(path)
    return load_file(path)
