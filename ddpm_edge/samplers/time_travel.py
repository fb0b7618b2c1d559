"""Time travel: go back and forth, so that what is imposed on x0 and what is not come to agree.

RePaint (Lugmayr et al. 2022, section 4.2) goes back by adding noise and does the steps again; DDNM
(Wang et al. 2022, section 3.4) does the same for any measurement.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ddpm_edge import checks
from ddpm_edge.errors import ConfigError
from ddpm_edge.noise import Stream
from ddpm_edge.plan import Plan, never_asked
from ddpm_edge.schedule import transition

MAX_ROWS = 100_000


def time_travel(plan: Plan, length: int, repeat: int) -> Plan:
    """The plan with every stretch of `length` rows run `repeat` times, but for the last stretch.

    Between two runs one row that does not ask the network takes the state back, by q(x_t | x_s).
    History is forgotten there: a row that would look back further takes the step of order 1, all
    its weights on its own answer.

    Args:
        plan: in form "x0".
        length: rows of a stretch, 1 or more (RePaint's jump length).
        repeat: how often each is run, 1 or more (RePaint's r); 1 = the plan as it is.

    Raises:
        ConfigError: another form, nothing to repeat, or more than about 100,000 rows.
    """
    length, repeat = checks.whole("travel_length", length), checks.whole("travel_repeat", repeat)
    if repeat == 1:
        return plan
    if length >= len(plan):
        raise ConfigError(
            f"travel_length {length} leaves nothing to repeat in {len(plan)} rows; give less"
        )
    if plan.form != "x0":
        raise ConfigError(
            f"time travel needs a sampler on x0, and {plan.name} is on {plan.form}; use dpmpp, "
            "unipc, ddim or ddpm"
        )
    rows = len(plan)
    if (rows + -(-rows // length)) * repeat > MAX_ROWS:  # with the ways back
        raise ConfigError(f"travel_repeat {repeat} makes more than {MAX_ROWS} rows; give less")
    # Rows of the plan in the order they run; ~i is the way back from the state before row i.
    order: list[int] = []
    for first in range(0, rows, length):
        stretch = list(range(first, min(first + length, rows)))
        order += stretch
        if stretch[-1] + 1 < rows:
            order += [~stretch[-1] - 1, *stretch] * (repeat - 1)
    visits = np.array(order)
    back = visits < 0
    at = np.where(back, ~visits, visits)
    a, s = plan.a[at], plan.s[at]
    below, above = at[back], at[back] - length  # where the ways back begin and where they lead
    a[back], variance = transition(
        plan.signal[above], plan.noise[above], plan.signal[below], plan.noise[below]
    )
    s[back] = np.sqrt(variance)
    evaluate, restart = plan.evaluate[at] & ~back, np.append(True, back[:-1])
    b = plan.b[at]
    b[back] = 0.0
    short = never_asked(b, evaluate, restart)
    b[short, 0] = b[short].sum(axis=1)
    b[short, 1:] = 0.0
    return replace(
        plan,
        name=f"{plan.name[:-1]}, travel_length={length}, travel_repeat={repeat})",
        t=plan.t[at],
        signal=plan.signal[at],
        noise=plan.noise[at],
        a=a,
        b=b,
        s=s,
        evaluate=evaluate,
        restart=restart,
        stream=np.where(back, Stream.TRAVEL, plan.stream[at]),
        row=np.arange(len(order)),
    )
