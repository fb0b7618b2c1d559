"""The variational bound: each part against its definition, and the whole against Gaussian data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from ddpm_edge import Generator, Schedule, noise
from ddpm_edge.errors import ConfigError, NonFiniteError
from ddpm_edge.likelihood import (
    Bound,
    gaussian_kl,
    log_mass,
    model_variance,
    variational_bound,
)

pytest.importorskip("scipy")

SCHEDULES = {
    "linear": Schedule.linear(30, 1e-3, 0.6),
    "lecture": Schedule.linear(100, 1e-4, 0.2),
    "cosine": Schedule.cosine(40),
    "rectified flow": Schedule.rectified_flow(25),
}
VARIANCES = ("beta", "beta-tilde")


# Parts


@pytest.mark.parametrize(
    ("difference", "variance_q", "variance_p"),
    [(0.0, 1.0, 1.0), (0.3, 0.02, 0.05), (-1.5, 2.0, 0.7), (0.01, 1e-4, 1.1e-4)],
)
def test_kl_is_the_integral(difference: float, variance_q: float, variance_p: float) -> None:
    from scipy import integrate, stats

    q = stats.norm(0.0, math.sqrt(variance_q))
    p = stats.norm(difference, math.sqrt(variance_p))
    wide = 12 * math.sqrt(variance_q)
    integral, _ = integrate.quad(
        lambda x: q.pdf(x) * (q.logpdf(x) - p.logpdf(x)), -wide, wide, points=[0.0], limit=200
    )
    kl = gaussian_kl(np.float64(difference**2), np.float64(variance_q), np.float64(variance_p))
    assert kl == pytest.approx(integral, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("deviation", [1e-3, 1e-2, 0.1, 1.0, 30.0])
def test_decoder_in_the_tails(deviation: float) -> None:
    mpmath = pytest.importorskip("mpmath")
    levels = np.array([0, 1, 100, 127, 128, 254, 255])
    x, mean = np.meshgrid(levels / 127.5 - 1, [-1.0, -0.98, 0.0, 0.003, 0.7, 1.0])
    got = log_mass(x, mean, deviation**2)
    with mpmath.workdps(60):
        for value, at, m in zip(got.flat, np.rint((x.ravel() + 1) * 127.5), mean.flat, strict=True):
            level, half = mpmath.mpf(int(at)) / mpmath.mpf("127.5") - 1, mpmath.mpf(1) / 255

            def phi(edge: Any, m: float = float(m)) -> Any:  # Phi(z) = erfc(-z / sqrt 2) / 2
                return mpmath.erfc((m - edge) / (mpmath.mpf(deviation) * mpmath.sqrt(2))) / 2

            def beyond(edge: Any, m: float = float(m)) -> Any:
                return mpmath.erfc((edge - m) / (mpmath.mpf(deviation) * mpmath.sqrt(2))) / 2

            if at == 0:
                mass = phi(level + half)
            elif at == 255:
                mass = beyond(level - half)
            elif level > m:
                mass = beyond(level - half) - beyond(level + half)
            else:
                mass = phi(level + half) - phi(level - half)
            # The level is rounded to float64; (x - mean)^2 / sigma^2, up to 4e6, is off by as much
            assert value == pytest.approx(float(mpmath.log(mass)), rel=1e-9, abs=1e-12)


def test_the_bins_share_all_of_the_mass() -> None:
    x = np.arange(256) / 127.5 - 1
    for mean, variance in ((0.2, 1e-6), (-1.0, 1e-2), (0.999, 4.0)):
        total = np.exp(log_mass(x, np.full(256, mean), variance)).sum()
        assert total == pytest.approx(1.0, abs=1e-12)


def test_model_variance() -> None:
    schedule = Schedule.linear(100, 1e-4, 0.2)
    assert model_variance(schedule, "beta") == pytest.approx(schedule.beta, rel=1e-9)
    tilde = model_variance(schedule, "beta-tilde")
    t = np.arange(2, 101)
    ab = schedule.alpha_bar
    assert tilde[2:] == pytest.approx(schedule.beta[2:] * (1 - ab[t - 1]) / (1 - ab[t]), rel=1e-9)
    assert tilde[1] == tilde[2]
    with pytest.raises(ConfigError, match="variance must be one of"):
        model_variance(schedule, "learned")


# The whole, for Gaussian data


def levels(x: np.ndarray) -> np.ndarray:
    """The nearest of 256 grey levels."""
    return np.rint((x + 1) * 127.5) / 127.5 - 1


def exact(schedule: Schedule, v: float) -> Any:
    """The network that is right for data N(0, v): E[eps | x_t]."""

    def ask(x: np.ndarray, t: np.ndarray, _: np.ndarray) -> np.ndarray:
        signal, noise_ = schedule.signal[t], schedule.noise[t]
        factor = noise_ / (noise_**2 + signal**2 * v)
        return (factor.reshape(-1, 1, 1, 1) * x).astype(np.float32)

    return ask


def right(name: str, v: float) -> tuple[Any, str]:
    """The same as one of SCHEDULES can be asked, and what it predicts."""
    schedule = SCHEDULES[name]
    ask = exact(schedule, v)
    if name != "rectified flow":  # whose x_T tells nothing of x_0 by eps
        return ask, "eps"

    def velocity(x: np.ndarray, t: np.ndarray, i: np.ndarray) -> np.ndarray:
        signal, noise_ = (a[t].reshape(-1, 1, 1, 1) for a in (schedule.signal, schedule.noise))
        x0 = signal * v / (noise_**2 + signal**2 * v) * x
        return (ask(x, t, i) - x0).astype(np.float32)

    return velocity, "velocity"


def joint_covariances(schedule: Schedule, v: float, sigma2: np.ndarray) -> tuple[Any, Any]:
    """Covariance of (x_0, .., x_T), one dimension, under q and under the model p."""
    T = schedule.T
    # q: x_t = signal_t x_0 + noise_t eps_t, by its steps x_t = factor x_{t-1} + sqrt(variance) z
    q, p = np.zeros((T + 1, T + 1)), np.zeros((T + 1, T + 1))
    rows = np.zeros((T + 1, T + 1))  # x_t as a sum of independent normals
    rows[0, 0] = math.sqrt(v)
    for t in range(1, T + 1):
        factor = schedule.signal[t] / schedule.signal[t - 1]
        rows[t] = factor * rows[t - 1]
        rows[t, t] = math.sqrt(schedule.noise[t] ** 2 - factor**2 * schedule.noise[t - 1] ** 2)
    q = rows @ rows.T
    rows = np.zeros((T + 1, T + 1))
    rows[T, T] = 1.0
    for t in range(T, 0, -1):  # mu is the posterior mean of the predicted x_0, linear in x_t
        x0 = schedule.signal[t] * v / (schedule.noise[t] ** 2 + schedule.signal[t] ** 2 * v)
        one = np.ones(1)
        mean = schedule.posterior_mean(x0 * one, one, t)[0]
        rows[t - 1] = mean * rows[t]
        rows[t - 1, t - 1] = math.sqrt(sigma2[t])
    p = rows @ rows.T
    return q, p


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 4)])
def test_gaussian_data_by_the_joint_distribution(
    name: str, variance: str, shape: tuple[int, int, int]
) -> None:
    # E[L] = H(q(x_0)) + KL(q(x_0..x_T) || p(x_0..x_T)), between two Gaussians of T + 1 dimensions
    # for each value. L's decoder is discrete, that of p is not: it is replaced by -ln p(x_0 | x_1).
    schedule, v, n = SCHEDULES[name], 0.25, 1200 // math.prod(shape)
    sigma2 = model_variance(schedule, variance)
    q, p = joint_covariances(schedule, v, sigma2)
    T = schedule.T
    solved = np.linalg.solve(p, q)
    gap = 0.5 * (np.trace(solved) - (T + 1) - np.linalg.slogdet(solved)[1])
    entropy = 0.5 * math.log(2 * math.pi * math.e * v)
    noise2, signal2 = schedule.noise[1] ** 2, schedule.signal[1] ** 2
    decoder = 0.5 * math.log(2 * math.pi * sigma2[1])
    decoder += 0.5 * v * noise2 / (noise2 + signal2 * v) / sigma2[1]
    wanted = math.prod(shape) * (entropy + gap - decoder)
    assert gap >= 0

    x0 = np.random.default_rng(0).normal(0.0, math.sqrt(v), (n, *shape))
    ask, prediction = right(name, v)
    bound = variational_bound(
        ask, schedule, x0, prediction=prediction, variance=variance, clip=None, seed=1, batch=4096
    )
    got = bound.prior + bound.diffusion
    error = got.std(ddof=1) / math.sqrt(n)
    assert abs(got.mean() - wanted) < 4 * error
    assert error < 0.05 * abs(wanted)  # or the line above says nothing


# Against the equations, with a network


@pytest.mark.parametrize("T", [10, 1000])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_small_network_against_the_equations(T: int, variance: str, clip: float | None) -> None:
    torch = pytest.importorskip("torch")
    normal, kl = torch.distributions.Normal, torch.distributions.kl_divergence
    torch.manual_seed(0)
    shape, n = (2, 4, 4), 3
    network = torch.nn.Sequential(
        torch.nn.Conv2d(2, 8, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(8, 2, 3, padding=1)
    )

    def ask(x: np.ndarray, t: np.ndarray, _: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return (
                (network(torch.from_numpy(x)) * torch.tensor(t / T).reshape(-1, 1, 1, 1))
                .float()
                .numpy()
            )

    schedule = Schedule.linear(T, 1e-4 * 1000 / T, 0.02 * 1000 / T if T > 10 else 0.98)
    levels = np.random.default_rng(0).integers(0, 256, (n, *shape))
    levels[0, 0, 0] = [0, 0, 255, 255]  # the open bins
    x0 = levels / 127.5 - 1
    got = variational_bound(
        ask, schedule, x0, variance=variance, clip=clip, seed=5, first=7, batch=8
    )

    # Ho et al. 2020 in float64, in alpha-bar and beta, one image and timestep at a time.
    beta, ab = schedule.beta, schedule.alpha_bar
    alpha = 1 - beta
    for i in range(n):
        x = torch.tensor(levels[i] / 127.5 - 1)
        prior = kl(
            normal(math.sqrt(ab[T]) * x, math.sqrt(1 - ab[T])), normal(torch.zeros_like(x), 1.0)
        )
        assert got.prior[i] == pytest.approx(float(prior.sum()), rel=1e-4)
        for t in range(1, T + 1):
            eps = noise.standard_normal(5, noise.Stream.LIKELIHOOD, 7 + i, t, x.numel())
            e = torch.tensor(eps.reshape(shape), dtype=torch.float64)
            x_t = math.sqrt(ab[t]) * x + math.sqrt(1 - ab[t]) * e
            answer = ask(x_t.float().numpy()[None], np.array([t]), np.array([i]))[0]
            hat = (
                x_t - math.sqrt(1 - ab[t]) * torch.tensor(answer, dtype=torch.float64)
            ) / math.sqrt(ab[t])
            hat = hat if clip is None else hat.clamp(-clip, clip)

            def posterior(x_0: Any, t: int = t, x_t: Any = x_t) -> Any:  # Eq 7
                first = math.sqrt(ab[t - 1]) * beta[t] * x_0
                return (first + math.sqrt(alpha[t]) * (1 - ab[t - 1]) * x_t) / (1 - ab[t])

            s = max(t, 2)
            tilde = beta[s] * (1 - ab[s - 1]) / (1 - ab[s])
            sigma = math.sqrt(beta[t] if variance == "beta" else tilde)
            if t > 1:
                term = kl(
                    normal(posterior(x), math.sqrt(beta[t] * (1 - ab[t - 1]) / (1 - ab[t]))),
                    normal(posterior(hat), sigma),
                )
                assert got.terms[i, t - 1] == pytest.approx(float(term.sum()), rel=1e-4)
            else:
                mass = log_mass(x.numpy(), posterior(hat).numpy(), sigma**2)  # tested above
                assert got.terms[i, 0] == pytest.approx(-mass.sum(), rel=1e-4)
    assert (got.t == np.arange(1, T + 1)).all()
    assert got.diffusion == pytest.approx(got.terms[:, 1:].sum(axis=1))
    np.testing.assert_array_equal(got.reconstruction, got.terms[:, 0])
    assert got.nats == pytest.approx(got.prior + got.terms.sum(axis=1))
    assert got.bits_per_dim == pytest.approx(got.nats / (x0[0].size * math.log(2)))
    assert np.isnan(got.standard_error).all()


# Fewer evaluations


@pytest.mark.parametrize("timesteps", [5, 30])
@pytest.mark.parametrize(("off", "variance"), [(0.0, "beta"), (0.2, "beta-tilde")])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_estimate_is_without_bias_and_knows_its_error(
    name: str, off: float, variance: str, timesteps: int
) -> None:
    schedule, v, n = SCHEDULES[name], 0.25, 2000
    timesteps = min(timesteps, schedule.T - 1)
    x0 = levels(np.random.default_rng(0).uniform(-1, 1, (1, 1, 2, 2)))
    many = np.repeat(x0, n, axis=0)  # the same image, as many draws
    network, prediction = right(name, v)

    def ask(x: np.ndarray, t: np.ndarray, i: np.ndarray) -> np.ndarray:
        return network(x, t, i) + np.float32(off)  # whose terms are others than those expected

    arguments = {"clip": None, "batch": 4096, "prediction": prediction, "variance": variance}
    whole = variational_bound(ask, schedule, many, seed=3, **arguments)
    part = variational_bound(ask, schedule, many, timesteps=timesteps, seed=4, **arguments)
    assert part.t.shape == (n, timesteps // 2 * 2)
    assert (part.t[:, :2] == 1).all()
    assert (part.t[:, 2:] > 1).all()
    for name_ in ("diffusion", "reconstruction"):
        a, b = getattr(part, name_), getattr(whole, name_)
        assert abs(a.mean() - b.mean()) < 4 * math.sqrt((a.var() + b.var()) / n)
    # The mean of its square is the variance of the estimates; that is known to some 5 %.
    claimed = math.sqrt(np.mean(part.standard_error**2))
    assert claimed == pytest.approx(part.nats.std(ddof=1), rel=0.15)


def test_what_is_evaluated_of_an_image_depends_on_seed_and_index(toy: Generator) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 1)).astype(np.uint8)
    part = toy.bound(images, 20, 4, label="sneaker", batch=7)
    second = toy.bound(images[1:], 20, 4, label="sneaker", first=1)
    np.testing.assert_array_equal(second.t, part.t[1:])
    np.testing.assert_allclose(second.nats, part.nats[1:], rtol=1e-6)
    assert (part.standard_error > 0).all()
    assert (part.t[0] != part.t[1]).any()
    assert (toy.bound(images, 20, 5).t != part.t).any()


# What a caller meets


def test_generator(generator: Generator) -> None:
    images = generator.sample(3, label=[1, 5, None], seed=0)
    seen: list[float] = []
    bound = generator.bound(images, 10, 0, label=[1, 5, None], progress=seen.append)
    assert isinstance(bound, Bound)
    assert seen[-1] == 1.0
    assert seen == sorted(seen)
    np.testing.assert_array_equal(
        generator.log_likelihood(images, 10, 0, label=[1, 5, None]), -bound.nats
    )
    bits = generator.bits_per_dim(images, 10, 0, label=[1, 5, None])
    np.testing.assert_array_equal(bits, bound.bits_per_dim)
    noise_ = np.random.default_rng(0).integers(0, 256, images.shape).astype(np.uint8)
    assert (generator.bits_per_dim(noise_, 10, 0) > bits + 1).all()
    mean, error = bound.mean()
    assert mean == pytest.approx(bits.mean())
    assert error == pytest.approx(bits.std(ddof=1) / math.sqrt(3))
    with pytest.raises(ConfigError, match="need all timesteps"):
        bound.rate_distortion()


def test_rate_and_distortion(toy: Generator) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 1)).astype(np.uint8)
    bound = toy.bound(images, seed=0)
    rate, distortion = bound.rate_distortion()
    assert rate.shape == distortion.shape == (1000,)
    assert (np.diff(rate) >= 0).all()
    sent = (bound.prior + bound.diffusion).mean() / (784 * math.log(2))
    assert rate[-1] == pytest.approx(sent)
    assert rate[0] == pytest.approx(bound.prior.mean() / (784 * math.log(2)))
    root = 127.5 * math.sqrt(bound.x0_mse[:, 0].mean())
    assert distortion[-1] == pytest.approx(root)


@pytest.mark.parametrize(
    ("images", "arguments", "message"),
    [
        (np.zeros((28, 28, 3), np.uint8), {}, r"must be \(28, 28, 1\)"),
        (np.zeros((0, 28, 28, 1), np.uint8), {}, r"got \(0, 28"),
        (np.full((28, 28, 1), np.nan, np.float32), {}, "nan"),
        (np.full((28, 28, 1), 3.0, np.float32), {}, r"\[-1, 1\]"),
        (np.full((28, 28, 1), -0.5, np.float32), {}, "256 levels.*give uint8"),
        (np.zeros((28, 28, 1), np.uint8), {"timesteps": 3}, r"timesteps must be 4\.\.1000"),
        (np.zeros((28, 28, 1), np.uint8), {"timesteps": 0}, "timesteps"),
        (np.zeros((28, 28, 1), np.uint8), {"timesteps": 1001}, "1000"),
        (np.zeros((28, 28, 1), np.uint8), {"timesteps": 10.0}, "timesteps"),
        (np.zeros((28, 28, 1), np.uint8), {"seed": -1}, "seed"),
        (np.zeros((28, 28, 1), np.uint8), {"label": "sock"}, "sock"),
        (np.zeros((28, 28, 1), np.uint8), {"batch": 0}, "batch"),
        (np.zeros((28, 28, 1), np.uint8), {"first": -1}, "first"),
    ],
)
def test_bad_arguments(
    toy: Generator, images: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        toy.bits_per_dim(images, **arguments)


def test_an_answer_that_is_not_finite() -> None:
    def ask(x: np.ndarray, t: np.ndarray, _: np.ndarray) -> np.ndarray:
        return np.full_like(x, np.nan)

    with pytest.raises(NonFiniteError, match="NaN or infinity at t in"):
        variational_bound(ask, Schedule.linear(10, 0.01, 0.98), np.zeros((1, 1, 2, 2)))
