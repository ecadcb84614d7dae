"""The private Kaplan-Meier curve beside lifelines' own, and its exact noise beside OpenDP's."""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Iterator

import numpy as np
from lifelines import KaplanMeierFitter

from benchmarks.base import Race, race
from weightroom.estimators import DPKaplanMeier
from weightroom.estimators.dp_kaplan_meier import _Coins


def races() -> Iterator[Race]:
    rng = np.random.default_rng(0)
    t, e = rng.exponential(400.0, 100_000), rng.random(100_000) < 0.7

    def fit(bins: int) -> DPKaplanMeier:
        return DPKaplanMeier(epsilon=1.0, horizon=900.0, bins=bins).fit(t, e)

    for name, times, target in (("days", np.ceil(t), 1.0), ("distinct times", t, 0.5)):
        peer = lambda times=times: KaplanMeierFitter().fit(times, e)  # noqa: E731
        yield race(f"dp-kaplan-meier: fit, 100,000 rows, 20 bins, {name}", lambda: fit(20), "lifelines", peer, target=target)
    yield race("dp-kaplan-meier: fit, 100,000 rows, 100 bins, distinct times", lambda: fit(100), "lifelines", peer, target=0.5)
    if importlib.util.find_spec("opendp") is None:
        return
    import opendp.prelude as dp

    dp.enable_features("contrib")
    noisy = dp.m.make_laplace(dp.vector_domain(dp.atom_domain(T=dp.i64)), dp.l1_distance(T=dp.i64), scale=1.0)
    coins = _Coins(secrets.token_bytes)
    for cells in (21, 41, 201):
        counts, rates = [100] * cells, np.full(cells, _Coins.ONE)
        ours = lambda rates=rates: coins.laplace(rates)  # noqa: E731
        theirs = lambda counts=counts: noisy(counts)  # noqa: E731
        yield race(f"dp-kaplan-meier: exact discrete Laplace noise, {cells} counts", ours, "OpenDP", theirs, target=1.5)
