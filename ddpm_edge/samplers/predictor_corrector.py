"""Predictor-corrector sampling (Song et al. 2021, "Score-based generative modeling ...")."""

from __future__ import annotations

import numpy as np

from ddpm_edge import checks
from ddpm_edge.arrays import Float64
from ddpm_edge.errors import ConfigError
from ddpm_edge.noise import Stream
from ddpm_edge.plan import Plan
from ddpm_edge.samplers.grid import DEFAULT_SPACING, Grid, Spacing, call_name
from ddpm_edge.samplers.one_step import ddpm
from ddpm_edge.schedule import Schedule

MAX_CORRECTIONS = 1000
MAX_ROWS = 100_000


def pc(
    schedule: Schedule,
    steps: int | None = None,
    corrections: int = 1,
    snr: float = 0.16,
    spacing: Spacing = DEFAULT_SPACING,
    clip: float | str | None = None,
) -> Plan:
    """Algorithm 2 with beta-tilde as predictor, and Langevin steps at every timestep it reaches.

    A Langevin step is x <- x + step score + sqrt(2 step) z with score = -eps / noise and step =
    2 (snr noise)^2. In the paper's Algorithm 5 step = 2 alpha_i (snr |z| / |score|)^2 depends on
    norms in the batch; here both are at their expectation, so that a sample depends on its own
    noise alone, and alpha_i, which respaced steps make small, is left out.

    Args:
        schedule: the forward process.
        steps: of the predictor; see `timesteps`. The network is asked steps + (steps - 1)
            corrections times.
        corrections: Langevin steps after each but the last, 0..1000.
        snr: "signal-to-noise ratio" of a Langevin step, above 0.
        spacing: see `timesteps`.
        clip: of x0, see `Clip.parse`; None = not.
    """
    corrections = checks.whole("corrections", corrections, least=0, most=MAX_CORRECTIONS)
    if not 0.0 < checks.number("snr", snr) < np.inf:
        raise ConfigError(f"snr must be a number above 0; got {snr!r}")
    grid = Grid.of(schedule, steps, spacing)
    if len(grid) * (corrections + 1) > MAX_ROWS:
        raise ConfigError(
            f"{len(grid)} steps with {corrections} corrections each are more than {MAX_ROWS} rows; "
            "give fewer"
        )
    predictor = ddpm(schedule, None, "beta-tilde", grid.t.tolist())
    a, b, s = langevin(grid.signal[:-1], grid.noise[:-1], snr)
    # At every point of the grid but the first Langevin rows, then the predictor's row.
    at = np.repeat(np.arange(len(grid)), [1, *[corrections + 1] * (len(grid) - 1)])
    leaves = np.append(np.diff(at) > 0, True)  # the predictor's rows
    return Plan(
        name=call_name(
            "pc", len(grid), spacing, clip, {"corrections": corrections, "snr": float(snr)}
        ),
        form="x0",
        clip=clip,
        t=grid.t[at],
        signal=grid.signal[at],
        noise=grid.noise[at],
        a=np.where(leaves, predictor.a[at], a[at]),
        b=np.where(leaves, predictor.b[at, 0], b[at])[:, None],
        s=np.where(leaves, predictor.s[at], s[at]),
        stream=np.where(leaves, Stream.STEP, Stream.LANGEVIN),
    )


def langevin(signal: Float64, noise: Float64, snr: float) -> tuple[Float64, Float64, Float64]:
    """Coefficients (of x, of x0, of z) of a Langevin step at a noise level."""
    step = 2.0 * (snr * noise) ** 2
    pull = step / noise**2  # x - step eps / noise, with eps = (x - signal x0) / noise
    return 1.0 - pull, pull * signal, np.sqrt(2.0 * step)
