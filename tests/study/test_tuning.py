import pytest

from weightroom.errors import UsageError
from weightroom.study.tuning import propose


def test_a_small_grid_is_tried_whole():
    assert propose({"lr": [0.1, 0.01], "wd": [0, 1]}, {"lr": 0.5, "k": 3}, 4) == [
        {"lr": 0.1, "k": 3, "wd": 0}, {"lr": 0.1, "k": 3, "wd": 1}, {"lr": 0.01, "k": 3, "wd": 0}, {"lr": 0.01, "k": 3, "wd": 1},
    ]  # fmt: skip


def test_everybody_gets_the_same_number_of_different_trials():
    for space in (
        {"lr": (1e-4, 1.0, "log")},
        {"lr": (0.0, 1.0)},
        {"n": (1, 100, "int"), "lr": (1e-3, 1.0, "log")},
        {"a": [1, 2, 3, 4, 5], "b": (0.0, 1.0)},
    ):
        proposals = propose(space, {}, 5)
        assert len(proposals) == 5
        assert all(proposals.count(p) == 1 for p in proposals)
        assert proposals == propose(space, {}, 5)


def test_ranges_are_respected_and_the_defaults_come_first():
    proposals = propose({"lr": (1e-4, 1e-1, "log"), "n": (2, 9, "int")}, {"lr": 3e-3, "n": 4}, 8)
    assert proposals[0] == {"lr": 3e-3, "n": 4}
    assert all(1e-4 <= p["lr"] <= 1e-1 and 2 <= p["n"] <= 9 and isinstance(p["n"], int) for p in proposals)
    assert min(p["lr"] for p in proposals) < 1e-3 < 1e-2 < max(p["lr"] for p in proposals)


def test_nothing_to_choose():
    assert propose({}, {"lr": 1.0}, 8) == [{"lr": 1.0}]


@pytest.mark.parametrize("choices", [[], (1,), (2, 1), (0.0, 1.0, "log"), "0.1", (1, 2, "linear"), {0.1}])
def test_a_range_that_is_none_is_refused(choices):
    with pytest.raises(UsageError, match="the space of 'lr' must be"):
        propose({"lr": choices}, {}, 3)
