import textwrap

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import weightroom as wr
from weightroom import tasks
from weightroom.errors import TaskError, UsageError

GOOD = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
import weightroom as wr

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
    def forward(self, x):
        return self.layer(x)

def task():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 4, generator=g), torch.randint(3, (60,), generator=g)
    return wr.Task("mine", model=Net, train=TensorDataset(x[:40], y[:40]), test=TensorDataset(x[40:], y[40:]), recipe={"epochs": 2})
"""


def write(tmp_path, text, name="mine.py"):
    path = tmp_path / name
    path.write_text(textwrap.dedent(text))
    return path


def test_a_file_with_a_function(tmp_path):
    path = write(tmp_path, GOOD)
    for spec in (path, str(path), f"{path}:task"):
        task = tasks.load(spec)
        assert (task.name, len(task.train), len(task.val), task.recipe.epochs) == ("mine", 32, 8, 2)
        task.check()


@pytest.mark.parametrize(
    "tail", ["TASK = task()\ndel task", "def other() -> wr.Task: return task_()\ntask_ = task\ndel task", "make = task\ndel task"]
)
def test_whatever_the_only_candidate_is_called(tmp_path, tail):
    assert tasks.load(write(tmp_path, GOOD + tail)).name == "mine"


def test_files_may_import_their_neighbours(tmp_path):
    write(tmp_path, GOOD, "neighbour_net.py")
    assert tasks.load(write(tmp_path, "from neighbour_net import task", "mine2.py")).name == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def task(:\n", r"mine.py, line 1: syntax error"),
        ("import nothing_of_that_name\n", "cannot import what it needs: No module named 'nothing_of_that_name'"),
        ("import sys; sys.exit(3)\n", "failed while it was read: SystemExit"),
        ("open('not_there.csv')\n", "FileNotFoundError.*relative paths start from"),
        ("1 / 0\n", "failed while it was read: ZeroDivisionError: division by zero"),
        ("def task():\n    return 3\n", r"task must return a wr.Task, got int"),
        ("def task():\n    raise KeyError('x')\n", "task failed: KeyError"),
        ("task = 3\n", "must be a wr.Task or a function that returns one, got int"),
        ("x = 3\n", r"must define a function task\(\) that returns a wr.Task"),
        ("def a(): pass\ndef b(): pass\n", "or name one of a, b as"),
        (GOOD.replace("x[:40], y[:40]", "x[:0], y[:0]"), "train is an empty data set"),
        (GOOD.replace("model=Net", "model=3"), "model must be an nn.Module or a function"),
        (GOOD.replace("train=TensorDataset(x[:40], y[:40])", "train=3"), "train must be a data set with len"),
        (GOOD.replace('{"epochs": 2}', '{"epoch": 2}'), "unknown recipe argument 'epoch': did you mean 'epochs'"),
        (GOOD.replace('"mine", ', '"mine", metrics=["acc"], '), "unknown metric 'acc': did you mean 'accuracy'"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, text, message):
    with pytest.raises((TaskError, UsageError), match=message):
        tasks.load(write(tmp_path, text))


def test_a_missing_file_function_or_name(tmp_path):
    with pytest.raises(TaskError, match=r"none.py does not exist"):
        tasks.load(tmp_path / "none.py")
    with pytest.raises(TaskError, match=r"has no 'nope': it has Net|has no 'nope': it has task"):
        tasks.load(f"{write(tmp_path, GOOD)}:nope")
    with pytest.raises(UsageError, match="unknown task 'digit': did you mean 'digits'"):
        tasks.load("digit")


def toy(**change):
    x, y = torch.randn(40, 4), torch.arange(40) % 3
    arguments = {"model": lambda: nn.Linear(4, 3), "train": TensorDataset(x, y), "test": TensorDataset(x, y), **change}
    return wr.Task("toy", **arguments)


class NeedsWidth(nn.Linear):
    def __init__(self, width):
        super().__init__(width, 3)


def huge(outputs, targets):
    return torch.tensor(float("nan"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": lambda: nn.Linear(5, 3)}, "the model cannot take an input of shape"),
        (
            {"model": lambda: nn.Linear(4, 2)},
            r"labels out of range: train has labels from 0 to 2, but the model has 2 outputs, so they must lie in 0\.\.1",
        ),
        (
            {"model": lambda: nn.Sequential(nn.Linear(4, 3), nn.Flatten(0))},
            "the model's output has the wrong shape: for 8 samples it has 24 rows",
        ),
        ({"model": lambda: nn.LSTM(4, 3)}, "the model must return one tensor, got tuple"),
        ({"model": lambda: 3}, r"model\(\) must return an nn.Module, got int"),
        ({"loss": nn.CrossEntropyLoss(reduction="none")}, "the loss must return a scalar"),
        ({"loss": nn.MSELoss()}, "the loss does not fit the model's output"),
        ({"loss": huge}, "the loss of the untrained model is nan"),
        ({"metrics": {"broken": lambda o, t: o[99, 99]}}, "metric 'broken' does not fit"),
        ({"model": NeedsWidth}, r"model\(\) failed .*say model=lambda: Net\(...\)"),
        ({"model": nn.Identity}, "the model has no parameters to train"),
        ({"test": TensorDataset(torch.randn(9, 4), torch.full((9,), 7))}, "labels out of range: test has labels from 7 to 7"),
        ({"val": TensorDataset(torch.randn(9, 4), torch.full((9,), -1))}, "labels out of range: val"),
        (
            {"train": [(torch.ones(4), "cat")] * 9},
            "the target of a sample of train must be a tensor, an array or a number, got str",
        ),
        ({"train": [1, 2, 3]}, r"must be a pair \(input, target\), got int"),
    ],
)
def test_what_does_not_fit_together_is_said_before_any_trial(change, message):
    with pytest.raises(TaskError, match=message):
        toy(**change).check()


def regression(**change):
    x, y = torch.randn(40, 4), torch.randn(40, 1)
    arguments = {
        "model": lambda: nn.Linear(4, 1),
        "train": TensorDataset(x, y),
        "test": TensorDataset(x, y),
        "loss": nn.MSELoss(),
        **change,
    }
    return wr.Task("toy", **arguments)


def test_regression_is_measured_as_such():
    task = regression()
    task.check()
    assert (task.metric, task.directions) == ("mse", {"mse": "min"})
    with pytest.raises(TaskError, match=r"metric 'accuracy' needs class labels, .*metrics=\['mse'\]"):
        regression(metrics=["accuracy"]).check()
    flat = TensorDataset(torch.randn(40, 4), torch.randn(40))
    with pytest.raises(
        TaskError, match=r"the loss does not fit the model's output: outputs of shape \(8, 1\) and targets of shape \(8,\)"
    ):
        regression(train=flat, test=flat).check()


def test_a_lower_metric_may_be_named_alone():
    assert regression(metrics={"error": lambda o, t: (o - t).abs().mean()}, lower_is_better="error").directions == {
        "error": "min"
    }


def test_random_data_of_a_file_are_the_same_at_every_run(tmp_path):
    path = write(tmp_path, GOOD.replace("generator=g", "generator=None"))
    first, second = tasks.load(path), tasks.load(path)
    assert torch.equal(first.test[:][0], second.test[:][0])


def test_a_metric_beside_the_task_is_no_candidate(tmp_path):
    text = GOOD.replace("def task():", "def error(outputs, targets):\n    return 0.0\n\ndef make():")
    assert tasks.load(write(tmp_path, text)).name == "mine"


def test_what_a_file_prints_goes_to_stderr(tmp_path, capsys):
    tasks.load(write(tmp_path, GOOD + "\nprint('while reading')\n".replace("while", "while")))
    out, err = capsys.readouterr()
    assert out == ""
    assert "while reading" in err


def test_a_seed_decides_the_weights_and_nothing_else():
    task = toy()
    state = torch.get_rng_state()
    a, b, c = task.model(seed=1), task.model(seed=1), task.model(seed=2)
    assert torch.equal(a.weight, b.weight)
    assert not torch.equal(a.weight, c.weight)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_module_as_model_is_copied():
    net = nn.Linear(4, 3)
    made = toy(model=net).model(seed=3)
    assert made is not net
    assert torch.equal(made.weight, net.weight)


def test_a_task_is_frozen_and_spoilt_into_a_new_one():
    task = toy()
    with pytest.raises(AttributeError):
        task.name = "other"
    hard = task.spoil(label_noise=0.5, imbalance=2.0, samples=20, seed=1)
    assert hard.name == "toy, 20 samples, imbalance 2, uniform label noise 0.5"
    assert len(hard.train) < 20 < len(task.train)
    assert hard.test is task.test
    assert task.spoil() is task


@pytest.mark.parametrize("name", ["digits", "wine", "breast-cancer", "diabetes", "vessels"])
def test_built_in_tasks_fit_together(name):
    task = tasks.load(name)
    task.check()
    assert task.evaluate(task.model())[task.metric] is not None
    assert tasks.load(name).name == task.name


def test_tasks_are_listed():
    assert set(wr.tasks()) == set(tasks.BUILT_IN)
    assert all(wr.tasks().values())
