"""U-Net, Algorithm 1, the trainer and runs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from ddpm_edge.data import Dataset
from ddpm_edge.errors import ConfigError, RunError
from ddpm_edge.schedule import Schedule
from ddpm_edge.train import run as runs
from ddpm_edge.train import trainer
from ddpm_edge.train.draws import Draws, batches
from ddpm_edge.train.torch_engine import TorchEngine
from ddpm_edge.train.trainer import EMA, Algorithm1, Training, TrainOptions, train
from ddpm_edge.train.unet import PRESETS, UNet, UNetConfig
from ddpm_edge.train.workers import Workers, resolve_device

CPU = Workers(torch.device("cpu"))
OPTIONS = TrainOptions(steps=4, batch=4, warmup=2, precision="fp32", device="cpu")


def squares(n: int = 32, classes: int = 2) -> Dataset:
    """Images 8 x 8, bright on the left (label 0) or on the right (label 1)."""
    rng = np.random.default_rng(0)
    labels = np.arange(n) % 2
    images = rng.integers(0, 40, (n, 1, 8, 8), dtype=np.uint8)
    images[labels == 0, :, :, :4] += 200
    images[labels == 1, :, :, 4:] += 200
    if not classes:
        return Dataset("squares", images)
    return Dataset("squares", images, labels.astype(np.int64), ("left", "right"))


def tiny(data: Dataset, seed: int = 0) -> UNet:
    torch.manual_seed(seed)
    return UNet(UNetConfig.preset("tiny", data.sample_shape, len(data.class_names)))


# U-Net


def test_the_cifar10_preset_is_the_paper_s() -> None:
    model = UNet(UNetConfig.preset("cifar10", (3, 32, 32)))
    assert sum(p.numel() for p in model.parameters()) == 35_746_307


def test_the_small_preset_stays_within_its_budget() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = UNet(UNetConfig.preset("small", (1, 28, 28), classes=10)).eval()
    t = torch.zeros(1, dtype=torch.int64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1, 28, 28), t, t)
    assert counter.get_total_flops() <= 0.5e9  # a multiplication and an addition are two
    assert 4 * sum(p.numel() for p in model.parameters()) <= 10e6  # bytes


@pytest.mark.parametrize("preset", ["tiny", "small"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 16, 8)])
def test_a_new_unet_answers_zero_and_every_weight_learns(
    preset: str, shape: tuple[int, int, int]
) -> None:
    model = UNet(UNetConfig.preset(preset, shape, classes=3))
    x, t, label = torch.randn(2, *shape), torch.tensor([0, 999]), torch.tensor([1, 3])
    assert (model(x, t, label) == 0).all()  # the last convolution starts at zero
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    out = model(x, t, label)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_time_and_label_matter() -> None:
    data = squares()
    model = tiny(data)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, t, label = torch.randn(1, 1, 8, 8), torch.tensor([5]), torch.tensor([0])
    here = model(x, t, label)
    assert (model(x, t + 1, label) != here).any()
    assert (model(x, t, label + 1) != here).any()


def test_attention_is_the_softmax_of_scaled_products() -> None:
    from ddpm_edge.train.unet import Attention

    torch.manual_seed(0)
    layer = Attention(8, UNetConfig(groups=2))
    torch.nn.init.normal_(layer.out.weight)
    x = torch.randn(2, 8, 3, 5)
    q, k, v = layer.qkv(layer.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=2)  # (B, N, C)
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    expected = x + layer.out(mixed.transpose(1, 2).unflatten(2, (3, 5)))
    assert (layer(x) - expected).abs().max() < 1e-5  # float32 rounding of sums of 15 terms


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sample_shape": (1, 30, 28)}, "30x28 .* must be multiples of 4: resize or pad"),
        ({"widths": (30, 60)}, "must be multiples of groups"),
        ({"groups": 1}, "groups, which must be >= 2"),
    ],
)
def test_impossible_unets(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(UNetConfig(), **arguments)  # type: ignore[arg-type]


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match="no preset 'huge'; presets are tiny, small, cifar10"):
        UNetConfig.preset("huge", (1, 8, 8))


def test_config_round_trip() -> None:
    for config in PRESETS.values():
        assert UNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


# Algorithm 1


class Recorder(torch.nn.Module):
    """Answers zero and remembers what it was asked."""

    def forward(self, x: object, t: object, label: object = None) -> object:
        self.asked = (x, t, label)
        return torch.zeros_like(x)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "velocity"])
def test_loss_is_the_error_of_what_is_predicted(prediction: str) -> None:
    schedule = Schedule.linear()
    model, x0 = Recorder(), torch.full((512, 1, 2, 2), 0.5)
    objective = Algorithm1(schedule, prediction, 0.25, 3, torch.device("cpu"))
    label = torch.zeros(512, dtype=torch.int64)
    loss = objective.loss(model, x0, label, Draws(512, CPU, 0))
    x_t, t, label = (a.numpy() for a in model.asked)
    assert t.min() >= 0  # what the network is fed counts from 0
    assert t.max() <= 999
    assert len(np.unique(t)) > 350  # of 512 uniform draws from 1000, 400 differ on average
    signal, noise = schedule.signal[t + 1], schedule.noise[t + 1]
    eps = (x_t - signal[:, None, None, None] * 0.5) / noise[:, None, None, None]  # Eq 4 solved
    v = signal[:, None, None, None] * eps - noise[:, None, None, None] * 0.5
    x0_of, velocity = np.full_like(eps, 0.5), eps - 0.5
    target = {"eps": eps, "x0": x0_of, "v": v, "velocity": velocity}[prediction]  # the answer is 0
    assert float(loss) == pytest.approx(float((target**2).mean()), rel=1e-5)
    assert abs(eps.mean()) < 4 / math.sqrt(eps.size)  # 4 standard errors
    assert abs((label == 3).mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 512)
    assert set(label) == {0, 3}


def test_training_learns() -> None:
    data = squares()
    model = tiny(data)
    options = replace(OPTIONS, steps=150, batch=32, warmup=10, learning_rate=1e-2)
    losses = [float(step.loss) for step in train(Training(model), data, Schedule.linear(), options)]
    assert len(losses) == 150
    assert losses[0] == pytest.approx(1.0, abs=0.2)  # it starts by answering 0 to unit noise
    assert np.mean(losses[-20:]) < 0.4


def test_the_same_seed_trains_the_same_weights() -> None:
    data, finals = squares(), []
    for _ in range(2):
        model = tiny(data)
        for _ in train(Training(model), data, Schedule.linear(), OPTIONS):
            pass
        finals.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert (finals[0] == finals[1]).all()


def test_minutes_end_training() -> None:
    data = squares()
    options = replace(OPTIONS, steps=None, minutes=0.01)  # 0.6 s
    steps = list(train(Training(tiny(data)), data, Schedule.linear(), options))
    assert steps[-1].fraction == 1.0
    assert steps[-1].seconds >= 0.6
    assert all(step.fraction < 1.0 for step in steps[:-1])


def test_every_image_is_seen_once_an_epoch() -> None:
    stream = batches(10, 3, CPU, seed=0, done=0)
    epochs = [torch.cat([next(stream) for _ in range(3)]).tolist() for _ in range(2)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_batches_go_on_where_they_were_left() -> None:
    stream = batches(10, 3, CPU, seed=5, done=0)
    whole = [next(stream).tolist() for _ in range(12)]
    for done in range(12):
        assert next(batches(10, 3, CPU, seed=5, done=done)).tolist() == whole[done]


def test_processes_share_out_what_one_would_draw() -> None:
    whole = [next(batches(20, 6, CPU, 1, 0)), Draws(6, CPU, 1).normal(torch.Size((6, 2)))]
    parts = []
    for index in range(2):
        one = Workers(torch.device("cpu"), index, 2)
        draws = Draws(3, one, 1).normal(torch.Size((3, 2)))
        parts.append([next(batches(20, 3, one, 1, 0)), draws])
    for i in range(2):
        assert (torch.cat([part[i] for part in parts]) == whole[i]).all()


def test_fewer_images_than_a_batch() -> None:
    data = squares(6)
    seen = [step.images for step in train(Training(tiny(data)), data, Schedule.linear(), OPTIONS)]
    assert seen == [4, 8, 12, 16]
    few = replace(OPTIONS, batch=64)
    seen = [step.images for step in train(Training(tiny(data)), data, Schedule.linear(), few)]
    assert seen == [6, 12, 18, 24]
    with pytest.raises(ConfigError, match="6 images are too few for 7 processes"):
        next(train(Training(tiny(data)), data, Schedule.linear(), few,
                   Workers(torch.device("cpu"), 0, 7)))  # fmt: skip


def test_flip_mirrors_half_of_the_images() -> None:
    data = squares(64, classes=0)
    data = replace(data, images=np.tile(np.arange(8, dtype=np.uint8), (64, 1, 8, 1)))
    options = replace(OPTIONS, batch=64, steps=8, flip=True, prediction="x0")
    seen: list[bool] = []

    class Spy(torch.nn.Linear):
        def forward(self, x: object, t: object) -> object:
            return x * self.weight.sum()

    def spy(self: Algorithm1, model: object, x0: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.extend((x0[:, 0, 0, 0] > x0[:, 0, 0, 7]).tolist())
        return model(x0, None).mean()

    original, Algorithm1.loss = Algorithm1.loss, spy
    try:
        list(train(Training(Spy(1, 1)), data, Schedule.linear(), options))
    finally:
        Algorithm1.loss = original
    assert len(seen) == 512
    assert abs(np.mean(seen) - 0.5) < 4 * 0.5 / math.sqrt(512)  # 4 standard errors


def test_learning_rate() -> None:
    assert trainer.warmup_cosine(1, 10, 0.0) == pytest.approx(0.1)
    assert trainer.warmup_cosine(10, 10, 0.0) == pytest.approx(1.0)
    assert trainer.warmup_cosine(99, 10, 0.5) == pytest.approx(0.5)
    short = trainer.warmup_cosine(1, 500, 0.025)  # of 40 steps: half of the way to the peak
    assert short == pytest.approx(0.5 * 0.5 * (1 + math.cos(0.025 * math.pi)))
    assert trainer.warmup_cosine(20, 500, 0.5) == pytest.approx(0.5)
    assert trainer.warmup_cosine(99, 10, 1.0) == pytest.approx(0.0)


def test_ema_is_the_recursion_with_warm_up() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    ema, expected = EMA(model, 0.9), 0.0
    for n in range(1, 120):
        torch.nn.init.constant_(model.weight, float(n))
        ema.update(model)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
    assert float(ema.model.weight) == pytest.approx(expected, rel=1e-5)  # float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": None}, "give steps or minutes"),
        ({"steps": 0}, "steps must be >= 1; got 0"),
        ({"minutes": -1.0}, "minutes must be > 0; got -1.0"),
        ({"batch": 0}, "batch must be >= 1; got 0"),
        ({"learning_rate": math.nan}, "learning_rate must be > 0; got nan"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\); got 1.0"),
        ({"null_label": 1.1}, "null_label must be in"),
        ({"prediction": "score"}, "prediction must be eps, x0, v, velocity; got 'score'"),
        ({"precision": "fp8"}, "precision must be auto, bf16 or fp32; got 'fp8'"),
    ],
)
def test_bad_options(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(OPTIONS, **arguments)  # type: ignore[arg-type]


def test_devices() -> None:
    assert resolve_device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match="no device 'warp'"):
        resolve_device("warp")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="torch sees no GPU"):
            resolve_device("cuda")


# Runs


@pytest.mark.parametrize("classes", [0, 2])
def test_a_run_on_disk(tmp_path: Path, classes: int) -> None:
    data = squares(classes=classes)
    config = UNetConfig.preset("tiny", data.sample_shape, classes)
    steps = list(runs.record(tmp_path / "run", data, config, Schedule.cosine(20), OPTIONS))
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "checkpoints", "config.json", "metrics.jsonl", "samples",
    ]  # fmt: skip
    assert (tmp_path / "run" / "samples" / "0000004.png").is_file()
    loaded = runs.load_run(tmp_path / "run")
    assert loaded.step == len(steps) == 4
    assert loaded.schedule.alpha_bar.tolist() == Schedule.cosine(20).alpha_bar.tolist()
    assert [line["step"] for line in runs.read_metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert loaded.loss == pytest.approx(float(steps[-1].loss), abs=1e-6)  # written with 6 digits
    assert loaded.provenance["images"] == 32
    assert loaded.provenance["steps"] == 4
    assert "bf16" in loaded.provenance["hardware"] or "fp32" in loaded.provenance["hardware"]


def test_an_interrupted_run_keeps_its_checkpoint(tmp_path: Path) -> None:
    data = squares()
    config = UNetConfig.preset("tiny", data.sample_shape, 2)
    options = replace(OPTIONS, steps=1000)
    training = runs.record(tmp_path / "run", data, config, Schedule.cosine(20), options)
    next(training)
    next(training)
    training.close()
    assert runs.load_run(tmp_path / "run").step == 2


def test_runs_that_cannot_be(tmp_path: Path) -> None:
    data = squares()
    config = UNetConfig.preset("tiny", data.sample_shape, 2)
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(RunError, match="exists and is not empty; give a new directory"):
        next(runs.record(tmp_path, data, config, Schedule.cosine(20), OPTIONS))
    with pytest.raises(RunError, match="is not a training run: it has no config.json"):
        runs.load_run(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RunError, match="config.json is damaged: KeyError: 'format'"):
        runs.load_run(tmp_path)
    (tmp_path / "config.json").write_text('{"format": 0}')
    with pytest.raises(RunError, match="run format 0, this version reads 1"):
        runs.load_run(tmp_path)
    (tmp_path / "config.json").write_text('{"format": 1}')
    with pytest.raises(RunError, match="has no checkpoints/last.safetensors: let it train"):
        runs.load_run(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.safetensors").write_bytes(b"torn")
    with pytest.raises(RunError, match="is damaged"):
        runs.load_run(tmp_path)


def test_torch_engine_is_the_model() -> None:
    data = squares()
    model = tiny(data)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x = np.random.default_rng(0).standard_normal((3, 1, 8, 8)).astype(np.float32)
    t, label = np.array([0, 5, 9]), np.array([0, 1, 2])
    with TorchEngine(model, data.sample_shape, labelled=True) as engine:
        got = engine({"x": x, "t": t, "label": label})["prediction"]
    with torch.no_grad():
        expected = model(*(torch.from_numpy(a) for a in (x, t, label))).numpy()
    assert (got == expected).all()
