"""What ``import weightroom as wr`` offers."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import weightroom as wr
from weightroom import api, record_verdicts
from weightroom.errors import MissingDataError, UsageError
from weightroom.losses import LDRKLLoss
from weightroom.optim import LionK
from weightroom.weights import BoneConfig, bone

ROOT = Path(__file__).parent.parent
NAMES = (
    "Task",
    "Arm",
    "Trial",
    "Study",
    "Expect",
    "Claim",
    "Verdict",
    "Recipe",
    "Method",
    "compare",
    "check",
    "papers",
    "cite",
    "tasks",
)


def toy():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 4, generator=g), torch.arange(60) % 3
    data = TensorDataset(x, y)
    return wr.Task(
        "toy",
        model=lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)),
        train=data,
        test=data,
        recipe={"epochs": 1},
    )


def test_names_are_there_whatever_was_imported_before():
    before = "import weightroom.compare.prune, weightroom.papers.lion_k, weightroom.tasks.classify; "
    for first in ("", before):
        code = f"{first}import weightroom as wr; print([callable(getattr(wr, n)) for n in {NAMES}])"
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert out.strip() == str([True] * len(NAMES))


def test_importing_weightroom_imports_nothing_heavy():
    heavy = (
        "torch",
        "pandas",
        "plotly",
        "optuna",
        "lightning_fabric",
        "sklearn",
        "scipy",
        "ray",
        "peft",
        "ot",
        "lifelines",
        "torch_pruning",
    )
    code = f"import sys, weightroom; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_rooms_do_not_import_optional_packages():
    optional = ("peft", "ot", "lifelines", "torch_pruning", "opendp", "ray", "monai", "transformers")
    rooms = "adversarial, curvature, diagnostics, distill, estimators, kernels, losses, nets, optim, prune, transport, weights, data, metrics, train"
    touch = f"for r in ({rooms}): [getattr(r, n) for n in r.__all__]"
    code = f"import sys\nfrom weightroom import {rooms}\n{touch}\nprint([m for m in {optional} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_papers():
    cards = {card.key: card for card in wr.papers()}
    numbers = {
        "lion-k": 47, "ldr": 17, "global-magnitude": 59, "bone": 20, "cv-sw": 13, "dp-kaplan-meier": 51, "mip-loss": 15,
    }  # fmt: skip
    assert numbers.items() <= {key: card.number for key, card in cards.items()}.items()
    for card in cards.values():
        assert all((card.title, card.authors, card.summary, card.claim, card.limits, card.parts))
        for name in card.names():
            module, _, attribute = name.rpartition(".")
            assert getattr(__import__(module, fromlist=[attribute]), attribute) in card.parts


def test_cite():
    entry = api.paper("lion-k").bibtex
    assert "2310.05898" in entry
    layer = nn.Linear(8, 8)
    for thing in ("lion-k", "weightroom.optim.LionK", LionK, LionK(layer.parameters()), wr.optim.lionk_objective):
        assert wr.cite(thing) == entry
    both = nn.ModuleList([bone(nn.Sequential(layer), BoneConfig(r=4)), LDRKLLoss()])
    assert wr.cite(both).count("@") == 2
    with pytest.raises(UsageError, match="nothing that is"):
        wr.cite(nn.Linear(2, 2))
    with pytest.raises(UsageError, match="did you mean"):
        wr.cite("weightroom.optim.Lionk")
    with pytest.raises(UsageError, match="did you mean 'lion-k'"):
        wr.cite("lionk")


def test_bibtex_is_well_formed():
    for card in wr.papers():
        text = card.bibtex
        assert text.count("{") == text.count("}")
        assert text.startswith("@")
        assert f"{{{card.title}}}" in text


def test_a_method_of_ones_own_joins_a_comparison(tmp_path):
    mine = {"mine": wr.Method(lambda params, lr: torch.optim.SGD(params, lr=lr), {"lr": 0.1}, {"lr": [0.1, 0.2]})}
    results = wr.compare("optimizer", toy, methods=mine, arms=["mine"], seeds=2, store=tmp_path, workers=1)
    assert set(results.table().arm) == {"adamw", "mine"}
    assert results.failed == 0
    assert results.direction("nll") == -1


def test_a_method_that_does_not_go_with_the_task_is_left_out_unless_it_is_asked_for(tmp_path):
    make = lambda params, lr: torch.optim.SGD(params, lr=lr)  # noqa: E731
    reason = {"toy": "it has three classes"}
    mine = {"picky": wr.Method(make, {"lr": 0.1}, unfit=lambda task: reason.get(task.name))}
    results = wr.compare("optimizer", toy, methods=mine, arms=None, seeds=1, store=tmp_path, workers=1, scale="smoke")
    assert "picky" not in set(results.frame.arm)
    with pytest.raises(UsageError, match="arm 'picky' does not go with task 'toy': it has three classes"):
        wr.compare("optimizer", toy, methods=mine, arms=["picky"], seeds=1, store=tmp_path)
    other = toy().with_(name="other")
    assert "picky" in set(wr.compare("optimizer", other, methods=mine, arms=["picky"], seeds=1, store=tmp_path).frame.arm)


def test_a_trained_module_is_pruned_as_it_is(tmp_path):
    task = toy().with_(model=toy().model(seed=3))
    results = wr.compare("prune", task, arms=["global magnitude"], sparsity=(0.5,), seeds=1, store=tmp_path, workers=1)
    assert results.failed == 0
    assert not (tmp_path / "cache").exists()


def test_a_check_at_smoke_scale(tmp_path):
    done = wr.check("lion-k", scale="smoke", store=tmp_path, report=tmp_path / "report.html", workers=2)
    plain = json.loads(json.dumps(done.as_dict()))
    assert plain["key"] == "lion-k"
    assert plain["scale"] == "smoke"
    assert plain["verdict"] in ("holds", "fails", "inconclusive")
    assert {"statement", "verdict", "difference", "interval", "n"} <= set(plain["expectations"][0])
    assert len(plain["trials"]) == len(done.frame)
    assert (tmp_path / "report.html").stat().st_size > 1e6


def test_a_record_keeps_what_a_reader_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(api, "RECORDS", tmp_path)
    assert api.recorded("small") == {}
    assert record_verdicts.record(["lion-k"], "smoke", store=tmp_path / "runs", workers=2) == 0
    found = api.recorded("smoke")["lion-k"]
    assert found["n_trials"] > 0
    assert found["seeds"]
    assert {"torch", "python", "weightroom", "date"} <= set(found["environment"])


@pytest.mark.parametrize("named", [False, True])
def test_at_real_scale_papers_without_data_are_skipped(tmp_path, monkeypatch, capsys, named):
    monkeypatch.setattr(api, "RECORDS", tmp_path)
    if named:
        monkeypatch.setenv("WEIGHTROOM_DATA", str(tmp_path))
    else:
        monkeypatch.delenv("WEIGHTROOM_DATA", raising=False)
    assert record_verdicts.record([], "real", store=tmp_path / "runs") == 0
    said = capsys.readouterr().err
    own = [p.key for p in wr.papers() if p.real]
    assert [line.split()[1] for line in said.splitlines() if line.startswith("checking")] == own
    state = f"it is {tmp_path}, which has no folder of that name" if named else "it is not set"
    for key in own:
        assert (
            f"skipped {key}: the data of {key} at scale real is not there: WEIGHTROOM_DATA must name a folder that holds cifar10-jpg; {state}"
        ) in said
    assert not (tmp_path / "real.json").exists()


def test_one_paper_without_its_data_is_an_error(monkeypatch):
    monkeypatch.delenv("WEIGHTROOM_DATA", raising=False)
    with pytest.raises(MissingDataError, match="WEIGHTROOM_DATA must name a folder that holds cifar10-jpg"):
        wr.check("dimap", scale="real")


def test_only_a_real_study_is_recorded_as_one():
    with pytest.raises(
        UsageError, match=r"lion-k has no study of its own at scale real.*these have one: dimap, global-magnitude"
    ):
        record_verdicts.record(["lion-k"], "real")


def test_pages_show_what_is_recorded_at_real_scale(tmp_path, monkeypatch):
    monkeypatch.setattr(api, "RECORDS", tmp_path)
    assert "On real images" not in record_verdicts.readme_table()
    assert "at real scale" not in record_verdicts.claims_page()
    expectation = {
        "statement": "it helps", "verdict": "holds", "difference": 0.5, "interval": [0.25, 0.75], "n": 3, "setting": "0.9",
    }  # fmt: skip
    environment = {"torch": "2", "python": "3.11", "date": "2026-01-01 00:00:00"}
    record = {"dimap": {"expectations": [expectation], "n_trials": 7, "environment": environment}}
    (tmp_path / "real.json").write_text(json.dumps({"scale": "real", "papers": record}))
    small, real = record_verdicts.readme_table().split("On real images")
    assert "| not recorded" in small
    assert real.count("arxiv.org") == 1
    assert "| 1 | 0 | 0 |" in real
    page = record_verdicts.claims_page()
    assert "## dimap, at real scale\n\n7 trials" in page
    assert "| it helps (at 0.9) | ✓ holds | 0.5 [0.25, 0.75] | 3 |" in page


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="not in a checkout")
def test_the_readme_shows_what_is_recorded():
    text = (ROOT / "README.md").read_text()
    shown = text.split(record_verdicts.BEGIN)[1].split(record_verdicts.END)[0].strip()
    assert shown == record_verdicts.readme_table()
    assert (ROOT / "docs" / "verdicts.md").read_text() == record_verdicts.claims_page()


def test_the_example_task_fits_together():
    task = wr.tasks.load(ROOT / "examples" / "mine.py")
    task.check()
    assert (task.name, task.metric) == ("tumours", "accuracy")


class Images(torch.utils.data.Dataset):
    """Arrays and plain integers, as many a user's data set gives them."""

    def __len__(self):
        return 40

    def __getitem__(self, i):
        return np.full((1, 4, 4), i % 3, dtype=np.float32), i % 3


def test_adapters_take_arrays_and_say_when_there_is_nothing_to_adapt(tmp_path):
    net = lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))  # noqa: E731
    task = wr.Task("images", model=net, train=Images(), test=Images(), recipe={"epochs": 1})
    assert wr.compare("adapt", task, arms=["head only"], seeds=1, store=tmp_path, workers=1).failed == 0
    with pytest.raises(UsageError, match="at least two linear layers"):
        wr.compare("adapt", task.with_(model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3))), store=tmp_path)


def test_arguments_that_no_run_takes_are_named(tmp_path):
    with pytest.raises(UsageError, match="unknown argument 'worker': did you mean 'workers'"):
        wr.compare("optimizer", toy, worker=2, store=tmp_path)


@pytest.mark.parametrize("name", api.FAMILIES)
def test_a_comparison_is_named_after_its_family(name, tmp_path, monkeypatch):
    named = []
    monkeypatch.setattr(wr.Study, "run", lambda self, *_, **__: named.append(self.name) or wr.Results(self, [], {}))
    wr.compare(name, "digits", store=tmp_path)
    assert named == [f"compare {name}: digits"]
