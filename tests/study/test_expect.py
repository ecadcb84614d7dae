import math

import pytest

from weightroom.errors import UsageError
from weightroom.study import Claim, Expect, Study


def run(trial):
    return {"m": 0.0}


def test_each_form_is_a_region_of_a_mean():
    e = Expect("a", metric="m", on="s", tuned=True)
    assert (e.better_than("b", by=0.1).low, e.better_than("b", by=0.1).high) == (0.1, math.inf)
    assert (e.not_worse_than("b", by=0.1).low, e.not_worse_than("b").strict) == (-0.1, False)
    assert (e.worse_than("b", by=0.2).high, e.worse_than("b").strict) == (-0.2, True)
    assert (e.equal_to("b", within=0.3).low, e.equal_to("b", within=0.3).high) == (-0.3, 0.3)
    assert (e.within(1, 2).low, e.within(1, 2).high, e.within(1, 2).other) == (1, 2, None)
    assert e.always(high=3).kind == "always"
    assert e.better_than("b").metric == "m"
    assert e.better_than("b").on == "s"
    assert e.better_than("b").tuned


def test_it_says_itself_in_words():
    assert str(Expect("a").better_than("b", by=0.01)) == "a is better than b by more than 0.01"


def test_an_unfinished_expectation_is_refused():
    with pytest.raises(UsageError, match=r"unfinished: add \.better_than"):
        Claim("hope", Expect("a"))


@pytest.mark.parametrize(
    "make",
    [
        lambda e: e.better_than("b", by=-1),
        lambda e: e.equal_to("b", within=0),
        lambda e: e.within(2, 1),
        lambda e: e.not_worse_than("b", by=math.nan),
    ],
)
def test_margins_that_make_no_sense_are_refused(make):
    with pytest.raises(UsageError, match=r"must be"):
        make(Expect("a"))


@pytest.mark.parametrize(
    ("expect", "message"),
    [
        (Expect("aa").within(0, 1), "unknown arm in an expectation 'aa': did you mean 'a'"),
        (Expect("a").better_than("bb"), "did you mean 'b'"),
        (Expect("a", metric="n").within(0, 1), "unknown metric in an expectation 'n'"),
        (Expect("a", on="t").within(0, 1), "unknown setting in an expectation 't'"),
        (Expect("a", tuned=True).within(0, 1), "tune is 0"),
    ],
)
def test_a_study_refuses_expectations_about_what_it_has_not(expect, message):
    with pytest.raises(UsageError, match=message):
        Study("s", {"a": run, "b": run}, metric="m", expect=[expect])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": {}}, "has no arms"),
        ({"seeds": 0}, "seeds must be >= 1, got 0"),
        ({"seeds": (1, 1)}, "seeds must be different"),
        ({"seeds": (-1,)}, "seeds must be different integers >= 0"),
        ({"max_seeds": 2}, "max_seeds must be >= seeds, got 2 < 5"),
        ({"baseline": "c"}, "unknown baseline arm 'c'"),
        ({"direction": "up"}, "direction"),
        ({"scale": "smal"}, "did you mean 'small'"),
        ({"tune": -1}, "tune must be an integer >= 0, got -1"),
        ({"seeds": "3"}, "seeds must be an integer >= 1 or a sequence"),
        ({"seeds": True}, "seeds must be"),
        ({"metrics": ["a"]}, "metrics must be a mapping"),
        ({"metric": 3}, "metric must be a name"),
        ({"alpha": 0.0}, r"alpha must be in \(0, 1\)"),
        ({"settings": {}}, "settings"),
    ],
)
def test_a_study_checks_its_arguments(change, message):
    with pytest.raises(UsageError, match=message):
        Study(**{"name": "s", "arms": {"a": run}, "metric": "m", **change})
