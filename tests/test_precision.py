"""Half precision: the graph pass against NumPy's and torch's own, the gate, the ladder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")
ort = pytest.importorskip("onnxruntime")
from torch import nn

from ddpm_edge import Bundle, Generator
from ddpm_edge.cli import main
from ddpm_edge.errors import BundleError, ConfigError, EngineError
from ddpm_edge.export import export, export_bundle
from ddpm_edge.export.precision import half_nodes, layers, rounded, to_half
from ddpm_edge.export.to_onnx import onnx_model
from ddpm_edge.onnx_check import check_model
from ddpm_edge.reference import HALF_TOLERANCE, ROUNDING, Comparison
from ddpm_edge.schedule import Schedule

FLOAT, INT64, FLOAT16, BFLOAT16 = 1, 7, 10, 16
KIND = {"fp16": FLOAT16, "bf16": BFLOAT16}
TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16}
SHAPE = (3, 8, 8)


def graph(*nodes: Any, constants: dict[str, np.ndarray] | None = None, size: tuple = (2, 4)) -> Any:
    """x -> prediction by these nodes."""
    value = onnx.helper.make_tensor_value_info
    model = onnx.helper.make_graph(
        list(nodes), "g", [value("x", FLOAT, ["batch", *size])],
        [value("prediction", FLOAT, ["batch", *size])],
        [onnx.numpy_helper.from_array(v, k) for k, v in (constants or {}).items()],
    )  # fmt: skip
    return onnx.helper.make_model(
        model, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10
    )


def node(kind: str, *names: str, **attributes: Any) -> Any:
    """A node; the last name is its output."""
    return onnx.helper.make_node(kind, names[:-1], names[-1:], name=names[-1], **attributes)


def compute(model: Any, **feed: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options).run(None, feed)[0]


def half_of(model: Any, precision: str, x: np.ndarray) -> np.ndarray:
    """The model in half precision, computed for real."""
    return compute(rounded(to_half(model, precision), precision), x=x)


def types(model: Any) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    return {v.name: v.type.tensor_type.elem_type for v in values} | {
        c.name: c.data_type for c in inferred.initializer
    }


@pytest.fixture(scope="module")
def builtin() -> Any:
    return onnx.load_from_string(Bundle.open().model("fp32")[1])


# The graph


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_what_is_computed_in_which_type(builtin: Any, precision: str) -> None:
    model = to_half(builtin, precision)
    onnx.checker.check_model(model, full_check=True)
    check_model(model.SerializeToString(), Bundle.open().manifest)
    kind = types(model)
    assert {v.name: kind[v.name] for v in (*model.graph.input, *model.graph.output)} == {
        "x": FLOAT, "t": INT64, "label": INT64, "prediction": FLOAT,
    }  # fmt: skip
    seen = set()
    for n in model.graph.node:
        operands = {kind[name] for name in (*n.input, *n.output) if name} - {INT64}
        if n.op_type in ("InstanceNormalization", "Softmax", "Sin", "Cos"):
            assert operands == {FLOAT}, n.name
        elif n.op_type in ("Conv", "MatMul", "Sigmoid") and n.input[0] != "linear":
            half = operands == {KIND[precision]}
            assert half or n.name.startswith("node_Sigmoid"), n.name  # those of the time embedding
            seen.add(n.op_type) if half else None
    assert seen == {"Conv", "MatMul", "Sigmoid"}
    before = sum(len(c.raw_data) for c in builtin.graph.initializer)
    assert sum(len(c.raw_data) for c in model.graph.initializer) < 0.6 * before


def test_the_time_embedding_stays(builtin: Any) -> None:
    """A time angle of up to 1000 would be wrong by 0.45 in fp16."""
    after_x, kind = {"x"}, types(to_half(builtin, "fp16"))
    model = to_half(builtin, "fp16")
    for n in model.graph.node:
        if not after_x.isdisjoint(n.input):
            after_x |= set(n.output)
        elif n.op_type != "Cast":  # into the network
            assert FLOAT16 not in {kind[name] for name in n.output}, n.name


def test_the_model_given_is_left_alone(builtin: Any) -> None:
    before = builtin.SerializeToString()
    to_half(builtin, "fp16")
    rounded(to_half(builtin, "fp16"), "fp16")
    assert builtin.SerializeToString() == before


def test_kept_nodes_stay(builtin: Any) -> None:
    convolution = next(n for n, name in layers(builtin) if name == "network.down.1")
    assert convolution.output[0] in half_nodes(builtin)
    model = to_half(builtin, "fp16", [convolution.output[0]])
    onnx.checker.check_model(model, full_check=True)
    (same,) = (n for n in model.graph.node if n.name == convolution.name)
    assert {types(model)[name] for name in (*same.input, *same.output)} == {FLOAT}


class RMSNorm(nn.Module):
    """x over its root mean square, as people write it."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(dim=(1, 2, 3), keepdim=True) + 1e-8)


class VarNorm(nn.Module):
    """Group normalisation by hand."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        variance = ((x - mean) * (x - mean)).mean(dim=(1, 2, 3), keepdim=True)
        return (x - mean) / torch.sqrt(variance + 1e-8)


class GroupRMS(nn.Module):
    """Squares that are moved before they are summed."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        squares = (x * x).reshape(len(x), 1, -1)
        return x * torch.rsqrt(squares.mean(dim=2, keepdim=True) + 1e-8)[..., None]


class Unit(nn.Module):
    """F.normalize, whose lower limit of 1e-12 is 0 in fp16."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(torch.relu(x), dim=1)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 3e3])
@pytest.mark.parametrize(
    "network", [RMSNorm(), VarNorm(), GroupRMS(), Unit()], ids=lambda n: type(n).__name__
)
def test_statistics_stay_in_float32(network: nn.Module, scale: float, precision: str) -> None:
    """A mean of squares is beyond fp16 from 256 on, and its eps below it."""
    x = scale * np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)
    x[:, :, 0] = 0
    model = onnx_model(network, {"x": x, "t": np.ones(2, np.int64)}, ["prediction"])
    feed = {v.name: {"x": x, "t": np.ones(2, np.int64)}[v.name] for v in model.graph.input}
    exact = compute(model, **feed)
    ours = compute(rounded(to_half(model, precision), precision), **feed)
    assert np.isfinite(exact).all()
    error = np.sqrt(np.mean((ours - exact) ** 2) / np.mean(exact**2))
    assert error < 3 * ROUNDING[precision]  # x, the statistics' root and their product, each once


def test_a_result_that_is_used_again() -> None:
    model = graph(
        node("Add", "x", "x", "prediction"), node("Mul", "prediction", "prediction", "unused"),
    )  # fmt: skip
    half = to_half(model, "fp16")
    onnx.checker.check_model(half, full_check=True)
    np.testing.assert_array_equal(half_of(model, "fp16", np.ones((1, 2, 4), np.float32)), 2.0)


def test_other_domains_keep_their_operator_set() -> None:
    model = graph(node("Add", "x", "x", "prediction"))
    model.opset_import.insert(0, onnx.helper.make_opsetid("ai.onnx.ml", 3))
    versions = {o.domain: o.version for o in to_half(model, "bf16").opset_import}
    assert versions == {"ai.onnx.ml": 3, "": 22}


# The arithmetic: what a type that rounds after every operation gives


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_elementwise_is_bit_for_bit_that_of_the_type(precision: str) -> None:
    model = graph(
        node("Mul", "x", "c", "a"), node("Add", "a", "x", "b"), node("Sub", "b", "c", "d"),
        node("Mul", "d", "d", "prediction"),
        constants={"c": np.float32([[1.7, -0.3, 1e-3, 900.0]])},
    )  # fmt: skip
    x = np.random.default_rng(0).standard_normal((50, 2, 4)).astype(np.float32) * 30
    h, c = (
        torch.from_numpy(v).to(TORCH[precision]) for v in (x, np.float32([[1.7, -0.3, 1e-3, 900]]))
    )
    d = h * c + h - c
    np.testing.assert_array_equal(half_of(model, precision, x), (d * d).float().numpy())


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_convolution_is_that_of_torch_in_half_precision(precision: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 4, 3, 3, generator=generator)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    model = graph(
        node("Conv", "x", "w", "prediction", pads=[1, 1, 1, 1]),
        constants={"w": weight.numpy()}, size=(4, 8, 8),
    )  # fmt: skip
    dtype = TORCH[precision]
    theirs = nn.functional.conv2d(x.to(dtype), weight.to(dtype), padding=1).float().numpy()
    ours = half_of(model, precision, x.numpy())
    # Both sum in float32, in another order, and round once: at most one rounding apart.
    np.testing.assert_allclose(ours, theirs, rtol=2 * ROUNDING[precision], atol=1e-6)
    assert (ours == theirs).mean() > 0.99


def test_onnx_runtime_alone_would_hide_an_overflow() -> None:
    """Why the gate rounds for real: the CPU provider computes a chain in float32."""
    model = graph(
        node("Add", "x", "x", "twice"), node("Mul", "twice", "c", "prediction"),
        constants={"c": np.float32([0.25])},
    )  # fmt: skip
    x = np.full((1, 2, 4), 5e4, np.float32)
    assert np.isinf(half_of(model, "fp16", x)).all()
    hidden = ort.InferenceSession(to_half(model, "fp16").SerializeToString()).run(None, {"x": x})
    assert np.isfinite(hidden[0]).all()
    np.testing.assert_allclose(half_of(model, "bf16", x), 2.5e4, rtol=1e-2)


# The gate and the ladder


class Loud(nn.Module):
    """Activations of 1e5 times the usual in one layer, which the next one normalises."""

    def __init__(self, scale: float = 1e5, eps: float = 1e-5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.loud = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8, eps=eps)
        self.last = nn.Conv2d(8, 3, 3, padding=1)
        with torch.no_grad():
            self.loud.weight *= scale
            self.loud.bias *= scale

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        loud = self.loud(self.first(x) + t.float()[:, None, None, None] / 1000)
        return x + 0.5 * self.last(torch.sigmoid(self.norm(loud)))


class Cancels(nn.Module):
    """x is what is left when two large numbers are subtracted."""

    def __init__(self) -> None:
        super().__init__()
        self.big = nn.Parameter(torch.full((3, 8, 8), 3000.0))
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (x + self.big) - self.big + 0 * self.conv(x)


def exported(model: nn.Module, path: Path, *variants: str, **arguments: Any) -> Bundle:
    return export(
        model, Schedule.linear(100, 1e-4, 0.2), path, sample_shape=SHAPE, variants=variants,
        plan={"sampler": "ddim", "steps": 5, "spacing": "trailing"}, **arguments,
    )  # fmt: skip


def test_a_network_that_fits(tmp_path: Path) -> None:
    said: list[Comparison] = []
    bundle = exported(Loud(1.0), tmp_path / "b", "fp32", "fp16", "bf16", report=said.append)
    variants = bundle.manifest.variants
    assert list(variants) == ["fp32", "fp16", "bf16"]
    for name in ("fp16", "bf16"):
        assert variants[name].keys() == {"file", "parity"}
        for figure in variants[name]["parity"].values():
            assert figure["tolerance"] == HALF_TOLERANCE * ROUNDING[name]
            assert 0 < figure["relative_error"] <= figure["tolerance"]
    worst = {name: max(f["relative_error"] for f in variants[name]["parity"].values())
             for name in ("fp16", "bf16")}  # fmt: skip
    assert 4 < worst["bf16"] / worst["fp16"] < 16  # 8 = the ratio of their roundings
    assert len(said) == 4 + 3 + 3
    with Generator.load(bundle.path, variant="fp16", runtime="onnxruntime", device="cpu") as g:
        assert all(c.passed and c.measure == "relative_error" for c in g.verify())
        assert g.run(1, seed=0).variant == "fp16"


def test_a_layer_that_overflows_is_named_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entry = exported(Loud(), tmp_path / "b", "fp32", "fp16").manifest.variants["fp16"]
    kept = entry["kept_in_fp32"]
    assert "network.loud" in kept
    assert not {"network.first", "network.last"} & set(kept)
    (line,) = entry["ladder"]
    assert line.startswith("fp16: answers at batch 1: relative error nan")
    assert "layer 'network.loud' reaches" in line
    assert line.endswith("and fp16 ends at 65504")
    assert "layer 'network.loud'" in caplog.text
    result = CliRunner().invoke(main, ["info", str(tmp_path / "b")])
    assert "fp16: also in fp32" in result.output


def test_values_too_small_for_fp16_take_bf16(tmp_path: Path) -> None:
    bundle = exported(Loud(1e-10, eps=1e-30), tmp_path / "b", "fp32", "fp16")
    variants = bundle.manifest.variants
    assert list(variants) == ["fp32", "bf16"]
    assert [line.partition(":")[0] for line in variants["bf16"]["ladder"]] == [
        "fp16", "fp16 with 2 more layers in fp32",
    ]  # fmt: skip


@pytest.mark.parametrize("variants", [["fp16"], ["fp32", "fp16"]])
def test_what_no_half_precision_can_do_stays_fp32(tmp_path: Path, variants: list[str]) -> None:
    bundle = exported(Cancels(), tmp_path / "b", *variants)
    assert list(bundle.manifest.variants) == ["fp32"]  # though only fp16 was wanted
    assert len(bundle.manifest.variants["fp32"]["ladder"]) == 4
    with Generator.load(bundle.path, runtime="onnxruntime", device="cpu") as generator:
        assert all(c.passed for c in generator.verify())


class Masked(nn.Module):
    """Attention that sees no later pixel: infinity on purpose, and one product too large."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loud = nn.Conv2d(3, 3, 1)
        with torch.no_grad():
            self.loud.weight *= 1e6

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(2).transpose(1, 2)  # (B, 64, 3)
        later = torch.ones(64, 64, dtype=torch.bool).triu(1)
        weights = (rows @ rows.transpose(1, 2)).masked_fill(later, -torch.inf).softmax(-1)
        mixed = (weights @ rows).transpose(1, 2).reshape(x.shape)
        loud = self.loud(mixed)
        return x + loud / (1 + loud.abs())


def test_infinity_on_purpose_is_not_blamed(tmp_path: Path) -> None:
    entry = exported(Masked(), tmp_path / "b", "fp32", "fp16").manifest.variants["fp16"]
    assert "layer 'network.loud' reaches" in entry["ladder"][0]
    assert "network.loud" in entry["kept_in_fp32"]


class Zero(nn.Module):
    """A network whose last layer begins at 0, not yet trained."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def test_answers_of_zero_pass(tmp_path: Path) -> None:
    bundle = exported(Zero(), tmp_path / "b", "fp32", "fp16", gate="full")
    assert list(bundle.manifest.variants) == ["fp32", "fp16"]


def test_the_full_gate_compares_samples(tmp_path: Path) -> None:
    figures = exported(Loud(1.0), tmp_path / "b", "fp16", gate="full").manifest.variants["fp16"]
    (what,) = (what for what in figures["parity"] if what.startswith("Frechet distance of 500"))
    assert 0 <= figures["parity"][what]["ratio"] < figures["parity"][what]["tolerance"] == 0.1


# A bundle again


def test_a_bundle_again(tmp_path: Path) -> None:
    once = exported(Loud(1.0), tmp_path / "a", "fp32")
    whole = exported(Loud(1.0), tmp_path / "b", "fp32", "fp16")
    again = export_bundle(once.path, tmp_path / "c", variants=["fp32", "fp16"])
    assert again.files == whole.files
    assert again.manifest.variants == whole.manifest.variants
    added = export_bundle(again.path, again.path, variants=["bf16"])  # in its own place
    assert list(added.manifest.variants) == ["fp32", "fp16", "bf16"]
    assert added.read("unet.fp16.onnx") == whole.read("unet.fp16.onnx")
    alone = exported(Loud(1.0), tmp_path / "d", "fp16")
    with pytest.raises(BundleError, match="has no fp32"):
        export_bundle(alone.path, tmp_path / "e", variants=["bf16"])


def test_bf16_says_what_runs_it(tmp_path: Path) -> None:
    bundle = exported(Loud(1.0), tmp_path / "b", "bf16")
    with pytest.raises(EngineError, match=r"cannot run this precision here: take another --var"):
        Generator.load(bundle.path, runtime="onnxruntime", device="cpu")


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_commands(tmp_path: Path) -> None:
    result = run("export", "-o", tmp_path / "b", "--variants", "fp16,bf16")  # the built-in model
    assert result.exit_code == 0, result.output
    assert "-[v] fp16: 20-step DDIM: relative error" in result.output
    assert f"{tmp_path / 'b'}: fp32, fp16, bf16; " in result.output
    here = ["--json", "--runtime", "onnxruntime", "--variant", "fp16"]
    result = run("verify", tmp_path / "b", *here)
    report = json.loads(result.output)
    assert (report["variant"], report["passed"]) == ("fp16", True)
    assert {"what", "relative_error", "tolerance"} == report["comparisons"][0].keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--variants", "fp16,fp8"], "variants are fp32, fp16, bf16, int8; got 'fp8'"),
     (["--variants", ""], "no variant is wanted"),
     (["--steps", "3"], "--steps cannot change"),
     (["--licence", "MIT"], "--licence cannot change"),
     (["--format", "tflite"], "'tflite' is not one of 'onnx', 'tensorrt'")],
)  # fmt: skip
def test_command_errors(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run("export", Bundle.open().path, "-o", tmp_path / "b", *arguments)
    assert (result.exit_code, message in result.output) == (2, True), result.output
    assert not (tmp_path / "b").exists()


def test_bad_choices(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="got 'int3'"):
        export_bundle(Bundle.open().path, tmp_path / "b", variants=["int3"])
    with pytest.raises(ConfigError, match="gate must be one of"):
        export_bundle(Bundle.open().path, tmp_path / "b", gate="half")
