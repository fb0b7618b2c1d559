"""Runs that go on: exact resume, transfer learning, several processes, training that fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import safetensors.torch
from click.testing import CliRunner

from ddpm_edge.cli import main
from ddpm_edge.data import Dataset
from ddpm_edge.errors import ConfigError, ExportError, RunError, TrainingError
from ddpm_edge.schedule import Schedule
from ddpm_edge.train import run as runs
from ddpm_edge.train.checkpoint import checkpoint_path, load_checkpoint, save_checkpoint
from ddpm_edge.train.trainer import EMA, Training, TrainOptions, train
from ddpm_edge.train.unet import UNetConfig
from ddpm_edge.train.workers import Workers

SCHEDULE = Schedule.linear(100, 1e-4, 0.2)
ALONE = Workers(torch.device("cpu"))
OPTIONS = TrainOptions(
    steps=120, batch=8, warmup=10, learning_rate=2e-3, ema=0.99, precision="fp32", device="cpu"
)


def blobs(n: int = 40, size: int = 8, seed: int = 0) -> Dataset:
    """Bright squares on dark, at random places; label = left half or right half."""
    rng = np.random.default_rng(seed)
    images = np.zeros((n, 1, size, size), np.uint8)
    labels = np.zeros(n, np.int64)
    for i, image in enumerate(images):
        top, left = rng.integers(0, size - 3, 2)
        image[0, top : top + 3, left : left + 3] = rng.integers(150, 256)
        labels[i] = left >= (size - 3) / 2
    return Dataset("blobs", images, labels, ("left", "right"))


def config(data: Dataset, dropout: float = 0.0) -> UNetConfig:
    preset = UNetConfig.preset("tiny", data.sample_shape, len(data.class_names))
    return replace(preset, dropout=dropout)


def state(run: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(checkpoint_path(run))


# Exact resume


@pytest.mark.parametrize("stop", [1, 50, 77])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, stop: int) -> None:
    data, options = blobs(), replace(OPTIONS, flip=True)
    unet = config(data, dropout=0.2)  # dropout has its random numbers too
    whole = runs.record(tmp_path / "whole", data, unet, SCHEDULE, options, validation=blobs(9))
    expected = [float(step.loss) for step in whole]
    first = runs.record(tmp_path / "part", data, unet, SCHEDULE, options, validation=blobs(9))
    got = [float(next(first).loss) for _ in range(stop)]
    first.close()
    got += [float(s.loss) for s in runs.resume(tmp_path / "part", data, validation=blobs(9))]
    assert got == expected  # to the last bit
    training, ema = runs._on_device(runs.build({"unet": unet.to_dict()}), options, ALONE)
    load_checkpoint(tmp_path / "part").restore(training, ema)
    for p in training.model.parameters():  # a GPU's fused Adam refuses others
        assert training.optimizer.state[p]["exp_avg"].stride() == p.stride()
    ours, theirs = state(tmp_path / "part"), state(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    lines = [runs.read_metrics(tmp_path / which) for which in ("whole", "part")]
    for a, b in zip(*lines, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    assert "validation_loss" in lines[0][-1]
    assert runs.read_config(tmp_path / "part")["resumed_at"] == [stop]


def test_what_was_trained_after_the_checkpoint_is_trained_again(tmp_path: Path) -> None:
    """As after a power cut: metrics are newer than the checkpoint, the last line is torn."""
    data, run = blobs(), tmp_path / "run"
    first = runs.record(run, data, config(data), SCHEDULE, OPTIONS)
    for _ in range(60):
        next(first)
    first.close()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 100, "loss": 1.0}\n{"step": 110, "lo')
    assert runs.load_run(run).loss is not None  # a torn line does not hide the checkpoint
    list(runs.resume(run, data))
    metrics = runs.read_metrics(run)
    steps = [line["step"] for line in metrics]
    assert steps == sorted(set(steps))
    assert steps[-1] == 120
    assert all(line["loss"] != 1.0 for line in metrics)


def test_what_cannot_be_resumed(tmp_path: Path) -> None:
    data, run = blobs(), tmp_path / "run"
    with pytest.raises(RunError, match="is not a training run"):
        next(runs.resume(run, data))
    first = runs.record(run, data, config(data), SCHEDULE, OPTIONS)
    next(first)
    first.close()
    with pytest.raises(RunError, match=r"40 images then, 39 now.*give the same data"):
        next(runs.resume(run, blobs(39)))
    list(runs.resume(run, data, steps=5))
    with pytest.raises(
        RunError, match=r"already trained to its end \(5 steps\); give more --steps"
    ):
        next(runs.resume(run, data))
    assert [s.step for s in runs.resume(run, data, steps=7)] == [6, 7]
    going_on = runs.resume(run, data, minutes=9.0)  # another kind of end: the old one is over
    assert [next(going_on).step for _ in range(3)] == [8, 9, 10]
    going_on.close()
    assert runs.read_config(run)["options"]["steps"] is None
    whole = checkpoint_path(run).read_bytes()
    checkpoint_path(run).write_bytes(whole[:-5])
    with pytest.raises(RunError, match=r"last.safetensors is damaged"):
        next(runs.resume(run, data, steps=9))
    with pytest.raises(RunError, match="exists and is not empty.*--resume"):
        next(runs.record(run, data, config(data), SCHEDULE, OPTIONS))


def test_an_exception_within_a_step_leaves_the_checkpoint_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a resumed run would go on from weights of one step and an average of another."""
    data, run = blobs(), tmp_path / "run"
    list(runs.record(run, data, config(data), SCHEDULE, replace(OPTIONS, steps=3)))
    before = checkpoint_path(run).read_bytes()
    going_on = runs.resume(run, data, steps=9)
    next(going_on)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.EMA, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(going_on)
    assert checkpoint_path(run).read_bytes() == before


@pytest.mark.skipif(os.name == "nt", reason="sends signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_training_between_two_steps(tmp_path: Path, number: int) -> None:
    data = blobs()
    np.savez(tmp_path / "set.npz", images=data.images[:, 0])
    command = [sys.executable, "-m", "ddpm_edge", "train", "--data", f"{tmp_path}/set.npz",
               "--preset", "tiny", "--minutes", "9", "-o", f"{tmp_path}/run"]  # fmt: skip
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        while not (tmp_path / "run" / "metrics.jsonl").is_file():  # the first steps are running
            assert child.poll() is None
            time.sleep(0.1)
        time.sleep(0.5)
        child.send_signal(number)
        output, _ = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 0
    assert "run: stopped early after" in output
    assert f"ddpm-edge train -o {tmp_path}/run --resume" in output
    assert runs.load_run(tmp_path / "run").step > 0


def test_tied_weights_can_be_saved(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    (tmp_path / "checkpoints").mkdir()
    assert save_checkpoint(tmp_path, Training(model), EMA(model, 0.9), [])
    assert load_checkpoint(tmp_path).part("model").keys() == model.state_dict().keys()


# Transfer learning


def test_init_from_starts_lower_than_scratch(tmp_path: Path) -> None:
    data, options = blobs(), replace(OPTIONS, steps=150)
    for _ in runs.record(tmp_path / "first", data, config(data), SCHEDULE, options):
        pass
    others = blobs(seed=1)

    def losses(name: str, init_from: Path | None) -> list[float]:
        recording = runs.record(
            tmp_path / name, others, config(others), SCHEDULE, replace(OPTIONS, steps=20),
            init_from=init_from,
        )  # fmt: skip
        return [float(step.loss) for step in recording]

    scratch, transferred = losses("scratch", None), losses("transferred", tmp_path / "first")
    # From zero it starts at 1, the variance of the noise; trained weights know most of it.
    assert scratch[0] == pytest.approx(1.0, abs=0.2)
    assert transferred[0] < 0.6 * scratch[0]
    assert np.mean(transferred) < 0.6 * np.mean(scratch)


def test_init_from_reports_what_does_not_fit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, options = blobs(), replace(OPTIONS, steps=1)
    list(runs.record(tmp_path / "first", data, config(data), SCHEDULE, options))
    more = replace(data, class_names=("left", "right", "both"))
    with caplog.at_level("INFO", "ddpm_edge"):
        list(runs.record(tmp_path / "second", more, config(more), SCHEDULE, options,
                         init_from=tmp_path / "first"))  # fmt: skip
    assert "tensors begin as in" in caplog.text
    assert "not taken: label.weight has shape (3, 32), here (4, 32)" in caplog.text
    weights = {"other": torch.zeros(3)}
    safetensors.torch.save_file(weights, tmp_path / "other.safetensors")
    (tmp_path / "pickled.pt").write_bytes(b"\x80\x02}q\x00.")
    for name, message in {
        "other.safetensors": "none of the checkpoint's tensors fit",
        "pickled.pt": "pickled weights are not read",
        "nothing": "no weights at",
    }.items():
        with pytest.raises(RunError, match=message):
            next(runs.record(tmp_path / "third", data, config(data), SCHEDULE, options,
                             init_from=tmp_path / name))  # fmt: skip
        assert not (tmp_path / "third").exists()


# Several processes


def test_two_processes_are_one_with_the_doubled_batch(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    data = blobs()
    np.savez(tmp_path / "set.npz", images=data.images[:, 0], labels=data.labels)
    common = ["train", "--data", f"{tmp_path}/set.npz", "--preset", "tiny", "--steps", "40",
              "--warmup", "5", "--precision", "fp32", "--device", "cpu", "--flip"]  # fmt: skip
    one = CliRunner().invoke(main, [*common, "--batch", "8", "-o", f"{tmp_path}/one"])
    assert one.exit_code == 0, one.output
    # --multi_gpu is Accelerate's word for several local processes, also on CPUs.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
              "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
              "--dynamo_backend", "no", "--main_process_port", "0", "-m", "ddpm_edge"]  # fmt: skip
    two = subprocess.run(
        [*launch, *common, "--batch", "4", "-o", f"{tmp_path}/two"],
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("done after 40 steps, 320 images") == 1  # process 0 alone speaks
    losses = [[line["loss"] for line in runs.read_metrics(tmp_path / w)] for w in ("one", "two")]
    # Sums in another order, 40 steps of Adam: measured 1e-6; losses are written with 6 digits.
    assert np.abs(np.subtract(*losses)).max() <= 2e-5
    ours, theirs = state(tmp_path / "two"), state(tmp_path / "one")
    mine, other = (
        torch.cat([s[k].flatten() for k in s if k.startswith("model.")]) for s in (ours, theirs)
    )
    # A norm: Adam moves a weight whose gradient is but rounding by its sign, a whole step.
    assert float((mine - other).norm() / other.norm()) <= 1e-3
    assert runs.read_config(tmp_path / "two")["processes"] == 2


# Training that fails


class Bomb(torch.nn.Module):
    """A network that answers NaN from its n-th call on."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 1, 1)
        self.calls = calls

    def forward(self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        self.calls -= self.training
        return self.conv(x) * (1.0 if self.calls > 0 else torch.nan)


def bomb() -> Bomb:
    return Bomb(61)


@pytest.fixture
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """This file as an importable module, for the factory's name."""
    monkeypatch.setitem(sys.modules, "bombs", sys.modules[__name__])


@pytest.mark.usefixtures("_here")
def test_a_loss_that_is_nan_stops_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "CHECKPOINT_SECONDS", 0.0)  # one every step
    data, run = blobs(), tmp_path / "run"
    message = (
        r"the loss of step 61 is nan; give a lower --lr than 0.002, or --precision fp32; the last "
        rf"good checkpoint is of step 60; start a new run from it with --init-from {run}"
    )
    with pytest.raises(TrainingError, match=message):
        list(runs.record(run, data, "bombs:bomb", SCHEDULE, OPTIONS))
    assert runs.load_run(run).step == 60
    assert all(v.isfinite().all() for v in state(run).values())


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize("stop", ["end", "close"])
def test_a_loss_that_is_nan_never_becomes_a_checkpoint(tmp_path: Path, stop: str) -> None:
    data, run = blobs(), tmp_path / "run"
    training = runs.record(run, data, "bombs:bomb", SCHEDULE, OPTIONS)
    if stop == "end":
        with pytest.raises(TrainingError, match="no checkpoint was written before that"):
            list(training)
    else:
        for _ in range(70):
            next(training)
        training.close()
    assert not checkpoint_path(run).exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_out_of_memory_has_a_remedy(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    from ddpm_edge.train.trainer import Algorithm1

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Algorithm1, "loss", fail)
    data = blobs()
    model = torch.nn.Linear(1, 1)
    with pytest.raises(TrainingError, match="out of memory with 8 images a step; give a smaller"):
        next(train(Training(model), data, SCHEDULE, OPTIONS))


def test_other_errors_pass() -> None:
    data = blobs()
    with pytest.raises(TypeError, match="forward"):
        next(train(Training(torch.nn.Linear(1, 1)), data, SCHEDULE, OPTIONS))


class Net(torch.nn.Module):
    """Takes a label and answers with `out` channels."""

    def __init__(self, out: int = 1) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(1, out, 1)

    def forward(self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def two_channels() -> Net:
    return Net(2)


def frozen() -> torch.nn.Module:
    return Net().requires_grad_(False)


def failing() -> Net:
    return Net("two")  # type: ignore[arg-type]


instance = Net()


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(
    ("name", "labelled", "error", "message"),
    [
        ("two_channels", True, ExportError, r"answers \(2, 2, 8, 8\) to x \(2, 1, 8, 8\)"),
        ("instance", False, ExportError, r"cannot be evaluated as forward\(x, t\)"),
        ("frozen", True, ConfigError, "no parameter to train"),
        ("failing", True, ConfigError, "bombs:failing failed: TypeError"),
    ],
)
def test_networks_of_one_s_own_are_checked_before_they_train(
    tmp_path: Path, name: str, labelled: bool, error: type[Exception], message: str
) -> None:
    data = blobs() if labelled else replace(blobs(), labels=None, class_names=())
    with pytest.raises(error, match=message):
        next(runs.record(tmp_path / "run", data, f"bombs:{name}", SCHEDULE, OPTIONS))
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("_here")
def test_a_network_of_one_s_own_trains_resumes_and_is_read_back(tmp_path: Path) -> None:
    data, run = blobs(), tmp_path / "run"
    list(runs.record(run, data, "bombs:instance", SCHEDULE, replace(OPTIONS, steps=3, batch=4)))
    assert [s.step for s in runs.resume(run, data, steps=5)] == [4, 5]
    assert isinstance(runs.load_run(run).model, Net)


def test_what_fails_before_a_checkpoint_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("ddpm_edge.train.trainer.Algorithm1.loss", fail)
    data, mine = blobs(), tmp_path / "mine"
    mine.mkdir()
    for run in (tmp_path / "new", mine):
        with pytest.raises(TrainingError, match="out of memory"):
            next(runs.record(run, data, config(data), SCHEDULE, OPTIONS))
    assert os.listdir(tmp_path) == ["mine"]  # an empty directory of the user's stays
    assert os.listdir(mine) == []


# The command line


def test_train_stop_resume_export(tmp_path: Path) -> None:
    data = blobs()
    np.savez(tmp_path / "set.npz", images=data.images[:, 0], labels=data.labels)
    run = f"{tmp_path}/run"

    def cli(*arguments: str) -> str:
        result = CliRunner().invoke(main, list(arguments))
        return f"{result.exit_code} {result.output}"

    new = ["train", "--data", f"{tmp_path}/set.npz", "--preset", "tiny", "--steps", "3", "--val",
           "0.2", "--batch", "4", "-o", run]  # fmt: skip
    output = cli(*new)
    assert output.startswith("0 set: ")
    assert "more held out" in output
    held_out = runs.read_config(Path(run))["validation"]
    assert 1 <= len(held_out) < 40
    assert "exists and is not empty; give a new directory, or go on with --resume" in cli(*new)
    output = cli("train", "-o", run, "--resume", "--steps", "6")
    assert "done after 6 steps" in output, output
    refused = cli("train", "-o", run, "--resume", "--lr", "1", "--preset", "tiny")
    assert refused.startswith("2 ")
    assert "--preset, --lr cannot change in a resumed run" in " ".join(refused.split())
    assert "already trained to its end" in cli("train", "-o", run, "--resume")
    assert "is not a training run" in cli("train", "-o", f"{tmp_path}/none", "--resume")
    assert "give --data, or --resume" in cli("train", "-o", f"{tmp_path}/none", "--steps", "1")
    moved = tmp_path / "moved.npz"
    (tmp_path / "set.npz").rename(moved)
    assert "no data at" in cli("train", "-o", run, "--resume", "--steps", "8")
    assert "done after 8 steps" in cli(
        "train", "-o", run, "--resume", "--steps", "8", "--data", str(moved)
    )
