"""A bundle as a model repository of NVIDIA Triton.

    REPOSITORY/
        NAME-network/           the network, whose batches Triton makes of what all loops ask
            config.pbtxt
            1/model.onnx        or model.plan, an engine that `ddpm-edge build -o` wrote
        NAME/                   the sampling loop, a model of the Python backend
            config.pbtxt
            1/model.py          ddpm_edge.serving
            1/bundle/           for the manifest: schedule, plan, labels

Needs neither torch nor onnx.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ddpm_edge import checks
from ddpm_edge.build import BuildOptions
from ddpm_edge.bundle import Bundle, write_bundle
from ddpm_edge.errors import ConfigError
from ddpm_edge.files import (
    check_writable,
    replace_directory,
    sync_directory,
    temporary_name,
    write_bytes,
)
from ddpm_edge.manifest import Manifest

LOOPS = 4  # that run at once, a process each
MAX_IMAGES = 256  # of a request, whose answer must fit into shared memory
MARK = "# ddpm-edge: the {}\n"  # by which a model is known as one that may be replaced
MODEL = """from ddpm_edge.serving import TritonPythonModel

__all__ = ["TritonPythonModel"]
"""
MOST_BATCH, MOST_IMAGES = 1024, 100_000
TYPES = {
    "float32": "TYPE_FP32", "int64": "TYPE_INT64", "uint64": "TYPE_UINT64", "uint8": "TYPE_UINT8",
    "str": "TYPE_STRING",
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
    inputs = [
        Tensor(name, dtype, shape or (1,), scalar=not shape)
        for name, (dtype, shape) in manifest.inputs.items()
    ]
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
    max_batch: int | None = None,
    loops: int = LOOPS,
    max_images: int = MAX_IMAGES,
) -> str:
    """Write the two models of a bundle into a model repository.

    Args:
        bundle: the bundle.
        path: the repository, which is made. What this function wrote under these names is
            replaced, other models stay.
        variant: precision of the network; None = fp32.
        name: of the loop; None = the bundle's name.
        engine: a file that `ddpm-edge build -o` wrote, for the TensorRT backend of the same
            TensorRT on the same GPU; None = the ONNX Runtime backend.
        max_batch: images of one evaluation, twice as many for the network where guidance can ask
            twice; of an engine, no more than it was built for. None = what `build` takes.
        loops: that run at once.
        max_images: of one request.

    Returns:
        The name of the loop.

    Raises:
        ConfigError: an argument that cannot work, or a name that another model has.
        BundleError: no such variant, or a changed file.
        OSError: it cannot be written.
    """
    manifest, path = bundle.manifest, Path(path)
    name = _model_name(manifest.name if name is None else name)
    network = f"{name}-network"
    options = BuildOptions() if max_batch is None else BuildOptions(max_batch)
    most = options.profile(manifest).most
    loops = checks.whole("loops", loops, most=MOST_BATCH)
    max_images = checks.whole("max_images", max_images, most=MOST_IMAGES)
    variant, model = bundle.model(variant)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file; a model repository is a directory")
    backend, file = "onnxruntime", "model.onnx"
    if engine is not None:
        backend, file, model = "tensorrt", "model.plan", Path(engine).read_bytes()
    parameters = {
        "network": network, "variant": variant, "max_batch": most, "max_images": max_images,
    }  # fmt: skip
    more = [f"instance_group [ {{ kind: KIND_CPU count: {loops} }} ]"]
    more += [
        f'parameters {{ key: "{k}" value {{ string_value: {json.dumps(str(v))} }} }}'
        for k, v in parameters.items()
    ]
    configs = {
        network: MARK.format("network")
        + config(network, backend, *network_tensors(manifest), most, ["dynamic_batching { }"]),
        name: MARK.format("loop") + config(name, "python", *loop_tensors(manifest), 0, more),
    }
    for model_name, text in configs.items():
        _check_place(path / model_name, text.partition("\n")[0])
    check_writable(path)
    path.mkdir(parents=True, exist_ok=True)
    # Beside the repository: Triton takes every directory in it for a model.
    temporary = temporary_name(path.absolute())
    try:
        for model_name, text in configs.items():
            (temporary / model_name / "1").mkdir(parents=True)
            write_bytes(temporary / model_name / "config.pbtxt", text.encode())
        write_bytes(temporary / network / "1" / file, model)
        write_bytes(temporary / name / "1" / "model.py", MODEL.encode())
        content = {entry: bundle.read(entry) for entry in bundle.files}
        write_bundle(temporary / name / "1" / "bundle", manifest, content)
        for model_name in configs:
            replace_directory(temporary / model_name, path / model_name)
        sync_directory(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return name


def config(
    name: str,
    backend: str,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    max_batch: int,
    more: Sequence[str],
) -> str:
    """A `config.pbtxt`: Triton's ModelConfig as text."""
    lines = [f"name: {json.dumps(name)}", f'backend: "{backend}"', f"max_batch_size: {max_batch}"]
    for kind, tensors in (("input", inputs), ("output", outputs)):
        lines += [f"{kind} {{ {' '.join(_fields(tensor))} }}" for tensor in tensors]
    return "\n".join([*lines, *more]) + "\n"


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


def _check_place(folder: Path, mark: str) -> None:
    """Raise ConfigError if something else than such a model of ours would be replaced."""
    if not folder.exists():
        return
    config = folder / "config.pbtxt"
    if not config.is_file() or not config.read_bytes().startswith(mark.encode()):
        raise ConfigError(f"{folder} exists and is none of this command; give another name")
