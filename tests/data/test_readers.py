import gzip
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from weightroom import data
from weightroom.errors import TaskError

REAL = os.environ.get("WEIGHTROOM_DATA")


def idx(array):
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return gzip.compress(head + array.astype(np.uint8).tobytes())


def test_mnist_from_a_folder(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (10, 28, 28))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(idx(images))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(idx(np.arange(10)))
    x, y, test_x, test_y = data.mnist(folder=tmp_path)
    assert (x.shape, test_x.shape) == ((8, 1, 28, 28), (2, 1, 28, 28))
    assert torch.allclose(x[3, 0], torch.from_numpy(images[3] / 255).float())
    assert (y.tolist(), test_y.tolist(), y.dtype) == (list(range(8)), [8, 9], torch.int64)


def test_a_damaged_file_is_said(tmp_path):
    for name in ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        (tmp_path / name).write_bytes(b"not gzip")
    with pytest.raises(TaskError, match="cannot be read as a gzipped IDX file"):
        data.mnist(folder=tmp_path)


def jpeg(colour):
    file = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(file, "JPEG", quality=100)
    return file.getvalue()


def test_cifar_from_a_folder(tmp_path):
    for name in ("train.zip", "test.zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("cat/1.jpg", jpeg((255, 0, 0)))
            archive.writestr("bird/7.jpg", jpeg((0, 0, 255)))
    x, y, test_x, _ = data.cifar10(folder=tmp_path)
    assert (x.shape, y.tolist(), test_x.shape) == ((2, 3, 32, 32), [0, 1], (2, 3, 32, 32))
    assert x[0, :, 0, 0].round().tolist() == [0, 0, 1]
    (tmp_path / "test.zip").write_bytes(b"no zip")
    with pytest.raises(TaskError, match="cannot be read as a zip of JPEG images"):
        data.cifar10(folder=tmp_path)


def test_chase_from_a_folder(tmp_path):
    Image.new("RGB", (20, 10), (255, 0, 0)).save(tmp_path / "Image_01L.png")
    Image.new("1", (20, 10), 1).save(tmp_path / "Image_01L_mask.png")
    image, mask = data.chase_db1(folder=tmp_path)["01L"]
    assert (image.shape, mask.shape) == ((3, 10, 20), (1, 10, 20))
    assert mask.unique().tolist() == [1.0]


@pytest.mark.parametrize("reader", [data.mnist, data.cifar10])
def test_nothing_is_downloaded_without_the_users_word(reader, monkeypatch, tmp_path):
    monkeypatch.delenv("WEIGHTROOM_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(TaskError, match=r"set WEIGHTROOM_DATA .* or say --download"):
        reader()
    assert not list(tmp_path.iterdir())


def test_an_absent_chase_is_said(monkeypatch):
    monkeypatch.delenv("WEIGHTROOM_DATA", raising=False)
    with pytest.raises(TaskError, match="set WEIGHTROOM_DATA"):
        data.chase_db1()


def test_files_under_the_root_are_verified(monkeypatch, tmp_path):
    monkeypatch.setenv("WEIGHTROOM_DATA", str(tmp_path))
    (tmp_path / "mnist10k").mkdir()
    with pytest.raises(TaskError, match=r"t10k-images-idx3-ubyte.gz is missing"):
        data.mnist()
    (tmp_path / "mnist10k" / "t10k-images-idx3-ubyte.gz").write_bytes(idx(np.zeros((2, 28, 28))))
    with pytest.raises(TaskError, match=r"its SHA-256 differs"):
        data.mnist()


@pytest.mark.skipif(not REAL or not Path(REAL).is_dir(), reason="WEIGHTROOM_DATA is not set")
def test_the_real_files():
    assert data.mnist()[0].shape == (8000, 1, 28, 28)
    assert data.cifar10()[2].shape == (5000, 3, 32, 32)
    assert len(data.chase_db1()) == 14
