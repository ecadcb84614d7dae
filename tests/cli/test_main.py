"""The command line as a user meets it: exit codes, one- or two-line messages, JSON on stdout and nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tasks.test_find import GOOD
from weightroom import api
from weightroom.cli import main


def run(capsys, *args):
    code = main([str(a) for a in args])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["comparr", "prune"], "unknown command 'comparr': did you mean 'compare'"),
        (["compare", "prun"], "unknown family 'prun': did you mean 'prune'"),
        (["compare", "prune", "--task", "digit"], "did you mean 'digits'"),
        (["compare", "prune", "--sparsity", "1.0"], r"sparsity must be in [0, 1), got 1"),
        (["compare", "prune", "--sparsity", "-0.1"], r"sparsity must be in [0, 1), got -0.1"),
        (["compare", "prune", "--sparsity", "0.5,0.5"], "may be given once"),
        (["compare", "prune", "--sparsity", ""], "numbers with commas"),
        (["compare", "optimizer", "--arms", ""], "unknown arm ''"),
        (["compare", "optimizer", "--store", ""], "store must name a folder"),
        (["check", "lion-k", "--report", "out.pdf"], "ends in .html"),
        (["check", "lion-k", "--report", "/proc/none/out.html"], "cannot be written"),
        (["verdicts", "--record", "nope"], "unknown paper 'nope'"),
        (["cite", ".."], "unknown import path"),
        (["compare", "prune", "--sparsity", "much"], "numbers with commas"),
        (["compare", "loss", "--sparsity", "0.5"], "sparsity belongs to the family 'prune'"),
        (["compare", "optimizer", "--seeds", "0"], "seeds must be >= 1, got 0"),
        (["compare", "optimizer", "--device", "cuda:7"], "device 'cuda:7' is not there: this machine has"),
        (["compare", "optimizer", "--metric", "acuracy"], "did you mean 'accuracy'"),
        (["compare", "optimizer", "--arms", "adamm"], "unknown arm 'adamm': did you mean 'adam"),
        (["compare", "optimizer", "--scale", "smal"], "did you mean 'small'"),
        (["compare", "optimizer", "--engine", "spark"], "unknown engine 'spark'"),
        (["compare", "optimizer", "--workers", "0"], "workers must be >= 1"),
        (["compare", "optimizer", "--label-noise", "2"], "label_noise must be in [0, 1]"),
        (["compare", "optimizer", "--epochs", "0"], "epochs must be >= 1"),
        (["compare", "optimizer", "--report", "out.pdf"], "ends in .html"),
        (["compare", "optimizer", "--frobnicate"], "No such option"),
        (["compare"], "Missing argument"),
        (["compare", "loss", "--task", "diabetes"], "need class labels, but the targets of task 'diabetes' are torch.float32"),
        (["check", "lion"], "unknown paper 'lion': did you mean 'lion-k'"),
        (["show", "lion"], "did you mean 'lion-k'"),
        (["cite", "weightroom.optim.Lion"], "unknown import path"),
        (["runs", "--store", "nowhere"], "there is no store in nowhere"),
    ],
)
def test_misuse_exits_with_2_and_a_short_message(capsys, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *args)
    assert code == 2
    assert message in err
    assert out == ""
    assert len(err.strip().splitlines()) <= 2
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs" / "trials").glob("*"))


def test_debug_shows_the_traceback(capsys):
    code, _, err = run(capsys, "compare", "prun", "--debug")
    assert code == 2
    assert "Traceback" in err


def test_a_users_own_task_from_a_file(capsys, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(GOOD)
    args = [
        "compare",
        "prune",
        "--task",
        path,
        "--sparsity",
        "0.5,0.9",
        "--seeds",
        2,
        "--arms",
        "global magnitude,random",
        "--store",
        tmp_path / "runs",
    ]
    report = tmp_path / "out.html"
    code, out, err = run(capsys, *args, "--json", "--report", report)
    assert code == 0, err
    found = json.loads(out)
    assert {t["setting"] for t in found["tables"]} == {"0.5", "0.9"}
    assert {row["arm"] for row in found["tables"][0]["rows"]} == {"dense", "global magnitude", "random"}
    assert len(found["trials"]) == 2 * 2 * 3
    assert all(t["sparsity"] == pytest.approx(float(t["setting"]), abs=0.05) for t in found["trials"] if t["arm"] != "dense")
    for suffix in (".html", ".csv", ".parquet"):
        assert report.with_suffix(suffix).stat().st_size > 0
    code, out, _ = run(capsys, *args)
    assert code == 0
    assert "global magnitude" in out
    code, out, _ = run(capsys, "runs", "--store", tmp_path / "runs", "--json")
    assert {row["study"] for row in json.loads(out)} == {"compare prune: mine"}


def test_another_sparsity_adds_only_its_own_trials(capsys, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(GOOD)
    args = [
        "compare",
        "prune",
        "--task",
        path,
        "--seeds",
        1,
        "--arms",
        "uniform",
        "--scale",
        "smoke",
        "--store",
        tmp_path,
        "--json",
    ]
    first = json.loads(run(capsys, *args, "--sparsity", "0.5")[1])["trials"]
    second = json.loads(run(capsys, *args, "--sparsity", "0.5,0.7")[1])["trials"]
    assert {t["fingerprint"]: t["seconds"] for t in first}.items() <= {t["fingerprint"]: t["seconds"] for t in second}.items()
    assert len(second) == 4
    assert sum(row["done"] for row in json.loads(run(capsys, "runs", "--store", tmp_path, "--json")[1])) == 4


def test_json_is_pure_whatever_the_users_file_prints(capsys, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("print('noise')\n" + GOOD.replace("self.layer(x)", "(print('more noise'), self.layer(x))[1]"))
    args = [
        "compare",
        "optimizer",
        "--task",
        path,
        "--seeds",
        1,
        "--arms",
        "sgd",
        "--scale",
        "smoke",
        "--store",
        tmp_path,
        "--json",
    ]
    code, out, err = run(capsys, *args)
    assert code == 0
    assert json.loads(out)["failed"] == 0
    assert "noise" in err


def test_a_narrow_terminal_keeps_the_numbers_that_decide(tmp_path, monkeypatch, capsys):
    from rich.console import Console

    from weightroom.cli import show

    path = tmp_path / "mine.py"
    path.write_text(GOOD)
    results = api.compare("optimizer", path, seeds=3, arms=["sgd"], scale="smoke", store=tmp_path, workers=1)
    monkeypatch.setattr(show, "console", lambda: Console(width=80))
    show.comparison(results, api.family("optimizer").costs)
    out = capsys.readouterr().out
    assert "…" not in out
    assert "cost" in out


@pytest.mark.parametrize("family", ["loss", "optimizer", "adapt"])
def test_every_family_runs(capsys, tmp_path, family):
    path = tmp_path / "mine.py"
    path.write_text(
        GOOD.replace("nn.Linear(4, 3)", "nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))")
    )
    code, out, _ = run(capsys, "compare", family, "--task", path, "--seeds", 1, "--scale", "smoke", "--store", tmp_path, "--json")
    found = json.loads(out)
    assert code == 0, [t["reason"] for t in found["trials"]]
    kind = api.family(family)
    arms = {row["arm"] for row in found["tables"][0]["rows"]}
    assert kind.baseline in arms
    assert len(arms) >= 4


def test_tuning_shows_both_results(capsys, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(GOOD)
    code, out, _ = run(
        capsys, "compare", "optimizer", "--task", path, "--seeds", 1, "--tune", 3, "--arms", "sgd", "--store", tmp_path, "--json"
    )
    assert code == 0
    found = json.loads(out)
    assert {t["variant"] for t in found["tables"]} == {"common", "tuned"}
    assert sum(t["variant"] == "search" for t in found["trials"]) == 6
    assert {c["arm"] for c in found["chosen"]} == {"adamw", "sgd"}


def test_failed_trials_exit_with_1(capsys, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        GOOD.replace("recipe={", 'metrics={"bad": bad}, recipe={')
        + "\ndef bad(outputs, targets):\n    return float('nan') if len(outputs) == 20 else 1.0\n"
    )
    code, _, err = run(capsys, "compare", "optimizer", "--task", path, "--seeds", 1, "--arms", "sgd", "--store", tmp_path)
    assert code == 1
    assert "2 of 2 trials failed" in err
    assert "metric 'bad' is nan" in err
    assert "--retry-failed" in err


def test_papers_and_cards(capsys):
    code, out, _ = run(capsys, "papers", "--json")
    assert code == 0
    for card in json.loads(out):
        assert {"key", "number", "title", "arxiv", "family", "parts", "verdict"} <= set(card)
        assert run(capsys, "show", card["key"])[0] == 0
        assert run(capsys, "cite", card["key"])[1].startswith("@")
        assert run(capsys, "cite", card["parts"][0])[1].startswith("@")
    assert run(capsys, "papers")[0] == 0
    assert run(capsys, "tasks", "--json")[1].startswith("{")
    assert run(capsys, "verdicts")[0] == 0


def test_it_is_installed_and_says_its_version():
    program = Path(sys.executable).with_name("weightroom")
    assert subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.startswith(
        "weightroom, version"
    )
    assert subprocess.run([sys.executable, "-m", "weightroom", "--help"], capture_output=True, check=False).returncode == 0
