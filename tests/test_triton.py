"""A Triton model repository: Triton's own protobuf, and the loop in a stand-in of its backend."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import TINY, tiny_model

from ddpm_edge import Bundle, Generator
from ddpm_edge.build import BuildOptions
from ddpm_edge.bundle import write_bundle
from ddpm_edge.cli import main
from ddpm_edge.errors import BundleError, ConfigError, EngineError
from ddpm_edge.export.to_triton import loop_tensors, network_tensors, write_repository
from ddpm_edge.runtimes import open_engine
from ddpm_edge.serving import TritonEngine

NUMPY = {"TYPE_FP32": np.float32, "TYPE_INT64": np.int64, "TYPE_UINT64": np.uint64,
         "TYPE_UINT8": np.uint8, "TYPE_STRING": np.object_}  # fmt: skip


def parsed(path: Path) -> Any:
    """A config.pbtxt as Triton reads it."""
    text_format = pytest.importorskip("google.protobuf.text_format")
    found = importlib.util.find_spec("tritonclient")
    if found is None:
        pytest.skip("tritonclient is not installed")
    (folder,) = found.submodule_search_locations or ()
    # Not by its package, which imports grpc.
    file = Path(folder) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", file)
    assert spec is not None
    module = sys.modules.get("model_config_pb2") or importlib.util.module_from_spec(spec)
    if "model_config_pb2" not in sys.modules:
        assert spec.loader is not None
        spec.loader.exec_module(module)
        sys.modules["model_config_pb2"] = module
    return text_format.Parse(path.read_text(), module.ModelConfig())


# A stand-in of Triton with a model repository


@dataclass
class Tensor:
    tensor_name: str
    values: np.ndarray

    def as_numpy(self) -> np.ndarray:
        return self.values


@dataclass
class Response:
    output_tensors: list[Tensor] = field(default_factory=list)
    failed: Any = None

    def has_error(self) -> bool:
        return self.failed is not None

    def error(self) -> Any:
        return self.failed


class Triton:
    """Serves what lies in a repository, and checks requests against the configs as Triton does."""

    def __init__(self, repository: Path) -> None:
        self.configs = {
            path.parent.name: parsed(path) for path in sorted(repository.glob("*/config.pbtxt"))
        }
        self.engines = {
            path.parents[1].name: open_engine(path, "onnxruntime", "cpu")
            for path in repository.glob("*/1/model.onnx")
        }
        self.asked: list[int] = []
        self.broken, self.unloaded = "", False

    def module(self) -> ModuleType:
        """Its triton_python_backend_utils."""
        server = self

        class InferenceRequest:
            def __init__(self, **given: Any) -> None:
                assert given.keys() == {
                    "model_name", "requested_output_names", "inputs", "preferred_memory",
                }  # fmt: skip
                assert given["preferred_memory"] == ("memory", "cpu")
                self.given = given

            def exec(self) -> Response:
                if server.unloaded:
                    raise utils.TritonModelException("is not ready")
                return server.infer(self.given["model_name"], self.given["inputs"])

        utils: Any = ModuleType("triton_python_backend_utils")
        utils.Tensor, utils.InferenceRequest = Tensor, InferenceRequest
        utils.TRITONSERVER_MEMORY_CPU = "cpu"
        utils.PreferredMemory = lambda kind: ("memory", kind)
        utils.TritonModelException = type("TritonModelException", (Exception,), {})
        utils.TritonError = lambda text: SimpleNamespace(message=lambda: text)
        utils.InferenceResponse = lambda output_tensors, error=None: Response(output_tensors, error)
        utils.get_input_tensor_by_name = lambda request, name: request.tensors.get(name)
        utils.get_output_tensor_by_name = lambda response, name: next(
            t for t in response.output_tensors if t.tensor_name == name
        )
        return utils  # type: ignore[no-any-return]

    def infer(self, name: str, tensors: list[Tensor]) -> Response:
        """The network's answer: shapes as the config has them outside, and the model inside."""
        config = self.configs[name]
        if self.broken:
            return Response(failed=SimpleNamespace(message=lambda: self.broken))
        given = {t.tensor_name: t.values for t in tensors}
        assert given.keys() == {entry.name for entry in config.input}
        batch = len(given["x"])
        assert 1 <= batch <= config.max_batch_size
        self.asked.append(batch)
        arrays = {}
        for entry in config.input:
            array = given[entry.name]
            check(array, entry, batch, config)
            inner = list(entry.reshape.shape) if entry.HasField("reshape") else list(entry.dims)
            arrays[entry.name] = array.reshape(batch, *inner)
        answer = self.engines[name](arrays)["prediction"]
        answer.flags.writeable = False  # the server's own memory
        return Response([Tensor("prediction", answer)])


def check(array: np.ndarray, entry: Any, batch: int | None, config: Any) -> None:
    """What Triton refuses: another type, another shape."""
    kind = type(config).DESCRIPTOR.fields_by_name["input"].message_type.fields_by_name["data_type"]
    name = kind.enum_type.values_by_number[entry.data_type].name
    assert array.dtype == NUMPY[name], entry.name
    assert array.flags.c_contiguous
    dims = ([] if batch is None else [batch]) + list(entry.dims)
    assert len(array.shape) == len(dims), entry.name
    assert all(want in (-1, got) for want, got in zip(dims, array.shape, strict=True)), entry.name


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("triton") / "repository"
    assert write_repository(Bundle.open(), path) == "fashion-mnist"
    return path


@pytest.fixture
def triton(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Triton:
    pytest.importorskip("onnxruntime")
    server = Triton(repository)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", server.module())
    return server


@pytest.fixture
def loop(triton: Triton, repository: Path) -> Iterator[Any]:
    """The Python model, loaded from its file as Triton does."""
    from google.protobuf import json_format

    folder = repository / "fashion-mnist"
    spec = importlib.util.spec_from_file_location("model", folder / "1" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    config = json_format.MessageToJson(
        triton.configs["fashion-mnist"], preserving_proto_field_name=True
    )
    model.initialize(
        {"model_config": config, "model_repository": str(folder), "model_version": "1"}
    )
    yield model
    model.finalize()


@dataclass
class Request:
    tensors: dict[str, Tensor]
    cancelled: bool = False

    def is_cancelled(self) -> bool:
        return self.cancelled


def request(triton: Triton, **inputs: Any) -> Request:
    """A request, if Triton would let it through."""
    config = triton.configs["fashion-mnist"]
    entries = {entry.name: entry for entry in config.input}
    for name, entry in entries.items():
        assert entry.optional or name in inputs
    for name, array in inputs.items():
        check(array, entries[name], None, config)
    return Request({name: Tensor(name, array) for name, array in inputs.items()})


def answered(triton: Triton, response: Response) -> dict[str, np.ndarray]:
    assert not response.has_error(), response.error().message()
    config = triton.configs["fashion-mnist"]
    found = {tensor.tensor_name: tensor.as_numpy() for tensor in response.output_tensors}
    assert [entry.name for entry in config.output] == [*found]
    for entry in config.output:
        check(found[entry.name], entry, None, config)
    return found


# The repository


def test_configs_are_what_triton_reads(repository: Path) -> None:
    network = parsed(repository / "fashion-mnist-network" / "config.pbtxt")
    assert (network.name, network.backend) == ("fashion-mnist-network", "onnxruntime")
    assert network.max_batch_size == 32
    assert network.HasField("dynamic_batching")
    loop = parsed(repository / "fashion-mnist" / "config.pbtxt")
    assert (loop.name, loop.backend, loop.max_batch_size) == ("fashion-mnist", "python", 0)
    assert loop.instance_group[0].count == 4
    assert loop.parameters["network"].string_value == network.name
    files = sorted(str(p.relative_to(repository)) for p in repository.rglob("*") if p.is_file())
    assert files == [
        "fashion-mnist-network/1/model.onnx", "fashion-mnist-network/config.pbtxt",
        "fashion-mnist/1/bundle/bundle.json", "fashion-mnist/1/bundle/reference.npz",
        "fashion-mnist/1/bundle/unet.onnx", "fashion-mnist/1/model.py",
        "fashion-mnist/config.pbtxt",
    ]  # fmt: skip
    assert Bundle.open(repository / "fashion-mnist" / "1" / "bundle").digest == Bundle.open().digest


def test_the_network_s_tensors_are_the_model_s(repository: Path) -> None:
    pytest.importorskip("onnxruntime")
    config = parsed(repository / "fashion-mnist-network" / "config.pbtxt")
    with open_engine(repository / "fashion-mnist-network" / "1" / "model.onnx") as engine:
        for entries, specs in ((config.input, engine.inputs), (config.output, engine.outputs)):
            assert {entry.name for entry in entries} == specs.keys()
            for entry in entries:
                inner = entry.reshape.shape if entry.HasField("reshape") else entry.dims
                assert specs[entry.name].shape == (None, *inner)
                assert len(entry.dims) >= 1  # Triton knows no empty shape


def test_a_model_without_labels() -> None:
    plain = replace(TINY, class_names=(), has_null_label=False)
    assert [tensor.name for tensor in network_tensors(plain)[0]] == ["x", "t"]
    assert not {"label", "guidance"} & {tensor.name for tensor in loop_tensors(plain)[0]}


# The loop


def test_it_makes_the_images_that_the_sdk_makes(loop: Any, triton: Triton) -> None:
    labels = np.arange(5)
    call = {"n": np.array([5]), "seed": np.array([7], np.uint64), "label": labels,
            "first": np.array([3]), "guidance": np.array([2.0], np.float32),
            "steps": np.array([4]), "sampler": np.array([b"ddim"], np.object_)}  # fmt: skip
    plain = {"n": np.array([2]), "steps": np.array([3]), "seed": np.array([2**64 - 1], np.uint64)}
    made, others = loop.execute([request(triton, **call), request(triton, **plain)])
    found = answered(triton, made)
    with Generator.load(runtime="onnxruntime", device="cpu") as generator:
        expected = generator.sample(
            5, seed=7, label=labels.tolist(), first=3, guidance=2.0, steps=4, sampler="ddim"
        )
        more = generator.sample(2, seed=2**64 - 1, steps=3)
    assert np.abs(found["images"].astype(int) - expected).max() <= 1  # rounding to a grey level
    assert (found["seed"][0], found["stopped"][0]) == (7, 0)
    assert found["milliseconds"][0] > 0
    assert np.abs(answered(triton, others)["images"].astype(int) - more).max() <= 1
    assert triton.asked == [10] * 4 + [2] * 3  # with guidance twice


def test_what_is_too_much_at_once_is_asked_in_parts(loop: Any, triton: Triton) -> None:
    big = {"n": np.array([40]), "steps": np.array([1]), "label": np.array([1]),
           "guidance": np.array([2.0], np.float32)}  # fmt: skip
    (made,) = loop.execute([request(triton, **big)])
    assert answered(triton, made)["images"].shape == (40, 28, 28, 1)
    assert triton.asked == [32, 32, 16]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"n": np.array([0])}, "n must be a whole number >= 1; got 0"),
        ({"n": np.array([257])}, "n must be at most 256 in one request; got 257"),
        ({"n": np.array([2**62])}, "n must be at most 256"),
        ({"sampler": np.array([b"dimm"], np.object_)}, "did you mean 'ddim'"),
        ({"sampler": np.array([b"\xff"], np.object_)}, "sampler must be one of"),
        ({"label": np.array([11])}, "no label 11"),
        ({"label": np.array([1, 2, 3])}, "got 3 labels for n = 2"),
        ({"deadline_ms": np.array([np.nan], np.float32)}, "deadline_ms must be"),
        ({"budget_ms": np.array([1e-3], np.float32)}, "budget_ms 0.001 is too little"),
    ],
)
def test_a_request_that_cannot_work_is_answered(
    loop: Any, triton: Triton, inputs: dict[str, np.ndarray], message: str
) -> None:
    bad = request(triton, **{"n": np.array([2])} | inputs)
    good = request(triton, n=np.array([1]), steps=np.array([1]))
    refused, made = loop.execute([bad, good])
    assert message in refused.error().message()
    assert len(answered(triton, made)["images"]) == 1


def test_a_network_that_fails(loop: Any, triton: Triton) -> None:
    triton.broken = "out of GPU memory"
    (refused,) = loop.execute([request(triton, n=np.array([1]))])
    text = refused.error().message()
    assert text == "fashion-mnist-network failed: out of GPU memory"
    triton.broken, triton.unloaded = "", True
    (refused,) = loop.execute([request(triton, n=np.array([1]))])
    assert refused.error().message() == "fashion-mnist-network failed: is not ready"
    triton.unloaded = False
    (made,) = loop.execute([request(triton, n=np.array([1]), steps=np.array([1]))])
    answered(triton, made)


def test_a_request_that_was_cancelled_stops(loop: Any, triton: Triton) -> None:
    gone = request(triton, n=np.array([1]))
    gone.cancelled = True
    (made,) = loop.execute([gone])
    assert answered(triton, made)["stopped"][0] == 1
    assert triton.asked == [1]


def test_requests_at_different_steps_share_a_batch(triton: Triton) -> None:
    # What Triton's batcher does: the rows of two requests in one evaluation.
    engine = triton.engines["fashion-mnist-network"]
    rng = np.random.default_rng(0)
    asked = [
        {"x": rng.standard_normal((n, 1, 28, 28)).astype(np.float32),
         "t": rng.integers(0, 1000, n), "label": rng.integers(0, 11, n)}
        for n in (1, 3)
    ]  # fmt: skip
    joined = engine({name: np.concatenate([a[name] for a in asked]) for name in asked[0]})
    alone = np.concatenate([engine(a)["prediction"] for a in asked])
    np.testing.assert_allclose(joined["prediction"], alone, atol=1e-5)


def test_the_engine_checks_what_it_is_asked(triton: Triton) -> None:
    with TritonEngine("fashion-mnist-network", Bundle.open().manifest, 2) as engine:
        assert triton.asked == []
        x, number = np.zeros((3, 1, 28, 28), np.float32), np.zeros(3, np.int64)
        with pytest.raises(EngineError, match="takes 2 at once; got 3"):
            engine({"x": x, "t": number, "label": number})
        with pytest.raises(EngineError, match="the model takes inputs x, t, label"):
            engine({"x": x, "t": number})
        answer = engine({"x": x[:2], "t": number[:2], "label": number[:2]})["prediction"]
        answer += 1  # the caller's to keep


# Writing it


def test_what_is_there_is_replaced_or_left_alone(tmp_path: Path) -> None:
    bundle, repository = Bundle.open(), tmp_path / "repo"
    (repository / "other" / "1").mkdir(parents=True)
    (repository / "resnet").mkdir()
    (repository / "resnet" / "config.pbtxt").write_text('name: "resnet"')
    write_repository(bundle, repository, max_batch=8)
    write_repository(bundle, repository, max_batch=4, name="second", loops=2)
    write_repository(bundle, repository, max_batch=16)
    config = parsed(repository / "fashion-mnist-network" / "config.pbtxt")
    assert config.max_batch_size == 32  # guidance asks about each twice
    names = [
        "fashion-mnist", "fashion-mnist-network", "other", "resnet", "second", "second-network",
    ]  # fmt: skip
    for name in ("other", "resnet", "fashion-mnist-network"):
        with pytest.raises(ConfigError, match=f"{name} exists and is none of this command; give"):
            write_repository(bundle, repository, name=name)
    assert sorted(p.name for p in repository.iterdir()) == names
    assert [p.name for p in tmp_path.iterdir()] == ["repo"]


def test_the_batch_is_what_build_takes(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    files = {"unet.onnx": tiny_model().SerializeToString()}
    assert onnx
    for has, most in ((True, 32), (False, 16)):  # without a null label nobody asks twice
        manifest = replace(TINY, has_null_label=has)
        bundle = write_bundle(tmp_path / "bundle", manifest, files)
        write_repository(bundle, tmp_path / "repo")
        text = (tmp_path / "repo" / "tiny-network" / "config.pbtxt").read_text()
        assert f"max_batch_size: {most}\n" in text
        assert BuildOptions().profile(manifest).most == most


def test_an_engine_in_the_place_of_onnx(tmp_path: Path) -> None:
    (tmp_path / "a.plan").write_bytes(b"an engine")
    write_repository(Bundle.open(), tmp_path / "repo", engine=tmp_path / "a.plan")
    config = parsed(tmp_path / "repo" / "fashion-mnist-network" / "config.pbtxt")
    assert config.backend == "tensorrt"
    folder = tmp_path / "repo" / "fashion-mnist-network" / "1"
    assert [p.name for p in folder.iterdir()] == ["model.plan"]
    assert (folder / "model.plan").read_bytes() == b"an engine"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "a/b"}, ConfigError, "letters, digits and _ . -; got 'a/b'"),
        ({"name": "../x"}, ConfigError, "letters, digits"),
        ({"max_batch": 0}, ConfigError, "max_batch must be a whole number >= 1"),
        ({"max_images": 0}, ConfigError, "max_images must be"),
        ({"loops": 0}, ConfigError, "loops must be"),
        ({"variant": "fp16"}, BundleError, "has no variant 'fp16'; its variants are fp32"),
    ],
)
def test_bad_arguments(
    tmp_path: Path, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        write_repository(Bundle.open(), tmp_path / "repo", **arguments)
    assert not (tmp_path / "repo").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file is a file"):
        write_repository(Bundle.open(), tmp_path / "file")


def test_a_name_that_is_text_in_a_config(tmp_path: Path) -> None:
    built_in = Bundle.open()
    files = {name: built_in.read(name) for name in built_in.files}
    named = write_bundle(tmp_path / "b", replace(built_in.manifest, name='a" b'), files)
    with pytest.raises(ConfigError, match="give another name"):
        write_repository(named, tmp_path / "repo")


def test_command(tmp_path: Path) -> None:
    def run(*arguments: object, code: int = 0) -> str:
        words = ["export", *map(str, arguments), "-o", str(tmp_path / "repo")]
        result = CliRunner().invoke(main, words)
        assert result.exit_code == code, result.output
        return result.output

    said = run("--format", "triton", "--max-batch", 8)
    assert "fashion-mnist, the sampling loop, and fashion-mnist-network" in said
    assert "Next: tritonserver --model-repository=" in said
    (tmp_path / "a.plan").write_bytes(b"an engine")
    run("--format", "triton", "--name", "fast", "--engine", tmp_path / "a.plan")
    assert (tmp_path / "repo" / "fast-network" / "1" / "model.plan").is_file()
    assert "--gate cannot go with" in run("--format", "triton", "--gate", "full", code=2)
    said = run("--format", "triton", "--variants", "fp32,fp16", code=2)
    assert "takes one of the variants; got fp32,fp16" in said
    assert "has no variant 'int8'" in run("--format", "triton", "--variants", "int8", code=1)
    assert "--max-batch go" in run("runs/none", "--max-batch", 3, code=2)
    assert "no bundle at" in run("runs/none", "--format", "triton", code=1)
