"""torch -> ONNX -> gate -> bundle."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

import safetensors.torch

from ddpm_edge import Bundle, Generator
from ddpm_edge.cli import main
from ddpm_edge.errors import BundleError, ConfigError, ExportError, ParityError
from ddpm_edge.export import export, export_run, to_onnx
from ddpm_edge.schedule import Schedule
from ddpm_edge.train.unet import UNet, UNetConfig

SHAPE = (1, 8, 8)


def network(classes: int = 2, shape: tuple[int, int, int] = SHAPE) -> UNet:
    """A tiny U-Net whose every weight matters."""
    torch.manual_seed(0)
    model = UNet(UNetConfig(shape, (8, 16), 1, attention=(1,), groups=4, classes=classes)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "tiny"
    export(network(), Schedule.linear(), path, sample_shape=SHAPE, class_names=["a", "b"])
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run of three steps."""
    folder = tmp_path_factory.mktemp("train")
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8), dtype=np.uint8)
    np.savez(folder / "set.npz", images=images, labels=np.arange(8) % 2)
    arguments = ["train", "--data", f"{folder}/set.npz", "--preset", "tiny", "--steps", "3"]
    result = CliRunner().invoke(main, [*arguments, "--batch", "4", "-o", f"{folder}/run"])
    assert result.exit_code == 0, result.output
    assert "done after 3 steps" in result.output
    assert f"Next: ddpm-edge export {folder}/run -o run-bundle" in result.output
    return folder / "run"


def test_graph_is_static_but_for_the_batch(exported: Path) -> None:
    model = onnx.load_from_string(Bundle.open(exported).model()[1])
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
    assert not {n.op_type for n in model.graph.node} & {"Shape", "Loop", "If", "Pad"}
    assert not any(t.HasField("data_location") and t.data_location for t in model.graph.initializer)
    shapes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        "x": ["batch", 1, 8, 8], "t": ["batch"], "label": ["batch"],
        "prediction": ["batch", 1, 8, 8],
    }  # fmt: skip
    assert {p.key for p in model.metadata_props} == {
        "sample_shape", "schedule", "prediction", "timestep_offset",
    }  # fmt: skip
    assert str(Path.cwd()).encode() not in model.SerializeToString()  # no paths of the exporter


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_any_batch_equals_torch(exported: Path, batch: int) -> None:
    x = np.random.default_rng(0).standard_normal((batch, *SHAPE)).astype(np.float32)
    t, label = np.arange(batch) * 100, np.arange(batch) % 3
    with torch.no_grad():
        expected = network()(*(torch.from_numpy(a) for a in (x, t, label))).numpy()
    with Generator.load(exported) as generator:
        got = generator._open().engine({"x": x, "t": t, "label": label})["prediction"]
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()  # float32 rounding


def test_bundle_says_what_was_exported(exported: Path) -> None:
    manifest = Bundle.open(exported).manifest
    assert manifest.name == "tiny"
    assert manifest.class_names == ("a", "b")
    assert manifest.make_plan().name == "dpmpp(steps=20, order=2, sde=True, spacing=logsnr, clip=1)"
    parity = manifest.variants["fp32"]["parity"]
    assert list(parity) == [
        "answers at batch 1", "answers at batch 5", "20-step DDIM", "Algorithm 2, last 50 steps",
    ]  # fmt: skip
    assert all(0 <= f["max_abs_error"] <= f["tolerance"] for f in parity.values())


def test_reference_can_be_recomputed_on_the_device(exported: Path) -> None:
    opened = Bundle.open(exported)
    with np.load(exported / "reference.npz") as reference, Generator.load(exported) as generator:
        images = generator.sample(
            len(reference["images"]),
            seed=int(reference["seed"]),
            label=[None if i == 2 else int(i) for i in reference["images_label"]],
            sampler="ddim",
            steps=int(reference["steps"]),
            dtype="float32",
        )
        expected = reference["images"].transpose(0, 2, 3, 1)
    assert np.abs(images - expected).max() <= 1e-3  # the gate's tolerance
    assert opened.read("reference.npz")


@pytest.mark.parametrize(
    ("classes", "shape", "schedule"),
    [
        (0, (3, 8, 4), Schedule.cosine(10)),  # fewer steps than the gate's usual chains
        (2, SHAPE, Schedule.linear(100, 1e-4, 0.2)),
    ],
)
def test_other_networks(
    tmp_path: Path, classes: int, shape: tuple[int, int, int], schedule: Schedule
) -> None:
    names = [str(i) for i in range(classes)]
    model = network(classes, shape)
    export(model, schedule, tmp_path / "b", sample_shape=shape, class_names=names, gate="full")
    with Generator.load(tmp_path / "b") as generator:
        assert generator.sample(2, seed=0).shape == (2, *shape[1:], shape[0])


@pytest.mark.parametrize(
    ("prediction", "schedule"),
    [
        ("x0", Schedule.cosine(10)),
        ("v", Schedule.cosine(10)),
        ("velocity", Schedule.rectified_flow(10)),
    ],
)
def test_other_predictions(tmp_path: Path, prediction: str, schedule: Schedule) -> None:
    export(network(0), schedule, tmp_path / "b", sample_shape=SHAPE,
           prediction=prediction, gate="full")  # fmt: skip
    assert Bundle.open(tmp_path / "b").manifest.prediction == prediction
    with Generator.load(tmp_path / "b") as generator:
        assert generator.sample(1, seed=0, sampler="euler", steps=4).shape == (1, 8, 8, 1)


def test_rectified_flow_needs_a_prediction_that_tells_x0(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="eps does not tell x0 .* must answer velocity, x0 or v"):
        export(network(0), Schedule.rectified_flow(10), tmp_path / "b", sample_shape=SHAPE)


@pytest.mark.parametrize("change", [5e-4, np.nan])
def test_the_gate_can_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: float, run: Path
) -> None:
    right, what = to_onnx.to_onnx, "answers at batch 1"

    def wrong(*arguments: object) -> bytes:
        proto = onnx.load_from_string(right(*arguments))
        bias = next(t for t in proto.graph.initializer if t.name.endswith("head.bias"))
        changed = onnx.numpy_helper.to_array(bias) + np.float32(change)
        bias.CopyFrom(onnx.numpy_helper.from_array(changed, bias.name))
        return bytes(proto.SerializeToString())

    monkeypatch.setattr(to_onnx, "to_onnx", wrong)
    with pytest.raises(ParityError, match=f"{what}: .* differs from torch by .* tolerance 1e-04"):
        export(network(0), Schedule.linear(), tmp_path / "b", sample_shape=SHAPE)
    assert os.listdir(tmp_path) == []
    result = CliRunner().invoke(main, ["export", str(run), "-o", str(tmp_path / "b")])
    assert result.exit_code == 1
    assert f"-[x] {what}: max abs error" in result.output
    assert "nothing was written" in result.output
    assert os.listdir(tmp_path) == []


def test_export_command(tmp_path: Path, run: Path) -> None:
    target = tmp_path / "b"
    arguments = ["export", str(run), "-o", str(target), "--name", "mine", "--licence", "CC0-1.0"]
    for extra in ([], ["--sampler", "ddpm", "--steps", "100", "--variance", "beta-tilde"]):
        result = CliRunner().invoke(main, [*arguments, *extra])
        assert result.exit_code == 0, result.output
    assert "-[v] 20-step DDIM: max abs error" in result.output
    assert f"Next: ddpm-edge sample {target} -n 16 -o samples.png" in result.output
    manifest = Bundle.open(target).manifest
    assert manifest.name == "mine"
    assert manifest.licence == "CC0-1.0"
    assert manifest.make_plan().name == "ddpm(steps=100, variance=beta-tilde, clip=1)"
    assert manifest.training["steps"] == 3
    assert os.listdir(tmp_path) == ["b"]


def test_what_cannot_be_exported(tmp_path: Path, run: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(BundleError, match="exists and is not a bundle"):
        export_run(run, tmp_path / "notes")
    with pytest.raises(ConfigError, match="gate must be one of quick, full; got 'none'"):
        export_run(run, tmp_path / "b", gate="none")
    with pytest.raises(ConfigError, match="steps must be in 1..1000"):
        export_run(run, tmp_path / "b", plan={"steps": 2000})
    result = CliRunner().invoke(main, ["export", str(tmp_path), "-o", str(tmp_path / "b")])
    assert result.exit_code == 1
    assert "is not a training run" in result.output


# Networks of one's own


class Plain(torch.nn.Module):
    """A network without anything of ours: a convolution shifted by time and label, and one back."""

    def __init__(self, channels: int = 3, classes: int = 0, out: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Conv2d(channels, 16, 3, padding=1)
        self.time = torch.nn.Linear(2, 16)
        self.label = torch.nn.Embedding(classes + 1, 16) if classes else None
        self.last = torch.nn.Conv2d(16, out or channels, 3, padding=1)

    def embed(self, t: torch.Tensor) -> torch.Tensor:
        angle = t.float()[:, None] / 1000
        return self.time(torch.cat([angle.sin(), angle.cos()], dim=1))

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None = None
    ) -> torch.Tensor:
        shift = self.embed(t)
        if self.label is not None:
            shift = shift + self.label(label)
        h = torch.relu(self.first(x) + shift[:, :, None, None])
        return self.last(h)


class Branch(Plain):
    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            x = -x
        return super().forward(x, t)


class Special(Plain):
    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.special.bessel_j0(x), t)


class FixedBatch(Plain):
    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return super().forward(x, t) + torch.zeros(2, 1, 1, 1)


class Answers(Plain):
    """Wraps its answer in something."""

    def __init__(self, wrap: object) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> object:
        return self.wrap(super().forward(x, t))  # type: ignore[operator]


def with_nan() -> Plain:
    model = Plain()
    model.first.weight.data[0, 0, 0, 0] = torch.nan
    return model


RGB = (3, 8, 8)


@pytest.mark.parametrize("classes", [0, 2])
def test_a_module_of_one_s_own(tmp_path: Path, classes: int) -> None:
    model = Plain(classes=classes).half().train()
    names = ["a", "b"][:classes]
    export(model, Schedule.linear(), tmp_path / "b", sample_shape=RGB, class_names=names)
    assert model.training  # the caller's module is left as it was
    assert next(model.parameters()).dtype == torch.float16
    with Generator.load(tmp_path / "b") as generator:
        assert all(c.passed for c in generator.verify())
        assert generator.sample(2, seed=0, steps=3).shape == (2, 8, 8, 3)


@pytest.mark.parametrize("classes", [0, 3])
def test_a_unet_of_diffusers(tmp_path: Path, classes: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 16), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
        num_class_embeds=classes + 1 if classes else None,
    )  # fmt: skip
    names = [str(i) for i in range(classes)]
    export(model, Schedule.linear(), tmp_path / "b", sample_shape=RGB, class_names=names)
    x = np.random.default_rng(0).standard_normal((3, *RGB)).astype(np.float32)
    t, label = np.array([0, 400, 999]), np.array([0, 1, 3])
    arrays = {"x": x, "t": t} | ({"label": label} if classes else {})
    with torch.no_grad():
        expected = model.eval()(*(torch.from_numpy(a) for a in arrays.values())).sample.numpy()
    with Generator.load(tmp_path / "b") as generator:
        got = generator._open().engine(arrays)["prediction"]
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()  # float32 rounding


@pytest.mark.parametrize("wrap", [lambda y: (y, 1), lambda y: [y]], ids=["tuple", "list"])
def test_wrapped_answers(tmp_path: Path, wrap: object) -> None:
    export(Answers(wrap), Schedule.cosine(10), tmp_path / "b", sample_shape=RGB)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Branch(), r"branches on the values of a tensor \(.*test_export.py, line \d+: `if x.sum"),
        (Special(), r"uses prims.bessel_j0, which has no ONNX form at opset 18; compute it from"),
        (FixedBatch(), r"fixes the size of the batch.*make what it adds or reshapes follow"),
        (with_nan(), r"1 of 432 values of first.weight are NaN or infinite; export an earlier"),
        (Plain(out=6), r"answers \(2, 6, 8, 8\).*twice the channels means a learned variance"),
        (
            Plain(channels=1),
            r"evaluated as forward\(x, t\) with x \(2, 3, 8, 8\): RuntimeError",
        ),
        (torch.nn.Conv2d(3, 3, 1), r"cannot be evaluated as forward\(x, t\).*TypeError"),
        (Answers(lambda y: {"sample": y}), r"the network returns dict; expected a tensor"),
        (Answers(lambda y: None), r"the network returns NoneType; expected a tensor"),
    ],
    ids=["branch", "operator", "batch", "nan", "variance", "channels", "forward", "dict", "none"],
)
def test_networks_that_cannot_be_exported(
    tmp_path: Path, model: torch.nn.Module, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ExportError, match=message):
        export(model, Schedule.linear(), tmp_path / "b", sample_shape=RGB)
    assert os.listdir(tmp_path) == []
    assert capfd.readouterr() == ("", "")  # the exporter's own graphs are not printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_names": [0, 1]}, "expected str, got 0"),
        ({"prediction": "score"}, "must be one of eps, x0, v, velocity; got 'score'"),
        ({"timestep_offset": 0.5}, "expected int, got 0.5"),
        ({"training": {"loss": float("nan")}}, "not JSON compliant"),
        ({"training": {"loss": np.float32(1)}}, "not JSON serializable"),
        ({"plan": {"steps": 2000}}, "steps must be in 1..1000"),
        ({"name": 3}, "expected str, got 3"),
    ],
)
def test_what_a_bundle_cannot_say_is_refused_before_any_work(
    tmp_path: Path, exported: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: dict[str, object], message: str,
) -> None:  # fmt: skip
    shutil.copytree(exported, tmp_path / "b")
    monkeypatch.setattr(to_onnx, "to_onnx", lambda *_: pytest.fail("exported"))
    with pytest.raises(ConfigError, match=message):
        export(network(0), Schedule.linear(), tmp_path / "b", sample_shape=SHAPE, **arguments)
    assert Bundle.open(tmp_path / "b").manifest.name == "tiny"  # the old one is whole


FACTORY = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x, t, label):
        return self.conv(x) * (1 + label.float() / 10)[:, None, None, None]

def make():
    return Net()

def wrong():
    return 3
"""


def test_export_a_model_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "factory_of_a_net.py").write_text(FACTORY)
    weights = {"conv.weight": torch.full((3, 3, 3, 3), 0.01), "conv.bias": torch.ones(3)}
    safetensors.torch.save_file(weights, "w.safetensors")

    def cli(*arguments: str) -> str:
        result = CliRunner().invoke(main, ["export", "-o", "b", *arguments])
        return f"{result.exit_code} {' '.join(result.output.split())}"

    common = ["--shape", "3x8x8", "--classes", "cat, dog", "--schedule", "cosine", "-T", "50"]
    model = ["--model", "factory_of_a_net:make"]
    output = cli(*model, *common, "--weights", "w.safetensors", "--prediction", "v")
    assert output.startswith("0 "), output
    assert "Next: ddpm-edge sample b -n 16" in output
    manifest = Bundle.open(tmp_path / "b").manifest
    assert (manifest.class_names, manifest.prediction) == (("cat", "dog"), "v")
    assert manifest.schedule.to_dict() == Schedule.cosine(50).to_dict()
    with Generator.load(tmp_path / "b") as generator:
        x = np.zeros((1, 3, 8, 8), np.float32)
        arrays = {"x": x, "t": np.zeros(1, np.int64), "label": np.array([2])}
        answer = generator._open().engine(arrays)["prediction"]
    assert np.abs(answer - 1.2).max() < 1e-6  # the bias of the file, times the label's factor
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"format": 1}')
    for arguments, message in {
        ("--model", "factory_of_a_net:none", *common): "has no attribute 'none'",
        ("--model", "factory_of_a_net", *common): "given as package.module:function",
        ("--model", "no_such_module_at_all:make", *common): "No module named",
        ("--model", "factory_of_a_net:wrong", *common): "must return a torch.nn.Module; got int",
        tuple(model): "--model needs --shape CxHxW, such as 3x32x32",
        (*model, "--shape", "3x8"): "--shape must be CxHxW, such as 3x32x32; got '3x8'",
        (): "give either the directory of a training run, or --model",
        ("run", *model): "give either the directory of a training run, or --model",
        ("run", "--shape", "3x8x8"): "--shape go with --model",
    }.items():
        output = cli(*arguments)
        assert output.startswith("2 "), output
        assert message in output
    safetensors.torch.save_file({"other": torch.ones(1)}, "other.safetensors")
    assert "do not fit" in cli(*model, *common, "--weights", "other.safetensors")
    assert "no weights at" in cli(*model, *common, "--weights", "gone.safetensors")
