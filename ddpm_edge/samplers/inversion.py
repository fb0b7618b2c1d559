"""From an image to the noise that DDIM makes it of."""

from __future__ import annotations

import numpy as np

from ddpm_edge.plan import Plan
from ddpm_edge.samplers.grid import DEFAULT_SPACING, Grid, Spacing, call_name
from ddpm_edge.schedule import Schedule


def inversion(
    schedule: Schedule, steps: int | None = None, spacing: Spacing = DEFAULT_SPACING
) -> Plan:
    """DDIM with eta 0 backwards, from the image at t = 0 up (Song et al. 2021, section 4.3).

    A step from s to t assumes that the eps of x_t, which is not known yet, is that of x_s; the
    network is asked for it at t, as it will be on the way down, and its answer is taken for one at
    x_s. The more steps, the closer.

    Args:
        schedule: the forward process.
        steps: see `timesteps`.
        spacing: see `timesteps`.
    """
    grid = Grid.of(schedule, steps, spacing)
    signal_t, noise_t = grid.signal[-2::-1], grid.noise[-2::-1]
    signal_s, noise_s = grid.signal[:0:-1], grid.noise[:0:-1]
    a = signal_t / signal_s
    return Plan(
        name=call_name("inversion", len(grid), spacing, None, {}),
        form="eps",
        t=grid.t[::-1],
        signal=np.where(noise_s > 0, signal_s, signal_t),  # of the data no eps is known
        noise=np.where(noise_s > 0, noise_s, noise_t),
        a=a,
        b=(noise_t - a * noise_s)[:, None],
        s=np.zeros(len(grid)),
    )
