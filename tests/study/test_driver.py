"""The engine under real conditions: workers that misbehave, drivers that are killed, two drivers at once."""

import ctypes
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from weightroom.errors import MissingExtraError, StoreError, UsageError
from weightroom.study import Arm, Claim, Expect, Scale, Study, Trial
from weightroom.study.engine import _died, open_engine
from weightroom.study.worker import Job, Parcel, run_trial


def good(trial):
    trial.log(0, loss=1.0)
    trial.log(1, loss=0.5)
    trial.spend(steps=2)
    return {"m": 1.0 + 0.01 * torch.rand(()).item(), "extra": trial.seed}


def better(trial):
    return {"m": 2.0 + 0.01 * torch.rand(()).item()}


def raises(trial):
    raise RuntimeError("the reason\nand more")


def segfaults(trial):
    ctypes.string_at(0)


def exits(trial):
    os._exit(3)


def eats(trial):
    hoard = []
    while True:
        hoard.append(bytearray(64 << 20))


def allocates(trial):
    return {"m": torch.zeros(1 << 34).sum()}


def hangs(trial):
    time.sleep(600)


def nan(trial):
    return {"m": float("nan")}


def nothing(trial):
    return None


def no_metric(trial):
    return {"extra": 1.0}


def undeclared(trial):
    return {"m": 1.0, "surprise": 2.0}


def cost_as_metric(trial):
    return {"m": 1.0, "seconds": 2.0}


def text(trial):
    return {"m": "high"}


def tensor(trial):
    return {"m": torch.tensor([0.5], dtype=torch.float64)}


def leaves(trial):
    sys.exit(5)


def interrupts(trial):
    raise KeyboardInterrupt


def prints(trial):
    print("noise on stdout")
    os.system("echo more noise")
    return {"m": 1.0}


BAD = {
    "raises": (raises, r"RuntimeError: the reason \(test_driver.py:\d+\)"),
    "segfaults": (segfaults, "died of SIGSEGV .*segmentation fault"),
    "exits": (exits, "ended by itself with exit code 3"),
    "eats": (eats, r"ran out of memory \(limit 0.5 GiB\)"),
    "allocates": (allocates, r"ran out of memory \(limit 0.5 GiB\)"),
    "hangs": (hangs, "took longer than the time limit of 6 s"),
    "leaves": (leaves, r"called sys.exit\(5\)"),
    "interrupts": (interrupts, "raised KeyboardInterrupt"),
    "nan": (nan, "metric 'm' is nan"),
    "nothing": (nothing, r"returned NoneType instead of a dict of metrics \(declared: m, extra\)"),
    "no metric": (no_metric, "returned no metric 'm'"),
    "undeclared": (undeclared, "returned metric 'surprise', which the study does not declare"),
    "cost as metric": (cost_as_metric, r"say trial.spend\(seconds=...\)"),
    "text": (text, "metric 'm' must be a number, got str"),
}


@pytest.fixture(scope="module")
def bad_results(tmp_path_factory):
    arms = {"good": good, **{name: function for name, (function, _) in BAD.items()}}
    study = Study("bad", arms, metric="m", metrics={"extra": "max"}, seeds=2, expect=[Expect("good").better_than("raises")])
    return study.run(tmp_path_factory.mktemp("store"), time_limit=6.0, memory_limit=1 << 29, workers=2)


@pytest.mark.parametrize("arm", BAD)
def test_a_bad_trial_is_recorded_with_its_reason(bad_results, arm):
    rows = bad_results.frame[bad_results.frame.arm == arm]
    assert list(rows.status) == ["failed", "failed"]
    assert rows.reason.str.contains(BAD[arm][1], regex=True).all(), list(rows.reason)


def test_the_others_are_not_touched(bad_results):
    rows = bad_results.frame[bad_results.frame.arm == "good"]
    assert list(rows.status) == ["done", "done"]
    assert bad_results.failed == 2 * len(BAD)
    assert (rows.steps == 2).all()
    assert (rows.seconds > 0).all()
    assert bad_results.verdicts[0].verdict == "inconclusive"


def test_results_of_a_good_study(tmp_path):
    study = Study("s", {"good": good, "better": Arm(better)}, metric="m", metrics={"extra": "min"}, seeds=4, expect=[
        Claim("better is better", Expect("better").better_than("good", by=0.5)), Expect("good", metric="extra").always(0, 3)])  # fmt: skip
    results = study.run(tmp_path, workers=2)
    assert [v.verdict for v in results.verdicts] == ["holds", "holds"]
    assert results.verdict == "holds"
    assert results.verdicts[0].difference == pytest.approx(1.0, abs=0.05)
    table = results.table()
    assert list(table.arm) == ["better", "good"]
    assert list(table["rank"]) == [1, 2]
    assert table.difference_low[0] > 0.9
    # the same seed draws the same numbers in every arm: the difference is exact
    assert (results.values("better") - results.values("good")).tolist() == pytest.approx([1.0] * 4)
    before = (tmp_path / "weightroom.sqlite").stat().st_mtime_ns
    again = study.run(tmp_path, workers=2)
    assert again.frame.equals(results.frame)
    assert (tmp_path / "weightroom.sqlite").stat().st_mtime_ns == before


def test_more_seeds_only_add(tmp_path):
    first = Study("s", {"good": good}, metric="m", metrics={"extra": "max"}, seeds=1).run(tmp_path, workers=1)
    second = Study("s", {"good": good}, metric="m", metrics={"extra": "max"}, seeds=2).run(tmp_path, workers=1)
    assert second.frame.fingerprint[0] == first.frame.fingerprint[0]
    assert second.frame.seconds[0] == first.frame.seconds[0]


def test_failed_trials_stand_until_they_are_asked_for(tmp_path):
    flag = tmp_path / "flag"

    def flaky(trial):
        if not flag.exists():
            raise RuntimeError("not yet")
        return {"m": 1.0}

    study = Study("s", {"flaky": flaky}, metric="m", seeds=1)
    assert study.run(tmp_path, workers=1).failed == 1
    flag.touch()
    assert study.run(tmp_path, workers=1).failed == 1
    assert study.run(tmp_path, workers=1, retry_failed=True).failed == 0


def noisy(trial):
    return {"m": trial.params.get("shift", 0.0) + torch.randn(()).item()}


def test_seeds_are_added_until_it_is_clear(tmp_path):
    arms = {"a": noisy, "b": Arm(lambda trial: {"m": 3 + torch.randn(()).item() * (1 + trial.seed % 2)})}
    study = Study("s", arms, metric="m", seeds=3, max_seeds=12, expect=[Expect("b").better_than("a")])
    results = study.run(tmp_path, workers=2)
    assert results.verdict == "holds"
    assert 3 <= len(results.values("a")) < 12
    hopeless = Study("h", {"a": noisy, "b": Arm(lambda t: {"m": torch.randn(3)[1].item()})}, metric="m", seeds=3, max_seeds=6,
                     expect=[Expect("b").equal_to("a", within=0.01)])  # fmt: skip
    assert len(hopeless.run(tmp_path, workers=2).values("a")) == 6


def peak(trial):
    assert trial.split in ("val", "test")
    return {"m": -abs(trial.params["x"] - 3.0) - (0.1 if trial.split == "test" else 0.0)}


def test_tuning_is_fair_and_never_decides(tmp_path):
    arms = {
        "tuned": Arm(peak, {"x": 0.0}, {"x": [0.0, 2.0, 3.0, 5.0]}),
        "wide": Arm(peak, {"x": 0.0}, {"x": (0.0, 10.0)}),
        "fixed": Arm(peak, {"x": 1.0}),
    }
    study = Study("s", arms, metric="m", seeds=3, tune=4, expect=[Expect("tuned", tuned=True).better_than("fixed")])
    results = study.run(tmp_path, workers=2)
    assert results.parameters("tuned", "") == {"x": 3.0}
    assert results.parameters("fixed", "") == {"x": 1.0}
    search = results.frame[results.frame.variant == "search"]
    assert search.groupby("arm").size().to_dict() == {"tuned": 4, "wide": 4}
    assert set(search.split) == {"val"}
    assert not set(search.seed) & set(results.frame[results.frame.variant != "search"].seed)
    assert results.values("tuned", variant="tuned").tolist() == [-0.1] * 3
    assert results.values("tuned").tolist() == [-3.1] * 3
    assert results.verdict == "holds"


def uses_cache(trial):
    made = trial.cached("start", lambda: {"x": torch.rand(2)}, seed=trial.seed)
    return {"m": made["x"].sum()}


def test_arms_share_what_they_start_from(tmp_path):
    results = Study("s", {"a": uses_cache, "b": Arm(lambda trial: uses_cache(trial))}, metric="m", seeds=3).run(
        tmp_path, workers=2
    )
    assert results.values("a").tolist() == results.values("b").tolist()
    assert len(list((tmp_path / "cache").glob("start-*.safetensors"))) == 3


def writes(trial):
    (trial.folder / "note.txt").write_text("kept")
    return {"m": len(list(trial.folder.iterdir()))}


def test_a_store_that_cannot_be_written_stops_the_study_and_fails_no_trial(tmp_path):
    (tmp_path / "cache").write_text("in the way")
    study = Study("s", {"a": uses_cache}, metric="m", seeds=2)
    with pytest.raises(StoreError, match=r"cannot be written .*run again"):
        study.run(tmp_path, workers=1)
    (tmp_path / "cache").unlink()
    assert study.run(tmp_path, workers=1).failed == 0


def test_artifacts_have_a_folder_of_their_own(tmp_path):
    results = Study("s", {"a": writes, "b": tensor}, metric="m", seeds=1).run(tmp_path, workers=1)
    assert results.values("a").tolist() == [1.0]
    folders = list((tmp_path / "trials").iterdir())
    assert [f.name for f in folders] == [results.frame.fingerprint[0]]


def test_stdout_is_left_to_the_driver(tmp_path):
    code = (
        "from tests.study.test_driver import *\n"
        f"Study('s', {{'a': prints}}, metric='m', seeds=2).run({str(tmp_path)!r}, workers=1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr.count("noise") == 4


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"engine": "loca"}, UsageError, "did you mean 'local'"),
        ({"workers": 0}, UsageError, "workers must be >= 1, got 0"),
        ({"time_limit": 0}, UsageError, "time_limit must be > 0"),
        ({"memory_limit": 0}, UsageError, "memory_limit must be > 0"),
        ({"device": "cuda:99"}, UsageError, "device 'cuda:99' is not there: this machine has cpu"),
        ({"device": "gpu"}, UsageError, "device 'gpu' is not there"),
    ],
)
def test_misuse_is_said_before_anything_runs(tmp_path, how, error, message):
    with pytest.raises(error, match=message):
        Study("s", {"a": good}, metric="m", metrics={"extra": "max"}).run(tmp_path, **how)
    assert not (tmp_path / "trials").exists()


def test_ray_without_ray_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'weightroom\[ray\]'"):
        Study("s", {"a": tensor}, metric="m").run(tmp_path, engine="ray")


def test_a_real_local_ray(tmp_path):
    pytest.importorskip("ray")
    study = Study(
        "s", {"good": good, "raises": raises, "exits": exits, "hangs": hangs}, metric="m", metrics={"extra": "max"}, seeds=2
    )
    results = study.run(tmp_path / "ray", engine="ray", workers=2, time_limit=5.0)
    local = Study("s", {"good": good}, metric="m", metrics={"extra": "max"}, seeds=2).run(tmp_path / "local", workers=1)
    assert results.values("good").tolist() == local.values("good").tolist()
    reasons = results.frame.groupby("arm").reason.first()
    assert reasons["raises"].startswith("RuntimeError: the reason")
    assert "died" in reasons["exits"]
    assert "time limit of 5 s" in reasons["hangs"]


def test_what_a_dead_worker_is_said_to_have_died_of():
    assert "SIGKILL (killed, most likely for using too much memory)" in _died(-9)
    assert "signal 63" in _died(-63)


def test_one_trial_without_any_engine(tmp_path):
    parcel = Parcel({"a": Arm(good)}, {"": None}, ("m", "extra"), "m", Scale.SMOKE, "cpu", tmp_path)
    outcome = run_trial(parcel, Job("f", "a", "", 3, "test"))
    assert outcome.status == "done"
    assert outcome.curves == [("loss", 0.0, 1.0), ("loss", 1.0, 0.5)]
    assert outcome.metrics["extra"] == 3


def test_costs_have_names():
    with pytest.raises(UsageError, match="unknown cost 'second': did you mean 'seconds'"):
        Trial(seed=0).spend(second=1.0)


def test_a_broken_parcel_is_not_silent(tmp_path):
    parcel = Parcel({"a": Arm(good)}, {"": None}, ("m", "extra"), "m", Scale.SMOKE, "cpu", tmp_path)
    with open_engine("local", parcel, workers=1, time_limit=None) as engine:
        engine.submit(Job("f", "not an arm", "", 0, "test"))
        (_, outcome) = engine.ready(60.0)[0]
    assert outcome.status == "failed"


DRIVER = """
import signal, sys, time, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background inherits a deaf ear
from pathlib import Path
from weightroom.study import Study, Arm
folder = Path(sys.argv[1])
def arm(trial):
    with open(folder / "ran.txt", "a") as file:
        file.write(f"{trial.seed} begins\\n")
    time.sleep(0.05)
    with open(folder / "ran.txt", "a") as file:
        file.write(f"{trial.seed} ends\\n")
    return {"m": trial.seed}
def other(trial):
    return arm(trial)
print("ready", flush=True)
results = Study("s", {"a": arm, "b": other}, metric="m", seeds=int(sys.argv[2])).run(folder, workers=2)
print(results.failed, results.missing, len(results.frame), flush=True)
"""


@pytest.fixture
def driver(tmp_path):
    script = tmp_path / "driver.py"
    script.write_text(textwrap.dedent(DRIVER))
    return lambda seeds=20: subprocess.Popen(
        [sys.executable, str(script), str(tmp_path), str(seeds)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip


def _rows(folder):
    with sqlite3.connect(folder / "weightroom.sqlite") as db:
        return db.execute("SELECT arm, seed, status, metrics FROM trials").fetchall()


@pytest.mark.slow
def test_killed_at_twenty_random_moments_nothing_is_lost_and_nothing_is_done_twice(tmp_path, driver):
    moments = random.Random(0)
    done = set()
    for _ in range(20):
        process = driver(60)
        process.stdout.readline()
        time.sleep(moments.uniform(0.0, 1.2))
        process.kill()
        process.wait()
        now = (
            {(arm, seed) for arm, seed, status, _ in _rows(tmp_path) if status == "done"}
            if (tmp_path / "weightroom.sqlite").exists()
            else set()
        )
        assert done <= now  # what was finished stays finished
        done = now
    last = driver(60)
    out, err = last.communicate(timeout=120)
    assert out.split()[-3:] == ["0", "0", "120"], err
    rows = _rows(tmp_path)
    assert len(rows) == 120
    assert {status for _, _, status, _ in rows} == {"done"}
    assert all(json.loads(metrics)["m"] == seed for _, seed, _, metrics in rows)
    begun = [int(line.split()[0]) for line in (tmp_path / "ran.txt").read_text().splitlines() if line.endswith("begins")]
    assert len(begun) <= 120 + 20 * 3  # only what was running at a kill is run again


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_things_tidy(tmp_path, driver, how):
    process = driver(200)
    process.stdout.readline()
    while not (tmp_path / "ran.txt").exists() or (tmp_path / "ran.txt").read_text().count("ends") < 4:
        time.sleep(0.05)
    process.send_signal(how)
    process.wait(timeout=30)
    assert process.returncode != 0
    assert {row[2] for row in _rows(tmp_path)} == {"done"} or how is signal.SIGTERM
    assert "ends" in (tmp_path / "ran.txt").read_text()


def test_workers_leave_with_their_driver(tmp_path, driver):
    process = driver(400)
    process.stdout.readline()
    while not (tmp_path / "ran.txt").exists():
        time.sleep(0.05)
    workers = subprocess.run(
        ["pgrep", "-g", str(os.getpgid(process.pid)), "-f", "forkserver"], capture_output=True, text=True, check=False
    ).stdout
    process.kill()
    process.wait()
    end = time.monotonic() + 15
    lines = -1
    while time.monotonic() < end:
        time.sleep(2.5)
        now = len((tmp_path / "ran.txt").read_text().splitlines())
        if now == lines:
            break
        lines = now
    else:
        pytest.fail(f"workers {workers} went on without their driver")


def test_two_drivers_share_one_store(tmp_path, driver):
    processes = [driver(30), driver(30)]
    for process in processes:
        out, err = process.communicate(timeout=180)
        assert out.split()[-3:] == ["0", "0", "60"], err
    begun = [line for line in (tmp_path / "ran.txt").read_text().splitlines() if line.endswith("begins")]
    assert len(begun) == 60
