"""Samples from any engine: what the network is asked, and the loop around it."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterable, Iterator

import numpy as np

from ddpm_edge import checks, device_loop, noise
from ddpm_edge.arrays import Array, Float32, Int64
from ddpm_edge.device_loop import DeviceLoops, Job
from ddpm_edge.errors import BundleError, ConfigError, OutOfMemoryError
from ddpm_edge.guidance import Guidance, Labels
from ddpm_edge.manifest import Manifest
from ddpm_edge.plan import Plan, State, run_plan
from ddpm_edge.restoration import Measurement
from ddpm_edge.runtimes.base import Engine, gpu_engine

LOOPS = ("auto", "host", "device")
log = logging.getLogger("ddpm_edge")

MAX_BATCH = 16  # samples in one engine call unless told otherwise


class Network:
    """The network of a bundle on an engine: its answer for x at timestep t.

    The one place that knows the number the network is fed for t, and how guidance asks.

    Args:
        engine: what evaluates it.
        manifest: what is known of it.
        loop: where the loop around it runs: "host", "device" (the engine's GPU), or "auto", on the
            device as far as it can.

    Raises:
        BundleError: the engine's tensors are not those that the manifest describes.
        ConfigError: there is no such loop, or none on the device.
    """

    def __init__(self, engine: Engine, manifest: Manifest, loop: str = "auto") -> None:
        checks.choice("loop", loop, LOOPS)
        expected = list(manifest.inputs)
        if sorted(engine.inputs) != sorted(expected) or list(engine.outputs) != ["prediction"]:
            raise BundleError(
                f"the model takes {', '.join(engine.inputs)} and gives "
                f"{', '.join(engine.outputs)}; expected {', '.join(expected)} and prediction: "
                "export it again"
            )
        if engine.inputs["x"].shape[1:] != manifest.sample_shape:
            raise BundleError(
                f"the model takes x as {engine.inputs['x']}, but its manifest says sample_shape "
                f"{manifest.sample_shape}: export it again"
            )
        self.engine, self.manifest = engine, manifest
        self._one_at_a_time: contextlib.AbstractContextManager[object] = (
            contextlib.nullcontext() if engine.concurrent else threading.RLock()
        )
        on_gpu = None if loop == "host" else gpu_engine(engine)
        if loop == "device" and on_gpu is None:
            raise ConfigError(
                f"loop='device' needs an engine whose arrays stay on a GPU, and {engine.runtime} "
                f"on {engine.device} is none (on a GPU, the log says why); leave loop out"
            )
        self.loop = loop
        self._loops: DeviceLoops | None = None
        if on_gpu is not None:
            self._loops = device_loop.DeviceLoops(manifest, on_gpu, self._one_at_a_time)

    def loops_for(
        self, plan: Plan, measurement: Measurement | None, batch: int, guided: bool
    ) -> DeviceLoops | None:
        """The loops on the device, if they run this; None = the host's does.

        Raises:
            ConfigError: loop="device" was asked for, and they cannot.
        """
        if self._loops is None or not len(plan):
            return None
        reason = device_loop.cannot(plan, measurement) or self._loops.cannot()
        asked, most = batch * (2 if guided else 1), self.engine.max_batch
        if self.loop == "auto" and most is not None and asked > most:  # the host may ask about less
            reason = f"it would ask about {asked} at once, and the engine takes {most}"
        if not reason:
            return self._loops
        if self.loop == "device":
            raise ConfigError(f"the loop on the device cannot do this: {reason}; leave loop out")
        log.info("the loop runs on the host: %s", reason)
        return None

    def close(self) -> None:
        """Free the engine, after the call that is under way where calls must not overlap."""
        try:
            if self._loops is not None:
                self._loops.close()
        finally:
            with self._one_at_a_time:
                self.engine.close()

    def __call__(
        self, x: Array, t: int | Int64, labels: Labels, scale: Float32 | None = None
    ) -> Array:
        """The answer (B, C, H, W), float32.

        Args:
            x: float32 (B, C, H, W).
            t: timesteps in 1..T, one for all or int64 (B,), which guidance does not take.
            labels: int64 (B,), or None where the model takes no label (or for no label).
            scale: of guidance, float32 (B,); None = labels as they are. Samples of scale 1 and
                those without a label are not asked about twice.
        """
        if labels is None:
            labels = self.manifest.no_label(len(x))
        if scale is None or labels is None:
            return self._evaluate(x, t, labels)
        guided = np.flatnonzero((scale != 1) & (labels != self.manifest.null_label))
        no_label = labels[:0] if not len(guided) else self.manifest.no_label(len(guided))
        both = self._evaluate(np.concatenate([x, x[guided]]), t, np.concatenate([labels, no_label]))
        answer, without = both[: len(x)], both[len(x) :]
        # eps_u + scale (eps_c - eps_u), from the side that leaves scale 1 as it is
        push = (scale[guided] - 1).reshape(-1, 1, 1, 1)
        answer[guided] += push * (answer[guided] - without)
        return answer

    def batch(self, guided: bool) -> int:
        """How many samples to ask about at once unless told otherwise; guided, each is two."""
        most = self.engine.max_batch or MAX_BATCH * 2
        return max(1, min(MAX_BATCH, most // 2 if guided else most))

    def _evaluate(self, x: Array, t: int | Int64, labels: Labels) -> Array:
        number = t + self.manifest.timestep_offset
        if isinstance(number, int):
            number = np.array([number] * len(x), np.int64)  # sooner than np.full
        arrays = {"x": x, "t": number}
        if labels is not None:
            arrays["label"] = labels
        with self._one_at_a_time:
            return self.engine(arrays)["prediction"]


def sample_states(
    network: Network,
    plan: Plan,
    seed: int,
    samples: range,
    labels: Labels = None,
    guidance: Guidance | None = None,
    start: Array | None = None,
    measurement: Measurement | None = None,
) -> Iterator[State]:
    """Run a plan for the samples of these indices, yielding after every row.

    Args:
        network: what answers.
        plan: what to run.
        seed: of all draws; sample i depends on (seed, i) only.
        samples: indices of the samples in the batch, consecutive.
        labels: int64 (len(samples),) or None.
        guidance: see `Guidance`.
        start: state to start from, float32 (B, C, H, W), left as it is; None = the prior's draw.
        measurement: what is imposed on every predicted x0.

    Raises:
        NonFiniteError: the network answered with NaN or infinity.
        OutOfMemoryError: too little memory for so many samples at once.
    """

    def ask(x: Array, t: int) -> Array:
        return network(x, t, labels, None if guidance is None else guidance.at(t))

    with enough_memory(len(samples)):
        draws = noise.Draws(seed, samples.start, (len(samples), *network.manifest.sample_shape))
        x = draws.prior() if start is None else np.copy(start)
        loops = network.loops_for(plan, measurement, len(samples), guidance is not None)
        if loops is not None:
            job = Job(plan, x, seed, samples.start, labels, guidance, measurement)
            yield from loops.run(job)
            return
        impose, draw = (None, draws) if measurement is None else measurement.along(plan, draws)
        yield from run_plan(plan, x, ask, draw, network.manifest.prediction, impose)


def warm_up(network: Network, plan: Plan, samples: int, labels: Labels) -> None:
    """Do what makes the first steps of a call slower than the others."""
    x = np.zeros((samples, *network.manifest.sample_shape), np.float32)
    loops = network.loops_for(plan, None, samples, guided=False)
    if loops is None:
        network(x, 1, labels)
        return
    until_warm(loops.run(Job(plan, x, 0, 0, labels)))


def until_warm(states: Iterable[State]) -> None:
    """Go on until the steps that follow are as quick as they become, or to the end."""
    for state in states:
        state.wait()
        if state.warm:
            break


def seconds_without_network(network: Network, plan: Plan, batch: int) -> float:
    """How long a plan takes that runs on the device, but for the network: what the loop costs."""
    loops = network.loops_for(plan, None, batch, guided=False)
    if loops is None:
        raise ConfigError(f"plan {plan.name} runs on the host")
    x = np.zeros((batch, *network.manifest.sample_shape), np.float32)
    before = time.perf_counter()
    for _ in loops.run(Job(plan, x, 0, 0, ask=False)):
        pass
    return time.perf_counter() - before


@contextlib.contextmanager
def enough_memory(batch: int) -> Iterator[None]:
    """Turn a MemoryError of NumPy or of an engine into one that says what to do."""
    try:
        yield
    except MemoryError as error:
        reason = f" ({error})" if str(error) else ""  # Python's own says nothing
        raise OutOfMemoryError(
            f"not enough memory for {batch} samples at once{reason}; give a smaller batch= (where "
            "that cannot be less, a smaller n, and the others by first=)"
        ) from error
