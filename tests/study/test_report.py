"""The report: what it says, and what a browser makes of it."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import math
import os
import re
import select
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from weightroom.errors import UsageError
from weightroom.study import report
from weightroom.study.core import Arm, Study
from weightroom.study.expect import Claim, Expect
from weightroom.study.results import Entry, Results
from weightroom.study.stats import Verdict
from weightroom.study.store import FILE, Outcome, Store, TrialKey

HOSTILE = ("<script>alert(1)</script>", "</script><img src=x onerror=alert(2)>%{x} $x$ & \"q\" 'p'", "<b>bold</b>", "a" * 200)
BIB = "@article{{{0},\n  title = {{{0} & co}}\n}}"


def made(study, value, *, status=lambda arm, setting, seed: "done", curves=None, folder=Path("nowhere"), **more):
    """Results without an engine: ``value(arm, setting, seed, variant)`` returns metrics and costs."""
    entries, outcomes = [], {}
    for variant in ("common", "tuned") if study.tune else ("common",):
        for seed in study.seeds:
            for setting in study.settings:
                for arm in study.arms:
                    fingerprint = f"{variant}/{arm}/{setting}/{seed}"
                    key = TrialKey(study.name, arm, setting, seed, "test", study.scale.value, {}, fingerprint)
                    entries.append(Entry(variant, key))
                    state = status(arm, setting, seed)
                    if state == "done":
                        outcomes[fingerprint] = Outcome("done", *value(arm, setting, seed, variant))
                    elif state == "failed":
                        outcomes[fingerprint] = Outcome("failed", reason=f"RuntimeError: <i>{arm}</i> went wrong (x.py:3)")
    if curves is not None:
        with Store(folder) as store:
            for entry in entries:
                store.claim(entry.key, {})
                logged = curves(entry.key.arm, entry.key.setting, entry.key.seed)
                store.finish(entry.key.fingerprint, Outcome("done", curves=logged))
    return Results(study, entries, outcomes, folder=folder, **more)


def noise(*key):
    return np.random.default_rng([sum(map(ord, str(part))) for part in key]).normal()


def rich(folder, **more):
    """Numeric settings, two metrics, costs, claims, tuning, curves, failures."""
    arms = {
        name: Arm(
            lambda trial: {}, defaults={"lr": 0.1}, space={"lr": (1e-3, 1.0, "log"), "k": [1, 2]}, cites=(BIB.format("han"),)
        )
        for name in ("dense", "magnitude", "random")
    }
    study = Study(
        "prune", arms, metric="accuracy", metrics={"loss": "min"}, seeds=4, tune=2,
        settings={s: float(s) for s in ("0.5", "0.9", "0.95")}, notes={"digits": "sha256 0123abcd"},
        expect=[Claim("magnitude beats random", Expect("magnitude", on="0.9").better_than("random")),
                Claim("random beats dense", Expect("random").better_than("dense")),
                Claim("dense stays in reach", Expect("dense").within(0.89, 0.9))],
    )  # fmt: skip

    def value(arm, setting, seed, variant):
        accuracy = 0.9 - {"dense": 0.0, "magnitude": 0.1, "random": 0.4}[arm] * float(setting) + 0.02 * noise(arm, seed)
        costs = {"seconds": 2.0, "parameters": 2e6 * (1 - float(setting)) ** 2, "peak_memory": 3 * 2.0**20, "latency": 2e-3}
        return {"accuracy": accuracy + 0.01 * (variant == "tuned"), "loss": 1 - accuracy}, costs

    def curves(arm, setting, seed):
        return [("loss", step, 1 / step + seed) for step in range(1, 5)]

    def status(arm, setting, seed):
        return {("random", "0.95", 3): "failed", ("random", "0.95", 2): "missing"}.get((arm, setting, seed), "done")

    chosen = {("magnitude", "0.5"): {"lr": 0.25, "k": 2}}
    return made(study, value, status=status, curves=curves, folder=folder, chosen=chosen, **more)


def hostile(**more):
    """Twenty arms with the worst names, twelve named settings."""
    names = [*HOSTILE, *(f"arm {i}" for i in range(16))]
    settings = {**dict.fromkeys(HOSTILE[:2]), **{f"task {i}": i for i in range(10)}}
    study = Study(
        HOSTILE[0], {n: Arm(lambda trial: {}, cites=(HOSTILE[1],)) for n in names}, metric=HOSTILE[2], settings=settings, seeds=2,
        notes={HOSTILE[0]: HOSTILE[1]}, expect=[Claim(HOSTILE[1], Expect(names[1], on="task 0").better_than(names[0]))],
    )  # fmt: skip
    value = lambda arm, setting, seed, variant: ({HOSTILE[2]: noise(arm, setting, seed)}, {"seconds": 1.0 + seed})  # noqa: E731
    failed = lambda arm, setting, seed: "failed" if arm == HOSTILE[0] and setting == "task 1" else "done"  # noqa: E731
    return made(study, value, status=failed, environment={"command": HOSTILE[1], HOSTILE[0]: HOSTILE[0]}, **more)


def simple(seeds=3, arms=("a", "b"), metric="error", direction="min", value=None, status=None, **more):
    study = Study("simple", {arm: Arm(lambda trial: {}) for arm in arms}, metric=metric, direction=direction, seeds=seeds, **more)
    given = value or (
        lambda arm, setting, seed, variant: ({metric: 0.5 + 0.1 * list(arms).index(arm) + 0.01 * seed}, {"seconds": 1.5})
    )
    return made(study, given, status=status or (lambda *key: "done"))


class Page(HTMLParser):
    """The elements of a page, its text, its headings."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.source = Path(path).read_text(encoding="utf-8")
        self.elements, self.headings, self.scripts, self.words, self.stack = [], [], [], [], []
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.stack.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if re.fullmatch(r"h\d", tag):
            self.headings.append(int(tag[1]))

    def handle_endtag(self, tag):
        if self.stack and self.stack[-1] == tag:
            self.stack.pop()

    def handle_data(self, data):
        if self.stack[-1:] == ["script"]:
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif not self.stack:
            self.words.append(data)

    def count(self, tag):
        return sum(name == tag for name, _ in self.elements)

    @property
    def figures(self):
        return json.loads(next(text for attrs, text in self.scripts if attrs.get("id") == "figures"))


def written(results, path, title=None):
    report.write_many(results if isinstance(results, list) else [results], path, title)
    return Page(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def pages(folder):
    """The pages that several tests look at."""
    return {
        "rich": written(rich(folder / "store"), folder / "rich.html"),
        "hostile": written(hostile(), folder / "hostile.html"),
        "failed": written(simple(status=lambda *key: "failed"), folder / "failed.html"),
        "one": written(simple(seeds=1, arms=("only",)), folder / "one.html"),
        "many": written([rich(folder / "store"), simple()], folder / "many.html"),
    }


# Files


def test_the_trials_lie_beside_the_page(tmp_path):
    results = simple()
    results.report(tmp_path / "deep" / "out.html")
    csv, parquet = pd.read_csv(tmp_path / "deep" / "out.csv"), pd.read_parquet(tmp_path / "deep" / "out.parquet")
    for table in (csv, parquet):
        assert table["error"].tolist() == pytest.approx(results.frame["error"].tolist())
        assert list(table.columns) == list(results.frame.columns)


def test_parquet_takes_hyper_parameters_of_mixed_types(tmp_path):
    results = simple()
    results.entries = [
        Entry(e.variant, TrialKey(**{**vars(e.key), "params": {"x": x, "y": 1.5}}))
        for e, x in zip(results.entries, [1, "one", [1, 2], None, True, {"a": 1}], strict=True)
    ]
    results.report(tmp_path / "out.html")
    table = pd.read_parquet(tmp_path / "out.parquet")
    assert table["param.x"].tolist() == ["1", "one", "[1, 2]", None, "True", "{'a': 1}"]
    assert table["param.y"].tolist() == [1.5] * 6


def test_an_unwritable_path_is_an_error_of_the_user(tmp_path):
    (tmp_path / "out.html").mkdir()
    with pytest.raises(UsageError, match="cannot be written"):
        simple().report(tmp_path / "out.html")


def test_the_page_links_the_files_by_their_names(tmp_path):
    page = written(simple(), tmp_path / "a b#c.html")
    assert [a["href"] for tag, a in page.elements if tag == "a" and "download" in a] == ["a%20b%23c.csv", "a%20b%23c.parquet"]


# One file, safe


def test_nothing_is_loaded_from_elsewhere(pages):
    for page in pages.values():
        for tag, attrs in page.elements:
            assert "src" not in attrs, tag
            assert tag != "link" or attrs["href"] == "data:,"
            if tag == "a":
                assert not attrs["href"].startswith(("http:", "javascript:"))
        assert page.source.count("plotly.js v") == 1


def test_the_policy_allows_the_two_scripts_and_nothing_else(pages):
    for page in pages.values():
        policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
        allowed = re.search(r"script-src (.*)$", policy)[1].split()
        hashes = [
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for attrs, text in page.scripts if "type" not in attrs
        ]  # fmt: skip
        assert allowed == hashes
        assert len(hashes) == 2
        assert "default-src 'none'" in policy


def test_what_the_user_names_stays_text(pages):
    page = pages["hostile"]
    assert (page.count("script"), page.count("img"), page.count("b"), page.count("i")) == (3, 0, 0, 0)
    for text in HOSTILE[:3]:
        assert " ".join(text.split()) in page.text
    assert f"RuntimeError: <i>{HOSTILE[0]}</i> went wrong" in page.text
    for figure in (f for versions in page.figures[0].values() for f in versions.values() if f):
        hover = [text for trace in figure["data"] for text in trace.get("hovertext", ())]
        for text in (*figure["layout"]["yaxis"].get("ticktext", ()), *hover):
            assert "<" not in text.replace("<br>", "")
            assert "$" not in text  # plotly would take it for TeX


def test_every_figure_is_one_that_plotly_accepts(pages):
    for page in pages.values():
        for study in page.figures:
            for versions in study.values():
                for figure in (f for f in versions.values() if f):
                    go.Figure(figure)
                    assert "NaN" not in json.dumps(figure)
                    assert figure["layout"]["meta"]["alt"]


def test_headings_come_in_order(pages):
    for page in pages.values():
        assert page.headings.count(1) == 1
        assert page.headings[0] == 1
        assert all(b <= a + 1 for a, b in zip(page.headings, page.headings[1:], strict=False))


def test_ids_are_unique(pages):
    for page in pages.values():
        ids = [a["id"] for _, a in page.elements if "id" in a]
        assert len(ids) == len(set(ids))


# What it says


@pytest.mark.parametrize(
    "words, said",
    [
        (["holds"], "The claim holds."),
        (["fails"], "The claim fails."),
        (["inconclusive"], "The claim is inconclusive."),
        (["holds", "holds"], "All 2 claims hold."),
        (["inconclusive"] * 3, "All 3 claims are inconclusive."),
        (["inconclusive", "holds", "fails", "holds"], "4 claims: 2 hold, 1 fail, 1 inconclusive."),
    ],
)
def test_the_answer_counts_the_verdicts(words, said):
    assert report._answer(words) == said


def shown(results):
    return report._Shown(results, {arm: i for i, arm in enumerate(results.study.arms)})


def test_without_claims_the_answer_is_the_best_arm_and_its_interval():
    results = simple()
    row = results.table().iloc[0]
    assert shown(results).answer == f"a has the best mean error: {row['mean']:.4f} [{row.low:.4f}, {row.high:.4f}]."
    better = simple(direction="max")
    assert "; +0.1000 [+0.1000, +0.1000] against a." in shown(better).answer
    unclear = simple(
        direction="max", value=lambda arm, s, seed, v: ({"error": 0.5 + 0.1 * (arm == "b") * (-1) ** (seed + 0) * (2 - seed)}, {})
    )
    assert shown(unclear).answer.endswith("against a, not clearly better.")


def test_the_answer_counts_settings():
    value = lambda arm, setting, seed, variant: ({"error": {"x": 1, "y": 2, "z": 3}[setting] * (1 if arm == "a" else -1)}, {})  # noqa: E731
    assert (
        "b has the best mean error in every setting; at x, b reaches −1.000"
        in shown(simple(settings=dict.fromkeys("xyz"), value=value)).answer
    )
    other = lambda arm, setting, seed, variant: ({"error": 1.0 if (arm == "a") == (setting == "x") else 2.0}, {})  # noqa: E731
    assert (
        "b has the best mean error in 2 of 3 settings; at x, a reaches"
        in shown(simple(settings=dict.fromkeys("xyz"), value=other)).answer
    )


def test_one_arm_one_seed_has_no_interval(pages):
    assert "only: error 0.5000." in pages["one"].text
    assert "One seed only" in pages["one"].text
    assert "∞" not in pages["one"].text
    trace = next(t for t in pages["one"].figures[0]["arms"]["0,0,0"]["data"] if t["meta"]["kind"] == "mean")
    assert (trace["error_x"]["array"], trace["error_x"]["arrayminus"]) == ([0.0], [0.0])
    assert "differences" not in pages["one"].figures[0]


def test_when_all_trials_failed_the_page_says_so(pages):
    page = pages["failed"]
    assert "No result: none of 6 trials has finished." in page.text
    assert "Of 6 trials, 6 failed" in page.text
    assert "RuntimeError: <i>a</i> went wrong" in page.text
    assert page.figures[0] == {"arms": {"0,0,0": None}, "differences": {"0,0,0": None}}


def test_failed_and_missing_trials_are_listed_with_their_reasons(pages):
    text = pages["rich"].text
    assert "Of 72 trials, 2 failed and 2 not run" in text
    assert re.search(r"random common setting 0\.95 3 1 RuntimeError: <i>random</i> went wrong \(x\.py:3\)", text)
    assert re.search(r"random tuned 0\.95 2 1 not run", text)


def test_values_that_are_not_finite_do_no_harm(tmp_path):
    values = {"a": [1.0, math.nan, math.inf], "b": [5e-9, 0.0, -math.inf], "c": [1e12, 2e12, 3e12]}
    results = simple(
        arms=("a", "b", "c"), direction="max", value=lambda arm, s, seed, v: ({"error": values[arm][seed]}, {"seconds": math.inf})
    )
    page = written(results, tmp_path / "out.html")
    assert "c has the best mean error: 2.000e+12" in page.text
    notes = [note["text"] for note in page.figures[0]["arms"]["0,0,0"]["layout"]["annotations"]]
    assert notes == ["not finite", "not finite"]


def test_the_ranking_has_the_numbers_of_the_table(pages, folder):
    results = rich(folder / "store")
    row = results.table("0.9", "loss").set_index("arm").loc["random"]
    ranking = next(r for r in shown(results).rankings if (r["variant"], r["metric"], r["setting"]) == ("common", "loss", "0.9"))
    cells = next(r for r in ranking["rows"] if r["arm"] == "random")
    minus = lambda text: text.replace("-", "−")  # noqa: E731
    assert cells["rank"] == "3"
    assert cells["mean"] == f"{row['mean']:.4f}"
    assert cells["interval"] == f"[{row.low:.4f}, {row.high:.4f}]"
    assert cells["difference"] == minus(f"{row.difference:+.3f}")
    assert cells["difference_interval"] == minus(f"[{row.difference_low:+.3f}, {row.difference_high:+.3f}]")
    assert dict(zip([head[1:] for head in ranking["costs"]], cells["costs"], strict=True)) == {
        ("time", "s"): "2.00", ("peak memory", "MiB"): "3.00", ("parameters", "k"): "20.0", ("latency", "ms"): "2.00",
    }  # fmt: skip
    assert f"loss, 0.9: mean and 95 % interval; the difference to dense is paired by seed" in pages["rich"].text  # noqa: F541


@pytest.mark.parametrize(
    "cost, values, unit",
    [
        ("parameters", [12.0], (1.0, "")),
        ("parameters", [999.0, 2.1e6], (1e6, "M")),
        ("flops", [3e9], (1e9, "G")),
        ("peak_memory", [100.0], (2.0**10, "KiB")),
        ("peak_memory", [2.0**31, 5.0], (2.0**30, "GiB")),
        ("latency", [3e-5], (1e-6, "µs")),
        ("seconds", [7200.0], (1.0, "s")),
        ("seconds", [], (1e-6, "µs")),
        ("steps", [1000.0], (1e3, "k")),
    ],
)
def test_units_fit_the_largest_value(cost, values, unit):
    assert report._unit(cost, values) == unit


@pytest.mark.parametrize(
    "values, spec, text",
    [
        ([0.97312, 0.5], ",.4f", "0.9731"),
        ([97.312], ",.2f", "97.31"),
        ([123456.0], ",.0f", "123,456"),
        ([-3e-7], ".3e", "−3.000e−07"),
        ([0.0], ",.3f", "0.000"),
    ],
)
def test_numbers_of_a_column_share_their_decimals(values, spec, text):
    assert report._decimals(values) == spec
    assert report._number(values[0], spec) == text


def test_verdicts_are_told_in_words_symbols_and_a_picture(pages, folder):
    results = rich(folder / "store")
    assert [v.verdict for v in results.verdicts] == ["holds", "fails", "inconclusive"]
    text = pages["rich"].text
    assert "3 claims: 1 hold, 1 fail, 1 inconclusive." in text
    for verdict, mark in zip(results.verdicts, "✓✗?", strict=True):
        assert f"{mark} {verdict.verdict} {verdict.statement}" in text
        assert verdict.reason in text
        assert f"{100 * verdict.level:.4g} %" in text


def picture(difference, interval, region, verdict="holds"):
    v = Verdict("x", verdict, difference, interval, 5, 0.95, 0.01, "", region, "a", "b")
    svg = str(report._picture(v))
    region_ = tuple(float(x) for x in re.search(r'<rect x="([\d.]+)" width="([\d.]+)"', svg).groups())
    bar = tuple(float(x) for x in re.search(r'd="M([\d.]+) 14H([\d.]+)"', svg).groups())
    return (region_[0], sum(region_)), bar, float(re.search(r'cx="([\d.]+)"', svg)[1]), svg.count('class="border"')


def test_the_picture_shows_whether_the_interval_lies_in_the_region():
    region, bar, mean, borders = picture(0.5, (0.4, 0.6), (0.1, math.inf))
    assert region[0] < bar[0] < mean < bar[1] < region[1] == 180
    assert borders == 1
    region, bar, mean, borders = picture(-0.5, (-0.6, -0.4), (-0.1, 0.1), "fails")
    assert bar[0] < mean < bar[1] < region[0] < region[1] < 180
    assert borders == 2
    assert picture(0.0, (-math.inf, math.inf), (-math.inf, 0.0))[1] == (0.0, 180.0)
    assert picture(3.0, (3.0, 3.0), (3.0, 3.0))[0][0] == pytest.approx(90)
    nothing = Verdict("x", "inconclusive", math.nan, (-math.inf, math.inf), 0, 0.95, math.nan, "", (0, 1), "a")
    assert report._picture(nothing) == ""


def test_tuning_says_what_was_given_and_chosen(pages):
    text = pages["rich"].text
    assert "lr 0.001 … 1 (log) k 1, 2" in text
    assert "lr 0.25 k 2" in text


def test_search_trials_are_counted(folder):
    results = rich(folder / "store")
    keys = [TrialKey("prune", "random", "0.5", 1_000_003, "val", "small", {"lr": lr}, f"search {lr}") for lr in (0.1, 0.2)]
    results.entries = [*results.entries, *(Entry("search", key) for key in keys)]
    results.outcomes = {
        **results.outcomes,
        "search 0.1": Outcome("done", {"accuracy": 0.5}),
        "search 0.2": Outcome("failed", reason="boom"),
    }
    view = shown(results)
    row = next(row for row in view.tuning[0]["rows"] if row["arm"] == "random")
    assert (row["tried"], row["failed"]) == (2, 1)
    assert {"arm": "random", "stage": "tuning", "trials": 1, "reason": "boom", "settings": "0.5", "seeds": ""} in view.failures
    assert view.seeds == [0, 1, 2, 3]


def test_configuration_environment_notes_and_command_are_there(tmp_path):
    results = simple(max_seeds=9, notes={"data": "sha256 77"})
    results.environment = {"torch": "2.13", "command": "weightroom compare optimizer --seeds 3"}
    text = written(results, tmp_path / "out.html").text
    for said in (
        "data sha256 77",
        "torch 2.13",
        "weightroom compare optimizer --seeds 3",
        "Most seeds 9",
        "error (lower is better)",
        '"max_seeds": 9',
    ):
        assert said in text


def test_without_a_command_there_is_python_to_run_it_again():
    results = simple()
    assert shown(results).command.endswith("study.run('nowhere')")
    results.study.paper = SimpleNamespace(key="lion-k")
    command = shown(results).command
    assert "from weightroom.papers.lion_k import study" in command
    assert "Scale('small')" in command
    compile(command, "command", "exec")


def test_bibtex_of_paper_and_arms_once_each(tmp_path):
    results = simple()
    results.study.paper = SimpleNamespace(key="p", title="T", bibtex=BIB.format("paper"))
    for arm, cites in {
        "a": (BIB.format("one"), SimpleNamespace(bibtex=BIB.format("two"))),
        "b": (BIB.format("one"), int),
    }.items():
        results.study.arms[arm] = Arm(lambda trial: {}, cites=cites)
    text = written([results, results], tmp_path / "out.html").text
    for key in ("paper", "one", "two"):
        assert text.count(f"@article{{{key},") == 1


def test_the_statistics_take_three_sentences():
    for results in (simple(), simple(max_seeds=9, expect=[Expect("a").better_than("b")])):
        text = shown(results).statistics
        assert len(re.findall(r"\.(?: [A-Z]|$)", re.sub(r"(J|Biopharm|Scand|Statist|Pharmacokinet)\.", r"\1", text))) == 3
        assert ("Kim and DeMets" in text) == (results.study.max_seeds == 9)


# Figures


def traces(figure, kind, arm=None):
    return [t for t in figure["data"] if t["meta"]["kind"] == kind and (arm is None or t["meta"]["arm"] == arm)]


def test_means_intervals_and_seeds_of_every_arm(pages, folder):
    results = rich(folder / "store")
    figure = pages["rich"].figures[0]["arms"]["0,0,1"]  # common, accuracy, 0.9
    table = results.table("0.9")
    assert figure["layout"]["yaxis"]["ticktext"] == table.arm.tolist()
    for i, row in table.iterrows():
        arm = list(results.study.arms).index(row.arm)
        (mean,), (dots,) = traces(figure, "mean", arm), traces(figure, "dots", arm)
        assert mean["x"] == [pytest.approx(row["mean"])]
        assert mean["y"] == [i]
        assert mean["x"][0] + mean["error_x"]["array"][0] == pytest.approx(row.high)
        assert mean["x"][0] - mean["error_x"]["arrayminus"][0] == pytest.approx(row.low)
        assert dots["x"] == pytest.approx(results.values(row.arm, setting="0.9").tolist())


def test_differences_are_improvements_and_filled_where_they_are_clear(pages):
    figure = pages["rich"].figures[0]["differences"]["0,1,1"]  # loss, lower is better: random is worse, to the left
    (random,) = traces(figure, "mean", 2)
    assert random["x"][0] < 0
    assert len(traces(figure, "dots", 2)[0]["x"]) == 4
    assert [n["text"] for n in figure["layout"]["annotations"]] == ["baseline"]
    low, high = figure["layout"]["xaxis"]["range"]
    assert low < min(traces(figure, "dots", 2)[0]["x"]) < 0 < high
    unclear = simple(value=lambda arm, s, seed, v: ({"error": 0.5 + (arm == "b") * (seed - 1)}, {}))
    assert traces(shown(unclear).figures["differences"]["0,0,0"], "open")[0]["marker"]["symbol"] == "circle-open"


def test_numeric_settings_make_curves_with_bands(pages, folder):
    results = rich(folder / "store")
    figure = pages["rich"].figures[0]["across"]["0,0"]
    (line,), (band,) = traces(figure, "line", 1), traces(figure, "band", 1)
    tables = [results.table(s).set_index("arm").loc["magnitude"] for s in results.study.settings]
    assert line["y"] == pytest.approx([t["mean"] for t in tables])
    assert band["y"] == pytest.approx([*(t.high for t in tables), *(t.low for t in reversed(tables))])
    assert band["fill"] == "toself"
    assert figure["layout"]["xaxis"]["ticktext"] == ["0.5", "0.9", "0.95"]


def test_named_settings_make_rows(pages):
    figure = pages["hostile"].figures[0]["across"]["0,0"]
    assert len(figure["layout"]["yaxis"]["ticktext"]) == 12
    assert not traces(figure, "band")
    assert all(t["mode"] == "markers" for t in traces(figure, "line"))
    assert len({y for t in traces(figure, "line") for y in t["y"]}) == 12 * 20 - 1  # all apart; one arm failed in one setting


@pytest.mark.parametrize(
    "names, expected",
    [
        (["1", "2", "3"], ([1, 2, 3], "")),
        (["32x", "2x", "8x"], ([5, 1, 3], "logarithmic")),
        (["90 %", "99 %", "99.9 %"], None),
        (["0.5", "0.9", "0.95", "0.99"], None),
        (["0", "0.1", "0.2"], ([0, 0.1, 0.2], "")),
        (["noise 0.1", "noise 0.2"], ([0.1, 0.2], "")),
        (["-1", "1e-3", "+2.5"], ([-1, 1e-3, 2.5], "")),
    ],
)
def test_settings_that_are_numbers_lie_on_an_axis(names, expected):
    places, word = report._operating_points(names)
    if expected is None:
        assert "− x" in word
        assert places == sorted(places)
    else:
        assert places == pytest.approx(expected[0])
        assert (expected[1] in word) if expected[1] else word == ""


@pytest.mark.parametrize(
    "names", [["0.5"], ["a", "b"], ["cifar10", "cifar100"], ["1", "b"], ["1x", "2"], ["1", "1.0"], ["1", "nan"], [""]]
)
def test_settings_that_are_names_do_not(names):
    assert report._operating_points(names) is None


def test_costs_go_on_the_x_axis_in_human_units(pages):
    figures = pages["rich"].figures[0]["costs"]
    by_title = {f["layout"]["xaxis"]["title"]["text"]: f for key, f in figures.items() if key.startswith("0,0,")}
    assert list(by_title) == ["parameters (k)", "latency (ms)", "time (s)", "peak memory (MiB)"]
    (line,) = traces(by_title["parameters (k)"], "line", 1)
    assert line["x"] == pytest.approx([500, 20, 5])
    assert by_title["parameters (k)"]["layout"]["xaxis"]["type"] == "log"
    assert line["error_y"]["array"][0] > 0


def test_a_wide_range_is_shown_on_a_logarithmic_axis():
    assert report._axis("t", [1.0, 100.0])["type"] == "log"
    assert "type" not in report._axis("t", [1.0, 40.0])
    assert "type" not in report._axis("t", [0.0, 100.0])
    assert "type" not in report._axis("t", [1.0, 100.0], lows=[-1.0])
    assert "type" not in report._axis("t", [])


def test_common_and_tuned_stand_side_by_side(pages, folder):
    results = rich(folder / "store")
    figure = pages["rich"].figures[0]["tuned"]["0,0"]
    (common,), (tuned,) = traces(figure, "open", 1), traces(figure, "mean", 1)
    assert common["x"] == [pytest.approx(results.values("magnitude").mean())]
    assert tuned["x"] == [pytest.approx(results.values("magnitude", variant="tuned").mean())]
    assert common["y"][0] < tuned["y"][0]


def test_training_curves_are_means_with_bands(pages):
    figure = pages["rich"].figures[0]["curves"]["0,0,0"]
    (line,), (band,) = traces(figure, "line", 0), traces(figure, "band", 0)
    assert line["x"] == [1, 2, 3, 4]
    assert line["y"] == pytest.approx([1 / step + 1.5 for step in range(1, 5)])
    assert band["y"][:4] > line["y"]


def test_a_seed_counts_in_a_curve_where_it_has_logged():
    rows = report._summary([[(0.0, 1.0), (2.0, 3.0)], [(0.0, 3.0), (1.0, 3.0)]])
    assert [(r["step"], r["mean"], r["n"]) for r in rows] == [(0.0, 2.0, 2), (1.0, 2.5, 2), (2.0, 3.0, 1)]
    assert report._summary([]) == []
    long = report._summary([[(float(i), float(i)) for i in range(5000)]])
    assert len(long) == report.POINTS
    assert (long[0]["step"], long[-1]["step"]) == (0.0, 4999.0)


def test_a_store_that_cannot_be_read_costs_only_the_curves(tmp_path):
    (tmp_path / FILE).write_bytes(b"this is no database, but it is long enough to be taken for one" * 10)
    results = simple()
    results.folder = tmp_path
    page = written(results, tmp_path / "out.html")
    assert "The training curves could not be read: store" in page.text
    assert "curves" not in page.figures[0]


def test_an_arm_looks_the_same_in_every_study_and_unlike_the_others(tmp_path):
    page = written([simple(arms=("base", "a", "b")), simple(arms=("base", "b"))], tmp_path / "out.html")
    first, second = (f["costs"]["0,0,0,0"] for f in page.figures)
    look = lambda figure, arm: [(t["meta"]["colour"], t["marker"]["symbol"]) for t in traces(figure, "line", arm)]  # noqa: E731
    assert look(first, 2) == look(second, 1)
    assert look(first, 0)[0][0] == 0
    last = written(simple(arms=("a", "b", "base"), baseline="base"), tmp_path / "last.html").figures[0]["costs"]["0,0,0,0"]
    assert look(last, 2)[0][0] == 0  # the baseline has the first colour wherever it stands
    many = simple(arms=[f"arm {i}" for i in range(35)])
    assert len({str(a["swatch"]) for a in shown(many).legend}) == 35
    assert (
        len({(t["meta"]["colour"], t["marker"]["symbol"]) for t in traces(shown(many).figures["costs"]["0,0,0,0"], "line")}) == 35
    )


# Several studies


def test_one_page_for_the_studies_of_a_paper(tmp_path):
    paper = SimpleNamespace(
        key="p", title="On <Papers>", authors="A. Uthor", venue="ICML", year=2024, arxiv="2401.00001", summary="S.",
        claim="C.", limits="L.", bibtex=BIB.format("p"),
    )  # fmt: skip
    results = [simple(expect=[Expect("a").always(0, 1)]), simple(arms=("x", "y"))]
    for i, one in enumerate(results):
        one.study.paper, one.study.name = paper, f"p: part {i}"
    page = written(results, tmp_path / "out.html")
    assert page.text.count("On <Papers> . A. Uthor") + page.text.count("On <Papers>. A. Uthor") == 1
    assert [a["href"] for tag, a in page.elements if tag == "a" and a["href"].startswith("#study")] == ["#study-0", "#study-1"]
    assert "✓ holds The claim holds." in page.text
    assert len(pd.read_csv(tmp_path / "out.csv")) == 12
    assert "Claim. C." in page.text
    assert "A title" in written(results, tmp_path / "out.html", title="A title").text


# Colours


def test_colours_have_contrast_in_both_themes():
    css = report._resource("report.css")
    pairs = {name: (light, dark) for name, light, dark in re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", css)}
    assert sum(name.startswith("arm-") for name in pairs) == report.COLOURS

    def luminance(colour):
        rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        return sum(
            w * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
            for w, c in zip((0.2126, 0.7152, 0.0722), rgb, strict=True)
        )

    def contrast(a, b):
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    for theme in (0, 1):
        for name, colours in pairs.items():
            if name.startswith("arm-"):
                assert contrast(colours[theme], pairs["page"][theme]) >= 3, name
            elif name not in ("line", "page", "raised"):
                assert contrast(colours[theme], pairs["page"][theme]) >= 4.5, name
                assert contrast(colours[theme], pairs["raised"][theme]) >= 4.5, name


# In a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND",
    "--remote-debugging-pipe",
)  # fmt: skip
#: Puts the pipe where Chromium looks for it, at 3 and 4.
LAUNCH = "import os, sys; r, w = map(int, sys.argv[1:3]); os.dup2(r, 3); os.dup2(w, 4); os.execv(sys.argv[3], sys.argv[3:])"


class Browser:
    """A headless Chromium, spoken to over its debugging pipe."""

    def __init__(self, profile):
        pipes = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (*os.pipe(), *os.pipe())]
        self.input, theirs_out, theirs_in, self.output = pipes
        command = [
            sys.executable,
            "-c",
            LAUNCH,
            str(theirs_in),
            str(theirs_out),
            CHROMIUM,
            *FLAGS,
            f"--user-data-dir={profile}",
            "about:blank",
        ]
        self.process = subprocess.Popen(
            command, pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.session, self.count, self.buffer, self.events = None, 0, b"", []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        self.count += 1
        session = {"sessionId": self.session} if self.session else {}
        os.write(self.output, json.dumps({"id": self.count, "method": method, "params": params, **session}).encode() + b"\0")
        while (answer := self.read()).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def read(self):
        while b"\0" not in self.buffer:
            assert select.select([self.input], [], [], 120)[0], "chromium does not answer"
            got = os.read(self.input, 1 << 20)
            assert got, "chromium has gone"
            self.buffer += got
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def open(self, path):
        self.events.clear()
        self.look()
        self.call("Page.navigate", url=Path(path).resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.read())
        self.settle()

    def look(self, width=1280, height=900, dark=False):
        """The screen and the theme of the system."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.settle()

    def settle(self):
        """Waits until what is scheduled is drawn: a resize waits 150 ms, then one study is drawn after the other."""
        self.run("new Promise((done) => setTimeout(() => requestAnimationFrame(() => setTimeout(done, 20)), 250))")

    def run(self, script):
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def complaints(self):
        """Exceptions, console messages, dialogs, and requests that leave the page."""
        bad = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Page.javascriptDialogOpening")
        requests = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [e for e in self.events if e.get("method") in bad] + [
            url for url in requests if not url.startswith(("file:", "data:", "blob:"))
        ]

    def close(self):
        os.write(self.output, json.dumps({"id": 0, "method": "Browser.close"}).encode() + b"\0")
        self.process.wait(30)
        os.close(self.input)
        os.close(self.output)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


#: Whether a CSS colour is nearer to white than to black.
BRIGHT = "((c) => c.match(/[\\d.]+/g).slice(0, 3).map(Number).reduce((a, b) => a + b) > 382)"
PAGE = f"{BRIGHT}(getComputedStyle(document.body).backgroundColor)"
TICKS = f"[...document.querySelectorAll('.xtick text')].map((t) => {BRIGHT}(getComputedStyle(t).fill))"


@pytest.mark.parametrize("name", ["rich", "hostile", "failed", "many"])
def test_every_plot_is_drawn_on_a_desk_on_a_phone_and_in_the_dark(browser, pages, folder, name):
    browser.open(folder / f"{name}.html")
    expected = [versions[next(iter(versions))] is not None for study in pages[name].figures for versions in study.values()]
    plots = "[...document.querySelectorAll('.plot')]"
    drawn = f"{plots}.map((p) => !p.hidden && Boolean(p.querySelector('svg.main-svg .scatterlayer .trace')))"
    empty = "[...document.querySelectorAll('.empty')].map((e) => e.hidden)"
    assert browser.run(drawn) == browser.run(empty) == expected

    browser.look(width=390, height=844)
    assert browser.run(drawn) == expected
    assert browser.run("[innerWidth, document.documentElement.scrollWidth]") == [390, 390]
    assert browser.run("[...document.querySelectorAll('svg.main-svg')].every((s) => s.getBoundingClientRect().right <= 390)")
    assert browser.run("[...document.querySelectorAll('table')].every((t) => t.closest('.scroll'))")

    assert browser.run(PAGE) is True
    browser.look(width=390, height=844, dark=True)
    assert browser.run(PAGE) is False
    assert set(browser.run(TICKS)) == ({True} if any(expected) else set())
    assert browser.complaints() == []


def test_the_controls_do_what_they_say(browser, pages, folder):
    browser.open(folder / "rich.html")
    figures = pages["rich"].figures[0]

    def choose(dim, index):
        browser.run(f"document.querySelector('select[data-dim={dim}]').selectedIndex = {index}")
        browser.run(f"document.querySelector('select[data-dim={dim}]').dispatchEvent(new Event('change'))")

    label = "document.querySelector('[data-plot=arms]').getAttribute('aria-label')"
    tables = "[...document.querySelectorAll('[data-when*=variant]')].filter((t) => !t.hidden).map((t) => t.dataset.when)"
    assert browser.run(label) == figures["arms"]["0,0,0"]["layout"]["meta"]["alt"]
    assert browser.run(tables) == ["variant=0 metric=0 setting=0"]
    for dim, index in {"metric": 1, "setting": 2, "variant": 1, "cost": 2}.items():
        choose(dim, index)
    assert browser.run(label) == figures["arms"]["1,1,2"]["layout"]["meta"]["alt"]
    assert browser.run(tables) == ["variant=1 metric=1 setting=2"]
    assert browser.run("document.querySelector('[data-plot=costs] .xtitle').textContent") == "time (s)"

    button = "document.querySelectorAll('.legend button')[1]"
    for lines, pressed in ((4, "false"), (6, "true")):  # three arms, each a band and a line
        browser.run(f"{button}.click()")
        assert browser.run("document.querySelectorAll('[data-plot=across] .scatterlayer .trace').length") == lines
        assert browser.run(f"{button}.getAttribute('aria-pressed')") == pressed

    for bright, text in ((False, "Light"), (True, "Dark")):
        browser.run("document.getElementById('theme').click()")
        browser.settle()
        assert browser.run(PAGE) is bright
        assert set(browser.run(TICKS)) == {not bright}
        assert browser.run("document.getElementById('theme').textContent") == text

    browser.run("document.querySelector('.copy').click()")
    image = browser.run("Plotly.toImage(document.querySelector('.plot'), { format: 'png', width: 300, height: 200 })")
    assert base64.b64decode(image.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    assert browser.run("document.getElementById('status').textContent") == "Copied"

    browser.call("Accessibility.enable")
    nodes = [n for n in browser.call("Accessibility.getFullAXTree")["nodes"] if not n.get("ignored")]
    browser.call("Accessibility.disable")
    roles = {"button", "link", "combobox", "image", "region"}
    names = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if n["role"]["value"] in roles]
    assert {role for role, _ in names} == roles
    assert [role for role, name in names if not name.strip()] == []
    assert browser.run("[...document.querySelectorAll('button, select, a, summary')].every((e) => e.tabIndex === 0)")
    assert browser.complaints() == []
