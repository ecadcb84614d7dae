import json
import os
import resource
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from weightroom.errors import StoreError
from weightroom.study import store as store_module
from weightroom.study.store import FILE, Outcome, Store, TrialKey


def key(i=0, study="s", arm="a"):
    return TrialKey(study, arm, "", i, "test", "small", {"lr": 0.1}, f"fp-{study}-{arm}-{i}")


def finish(store, k, **metrics):
    assert store.claim(k, {}) == "mine"
    store.finish(k.fingerprint, Outcome("done", metrics, {"seconds": 1.0}, curves=[("loss", 0.0, 1.0)]))


def test_round_trip(tmp_path):
    with Store(tmp_path) as store:
        finish(store, key(), accuracy=0.5)
    with Store(tmp_path) as store:
        assert store.claim(key(), {}) == "done"
    with Store(tmp_path, create=False) as store:
        outcome = store.outcomes([key().fingerprint])[key().fingerprint]
        assert (outcome.metrics, outcome.costs) == ({"accuracy": 0.5}, {"seconds": 1.0})
        assert store.curves([key().fingerprint]) == {key().fingerprint: [("loss", 0.0, 1.0)]}
        row = store.frame("s").iloc[0]
        assert (row.arm, row.accuracy, row.seconds, json.loads(row.params)) == ("a", 0.5, 1.0, {"lr": 0.1})
        assert store.summary().to_dict("records")[0]["done"] == 1


def test_a_living_drivers_claim_is_respected_and_a_dead_ones_is_not(tmp_path):
    with Store(tmp_path) as mine, Store(tmp_path) as other:
        sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        import psutil

        other.owner = f"{mine.owner.split(':')[0]}:{sleeper.pid}:{psutil.Process(sleeper.pid).create_time():.2f}"
        assert other.claim(key(), {}) == "mine"
        assert mine.claim(key(), {}) == "theirs"
        sleeper.kill()
        sleeper.wait()
        assert mine.claim(key(), {}) == "mine"
        other.finish(key().fingerprint, Outcome("done", {"accuracy": 0.1}))  # too late: it is mine now
        assert mine.status([key().fingerprint]) == {key().fingerprint: "running"}


def test_a_driver_on_another_machine_lives_by_its_heartbeat(tmp_path, monkeypatch):
    with Store(tmp_path) as mine, Store(tmp_path) as other:
        other.owner = "elsewhere:1:0.00"
        assert other.claim(key(), {}) == "mine"
        assert mine.claim(key(), {}) == "theirs"
        monkeypatch.setattr(store_module, "STALE", -1.0)
        assert mine.claim(key(), {}) == "mine"


def test_release_gives_back_only_ones_own_claims(tmp_path):
    with Store(tmp_path) as store:
        finish(store, key(1), accuracy=1.0)
        store.claim(key(2), {})
        store.release()
        assert store.status(k.fingerprint for k in (key(1), key(2))) == {key(1).fingerprint: "done"}


def test_failed_trials_can_be_forgotten(tmp_path):
    with Store(tmp_path) as store:
        store.claim(key(), {})
        store.finish(key().fingerprint, Outcome("failed", reason="boom"))
        assert store.claim(key(), {}) == "failed"
        store.forget_failed([key().fingerprint])
        assert store.claim(key(), {}) == "mine"


def test_a_missing_store_is_said(tmp_path):
    with pytest.raises(StoreError, match="there is no store in"):
        Store(tmp_path / "none", create=False)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot be made .*choose another folder"):
        Store(tmp_path / "file" / "store")


def test_a_newer_store_is_left_alone(tmp_path):
    Store(tmp_path).close()
    with sqlite3.connect(tmp_path / FILE) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match=r"newer weightroom \(format 99.*upgrade"):
        Store(tmp_path)


def test_something_that_is_no_store(tmp_path):
    (tmp_path / FILE).write_text("hello " * 100)
    with pytest.raises(StoreError, match="damaged"):
        Store(tmp_path)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_a_truncated_store_is_not_taken_for_a_whole_one(tmp_path, share):
    with Store(tmp_path) as store:
        for i in range(200):
            finish(store, key(i), accuracy=0.5)
    path = tmp_path / FILE
    for side in ("-wal", "-shm"):
        path.with_name(FILE + side).unlink(missing_ok=True)
    os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises(StoreError, match="damaged"), Store(tmp_path) as store:
        store.frame()


def test_a_locked_store_is_said_after_some_patience(tmp_path):
    Store(tmp_path).close()
    holder = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StoreError, match="locked by another program"), Store(tmp_path, patience=0.1) as store:
        store.claim(key(), {})
    holder.close()


def test_a_read_only_store_is_said(tmp_path):
    with Store(tmp_path) as store:
        store.db.execute("PRAGMA query_only = 1")
        with pytest.raises(StoreError, match="read-only: make it writable"):
            store.claim(key(), {})


def test_a_full_disk_is_said_and_nothing_that_was_finished_is_lost(tmp_path):
    with Store(tmp_path) as store:
        finish(store, key(0), accuracy=0.5)
        pages = store.db.execute("PRAGMA page_count").fetchone()[0]
        store.db.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StoreError, match="disk is full"):
            for i in range(1, 500):
                finish(store, key(i), accuracy=0.5)
    with Store(tmp_path) as store:
        assert key(0).fingerprint in store.outcomes([key(0).fingerprint])


def test_a_file_that_may_not_grow(tmp_path):
    """The same with the system's own limit, in a process of its own."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from weightroom.study.store import *\nfrom weightroom.errors import StoreError\n"
        f"s = Store({str(tmp_path)!r})\nresource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))\n"
        "try:\n  for i in range(5000):\n    k = TrialKey('s', 'a', '', i, 'test', 'small', {}, str(i)); s.claim(k, {})\n"
        "except StoreError as e: print(e); sys.exit(7)"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    assert "cannot be written" in done.stdout


def test_old_trials_of_changed_code_stay_beside_the_new(tmp_path):
    with Store(tmp_path) as store:
        finish(store, key(0), accuracy=0.5)
        finish(store, TrialKey("s", "a", "", 0, "test", "small", {}, "other"), accuracy=0.7)
        assert sorted(store.frame("s").accuracy) == [0.5, 0.7]


def test_a_store_is_read_without_changing_it(tmp_path):
    with Store(tmp_path) as store:
        finish(store, key(), accuracy=0.5)
    with Store(tmp_path, create=False) as store:
        assert len(store.frame()) == 1
        with pytest.raises(StoreError, match="read-only"):
            store.claim(key(1), {})


def test_an_empty_name_is_no_folder():
    with pytest.raises(StoreError, match="must name a folder"):
        Store("")


def test_paths_with_spaces_and_quotes(tmp_path):
    folder = Path(tmp_path) / "my 'runs' ünïcode"
    with Store(folder) as store:
        finish(store, key(), accuracy=0.5)
    assert (folder / FILE).exists()
