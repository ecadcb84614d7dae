"""Readers of real data: where it lies, whether it is what it should be, and how it is read.

Data is looked for in the folder that the environment variable ``WEIGHTROOM_DATA`` names, one sub-folder per set. Nothing is
ever downloaded unless ``download=True`` is said; then the full set goes, checked by its checksum, to the user's cache folder.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from weightroom.errors import TaskError

__all__ = ["chase_db1", "cifar10", "data_root", "mnist"]

Arrays = tuple[Tensor, Tensor, Tensor, Tensor]

_MNIST_10K = {
    "t10k-images-idx3-ubyte.gz": "ba05d2d6e06f59dd97d2d5378250478bb5c9b64296a5c2681700569121e3a2d7",
    "t10k-labels-idx1-ubyte.gz": "94088eab8a64f51a9b34cc9716f54b6548ef8b2fd16ada6d1575091b933dbf4b",
}
_CIFAR_JPG = {
    "train.zip": "cc98a041354cd4e270459f773dac7be7f04b8cdd8a7a6f701b9486a5e51ad0e1",
    "test.zip": "64ea5a17500fad6bcae726be0155d794e1488e3e188c79c6eb13f74f0fff34d0",
}
_MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_MNIST_FULL = {
    "train-images-idx3-ubyte.gz": "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "md5:d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "md5:9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "md5:ec29112dd5afa0611ce80d1b7f02629c",
}
_CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_CIFAR_MD5 = "md5:c32a1d4ab5d03f1284b67883e8d87530"


def data_root() -> Path | None:
    """The folder that ``WEIGHTROOM_DATA`` names; None where it is not set."""
    root = os.environ.get("WEIGHTROOM_DATA")
    return Path(root) if root else None


def mnist(*, download: bool = False, folder: Path | None = None) -> Arrays:
    """Handwritten digits, 28 x 28, in [0, 1].

    From ``WEIGHTROOM_DATA/mnist10k`` (the 10,000 test images: the first 8,000 to train, the last 2,000 to test), else the
    full set (60,000 and 10,000) that was downloaded earlier or, with ``download=True``, now.

    Args:
        download: fetch the full set where it is not there.
        folder: read the 10,000 from here, unchecked.

    Returns:
        Training images (n, 1, 28, 28) float32 and labels (n,) int64, test images and labels.

    Raises:
        TaskError: the data is not there, or is damaged.
    """
    here = folder or _under_root("mnist10k")
    if here is not None:
        _verify(here, {} if folder else _MNIST_10K)
        images, labels = (_idx(here / name) for name in _MNIST_10K)
        cut = int(0.8 * len(images))
        return _pixels(images[:cut, None]), _labels(labels[:cut]), _pixels(images[cut:, None]), _labels(labels[cut:])
    paths = {name: _fetched(_MNIST_URL + name, check, "mnist", download) for name, check in _MNIST_FULL.items()}
    train, train_labels, test, test_labels = (_idx(path) for path in paths.values())
    return _pixels(train[:, None]), _labels(train_labels), _pixels(test[:, None]), _labels(test_labels)


def cifar10(*, download: bool = False, folder: Path | None = None) -> Arrays:
    """Small colour photographs of ten kinds of things, 32 x 32, in [0, 1].

    From ``WEIGHTROOM_DATA/cifar10-jpg`` (20,000 and 5,000 re-compressed images: accuracies are not comparable with the official
    files to better than a point), else the full set (50,000 and 10,000) that was downloaded earlier or, with ``download=True``, now.

    Args:
        download: fetch the full set where it is not there.
        folder: read the re-compressed images from here, unchecked.

    Returns:
        Training images (n, 3, 32, 32) float32 and labels (n,) int64, test images and labels.

    Raises:
        TaskError: the data is not there, or is damaged.
    """
    here = folder or _under_root("cifar10-jpg")
    if here is not None:
        _verify(here, {} if folder else _CIFAR_JPG)
        train, train_labels = _jpegs(here / "train.zip")
        test, test_labels = _jpegs(here / "test.zip")
        return train, train_labels, test, test_labels
    path = _fetched(_CIFAR_URL, _CIFAR_MD5, "cifar10", download)
    with tarfile.open(path) as archive:
        names = [f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)], ["cifar-10-batches-bin/test_batch.bin"]
        parts = [np.concatenate([_rows(archive, name) for name in group]) for group in names]
    out = [x for part in parts for x in (_pixels(part[:, 1:].reshape(-1, 3, 32, 32)), _labels(part[:, 0]))]
    return out[0], out[1], out[2], out[3]


def chase_db1(*, folder: Path | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """Fundus photographs of children's eyes with vessel masks (CHASE_DB1, 14 of 28), from ``WEIGHTROOM_DATA/chase-db1``.

    Returns:
        Name ("01L") -> image (3, 960, 999) float32 in [0, 1] and mask (1, 960, 999) float32 of 0 and 1.

    Raises:
        TaskError: the data is not there.
    """
    here = folder or _under_root("chase-db1")
    masks = sorted(here.glob("Image_*_mask.png")) if here is not None else []
    if not masks:
        raise TaskError(
            "CHASE_DB1 is not there: set WEIGHTROOM_DATA to a folder with chase-db1/Image_01L.png, Image_01L_mask.png, ..."
        )
    out = {}
    for path in masks:
        name = path.name.removeprefix("Image_").removesuffix("_mask.png")
        image = np.asarray(Image.open(path.with_name(f"Image_{name}.png")).convert("RGB"))
        mask = np.asarray(Image.open(path).convert("L")) > 127
        out[name] = (_pixels(image.transpose(2, 0, 1)), torch.from_numpy(mask[None].astype(np.float32)))
    return out


def _under_root(name: str) -> Path | None:
    root = data_root()
    return root / name if root is not None and (root / name).is_dir() else None


def _verify(folder: Path, sums: Mapping[str, str]) -> None:
    for name, expected in sums.items():
        path = folder / name
        if not path.exists():
            raise TaskError(f"{path} is missing: restore it, or unset WEIGHTROOM_DATA")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                raise TaskError(
                    f"{path} is not the file it should be (its SHA-256 differs): restore it, or unset WEIGHTROOM_DATA"
                )


def _fetched(url: str, check: str, name: str, download: bool) -> Path:
    import platformdirs
    import pooch

    cache = Path(platformdirs.user_cache_dir("weightroom")) / name
    path = cache / url.rpartition("/")[2]
    if not path.exists() and not download:
        raise TaskError(
            f"the data of task {name!r} is not there: set WEIGHTROOM_DATA to the folder that holds it, or say --download "
            f"(download=True) to fetch the full set to {cache}"
        )
    try:
        return Path(pooch.retrieve(url, known_hash=check, fname=path.name, path=cache, progressbar=False))
    except Exception as error:
        raise TaskError(
            f"{url} could not be downloaded ({type(error).__name__}): check the connection and say --download again"
        ) from error


def _idx(path: Path) -> np.ndarray:
    try:
        raw = gzip.decompress(path.read_bytes())
        shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except (OSError, EOFError, IndexError, ValueError) as error:
        raise TaskError(f"{path} cannot be read as a gzipped IDX file ({error})") from error


def _jpegs(path: Path) -> tuple[Tensor, Tensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(n for n in archive.namelist() if n.endswith(".jpg"))
            classes = {kind: k for k, kind in enumerate(sorted({n.rpartition("/")[0] for n in names}))}
            images = np.stack([np.asarray(Image.open(io.BytesIO(archive.read(n))).convert("RGB")) for n in names])
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise TaskError(f"{path} cannot be read as a zip of JPEG images ({error})") from error
    labels = torch.tensor([classes[n.rpartition("/")[0]] for n in names])
    return _pixels(images.transpose(0, 3, 1, 2)), labels


def _rows(archive: tarfile.TarFile, name: str) -> np.ndarray:
    file = archive.extractfile(name)
    if file is None:
        raise TaskError(f"the CIFAR-10 archive lacks {name}")
    return np.frombuffer(file.read(), np.uint8).reshape(-1, 3073)


def _pixels(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images.astype(np.float32)).div_(255)


def _labels(labels: np.ndarray) -> Tensor:
    return torch.from_numpy(labels.astype(np.int64))
