"""The forward process of a diffusion model: beta_1..beta_T and everything that follows from them.

One class serves training and the device. All arrays are float64, have T + 1 entries and are indexed
by the timestep t of the mathematics, 1..T; entry 0 is the data itself (alpha_bar[0] = 1). Equation
numbers are those of Ho et al. 2020, "Denoising Diffusion Probabilistic Models".
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ddpm_edge import checks
from ddpm_edge.arrays import Array, Float64, Int64
from ddpm_edge.errors import ScheduleError, warn

# x0 = (x - noise eps) / signal is computed in float32, which holds up to 3.4e38: this leaves room
# for values of a hundred.
LEAST_SIGNAL = 1e-36


class ScheduleWarning(UserWarning):
    """A schedule that works, but probably not as meant."""


class Schedule:
    """The noise schedule of a diffusion model.

    Make one with `linear`, `geometric`, `cosine`, `sigmoid`, `constant`, `from_betas` or
    `rectified_flow`.

    Attributes:
        T: number of timesteps.
        signal: what is left of the data at t: x_t = signal x_0 + noise eps; (T + 1,).
        noise: standard deviation of the noise in x_t.
        alpha_bar: signal^2 / (signal^2 + noise^2), the signal's share of the power. Where betas
            are given, signal = sqrt(alpha_bar) and noise = sqrt(1 - alpha_bar) (Eq 4).
        alpha: alpha_bar_t / alpha_bar_{t-1}.
        beta: 1 - alpha; beta[0] = 0.
    """

    T: int
    signal: Float64
    noise: Float64
    alpha_bar: Float64
    alpha: Float64
    beta: Float64

    def __init__(self, betas: ArrayLike, definition: dict[str, Any] | None = None) -> None:
        try:
            values = np.array(betas, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ScheduleError(f"betas must be numbers; {error}") from error
        if values.ndim != 1 or values.size < 1:
            raise ScheduleError(
                f"betas must be a list of T >= 1 numbers; got an array of shape {values.shape}"
            )
        # 1 - beta < 1: a beta below float64's resolution adds no noise. NaN is wrong as well.
        wrong = ~((values > 0) & (values < 1) & (1.0 - values < 1.0))
        if wrong.any():
            t = int(np.argmax(wrong)) + 1
            raise ScheduleError(
                f"every beta must be finite and strictly between 0 and 1; got "
                f"beta_{t} = {values[t - 1]} (t = {t} of {values.size})"
            )
        beta = np.concatenate([[0.0], values])
        alpha = 1.0 - beta
        alpha_bar = np.cumprod(alpha, dtype=np.float64)
        signal, noise = np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar)
        if signal[-1] < LEAST_SIGNAL:
            raise ScheduleError(
                f"sqrt(alpha_bar_T) = {signal[-1]:.3g} is too small for float32, in which x_T "
                f"would be divided by it; expected at least {LEAST_SIGNAL:g}: lower "
                f"T = {values.size} or the betas"
            )
        self._hold(
            definition or {"rule": "betas", "betas": values.tolist()},
            beta=beta, alpha=alpha, alpha_bar=alpha_bar, signal=signal, noise=noise,
        )  # fmt: skip
        self._warn()

    def _hold(self, definition: dict[str, Any], **arrays: Float64) -> None:
        """Keep the arrays, which nobody may change."""
        self.T, self._definition = len(arrays["signal"]) - 1, definition
        for name, array in arrays.items():
            array.setflags(write=False)
            setattr(self, name, array)

    def _warn(self) -> None:
        if self.signal[-1] > 0.01:
            warn(
                f"sqrt(alpha_bar_T) = {self.signal[-1]:.3g} > 0.01: x_T still holds part of the "
                "image, sampling from pure noise starts from the wrong place; raise T or beta_T",
                ScheduleWarning,
            )
        elif self.alpha_bar[-1] < 1e-12:
            warn(
                f"alpha_bar_T = {self.alpha_bar[-1]:.3g} < 1e-12: most of the {self.T} steps are "
                "pure noise and teach the network nothing; lower T or beta_T",
                ScheduleWarning,
            )

    # Rules

    @classmethod
    def linear(cls, T: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02) -> Schedule:
        """Let beta rise linearly from beta_1 to beta_T (Ho et al. 2020, section 4)."""
        T, beta_1, beta_T = _arguments(T, beta_1=beta_1, beta_T=beta_T)
        betas = np.linspace(beta_1, beta_T, T)
        return cls(betas, {"rule": "linear", "T": T, "beta_1": beta_1, "beta_T": beta_T})

    @classmethod
    def geometric(cls, T: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02) -> Schedule:
        """Let beta rise by a constant factor: beta_1 (beta_T / beta_1)^((t-1)/(T-1))."""
        T, beta_1, beta_T = _arguments(T, beta_1=beta_1, beta_T=beta_T)
        betas = beta_1 * (beta_T / beta_1) ** np.linspace(0.0, 1.0, T)
        return cls(betas, {"rule": "geometric", "T": T, "beta_1": beta_1, "beta_T": beta_T})

    @classmethod
    def cosine(cls, T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> Schedule:
        """Let alpha_bar follow cos^2 (Nichol and Dhariwal 2021, Eq 17), beta <= max_beta."""
        T, s, max_beta = _arguments(T, s=s, max_beta=max_beta)
        angle = (np.arange(T + 1) / T + s) / (1 + s) * np.pi / 2
        f = np.cos(angle) ** 2
        betas = np.minimum(1.0 - f[1:] / f[:-1], max_beta)
        return cls(betas, {"rule": "cosine", "T": T, "s": s, "max_beta": max_beta})

    @classmethod
    def sigmoid(cls, T: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02) -> Schedule:
        """Let beta follow a logistic curve over [-6, 6] (as diffusers' "sigmoid" defines it)."""
        T, beta_1, beta_T = _arguments(T, beta_1=beta_1, beta_T=beta_T)
        rise = 1.0 / (1.0 + np.exp(-np.linspace(-6.0, 6.0, T)))
        betas = rise * (beta_T - beta_1) + beta_1
        return cls(betas, {"rule": "sigmoid", "T": T, "beta_1": beta_1, "beta_T": beta_T})

    @classmethod
    def constant(cls, T: int = 1000, beta: float = 0.01) -> Schedule:
        """The same beta at every step."""
        T, beta = _arguments(T, beta=beta)
        return cls(np.full(T, beta), {"rule": "constant", "T": T, "beta": beta})

    @classmethod
    def from_betas(cls, betas: ArrayLike) -> Schedule:
        """Any beta_1..beta_T, each strictly between 0 and 1."""
        return cls(betas)

    @classmethod
    def rectified_flow(cls, T: int = 1000) -> Schedule:
        """A straight line to noise: x_t = (1 - t/T) x_0 + (t/T) eps (Liu et al. 2023).

        Nothing of the data is left at T, so the network must answer "velocity", "x0" or "v".
        """
        (T,) = _arguments(T)
        noise = np.arange(T + 1) / T
        signal = 1.0 - noise
        alpha_bar = signal**2 / (signal**2 + noise**2)
        alpha = np.append(1.0, alpha_bar[1:] / alpha_bar[:-1])
        schedule = cls.__new__(cls)
        schedule._hold(
            {"rule": "rectified-flow", "T": T},
            beta=1.0 - alpha, alpha=alpha, alpha_bar=alpha_bar, signal=signal, noise=noise,
        )  # fmt: skip
        return schedule

    def until(self, t: int) -> Schedule:
        """The first t timesteps, 1..T: what sampling has before it that begins at x_t."""
        t = checks.whole("t", t, most=self.T, error=ScheduleError)
        part = Schedule.__new__(Schedule)
        names = ("beta", "alpha", "alpha_bar", "signal", "noise")
        part._hold(
            {**self._definition, "until": t}, **{n: getattr(self, n)[: t + 1].copy() for n in names}
        )
        return part

    # The forward process

    def q_sample(self, x0: Array, t: ArrayLike, eps: Array) -> Array:
        """x_t from x_0 and standard normal eps (Eq 4).

        Args:
            x0: (B, ...), any floating dtype.
            eps: standard normal draws, as x0.
            t: timesteps in 0..T, one for all or (B,).
        """
        t = self.check_t(t)
        x_t: Array = _like(self.signal[t], x0) * x0 + _like(self.noise[t], x0) * eps
        return x_t

    def posterior_mean(self, x0: Array, x_t: Array, t: ArrayLike) -> Array:
        """Mean of q(x_{t-1} | x_t, x_0), t in 1..T (Eq 7)."""
        t = self.check_t(t, least=1)
        to_x0, to_xt = self.posterior_coefficients(t)
        mean: Array = _like(to_x0, x0) * x0 + _like(to_xt, x0) * x_t
        return mean

    def posterior_variance(self, t: ArrayLike) -> Float64:
        """Variance of q(x_{t-1} | x_t, x_0), "beta-tilde", t in 1..T; 0 at t = 1 (Eq 7)."""
        t = self.check_t(t, least=1)
        _, variance = self.transition(t)
        posterior: Float64 = variance * self.noise[t - 1] ** 2 / self.noise[t] ** 2
        return posterior

    def posterior_coefficients(self, t: Int64) -> tuple[Float64, Float64]:
        """What x_0 and x_t have in the mean of q(x_{t-1} | x_t, x_0), t in 1..T (Eq 7)."""
        step, variance = self.transition(t)
        to_x0: Float64 = self.signal[t - 1] * variance / self.noise[t] ** 2
        to_xt: Float64 = step * self.noise[t - 1] ** 2 / self.noise[t] ** 2
        return to_x0, to_xt

    def transition(self, t: Int64) -> tuple[Float64, Float64]:
        """Factor and variance of q(x_t | x_{t-1}), t in 1..T (see the function `transition`)."""
        s = t - 1
        return transition(self.signal[t], self.noise[t], self.signal[s], self.noise[s])

    def check_t(self, t: ArrayLike, least: int = 0) -> Int64:
        """`t` as int64, or a ScheduleError if it is not a whole number in least..T."""
        array = np.asarray(t)
        if array.dtype.kind not in "iu" or (array < least).any() or (array > self.T).any():
            raise ScheduleError(f"t must be whole numbers in {least}..{self.T}; got {t!r}")
        return array.astype(np.int64)

    # As data

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready definition; `from_dict` of it is an equal schedule."""
        return copy.deepcopy(self._definition)

    @classmethod
    def from_dict(cls, definition: dict[str, Any]) -> Schedule:
        """The schedule that `to_dict` described."""
        if not isinstance(definition, dict):
            raise ScheduleError(f"a schedule's definition must be a dict; got {definition!r}")
        arguments = dict(definition)
        rule = arguments.pop("rule", None)
        make = RULES.get(rule) if isinstance(rule, str) else None
        if make is None:
            raise ScheduleError(f"schedule {checks.unknown('rule', rule, RULES)}")
        until = arguments.pop("until", None)
        known = inspect.signature(make).parameters
        for name in arguments:
            if name not in known:
                raise ScheduleError(
                    f"schedule rule {rule!r} has no {name}; it has {', '.join(known)}"
                )
        if rule == "betas" and "betas" not in arguments:
            raise ScheduleError("schedule rule 'betas' needs its list of betas")
        whole = make(**arguments)
        return whole if until is None else whole.until(until)

    def __repr__(self) -> str:
        details = ", ".join(
            f"{k}={v}" for k, v in self._definition.items() if k not in ("rule", "betas")
        )
        return f"Schedule.{self._definition['rule']}({details or f'T={self.T}'})"


RULES: dict[str, Callable[..., Schedule]] = {
    "linear": Schedule.linear,
    "geometric": Schedule.geometric,
    "cosine": Schedule.cosine,
    "sigmoid": Schedule.sigmoid,
    "constant": Schedule.constant,
    "rectified-flow": Schedule.rectified_flow,
    "betas": Schedule.from_betas,
}


def _arguments(T: int, **numbers: float) -> tuple[Any, ...]:
    """T as int and the others as float64: a float32 beta would lose digits."""
    values: list[float] = [checks.whole("T", T, error=ScheduleError)]
    for name, given in numbers.items():
        value = checks.number(name, given, ScheduleError)
        if "beta" in name and not 0.0 < value < 1.0:
            raise ScheduleError(f"{name} must be finite and strictly between 0 and 1; got {value}")
        values.append(value)
    return tuple(values)


def _like(coefficient: Float64, x: Array) -> Array:
    """A coefficient, or one a sample, as x's dtype and broadcastable over x (B, ...)."""
    if x.dtype.kind != "f":
        raise ScheduleError(f"samples must be floating-point arrays; got {x.dtype}")
    array: Array = np.asarray(coefficient).astype(x.dtype)
    return array.reshape(array.shape + (1,) * (x.ndim - array.ndim))


def transition(
    signal_t: Float64, noise_t: Float64, signal_s: Float64, noise_s: Float64
) -> tuple[Float64, Float64]:
    """Factor and variance of q(x_t | x_s), s < t: x_t = factor x_s + sqrt(variance) z.

    From (signal, noise) at both ends (Kingma et al. 2021, "Variational diffusion models", A.1);
    from t - 1 to t they are sqrt(1 - beta_t) and beta_t.
    """
    factor: Float64 = signal_t / signal_s
    variance: Float64 = noise_t**2 - factor**2 * noise_s**2
    return factor, np.maximum(variance, 0.0)  # where nothing is added rounding may go below
