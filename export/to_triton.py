"""A bundle as a model repository of NVIDIA Triton; needs neither torch nor onnx.

REPOSITORY/
NAME-network/           the network, whose batches Triton makes of what all loops ask at once
config.pbtxt
1/model.onnx        or model.plan, an engine that `ddpm-edge build -o` wrote
NAME/                   the sampling loop, a model of the Python backend
config.pbtxt
1/model.py          ddpm_edge.serving
1/bundle/           for the manifest: schedule, plan, labels
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ddpm_edge import checks
from ddpm_edge.bundle import Bundle, write_bundle
from ddpm_edge.errors import ConfigError
from ddpm_edge.files import check_writable, replace_directory, temporary_name, write_bytes
from ddpm_edge.manifest import Manifest

LOOPS = 4  # that run at once, a process each
QUEUE_US = 500  # how long the network's batcher waits for another loop
MODEL = """from ddpm_edge.serving import TritonPythonModel

__all__ = ["TritonPythonModel"]
"""
MOST_BATCH = 1024
TYPES = {
    "float32": "TYPE_FP32", "int32": "TYPE_INT32", "int64": "TYPE_INT64", "uint64": "TYPE_UINT64",
    "uint8": "TYPE_UINT8", "str": "TYPE_STRING",
}  # fmt: skip


class Tensor(NamedTuple):
    """An input or output of a model in Triton, without the batch.

    Attributes:
        name: of it.
        dtype: NumPy's name; "str" for text.
        dims: -1 = any.
        optional: whether a request may leave it out.
        scalar: whether the model takes (B,) where Triton, which knows no empty shape, has (B, 1).
    """

    name: str
    dtype: str
    dims: tuple[int, ...]
    optional: bool = False
    scalar: bool = False


def network_tensors(manifest: Manifest) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and outputs of a bundle's network."""
    numbers = ["t", *(["label"] if manifest.class_names else [])]
    inputs = [Tensor("x", "float32", manifest.sample_shape)]
    inputs += [Tensor(name, "int64", (1,), scalar=True) for name in numbers]
    return inputs, [Tensor("prediction", "float32", manifest.sample_shape)]


def loop_tensors(manifest: Manifest) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and outputs of the loop: what `Generator.run` takes and gives, one call a request."""
    channels, height, width = manifest.sample_shape
    inputs = [Tensor("n", "int64", (1,))]
    optional = {"seed": "uint64", "first": "int64", "steps": "int64", "sampler": "str",
                "deadline_ms": "float32", "budget_ms": "float32"}  # fmt: skip
    inputs += [Tensor(name, dtype, (1,), optional=True) for name, dtype in optional.items()]
    if manifest.class_names:
        inputs += [Tensor("label", "int64", (-1,), optional=True)]
        inputs += [Tensor("guidance", "float32", (-1,), optional=True)]
    outputs = [
        Tensor("images", "uint8", (-1, height, width, channels)),
        Tensor("seed", "uint64", (1,)),
        Tensor("milliseconds", "float32", (1,)),
        Tensor("stopped", "uint8", (1,)),
    ]
    return inputs, outputs


def write_repository(
    bundle: Bundle,
    path: str | Path,
    *,
    variant: str | None = None,
    name: str | None = None,
    engine: str | Path | None = None,
    max_batch: int = 32,
    loops: int = LOOPS,
) -> str:
    """Write the two models of a bundle into a model repository; other models there stay.

    Args:
        bundle: the bundle.
        path: the repository, which is made; models of these names are replaced.
        variant: precision of the network; None = fp32.
        name: of the loop; None = the bundle's name.
        engine: a file that `ddpm-edge build -o` wrote, for the TensorRT backend of the same
            TensorRT on the same GPU; None = the ONNX Runtime backend.
        max_batch: of the network, guidance asks about each sample twice; of an engine, no more than
            it was built for.
        loops: that run at once.

    Returns:
        The name of the loop.

    Raises:
        ConfigError: an argument that cannot work.
        BundleError: no such variant, or a changed file.
        OSError: it cannot be written.
    """
    manifest, path = bundle.manifest, Path(path)
    name = _model_name(manifest.name if name is None else name)
    max_batch = checks.whole("max_batch", max_batch, most=MOST_BATCH)
    loops = checks.whole("loops", loops, most=MOST_BATCH)
    variant, model = bundle.model(variant)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file; a model repository is a directory")
    check_writable(path)
    file = "model.onnx"
    if engine is not None:
        file, model = "model.plan", Path(engine).read_bytes()
    network = f"{name}-network"
    backend = "onnxruntime" if engine is None else "tensorrt"
    path.mkdir(parents=True, exist_ok=True)
    _write(
        path / network,
        config(
            network, backend, *network_tensors(manifest), max_batch=max_batch,
            more=f"dynamic_batching {{ max_queue_delay_microseconds: {QUEUE_US} }}",
        ),
        {file: model},
    )  # fmt: skip
    parameters = {"network": network, "variant": variant, "max_batch": str(max_batch)}
    more = [f"instance_group [ {{ kind: KIND_CPU count: {loops} }} ]"]
    more += [
        f"parameters {{ key: {json.dumps(k)} value {{ string_value: {json.dumps(v)} }} }}"
        for k, v in parameters.items()
    ]
    _write(
        path / name,
        config(name, "python", *loop_tensors(manifest), max_batch=0, more="\n".join(more)),
        {"model.py": MODEL.encode()},
        bundle,
    )
    return name


def config(
    name: str,
    backend: str,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    *,
    max_batch: int,
    more: str,
) -> str:
    """A `config.pbtxt`: Triton's ModelConfig as text."""
    lines = [f"name: {json.dumps(name)}", f'backend: "{backend}"', f"max_batch_size: {max_batch}"]
    for kind, tensors in (("input", inputs), ("output", outputs)):
        lines += [f"{kind} {{ {' '.join(_fields(tensor))} }}" for tensor in tensors]
    return "\n".join([*lines, more]) + "\n"


def _fields(tensor: Tensor) -> list[str]:
    fields = [f'name: "{tensor.name}"', f"data_type: {TYPES[tensor.dtype]}"]
    fields += [f"dims: {list(tensor.dims)}"]
    fields += ["reshape { shape: [ ] }"] if tensor.scalar else []
    return fields + (["optional: true"] if tensor.optional else [])


def _model_name(name: str) -> str:
    """A name that is a directory, part of a URL, and text in a config."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", str(name)):
        raise ConfigError(
            f"a model's name in Triton must be letters, digits and _ . -; got {checks.shown(name)}:"
            " give another name"
        )
    return name


def _write(
    folder: Path, text: str, files: Mapping[str, bytes], bundle: Bundle | None = None
) -> None:
    """Write a model, or replace it: its directory appears when it is whole."""
    if folder.exists() and not (folder / "config.pbtxt").is_file():
        raise ConfigError(f"{folder} exists and is no model of Triton's; give another name")
    temporary = temporary_name(folder)
    (temporary / "1").mkdir(parents=True)
    try:
        write_bytes(temporary / "config.pbtxt", text.encode())
        for name, data in files.items():
            write_bytes(temporary / "1" / name, data)
        if bundle is not None:
            content = {name: bundle.read(name) for name in bundle.files}
            write_bundle(temporary / "1" / "bundle", bundle.manifest, content)
        replace_directory(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
