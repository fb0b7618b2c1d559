"""A torch module as an Engine: the reference that exports are held against."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from ddpm_edge.arrays import Array
from ddpm_edge.runtimes.base import TensorSpec, check_inputs
from ddpm_edge.train.network import prediction_of


class TorchEngine:
    """`model(x, t)` or `model(x, t, label)` behind the Engine protocol, in float32.

    Args:
        model: the network; used where it is, in evaluation mode.
        sample_shape: (C, H, W).
        labelled: whether it takes a label.
    """

    runtime = "torch"
    concurrent = False
    max_batch = None

    def __init__(
        self, model: nn.Module, sample_shape: tuple[int, int, int], labelled: bool
    ) -> None:
        self.model = model.eval()
        tensor = next(model.parameters(), None)
        self.device = str(tensor.device) if tensor is not None else "cpu"
        number = TensorSpec((None,), np.dtype(np.int64))
        image = TensorSpec((None, *sample_shape), np.dtype(np.float32))
        self.inputs = {"x": image, "t": number} | ({"label": number} if labelled else {})
        self.outputs = {"prediction": image}

    @torch.no_grad()
    def __call__(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Evaluate the module (see `Engine`)."""
        check_inputs(self.inputs, arrays)
        tensors = [torch.from_numpy(arrays[name]).to(self.device) for name in self.inputs]
        return {"prediction": prediction_of(self.model(*tensors)).float().cpu().numpy()}

    def close(self) -> None:
        """Nothing to free."""

    def __enter__(self) -> TorchEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
