"""Fair tuning: every arm is given equally many trials, on the validation split, with seeds that never decide."""

from __future__ import annotations

import itertools
import math
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from weightroom.errors import UsageError

__all__ = ["TUNING_SEED", "propose"]

#: The seed of every tuning trial; those that decide are far below it.
TUNING_SEED = 1_000_003


def propose(space: Mapping[str, Any], defaults: Mapping[str, Any], trials: int) -> list[dict[str, Any]]:
    """Returns the hyper-parameters to try, the defaults first where they lie in the space.

    A space of lists with no more than ``trials`` combinations is tried whole. Otherwise the trials are a quasi-random
    sequence (Optuna's QMC sampler): it does not look at results, so that it is the same whoever runs it and can be resumed.

    Args:
        space: hyper-parameter -> list of values, ``(low, high)``, ``(low, high, "log")`` or ``(low, high, "int")``.
        defaults: the common setting.
        trials: how many at the most.

    Raises:
        UsageError: a range that is none of these.
    """
    if not space:
        return [dict(defaults)]
    first = [dict(defaults)] if set(space) <= set(defaults) else []
    if all(isinstance(choices, list) and choices for choices in space.values()):
        grid = [{**defaults, **dict(zip(space, values, strict=True))} for values in itertools.product(*space.values())]
        if len(grid) <= trials:
            return grid
    return _distinct([*first, *({**defaults, **given} for given in _quasi_random(space, trials))])[:trials]


def _quasi_random(space: Mapping[str, Any], trials: int) -> list[dict[str, Any]]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions = {name: _distribution(name, choices, optuna.distributions) for name, choices in space.items()}
    seed = zlib.crc32(repr(sorted(space)).encode())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.QMCSampler(scramble=True, seed=seed, warn_independent_sampling=False)
    study = optuna.create_study(sampler=sampler)
    proposals = []
    for _ in range(2 * trials):
        trial = study.ask(distributions)
        proposals.append(dict(trial.params))
        study.tell(trial, 0.0)
    return proposals


def _distribution(name: str, choices: Any, kinds: Any) -> Any:
    if isinstance(choices, list) and choices:
        return kinds.CategoricalDistribution(choices)
    if (
        isinstance(choices, tuple)
        and len(choices) in (2, 3)
        and all(isinstance(x, int | float) and math.isfinite(x) for x in choices[:2])
    ):
        low, high, *how = choices
        if low < high and how == ["int"]:
            return kinds.IntDistribution(int(low), int(high))
        if low < high and (not how or (how == ["log"] and low > 0)):
            return kinds.FloatDistribution(float(low), float(high), log=bool(how))
    raise UsageError(
        f"the space of {name!r} must be a list of values, (low, high), (low, high, 'log') or (low, high, 'int'), got {choices!r}"
    )


def _distinct(proposals: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [p for i, p in enumerate(proposals) if p not in proposals[:i]]
