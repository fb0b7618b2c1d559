"""The sampling loop as a model of Triton's Python backend; `ddpm-edge export --format triton`.

The loop runs in this SDK, the network in Triton: every evaluation is a request to a model beside
this one, whose dynamic batcher joins what several loops ask at the same time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_edge.arrays import Array
from ddpm_edge.bundle import Bundle
from ddpm_edge.errors import ConfigError, DdpmEdgeError, EngineError
from ddpm_edge.generator import Generator
from ddpm_edge.manifest import Manifest
from ddpm_edge.runtimes.base import TensorSpec, check_inputs

ONE = ("n", "seed", "first", "steps", "sampler", "deadline_ms", "budget_ms")
EACH = ("label", "guidance")  # one for all images, or one for each


def triton() -> Any:
    """The module that Triton gives to models of its Python backend."""
    import triton_python_backend_utils

    return triton_python_backend_utils


class TritonEngine:
    """A network that Triton serves, asked from another model of the same server.

    Args:
        name: of the model.
        manifest: of the bundle that it is from.
        max_batch: the largest batch that its config allows.
    """

    runtime, concurrent = "triton", True

    def __init__(self, name: str, manifest: Manifest, max_batch: int) -> None:
        self.device, self.max_batch = name, max_batch
        self.inputs = {
            name: TensorSpec((None, *shape), np.dtype(dtype))
            for name, (dtype, shape) in manifest.inputs.items()
        }
        self.outputs = {"prediction": self.inputs["x"]}

    def __call__(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Evaluate the model (see `Engine`)."""
        batch = check_inputs(self.inputs, arrays)
        if batch > self.max_batch:
            raise EngineError(f"{self.device} takes {self.max_batch} at once; got {batch}")
        backend = triton()
        tensors = [
            # Triton knows no empty shape: a number is (1,), the batch's numbers (B, 1)
            backend.Tensor(name, np.ascontiguousarray(a if a.ndim > 1 else a[:, None]))
            for name, a in arrays.items()
        ]
        try:
            response = backend.InferenceRequest(
                model_name=self.device,
                requested_output_names=["prediction"],
                inputs=tensors,
                preferred_memory=backend.PreferredMemory(backend.TRITONSERVER_MEMORY_CPU),
            ).exec()
        except backend.TritonModelException as error:  # such as: it is not loaded
            raise EngineError(f"{self.device} failed: {error}") from error
        if response.has_error():
            raise EngineError(f"{self.device} failed: {response.error().message()}")
        answer = backend.get_output_tensor_by_name(response, "prediction").as_numpy()
        return {"prediction": np.array(answer)}  # the response owns its memory

    def close(self) -> None:
        """Triton has the model (see `Engine`)."""

    def __enter__(self) -> TritonEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class TritonPythonModel:
    """What Triton's Python backend calls: `Generator.run`, one call a request."""

    def initialize(self, arguments: Mapping[str, str]) -> None:
        """Load the bundle that lies beside the model file."""
        config = json.loads(arguments["model_config"])
        given = {name: value["string_value"] for name, value in config["parameters"].items()}
        folder = Path(arguments["model_repository"]) / arguments["model_version"]
        bundle = Bundle.open(folder / "bundle")
        engine = TritonEngine(given["network"], bundle.manifest, int(given["max_batch"]))
        self.generator = Generator(bundle, engine, given["variant"])
        self.max_images = int(given["max_images"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """A response to each request, in their order."""
        return [self._answer(request) for request in requests]

    def finalize(self) -> None:
        """Triton unloads the model."""
        self.generator.close()

    def _answer(self, request: Any) -> Any:
        backend = triton()
        try:
            arguments = _arguments(request)
            if arguments["n"] > self.max_images:
                raise ConfigError(
                    f"n must be at most {self.max_images} in one request; got {arguments['n']}: ask"
                    " for others by first"
                )
            result = self.generator.run(**arguments, callback=lambda _: request.is_cancelled())
        except (DdpmEdgeError, MemoryError) as error:
            failed = backend.TritonError(str(error) or "not enough memory")
            return backend.InferenceResponse(output_tensors=[], error=failed)
        outputs = {
            "images": result.images,
            "seed": np.array([result.seed], np.uint64),
            "milliseconds": np.array([result.milliseconds], np.float32),
            "stopped": np.array([result.stopped], np.uint8),
        }
        tensors = [backend.Tensor(name, array) for name, array in outputs.items()]
        return backend.InferenceResponse(output_tensors=tensors)


def _arguments(request: Any) -> dict[str, Any]:
    """The inputs of a request as `Generator.run` takes them."""
    backend = triton()
    found: dict[str, Any] = {}
    for name in (*ONE, *EACH):
        tensor = backend.get_input_tensor_by_name(request, name)
        if tensor is None:
            continue
        values = [
            v.decode(errors="replace") if isinstance(v, bytes) else v
            for v in tensor.as_numpy().tolist()
        ]
        found[name] = values[0] if name in ONE or len(values) == 1 else values
    return found
