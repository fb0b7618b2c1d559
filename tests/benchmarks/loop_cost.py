"""What the loop around the network costs: time outside engine calls, and the noise's share.

    python tests/benchmarks/loop_cost.py [--runs 5]

Within one run of the built-in bundle each engine call is timed; all the rest is the loop: the
update of the state, normal draws, checks. Printed for batch 1 and 16, for the default plan, one
that never draws noise (ddim) and Algorithm 2 (ddpm). The median of the runs.
"""

import argparse
import statistics
import time

from ddpm_edge import Bundle, Generator, noise
from ddpm_edge.bench import TimedEngine
from ddpm_edge.runtimes import open_engine

PLANS = {
    "default": {},
    "ddim": {"sampler": "ddim"},
    "ddpm": {"sampler": "ddpm", "variance": "beta-tilde"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs

    draws = noise.Draws.__call__
    spent = 0.0

    def timed_draws(*arguments):
        nonlocal spent
        start = time.perf_counter()
        out = draws(*arguments)
        spent += time.perf_counter() - start
        return out

    noise.Draws.__call__ = timed_draws
    bundle = Bundle.open()
    engine = TimedEngine(open_engine(bundle.model()[1], device="cpu"))
    generator = Generator(bundle, engine, "fp32")
    print(
        f"{'plan':7} {'batch':>5} {'ms/step':>9} {'loop us/step':>13} {'loop %':>7} {'draws %':>8}"
    )
    for name, plan in PLANS.items():
        for batch in (1, 16):
            generator.sample(batch, steps=5, seed=0, **plan)  # warm up
            rows = []
            for _ in range(runs):
                engine.seconds = spent = 0.0
                start = time.perf_counter()
                generator.sample(batch, steps=50, seed=0, **plan)
                total = time.perf_counter() - start
                rows.append((total, total - engine.seconds, spent))
            total, loop, drawn = (statistics.median(column) for column in zip(*rows, strict=True))
            print(
                f"{name:7} {batch:5d} {total / 50 * 1e3:9.3f} {loop / 50 * 1e6:13.1f} "
                f"{100 * loop / total:7.2f} {100 * drawn / total:8.2f}"
            )


if __name__ == "__main__":
    main()
