"""Finds the coefficients of L(N, D) = E + A N^-alpha + B D^-beta that fit mean losses best.

A vector theta holds E, alpha (one, or one an arm), beta (as many), and A and B of each arm at the data's mean size and
tokens, where they are well determined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from query_experts.study.ladder.estimates import Array

HUBER = 1e-3  # residual of log L above which its loss is linear
STARTS = 4
EXPONENTS = (0.01, 2.0)  # lowest and highest alpha and beta


@dataclass(frozen=True)
class Coefficients:
    """The law of each arm: `alpha`, `beta`, `A` and `B` by arm; nats a token."""

    E: float
    alpha: dict[str, float]
    beta: dict[str, float]
    A: dict[str, float]
    B: dict[str, float]

    def loss(self, arm: str, parameters: float, tokens: float) -> float:
        of_size = self.A[arm] * parameters ** -self.alpha[arm]
        of_tokens = self.B[arm] * tokens ** -self.beta[arm]
        return self.E + of_size + of_tokens

    def gap(self, arm: str, base: str, parameters: float, tokens: float) -> float:
        """Loss of an arm minus that of a baseline of the same size."""
        return self.loss(arm, parameters, tokens) - self.loss(base, parameters, tokens)


@dataclass(frozen=True)
class Data:
    """The mean losses that a law is fitted to, an entry each; sizes relative to their geometric means."""

    arms: list[str]
    arm: Array  # positions in arms
    log_size: Array
    log_tokens: Array
    log_loss: Array

    def take(self, rows: Array) -> Data:
        return Data(self.arms, self.arm[rows], self.log_size[rows], self.log_tokens[rows], self.log_loss[rows])

    def of_losses(self, log_loss: Array) -> Data:
        """The same entries with other losses."""
        return replace(self, log_loss=log_loss)


def _unpack(theta: Array, arms: int) -> tuple[float, Array, Array, Array, Array]:
    k = (len(theta) - 1 - 2 * arms) // 2
    alpha, beta = theta[1 : 1 + k], theta[1 + k : 1 + 2 * k]
    return theta[0], np.resize(alpha, arms), np.resize(beta, arms), theta[-2 * arms : -arms], theta[-arms:]


def _terms(theta: Array, data: Data) -> tuple[Array, Array, Array]:
    """N^-alpha, D^-beta and the loss of each entry."""
    E, alpha, beta, A, B = _unpack(theta, len(data.arms))
    of_size = np.exp(-alpha[data.arm] * data.log_size)
    of_tokens = np.exp(-beta[data.arm] * data.log_tokens)
    return of_size, of_tokens, E + A[data.arm] * of_size + B[data.arm] * of_tokens


def residuals(theta: Array, data: Data) -> Array:
    """log L of the law minus that of the data."""
    return np.log(_terms(theta, data)[2]) - data.log_loss


def _jacobian(theta: Array, data: Data) -> Array:
    arms, arm = len(data.arms), data.arm
    *_, A, B = _unpack(theta, arms)
    of_size, of_tokens, loss = _terms(theta, data)
    member = (arm[:, None] == np.arange(arms)).astype(np.float64)
    by_alpha = member * (-A[arm] * data.log_size * of_size)[:, None]
    by_beta = member * (-B[arm] * data.log_tokens * of_tokens)[:, None]
    if len(theta) == 3 + 2 * arms:
        by_alpha, by_beta = by_alpha.sum(axis=1, keepdims=True), by_beta.sum(axis=1, keepdims=True)
    by_A, by_B = member * of_size[:, None], member * of_tokens[:, None]
    return np.concatenate([np.ones((len(arm), 1)), by_alpha, by_beta, by_A, by_B], axis=1) / loss[:, None]


def solve(data: Data, starts: Sequence[Array]) -> Array:
    """The vector with the lowest Huber loss of the residuals of log L, of those found from each start."""
    from scipy.optimize import least_squares

    exponents = len(starts[0]) - 1 - 2 * len(data.arms)
    highest = float(np.exp(data.log_loss.max()))
    low = np.array([1e-6, *[EXPONENTS[0]] * exponents, *[1e-9] * (2 * len(data.arms))])
    high = np.array([np.exp(data.log_loss.min()), *[EXPONENTS[1]] * exponents, *[10 * highest] * (2 * len(data.arms))])
    inside = [np.clip(start, low + 1e-9, high - 1e-9) for start in starts]
    solved = [
        least_squares(residuals, start, _jacobian, (low, high), loss="huber", f_scale=HUBER, args=(data,),
                      max_nfev=300, x_scale="jac")
        for start in inside
    ]  # fmt: skip
    return min(solved, key=lambda solution: solution.cost).x


def starts(data: Data) -> list[Array]:
    """The best of a grid of E, alpha and beta, each with the A and B that least squares give."""
    lowest = float(np.exp(data.log_loss.min()))
    grid = product((0.2 * lowest, 0.5 * lowest, 0.8 * lowest), (0.1, 0.3, 0.6), (0.1, 0.3, 0.6))
    found = [_start(data, *entry) for entry in grid]
    return sorted(found, key=lambda theta: float(np.abs(residuals(theta, data)).sum()))[:STARTS]


def _start(data: Data, E: float, alpha: float, beta: float) -> Array:
    from scipy.optimize import nnls

    A: list[float] = []
    B: list[float] = []
    for position in range(len(data.arms)):
        own = data.arm == position
        loss = np.exp(data.log_loss[own])
        terms = np.exp(-np.stack([alpha * data.log_size[own], beta * data.log_tokens[own]], axis=1))
        a, b = nnls(terms / loss[:, None], 1 - E / loss)[0]
        A, B = [*A, a], [*B, b]
    return np.array([E, alpha, beta, *A, *B])


def namer(arms: Sequence[str], origin: Array) -> Callable[[Array], Coefficients]:
    """Turns a vector into coefficients by arm, for sizes and tokens as they are."""

    def name(theta: Array) -> Coefficients:
        E, alpha, beta, A, B = _unpack(theta, len(arms))
        of_size, of_tokens = A * np.exp(alpha * origin[0]), B * np.exp(beta * origin[1])
        columns = [dict(zip(arms, map(float, column), strict=True)) for column in (alpha, beta, of_size, of_tokens)]
        return Coefficients(float(E), *columns)

    return name
