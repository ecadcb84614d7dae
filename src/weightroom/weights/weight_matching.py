r"""Weight matching: permute the hidden units of one network so that it can be averaged with another.

Two networks trained from different seeds usually have a bump of the loss on the straight line between their weights. Units have
no order, and in the right one (``weight_matching``) the bump all but goes away, so that the networks can be merged.
``loss_barrier`` says how high the bump is, ``alignment_score`` and ``l2_reduction`` what the permutation has changed.

Reach for it to merge models, to average the clients of a federated training, or to look at loss landscapes. The networks must
have one architecture and be trained on the same task. Wide networks merge well, narrow ones badly.

.. math::
    \min_P \|\theta_a - P(\theta_b)\|^2 \;\Leftrightarrow\; \max_P \sum_l \langle W_l^a, P_l W_l^b P_{l-1}^\top \rangle \tag{1}

Permutations rotate the singular vectors of :math:`W = U S V^\top` and leave its singular values alone:

.. math::
    \|W^a - P W^b Q^\top\|^2 = \|W^a\|^2 + \|W^b\|^2
        - 2 \sum_{ij} s_i^a s_j^b (u_i^a \cdot P u_j^b)(v_i^a \cdot Q v_j^b) \tag{2}

so that (1) is large where the vectors of large singular values are aligned, which is what ``alignment_score`` measures.

Known not to work: weight matching finds a local optimum, which depends on the order of its visits (``seed``). Networks with batch
norm need their statistics re-estimated after merging (``reestimate_batchnorm``, ``reset=``); averages of the statistics are
wrong. A quadratic estimate of the barrier (``taylor_barrier``) does not predict it.

Ito, Yamada, Kumagai, "Analysis of Linear Mode Connectivity via Permutation-Based Weight Matching", ICLR 2025, arXiv 2402.04051,
with the search of Ainsworth, Hayase, Srinivasa, "Git Re-Basin", ICLR 2023, arXiv 2209.04836. The released straight-through search
keeps a reference to the best permutation that later steps overwrite, so it returns the last one; ours returns the best.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader

from weightroom import metrics, train
from weightroom.errors import UsageError, check_range, unknown
from weightroom.weights.permutation import PermutationSpec, apply_permutation, checked, identity, moved

__all__ = [
    "alignment_score",
    "interpolate",
    "l2_reduction",
    "loss_barrier",
    "loss_path",
    "match_many",
    "merge_many",
    "ste_matching",
    "taylor_barrier",
    "weight_matching",
]

State = Mapping[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]

#: Running statistics are moved with their units, but say nothing about a distance of weights.
STATISTICS = ("running_mean", "running_var")


def weight_matching(
    spec: PermutationSpec, state_a: State, state_b: State, max_sweeps: int = 100, init: Mapping[str, Any] | None = None, seed: int = 0
) -> dict[str, Tensor]:  # fmt: skip
    r"""Returns the permutations that bring ``state_b`` closest to ``state_a``, from the weights alone: a local maximum of (1).

    Permutations are visited one by one, in an order drawn anew for each sweep. With all others fixed, the best one solves a linear
    assignment of :math:`A = \sum W^a (W^b)^\top` over every axis that it moves (biases and scales of norms count, running
    statistics do not). One is visited again only after a neighbour has changed, for else its assignment is what it was, and what
    the others do not move is multiplied once.

    Args:
        spec: which axes move together.
        state_a: state dict of the model that stays.
        state_b: state dict of the model to permute.
        max_sweeps: give up after so many; usually it is done after ten.
        init: permutations to start from; the identity when None.
        seed: of the order of the visits.

    Returns:
        Permutation -> int64 indices on the CPU; ``apply_permutation(spec, perm, state_b)`` is close to ``state_a``.

    Raises:
        ValueError: the states differ in a key or shape, do not fit the spec or are not finite, ``init`` is not made of
            permutations, or ``max_sweeps`` < 0.
    """
    check_range("max_sweeps", max_sweeps, low=0)
    sizes = _check_states(spec, state_a, state_b)
    perm = identity(sizes) if init is None else checked(sizes, init)
    keys = [key for key in spec.axes_to_perm if _counts(key)]
    a, b = ({key: _double(state[key]) for key in keys} for state in (state_a, state_b))
    moves = {name: [(key, axis) for key, axis in axes if _counts(key)] for name, axes in spec.perm_to_axes.items()}
    twice = {name for name, axes in moves.items() if len({key for key, _ in axes}) < len(axes)}
    met = {name: {p for key, _ in axes for p in spec.axes_to_perm[key] if p is not None} for name, axes in moves.items()}
    neighbours = {name: others if name in twice else others - {name} for name, others in met.items()}
    g = torch.Generator().manual_seed(seed)
    names, waiting, constant = list(perm), set(perm), dict[str, Tensor]()
    for _ in range(max_sweeps):
        for i in torch.randperm(len(names), generator=g).tolist():
            name = names[i]
            if name not in waiting:
                continue
            waiting.remove(name)
            if name not in constant:
                constant[name] = _overlap(spec, perm, a, b, moves[name], sizes[name], others=False)
            A = constant[name] + _overlap(spec, perm, a, b, moves[name], sizes[name], others=True)
            if not A.isfinite().all():
                raise UsageError(f"the weights that permutation {name!r} moves are not finite")
            best = _assign(A)
            old, new = (A[torch.arange(len(p)), p.to(A.device)].sum().item() for p in (perm[name], best))
            if name in twice:  # both axes of one weight: not linear in the permutation, so A promises what need not be
                old, new = (_agreement(spec, {**perm, name: p}, a, b, moves[name]) for p in (perm[name], best))
            if new > old + 1e-12 * max(1.0, abs(old)):
                perm[name] = best
                waiting |= neighbours[name]
        if not waiting:
            break
    return perm


def ste_matching(
    spec: PermutationSpec,
    model: nn.Module,
    state_a: State,
    state_b: State,
    loader: Iterable[Any],
    loss_fn: Loss,
    epochs: int,
    lr: float = 1e-2,
    momentum: float = 0.9,
    init: Literal["a", "b"] = "b",
    seed: int = 0,
    *,
    optimizer: Callable[[Iterable[Tensor]], Optimizer] | None = None,
    select: Iterable[Any] | None = None,
    on_fit: Callable[[train.Fit], None] | None = None,
) -> dict[str, Tensor]:
    r"""Returns permutations of ``state_b`` found with data, by straight-through descent on the loss at the midpoint.

    Latent weights X are trained; each step takes the permutation that brings ``state_b`` closest to X, and hands the gradient at
    the permuted weights to X:

    .. math::
        \pi = \mathrm{WM}(X, \theta_b), \qquad Y = \mathrm{sg}[\pi(\theta_b)] + X - \mathrm{sg}[X], \qquad
        \min_X L\big((\theta_a + Y) / 2\big)

    The permutation of the lowest loss is returned. Batch norm uses the statistics of the batch.

    Args:
        spec: which axes move together.
        model: of the architecture of the states; copied, its own weights play no role.
        state_a: state dict of the model that stays.
        state_b: state dict of the model to permute.
        loader: batches of (inputs, targets), a new pass for each epoch.
        loss_fn: ``loss_fn(outputs, targets) -> scalar``, a mean over the samples.
        epochs: passes over the batches; with 0, the permutation of the start is returned.
        lr: learning rate of X.
        momentum: of the SGD on X.
        init: X starts at ``state_b`` (the identity), or at ``state_a``: then the first permutation is that of weight matching.
        seed: of the order of the visits and of ``loader``, if that draws from torch's generator.
        optimizer: makes another optimizer of X than SGD with ``lr`` and ``momentum``.
        select: batches whose mean loss at the midpoint chooses the permutation, instead of the loss of each step's own batch.
        on_fit: called once with what the search has spent; the passes over ``select`` count as forward passes.

    Returns:
        Permutation -> int64 indices on the CPU.

    Raises:
        ValueError: as for ``weight_matching``; ``epochs`` < 0; ``init`` is neither "a" nor "b".
    """
    if init not in ("a", "b"):
        raise unknown("init", init, ("a", "b"))
    check_range("epochs", epochs, low=0)
    _check_states(spec, state_a, state_b)
    latent, probe = (_loaded(model, state) for state in (state_a if init == "a" else state_b, state_a))
    for module in probe.modules():
        module.training = isinstance(module, _BatchNorm)
    a, b = ({key: value.detach().to(metrics.device_of(probe)) for key, value in state.items()} for state in (state_a, state_b))
    X = dict(latent.named_parameters())
    buffers = [name for name, _ in latent.named_buffers() if name in a]
    perm = weight_matching(spec, latent.state_dict(), b, seed=seed)
    best, lowest, chosen = perm, math.inf, None
    done, forwards = train.Fit(), 0

    def count(*_: Any) -> None:
        nonlocal forwards
        forwards += 1

    def middle(Y: State) -> dict[str, Tensor]:
        return interpolate({key: a[key] for key in (*X, *buffers)}, Y, 0.5)

    def step(_: nn.Module, batch: Any) -> Tensor:
        nonlocal perm, best, lowest, chosen
        perm = weight_matching(spec, latent.state_dict(), b, init=perm, seed=seed)
        pi_b = {key: value for key, value in apply_permutation(spec, perm, b).items() if key in X or key in buffers}
        Y = pi_b | {key: pi_b[key] + (x - x.detach()) for key, x in X.items()}
        loss = loss_fn(functional_call(probe, middle(Y), batch[0]), batch[1])
        if select is None:
            value = loss.item()
        elif chosen is not None and all(torch.equal(perm[name], chosen[name]) for name in perm):
            return loss
        else:
            with torch.no_grad():
                value = _average(
                    (len(x), loss_fn(functional_call(probe, middle(pi_b), x), y)) for x, y in _batches(select, probe)
                )
            chosen = perm
        if value < lowest:
            best, lowest = perm, value
        return loss

    make = (lambda params: SGD(params, lr=lr, momentum=momentum)) if optimizer is None else optimizer
    if epochs:
        batches = DataLoader(cast(Any, loader), batch_size=None) if isinstance(loader, Sequence) else loader
        probe.register_forward_hook(count)
        done = train.fit(latent, batches, step=step, optimizer=make, epochs=epochs, seed=seed)
        done.forwards, done.backwards = forwards, done.steps
    if on_fit is not None:
        on_fit(done)
    return best


def interpolate(state_a: State, state_b: State, t: float) -> dict[str, Tensor]:
    """Returns the state (1 - t) a + t b; integers, such as counters, are those of the nearer end.

    Args:
        state_a: at t = 0, of which that is an exact copy.
        state_b: at t = 1, likewise.
        t: where on the line; outside [0, 1] it extrapolates, with a warning.

    Raises:
        ValueError: the states differ in a key or shape, or ``t`` is not finite.
    """
    check_range("t", t, open_low=True, open_high=True)
    if not 0 <= t <= 1:
        warnings.warn(f"t = {t:g} is outside [0, 1]: this extrapolates", stacklevel=2)
    _check_same(state_a, state_b)
    nearer = state_a if t < 0.5 else state_b

    def between(key: str, a: Tensor) -> Tensor:
        if not (a.is_floating_point() or a.is_complex()):
            return nearer[key].clone()
        if t in (0, 1):  # the other end may be infinite
            return nearer[key].to(a, copy=True)
        return torch.lerp(a, state_b[key].to(a), t)

    return {key: between(key, a) for key, a in state_a.items()}


def loss_path(
    model: nn.Module, state_a: State, state_b: State, loader: Iterable[Any], loss_fn: Loss, points: int = 11,
    reset: Iterable[Any] | None = None,
) -> tuple[list[float], list[float]]:  # fmt: skip
    """Returns the points t of an even grid on [0, 1] and the mean loss at each (1 - t) a + t b; see ``loss_barrier``."""
    if points < 2:
        raise UsageError(f"points must be >= 2, got {points}")
    probe = metrics.copy_model(model)
    grid = [i / (points - 1) for i in range(points)]
    return grid, [_mean_loss(probe, interpolate(state_a, state_b, t), loader, loss_fn, reset) for t in grid]


def loss_barrier(
    model: nn.Module, state_a: State, state_b: State, loader: Iterable[Any], loss_fn: Loss, points: int = 11,
    reset: Iterable[Any] | None = None,
) -> float:  # fmt: skip
    r"""Returns how far the loss between two models rises above the line between their losses.

    .. math:: B = \max_{t \in [0, 1]} L\big((1 - t) a + t b\big) - (1 - t) L(a) - t L(b)

    Args:
        model: of the architecture of the states; copied.
        state_a: state dict of one model.
        state_b: state dict of the other.
        loader: batches of (inputs, targets), the same at each pass; the model is in eval mode.
        loss_fn: ``loss_fn(outputs, targets) -> scalar``, a mean over the samples.
        points: of the grid, both ends among them; Git Re-Basin takes 25.
        reset: batches on which the statistics of batch norm are re-estimated at every point, the ends too.

    Raises:
        ValueError: the states differ in a key or shape, ``points`` < 2, or ``loader`` is empty.
    """
    grid, losses = loss_path(model, state_a, state_b, loader, loss_fn, points, reset)
    return max(loss - (losses[0] + t * (losses[-1] - losses[0])) for t, loss in zip(grid, losses, strict=True))


def taylor_barrier(model: nn.Module, state_a: State, state_b: State, loader: Iterable[Any], loss_fn: Loss) -> float:
    r"""Returns the barrier at the midpoint as the expansions of second order at both ends, averaged, have it.

    .. math:: \tfrac14 \mu^\top (\nabla L(a) - \nabla L(b)) + \tfrac1{16} \mu^\top (H_a + H_b) \mu, \qquad \mu = b - a

    The arguments are those of ``loss_barrier``; statistics of batch norm stay those of each end.
    """
    probe = metrics.copy_model(model).eval().requires_grad_(True)
    _check_same(state_a, state_b)
    slopes, curvatures = [], []
    for state in (state_a, state_b):
        probe.load_state_dict(state)
        params = dict(probe.named_parameters())
        mu = [(state_b[key] - state_a[key]).to(p) for key, p in params.items()]
        slope: list[tuple[int, Tensor]] = []
        curvature: list[tuple[int, Tensor]] = []
        for x, y in _batches(loader, probe):
            grads = torch.autograd.grad(loss_fn(probe(x), y), list(params.values()), create_graph=True)
            along = torch.stack([(g * m).sum() for g, m in zip(grads, mu, strict=True)]).sum()
            Hmu = torch.autograd.grad(along, list(params.values()), allow_unused=True, materialize_grads=True)
            slope.append((len(x), along.detach()))
            curvature.append((len(x), torch.stack([(h * m).sum() for h, m in zip(Hmu, mu, strict=True)]).sum()))
        slopes.append(_average(slope))
        curvatures.append(_average(curvature))
    return (slopes[0] - slopes[1]) / 4 + sum(curvatures) / 16


def l2_reduction(spec: PermutationSpec, state_a: State, state_b: State, perm: Mapping[str, Any]) -> float:
    r"""Returns the share of the distance that permutations take away, :math:`1 - \|a - P(b)\| / \|a - b\|`.

    It is taken over all weights of the spec, without running statistics; 0 where a and b are the same.

    Raises:
        ValueError: as for ``apply_permutation``; the states differ in a key or shape.
    """
    _check_states(spec, state_a, state_b)
    before = _distance(spec, state_a, state_b)
    return 1 - _distance(spec, state_a, apply_permutation(spec, perm, state_b)) / before if before else 0.0


def alignment_score(spec: PermutationSpec, state_a: State, state_b: State, gamma: float = 0.0) -> float:
    r"""Returns how well the singular vectors of two models' weights agree, in [-1, 1]; 1 for a model with itself.

    .. math::
        R_\gamma = \sum_l \sum_{ij} (u_i^a \cdot u_j^b)(v_i^a \cdot v_j^b) \Big/ \sum_l n_l
                 = \sum_l \langle U_a V_a^\top, U_b V_b^\top \rangle \Big/ \sum_l n_l

    over the layers l of the spec. Each model keeps the vectors with :math:`s_i \ge \gamma s_1` and a singular value above what the
    rounding of the weights makes of zero; :math:`n_l` is the geometric mean of how many the two keep. The inner product of polar
    factors is the double sum without its arbitrary signs. Permute ``state_b`` first. A convolution is a matrix of out times the
    rest.

    Args:
        spec: of whose matrices the score is taken.
        state_a: state dict of one model.
        state_b: state dict of the other.
        gamma: in [0, 1]; the paper takes 0 and 0.3.

    Raises:
        ValueError: ``gamma`` is out of its range, or the states differ in a key or shape or do not fit the spec.
    """
    check_range("gamma", gamma, low=0.0, high=1.0)
    _check_states(spec, state_a, state_b)
    total, count = 0.0, 0.0
    for key in spec.axes_to_perm:
        if state_a[key].ndim >= 2:
            (polar_a, k_a), (polar_b, k_b) = (_polar(state[key], gamma) for state in (state_a, state_b))
            total += (polar_a * polar_b).sum().item()
            count += math.sqrt(k_a * k_b)
    return total / count if count else 0.0


def match_many(
    spec: PermutationSpec, states: Sequence[State], anchor: int | None = None, max_rounds: int = 100, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Returns the states with their units matched to one another.

    Args:
        spec: which axes move together.
        states: of one architecture, one or more.
        anchor: number of the state that all others are matched to. None matches each to the mean of the others, in random order,
            again and again until no distance falls (Git Re-Basin's MergeMany).
        max_rounds: of the latter.
        seed: of all orders.

    Raises:
        ValueError: there is no state, ``anchor`` is not the number of one, or the states differ in a key or shape.
    """
    if not states:
        raise UsageError("states must hold at least one state")
    if anchor is not None and not 0 <= anchor < len(states):
        raise UsageError(f"anchor must be in 0..{len(states) - 1}, got {anchor}")
    for other in states:
        _check_states(spec, states[0], other)
    if anchor is not None:
        to = states[anchor]
        still = identity(spec.sizes(to))
        perms = [still if i == anchor else weight_matching(spec, to, state, seed=seed) for i, state in enumerate(states)]
        return [apply_permutation(spec, perm, state) for perm, state in zip(perms, states, strict=True)]
    matched = [{key: value.clone() for key, value in state.items()} for state in states]
    g = torch.Generator().manual_seed(seed)
    for _ in range(max_rounds if len(states) > 1 else 0):
        progress = False
        for i in torch.randperm(len(matched), generator=g).tolist():
            others = mean_state([*matched[:i], *matched[i + 1 :]])
            perm = weight_matching(spec, others, matched[i], seed=seed)
            new = apply_permutation(spec, perm, matched[i])
            before, after = (_distance(spec, others, state) for state in (matched[i], new))
            if after < before * (1 - 1e-12):
                matched[i], progress = new, True
        if not progress:
            break
    return matched


def merge_many(
    spec: PermutationSpec, states: Sequence[State], anchor: int | None = None, max_rounds: int = 100, seed: int = 0
) -> dict[str, Tensor]:
    """Returns the mean of states after ``match_many``, whose arguments it takes; integers are those of the first.

    A network with batch norm needs its statistics re-estimated after this (``reestimate_batchnorm``).
    """
    return mean_state(match_many(spec, states, anchor, max_rounds, seed))


# ---- weights


def _check_same(state_a: State, state_b: State) -> None:
    for key in [*state_a, *state_b]:
        if key not in state_a or key not in state_b:
            raise UsageError(f"the states differ: {'the second' if key in state_a else 'the first'} has no {key!r}")
        if state_a[key].shape != state_b[key].shape:
            shapes = f"{tuple(state_a[key].shape)} and {tuple(state_b[key].shape)}"
            raise UsageError(f"the states differ: {key!r} has shapes {shapes}")


def _check_states(spec: PermutationSpec, state_a: State, state_b: State) -> dict[str, int]:
    _check_same(state_a, state_b)
    return spec.sizes(state_a)


def _counts(key: str) -> bool:
    return key.rpartition(".")[2] not in STATISTICS


def _double(w: Tensor) -> Tensor:
    return w.detach().to("cpu" if w.device.type == "mps" else w.device, torch.float64)


def _rows(w: Tensor, axis: int, n: int) -> Tensor:
    return w.movedim(axis, 0).reshape(n, -1)


def _overlap(
    spec: PermutationSpec, perm: Mapping[str, Tensor], a: State, b: State, axes: Sequence[tuple[str, int]], n: int, others: bool
) -> Tensor:  # fmt: skip
    """The sum of W^a (W^b)' over the axes of tensors that are permuted along other axes too, or over the other tensors."""
    A = torch.zeros(n, n, dtype=torch.float64, device=next(iter(a.values())).device if a else "cpu")
    for key, axis in axes:
        if others == any(p is not None and i != axis for i, p in enumerate(spec.axes_to_perm[key])):
            A.addmm_(_rows(a[key], axis, n), _rows(moved(spec, perm, key, b[key], but=axis), axis, n).T)
    return A


def _assign(A: Tensor) -> Tensor:
    cost = A.amax(1, keepdim=True) - A
    cost -= cost.amin(0)  # constants in rows and columns leave the optimum alone, and let the solver start near it
    return torch.from_numpy(linear_sum_assignment(cost.cpu().numpy())[1])


def _agreement(spec: PermutationSpec, perm: Mapping[str, Tensor], a: State, b: State, axes: Sequence[tuple[str, int]]) -> float:
    """The terms of (1) that have these axes."""
    return sum((a[key] * moved(spec, perm, key, b[key])).sum().item() for key in {key for key, _ in axes})


def _distance(spec: PermutationSpec, state_a: State, state_b: State) -> float:
    squares = [(_double(state_a[key]) - _double(state_b[key])).square().sum() for key in spec.axes_to_perm if _counts(key)]
    return math.sqrt(float(sum(squares)))


def _polar(w: Tensor, gamma: float) -> tuple[Tensor, int]:
    """U V' of the singular vectors that are kept, and how many these are."""
    W = _double(w).flatten(1)
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    tiny = max(
        torch.finfo(w.dtype).eps / 2, max(W.shape) * torch.finfo(W.dtype).eps
    )  # rounding: of weights, of the decomposition
    k = int((s >= max(gamma, tiny) * s[0]).sum()) if s[0] > 0 else 0
    return U[:, :k] @ Vh[:k], k


def mean_state(states: Sequence[State]) -> dict[str, Tensor]:
    """The mean of states; integers are those of the first."""
    return {
        key: torch.stack([s[key].to(value) for s in states]).mean(0)
        if value.is_floating_point() or value.is_complex()
        else value.clone()
        for key, value in states[0].items()
    }


# ---- data


def _loaded(model: nn.Module, state: State) -> nn.Module:
    model = metrics.copy_model(model)
    model.load_state_dict(state)
    return model.requires_grad_(True)


def _batches(loader: Iterable[Any], model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    device, empty = metrics.device_of(model), True
    for x, y, *_ in loader:
        empty = False
        yield x.to(device), y.to(device)
    if empty:
        raise UsageError("loader gave no batch")


@torch.no_grad()
def _mean_loss(probe: nn.Module, state: State, loader: Iterable[Any], loss_fn: Loss, reset: Iterable[Any] | None = None) -> float:
    probe.load_state_dict(state)
    if reset is not None:
        train.reestimate_batchnorm(probe, reset)
    probe.eval()
    return _average((len(x), loss_fn(probe(x), y)) for x, y in _batches(loader, probe))


def _average(losses: Iterable[tuple[int, Tensor]]) -> float:
    total, seen = 0.0, 0
    for n, loss in losses:
        total, seen = total + n * loss.item(), seen + n
    return total / seen
