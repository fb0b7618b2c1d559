"""The random numbers of training: each step's depend on (seed, step) alone.

So a run that was interrupted goes on exactly, and several processes draw what one would have drawn.
(Torch's generators, not `ddpm_edge.noise`: they run on the GPU, and no device need repeat them.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ddpm_edge.train.workers import Workers


class Draws:
    """The random numbers of one step: those of the whole batch, of which we keep our rows.

    Args:
        batch: images a process.
        workers: this process among all.
        key: whole numbers and words that tell these draws from all others: seed, purpose, step.
    """

    def __init__(self, batch: int, workers: Workers, *key: int | str) -> None:
        self._whole = batch * workers.count
        self._workers = workers
        self._generator = torch.Generator(workers.device).manual_seed(number(*key))

    def integers(self, low: int, high: int) -> Tensor:
        """Whole numbers in low..high; int64 (B,)."""
        shape, device = (self._whole,), self._workers.device
        whole = torch.randint(low, high + 1, shape, generator=self._generator, device=device)
        return self._workers.rows(whole)

    def uniform(self) -> Tensor:
        """In [0, 1); float32 (B,)."""
        device = self._workers.device
        return self._workers.rows(torch.rand(self._whole, generator=self._generator, device=device))

    def normal(self, shape: torch.Size) -> Tensor:
        """Standard normal, of the shape of our own batch (B, ...); float32."""
        whole, device = (self._whole, *shape[1:]), self._workers.device
        return self._workers.rows(torch.randn(whole, generator=self._generator, device=device))


def batches(count: int, batch: int, workers: Workers, seed: int, done: int) -> Iterator[Tensor]:
    """Endless index batches (batch,) of step done + 1, ...: every epoch a new order.

    What is left of an epoch when another whole batch does not fit is dropped.
    """
    whole = batch * workers.count
    epoch, step = divmod(done, count // whole)
    while True:
        generator = torch.Generator().manual_seed(number(seed, "order", epoch))
        order = torch.randperm(count, generator=generator)
        for index in torch.split(order[: count // whole * whole], whole)[step:]:
            yield workers.rows(index).to(workers.device)
        epoch, step = epoch + 1, 0


def number(*key: int | str) -> int:
    """A seed for a torch generator, in 0..2**63 - 1, from the words of a key."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
