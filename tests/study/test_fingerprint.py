import copy
import functools
import subprocess
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from weightroom.study.fingerprint import fingerprint

SOURCE = """
LIMIT = {limit}
def helper(x):
    return x + {add}
class Part:
    def step(self):
        return helper({step})
def unused():
    return {unused}
def arm(trial):
    '''{doc}'''
    part = Part()
    return {{"m": part.step() + LIMIT}}
"""


def arm(limit=1, add=1, step=1, unused=1, doc="does", pad=""):
    module = types.ModuleType("user_file")
    exec(pad + SOURCE.format(limit=limit, add=add, step=step, unused=unused, doc=doc), module.__dict__)
    sys.modules["user_file"] = module
    return module.arm


def test_what_decides_changes_it_and_what_does_not_leaves_it():
    same = fingerprint(arm())
    assert fingerprint(arm()) == same
    assert fingerprint(arm(pad="\n\n# a comment\n")) == same
    assert fingerprint(arm(doc="says")) == same
    assert fingerprint(arm(unused=2)) == same
    assert len({same, fingerprint(arm(add=2)), fingerprint(arm(step=2)), fingerprint(arm(limit=2))}) == 4


def test_closures_and_defaults_count():
    def make(value, default=1):
        def run(trial, extra=default):
            return value + extra

        return run

    assert fingerprint(make(1)) == fingerprint(make(1))
    assert fingerprint(make(1)) != fingerprint(make(2))
    assert fingerprint(make(1)) != fingerprint(make(1, default=2))
    assert fingerprint(make(1), closures=False) == fingerprint(make(2), closures=False)


def test_values_of_all_kinds():
    @dataclass
    class Thing:
        x: int

    things = [
        1, 1.0, True, "1", b"1", None, (1,), {"a": 1}, {"a": 2}, {1, 2}, np.array([1.0]), np.array([1]), np.array([[1.0]]), torch.tensor([1.0]),
        torch.tensor(1.0), torch.tensor([1.0], dtype=torch.bfloat16), Thing(1), Thing(2), functools.partial(max, 1), nn.Linear, nn.ReLU, torch.relu,
        TensorDataset(torch.ones(2)), TensorDataset(torch.zeros(2)), torch.Generator().manual_seed(1), np.array(["a", None], dtype=object),
    ]  # fmt: skip
    prints = [fingerprint(thing) for thing in things]
    assert len(set(prints)) == len(things)
    assert prints == [fingerprint(thing) for thing in things]


def test_models_count_by_weights_and_structure():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    assert fingerprint(a) != fingerprint(b)
    b.load_state_dict(a.state_dict())
    assert fingerprint(a) == fingerprint(b)
    assert fingerprint(nn.Sequential(a, nn.ReLU())) != fingerprint(nn.Sequential(a, nn.Tanh()))
    assert fingerprint(nn.Dropout(0.1)) != fingerprint(nn.Dropout(0.2))


def test_recursion_ends():
    loop = []
    loop.append(loop)
    assert fingerprint(loop)

    def even(n):
        return n == 0 or odd(n - 1)

    def odd(n):
        return n != 0 and even(n - 1)

    assert fingerprint(even)


def test_an_arm_does_not_depend_on_the_arms_beside_it():
    x = torch.ones(3)
    one, two = (lambda trial: x), (lambda trial: x + 1)
    memo = {}
    fingerprint(two, memo=memo)
    assert fingerprint(one, memo=memo) == fingerprint(one)


class Table(Mapping[str, int]):
    """A class of a generic abstract base, as users write them."""

    def __getitem__(self, key):
        return 1

    def __iter__(self):
        return iter(())

    def __len__(self):
        return 0


def test_classes_of_generic_bases():
    assert fingerprint(Table) == fingerprint(Table)
    assert fingerprint(lambda: Table())


def test_pickling_an_object_leaves_its_fingerprint():
    @dataclass
    class Point:
        x: int

    before = fingerprint(Point(1))
    copy.copy(Point(2))  # as pickling does, this notes the class's slots on the class
    assert "__slotnames__" in vars(Point)
    assert fingerprint(Point(1)) == before


def test_it_is_the_same_in_another_process():
    code = (
        "from weightroom.study.fingerprint import fingerprint\nfrom weightroom import tasks\n"
        "print(fingerprint(tasks.digits(), {'b', 'a', 'c'}, tasks.digits))"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert runs[0] == runs[1] != ""
