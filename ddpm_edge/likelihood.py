"""How likely a model finds images: the variational bound on -ln p(x_0) (Ho et al. 2020, Eq 5).

    L = L_T + sum over t = 2..T of L_{t-1} + L_0                         nats an image

    L_T      KL(q(x_T | x_0) || N(0, I))
    L_{t-1}  KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), Gaussians with means mu~ and mu and
             variances beta~ and sigma^2 (Eq 8, with its constant); mu is mu~ of the predicted x_0
    L_0      -ln P(x_0 | x_1), a Gaussian's mass over the pixel's bin (Eq 13)

L_{t-1} and L_0 are expectations over x_t. Either one x_t is drawn for every t; or a few pairs of t
and x_t, by stratified importance sampling: how far the two of a pair are apart says how far off the
estimate is. p is Algorithm 2: sigma^2 is beta or beta-tilde, x_0 clipped or not. At t = 1
beta-tilde is 0, and beta-tilde_2 is taken, which Ho et al.'s code does for "beta" as well; here
"beta" is beta_1 there, as Eq 13 has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddpm_edge import checks, noise
from ddpm_edge.arrays import Array, Float32, Float64, Int64
from ddpm_edge.errors import ConfigError, NonFiniteError, RuntimeUnavailableError
from ddpm_edge.plan import Clip, prediction_to_form
from ddpm_edge.samplers import VARIANCES
from ddpm_edge.schedule import Schedule

HALF_BIN = 1.0 / 255.0  # of a grey level in [-1, 1]
OFF_LEVEL = 0.01  # of a grey level: what float32 makes of one is far nearer
LEAST_TIMESTEPS = 4  # a pair at t = 1, and a pair of the others

Ask = Callable[[Float32, Int64, Int64], Array]  # x_t (B, C, H, W), t (B,), index of the image (B,)
Progress = Callable[[float], object]  # the share that is done, 0..1


@dataclass(frozen=True, eq=False)
class Bound:
    """The bound of n images and what it is made of; all in nats an image, float64.

    Attributes:
        prior: L_T; (n,).
        diffusion: the sum of all L_{t-1}; (n,).
        reconstruction: L_0; (n,).
        standard_error: of their sum, by the choice of the timesteps and the noise in x_t; (n,). NaN
            where every timestep was evaluated once, which cannot tell.
        dimensions: values of an image.
        t: where the network was evaluated, 1..T; int64 (n, K).
        terms: L_{t-1} there, L_0 for t = 1; (n, K).
        x0_mse: mean square of x_0 less its prediction, in units where images are in [-1, 1];
            (n, K).
        seed: of the draws.
    """

    prior: Float64
    diffusion: Float64
    reconstruction: Float64
    standard_error: Float64
    dimensions: int
    t: Int64
    terms: Float64
    x0_mse: Float64
    seed: int

    @property
    def nats(self) -> Float64:
        """The bound, L; (n,)."""
        return self.prior + self.diffusion + self.reconstruction

    @property
    def bits_per_dim(self) -> Float64:
        """L / (D ln 2); (n,)."""
        return self.nats / (self.dimensions * math.log(2.0))

    def mean(self) -> tuple[float, float]:
        """Bits/dim of all images, and its standard error: by the choice of images and of draws.

        The spread of the images holds that of the draws, which are made anew for each.
        """
        bits = self.bits_per_dim
        n = len(bits)
        if n == 1:
            return float(bits[0]), float(self.standard_error[0] / self.dimensions / math.log(2.0))
        return float(bits.mean()), float(bits.std(ddof=1) / math.sqrt(n))

    def rate_distortion(self) -> tuple[Float64, Float64]:
        """Progressive coding (Ho et al., section 4.3), from t = T to 1; float64 (T,) each.

        What has been sent before x_0 is predicted at t, bits/dim, and how far off the prediction
        is: root of the mean square, in grey levels of 0..255.

        Raises:
            ConfigError: not all timesteps were evaluated.
        """
        if (self.t != np.arange(1, self.t.shape[1] + 1)).any():
            raise ConfigError("rate and distortion need all timesteps; give timesteps=None")
        sent = np.concatenate([self.prior[:, None], self.terms[:, :0:-1]], axis=1)
        rate = np.cumsum(sent.mean(axis=0)) / (self.dimensions * math.log(2.0))
        distortion: Float64 = 127.5 * np.sqrt(self.x0_mse.mean(axis=0)[::-1])
        return rate, distortion


def variational_bound(
    ask: Ask,
    schedule: Schedule,
    x0: Float64,
    *,
    prediction: str = "eps",
    variance: str = "beta",
    clip: float | str | None = 1.0,
    timesteps: int | None = None,
    seed: int | None = None,
    first: int = 0,
    batch: int = 16,
    progress: Progress | None = None,
) -> Bound:
    """The bound of images under a model.

    Args:
        ask: the network.
        schedule: the forward process.
        x0: the images as states, float64 (n, C, H, W) in [-1, 1] (see `levels`).
        prediction: what the network answers, one of `plan.PREDICTIONS`.
        variance: sigma^2 of Algorithm 2, "beta" or "beta-tilde".
        clip: how the predicted x0 is clipped, see `Clip.parse`.
        timesteps: how many evaluations each image gets, 4..T, in pairs (an odd number is one
            less): one pair at t = 1, the others where the bound is made, chosen for every image
            anew; the estimate has no bias. None or T = every timestep once.
        seed: of all draws; image i depends on (seed, first + i) alone. None draws a fresh one.
        first: index of the first image.
        batch: evaluations at once.
        progress: called after each of them.

    Raises:
        ConfigError: an argument that cannot work.
        NonFiniteError: the network answered with NaN or infinity.
        RuntimeUnavailableError: SciPy is missing.
    """
    seed = noise.check_seed(seed)
    T, n = schedule.T, len(x0)
    wanted = check_timesteps(timesteps, T)
    sigma2 = model_variance(schedule, variance)
    chosen, weights = (
        _all(n, T) if wanted == T else _pairs(schedule, sigma2, wanted, seed, first, n)
    )
    K = chosen.shape[1]

    to_x, to_answer = prediction_to_form(prediction, "x0", schedule.signal[1:], schedule.noise[1:])
    terms, x0_mse = np.empty(n * K), np.empty(n * K)
    bounds = Clip.parse(clip)
    draws = [noise.Draws(seed, first + i, x0[:1].shape) for i in range(n)]
    for begin in range(0, n * K, batch):
        now = slice(begin, begin + batch)
        i, row = np.divmod(np.arange(n * K)[now], K)
        t = chosen[i, row]
        eps = np.concatenate([draws[a].rows(noise.Stream.LIKELIHOOD, range(1 + b, 2 + b))[0]
                              for a, b in zip(i.tolist(), row.tolist(), strict=True)])  # fmt: skip
        x_t = schedule.q_sample(x0[i], t, eps)
        answer = ask(x_t.astype(np.float32), t, i)
        if not np.isfinite(answer).all():
            raise NonFiniteError(
                f"the network's answer has NaN or infinity at t in {t.min()}..{t.max()}; use "
                "another variant, such as fp32, or verify the bundle"
            )
        predicted = _column(to_x[t - 1]) * x_t + _column(to_answer[t - 1]) * answer  # float64
        if bounds is not None:
            bounds(predicted)
        error = np.mean((x0[i] - predicted) ** 2, axis=(1, 2, 3))
        last = t == 1
        term = np.empty(len(t))
        term[~last] = x0[0].size * _term(schedule, sigma2, t[~last], error[~last])
        term[last] = -log_mass(x0[i[last]], predicted[last], sigma2[1]).sum(axis=(1, 2, 3))
        terms[now], x0_mse[now] = term, error
        if progress is not None:
            progress(min(1.0, (begin + batch) / (n * K)))
    terms = terms.reshape(n, K)
    parts = weights * terms
    return Bound(
        prior=_prior(schedule, x0),
        diffusion=np.where(chosen > 1, parts, 0.0).sum(axis=1),
        reconstruction=np.where(chosen == 1, parts, 0.0).sum(axis=1),
        standard_error=np.full(n, np.nan) if wanted == T else _spread(parts),
        dimensions=x0[0].size,
        t=chosen,
        terms=terms,
        x0_mse=x0_mse.reshape(n, K),
        seed=seed,
    )


def check_timesteps(timesteps: int | None, T: int) -> int:
    """How many evaluations each image gets; None = T.

    Raises:
        ConfigError: too few to know the standard error, or more than there are.
    """
    least = min(LEAST_TIMESTEPS, T)
    wanted = T if timesteps is None else checks.whole("timesteps", timesteps, most=T)
    if wanted < least:
        raise ConfigError(
            f"timesteps must be {least}..{T}, or None for all, exactly; got {timesteps}"
        )
    return wanted


def model_variance(schedule: Schedule, variance: str) -> Float64:
    """sigma^2 of Algorithm 2 at t = 0..T, 0 at t = 0; float64 (T + 1,).

    Raises:
        ConfigError: another name than "beta" and "beta-tilde".
    """
    checks.choice("variance", variance, VARIANCES)
    _, beta = schedule.transition(np.arange(1, schedule.T + 1))
    sigma2 = np.append(0.0, beta)
    if variance == "beta-tilde" and schedule.T > 1:
        sigma2[2:] = schedule.posterior_variance(np.arange(2, schedule.T + 1))
        sigma2[1] = sigma2[2]
    if not (sigma2[1:] > 0).all():
        t = int(np.argmin(sigma2[1:])) + 1
        raise ConfigError(f"no noise is added at t = {t}, so that no image but one is possible")
    return sigma2


def gaussian_kl(
    mean_difference2: Array, variance_q: Array | float, variance_p: Array | float
) -> Float64:
    """KL(N(m, variance_q) || N(m + d, variance_p)) from d^2, in nats."""
    ratio = np.divide(variance_q, variance_p)
    kl: Float64 = 0.5 * (mean_difference2 / variance_p + ratio - 1.0 - np.log(ratio))
    return kl


def log_mass(x: Array, mean: Array, variance: float) -> Float64:
    """Log of N(mean, variance)'s mass over the bin of a grey level x in [-1, 1] (Eq 13).

    The bins of the darkest and the lightest level are open. In the tails as well: ln Phi itself is
    computed, not Phi, and the difference is taken on the side where it is small.
    """
    special = scipy_special()
    deviation = math.sqrt(variance)
    low = np.where(x < -1.0 + HALF_BIN, -np.inf, (x - HALF_BIN - mean) / deviation)
    high = np.where(x > 1.0 - HALF_BIN, np.inf, (x + HALF_BIN - mean) / deviation)
    right = low > -high  # more of the bin is right of the mean: look at it from the other side
    low, high = np.where(right, -high, low), np.where(right, -low, high)
    log_high = special.log_ndtr(high)
    mass: Float64 = log_high + np.log(-np.expm1(special.log_ndtr(low) - log_high))
    return mass


def _all(n: int, T: int) -> tuple[Int64, Float64]:
    """Every timestep once: t and its weight, (n, T) each."""
    return np.tile(np.arange(1, T + 1), (n, 1)), np.ones((n, T))


def _pairs(
    schedule: Schedule, sigma2: Float64, evaluations: int, seed: int, first: int, n: int
) -> tuple[Int64, Float64]:
    """Pairs of evaluations: t and the weight of its term in the sum, (n, K) each.

    The first pair is at t = 1. The others are S strata of equal probability, p_t in proportion to
    what L_{t-1} is for data of unit variance and the exact prediction: a term has the mean
    (1 / S) E[L_{t-1} / p_t] of its stratum to tell.
    """
    T, S = schedule.T, evaluations // 2 - 1
    t = np.arange(2, T + 1)
    signal2, noise2 = schedule.signal[t] ** 2, schedule.noise[t] ** 2
    typical = np.maximum(_term(schedule, sigma2, t, noise2 / (noise2 + signal2)), 0.0)  # rounding
    p = typical / typical.sum()
    words = np.stack([noise.words(seed, noise.Stream.LIKELIHOOD, first + i, 0, 2 * S)
                      for i in range(n)])  # fmt: skip
    within = (np.arange(2 * S) // 2 + noise.to_unit(words)) / S
    at = np.searchsorted(np.cumsum(p), within, side="right")
    at = np.minimum(at, T - 2)  # the sum of all p may be rounded to less than 1
    ones = np.ones((n, 2), np.int64)
    return np.hstack([ones, t[at]]), np.hstack([ones / 2.0, 1.0 / (2 * S * p[at])])


def _spread(parts: Float64) -> Float64:
    """Standard error of a sum of pairs (n, K): that of a pair's sum is its difference."""
    error: Float64 = np.sqrt(np.square(parts[:, ::2] - parts[:, 1::2]).sum(axis=1))
    return error


def _term(schedule: Schedule, sigma2: Float64, t: Int64, x0_mse: Array) -> Float64:
    """L_{t-1} a dimension, of the mean square error of x_0 predicted at t >= 2 (Eq 8)."""
    to_x0, _ = schedule.posterior_coefficients(t)
    return gaussian_kl(to_x0**2 * x0_mse, schedule.posterior_variance(t), sigma2[t])


def _prior(schedule: Schedule, x0: Float64) -> Float64:
    """L_T of images (n, ...); float64 (n,)."""
    signal2, noise2 = float(schedule.signal[-1] ** 2), float(schedule.noise[-1] ** 2)
    squares = np.square(x0).reshape(len(x0), -1)
    prior: Float64 = gaussian_kl(signal2 * squares, noise2, 1.0).sum(axis=1)
    return prior


def levels(x0: Float32) -> Float64:
    """States in [-1, 1] of 256 grey levels, exactly.

    Raises:
        ConfigError: they are of no such levels.
    """
    level = (x0.astype(np.float64) + 1.0) * 127.5
    near: Float64 = np.rint(level)
    off = np.abs(level - near).max(initial=0.0)
    if off > OFF_LEVEL:
        raise ConfigError(
            f"likelihood is that of images of 256 levels; some values are {off:.2f} of a level off "
            "them: give uint8"
        )
    return near / 127.5 - 1.0


def _column(values: Float64) -> Float64:
    return values.reshape(-1, 1, 1, 1)


def scipy_special() -> Any:
    """SciPy's special functions."""
    try:
        from scipy import special
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"likelihood needs SciPy ({error}); pip install 'ddpm-edge[evaluate]'"
        ) from error
    return special
