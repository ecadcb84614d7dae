"""At scale "real" five papers have a study on photographs: built from the data where it lies, and from a stand-in otherwise."""

from __future__ import annotations

import functools
import io
import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from weightroom import api, data, tasks
from weightroom.errors import TaskError
from weightroom.papers import dimap, global_magnitude, joint_layerwise, precropping, weight_matching
from weightroom.study import Scale, Study, Trial

MODULES = {
    module.PAPER.key: module for module in (dimap, global_magnitude, joint_layerwise, precropping, weight_matching)
}  # fmt: skip
#: Key -> the settings of its studies at real scale.
SETTINGS = {
    "dimap": [["0.5", "0.7", "0.8"], ["0.55", "0.8"]],
    "global-magnitude": [["0.9", "0.95"]],
    "joint-layerwise": [["0.7", "0.95"]],
    "precropping": [["0.2"]],
    "weight-matching": [[""], [""]],
}


def studies(key) -> list[Study]:
    made = MODULES[key].study(Scale.REAL)
    return made if isinstance(made, list) else [made]


def archive(path, count):
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as zipped:
        for i in range(count):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "JPEG")
            zipped.writestr(f"{i % 10}/{i}.jpg", file.getvalue())


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    """A folder of 80 and 20 pictures of noise stands in for CIFAR-10."""
    archive(tmp_path / "train.zip", 80)
    archive(tmp_path / "test.zip", 20)
    monkeypatch.setattr(tasks, "cifar10", functools.partial(tasks.cifar10, folder=tmp_path))
    for module in MODULES.values():
        monkeypatch.setattr(module, "_IMAGES", 40)
    monkeypatch.setattr(weight_matching, "_RESIDUAL_IMAGES", 40)
    monkeypatch.setattr(weight_matching, "_EPOCHS", 1)


def check(study, settings):
    assert study.scale is Scale.REAL
    assert study.seeds == (100, 101, 102)
    assert study.max_seeds in (3, 5)
    assert list(study.settings) == settings
    assert study.claims
    assert all(study.setting_of(claim.expect) in study.settings for claim in study.claims)


def test_the_papers_that_have_one():
    assert {paper.key for paper in api.papers() if paper.real} == set(MODULES)
    assert all(module.PAPER.real == ("cifar10-jpg",) for module in MODULES.values())


@pytest.mark.parametrize("key", MODULES)
def test_studies_of_a_stand_in(photographs, key):
    made = studies(key)
    for study, settings in zip(made, SETTINGS[key], strict=True):
        check(study, settings)


@pytest.mark.parametrize(
    ("key", "which", "arm"),
    [
        ("global-magnitude", 0, "global + MT"),
        ("precropping", 0, "LAMP"),
        ("dimap", 0, "DIMAP"),
        ("joint-layerwise", 0, "LAMP"),
        ("weight-matching", 0, "weight matching"),
        ("weight-matching", 1, "weight matching"),
    ],
)
def test_a_trial_on_a_stand_in(photographs, tmp_path, key, which, arm):
    if key == "dimap":
        pytest.importorskip("transformers")
    study = studies(key)[which]
    setting = next(iter(study.settings.values()))
    result = study.arms[arm].run(
        Trial(seed=0, scale=Scale.REAL, setting=setting, params=study.arms[arm].defaults, shared=tmp_path)
    )
    assert study.metric in result
    assert set(result) <= set(study.metrics)


@pytest.mark.parametrize("key", MODULES)
def test_without_the_data_it_is_said(monkeypatch, tmp_path, key):
    monkeypatch.delenv("WEIGHTROOM_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(TaskError, match="is not there: set WEIGHTROOM_DATA"):
        studies(key)


@pytest.mark.skipif(
    data.data_root() is None or not (data.data_root() / "cifar10-jpg").is_dir(), reason="WEIGHTROOM_DATA holds no cifar10-jpg"
)
@pytest.mark.parametrize("key", MODULES)
def test_studies_of_the_data(key):
    assert os.environ["WEIGHTROOM_DATA"]
    for study, settings in zip(studies(key), SETTINGS[key], strict=True):
        check(study, settings)
        assert any("samples" in note or "images" in note for note in study.notes.values())
