"""A small classifier whose last features judge generated images.

    python -m ddpm_edge.train.features --data fashion-mnist --epochs 12 --seed 0 -o FILE.onnx

trains it on the training images, exports it and measures the exported file on the test images,
which nothing before that has seen. `ddpm_edge.features` runs the file, without torch.
"""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Iterator

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ddpm_edge.arrays import Int64, UInt8
from ddpm_edge.data import Dataset, load
from ddpm_edge.errors import DataError, DdpmEdgeError, EngineError
from ddpm_edge.features import FeatureNetwork
from ddpm_edge.files import write_bytes
from ddpm_edge.train.draws import batches
from ddpm_edge.train.trainer import to_network
from ddpm_edge.train.workers import Workers, resolve_device, resolve_precision

BATCH = 128
LEARNING_RATE = 4e-3  # peak of the one cycle
WEIGHT_DECAY = 0.02
LABEL_SMOOTHING = 0.05
SHIFT = 2  # pixels, at most, up or down and left or right


class Classifier(nn.Module):
    """Convolutions, the mean over all positions, and a linear layer.

    Made for runtimes: each batch normalisation folds into its convolution, and the first
    convolution already halves the image.

    Args:
        channels: of the images, whose height and width are 8 or more.
        classes: number of labels.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            block(channels, 32, kernel=5, stride=2),
            block(32, 48),
            nn.MaxPool2d(2),
            block(48, 64),
            block(64, 96),
            block(96, 96),
        )
        self.head = nn.Linear(96, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map x (B, channels, H, W) in [-1, 1] to features >= 0 (B, 96), logits (B, classes)."""
        features = self.body(x).mean(dim=(2, 3))
        return features, self.head(features)


def block(channels: int, out: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, batch normalisation, ReLU."""
    convolution = nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU(inplace=True))


def train(model: nn.Module, data: Dataset, epochs: int) -> Iterator[float]:
    """Train `model` in place; yields the mean loss of every epoch.

    The model must already be on its device, and the data have labels. Random numbers come from
    torch's global generators, seeded by the caller (`torch.manual_seed`).
    """
    device = next(model.parameters()).device
    bf16 = resolve_precision("auto", device) == "bf16"
    images = torch.from_numpy(data.images).to(device)  # uint8 (N, C, H, W)
    labels = torch.from_numpy(data.labels).to(device)  # int64 (N,)
    order = batches(
        len(images), min(BATCH, len(images)), Workers(device), torch.initial_seed(), done=0
    )
    steps = max(len(images) // BATCH, 1)  # an epoch
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, epochs=epochs, steps_per_epoch=steps
    )
    model.train()
    for _ in range(epochs):
        total = torch.zeros((), device=device)
        for index in itertools.islice(order, steps):
            x = to_network(augmented(images[index]))
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                _, logits = model(x)
            loss = F.cross_entropy(logits.float(), labels[index], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            cycle.step()
            total += loss.detach()
        yield float(total) / steps


def augmented(images: Tensor) -> Tensor:
    """Images uint8 (B, C, H, W), each shifted by its own few pixels and, every second, mirrored."""
    count, _, height, width = images.shape
    device = images.device
    windows = F.pad(images, (SHIFT,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    down, right = torch.randint(2 * SHIFT + 1, (2, count), device=device)
    shifted = windows[torch.arange(count, device=device), :, down, right]  # (B, C, H, W)
    mirror = torch.rand(count, device=device) < 0.5
    return torch.where(mirror[:, None, None, None], shifted.flip(3), shifted)


def accuracy(network: FeatureNetwork, images: UInt8, labels: Int64) -> float:
    """Share of images uint8 (N, C, H, W) whose largest logit is that of their label (N,)."""
    logits = network(images.transpose(0, 2, 3, 1)).logits
    if logits is None:
        raise EngineError("the network is no classifier: it has no logits")
    return float(np.mean(logits.argmax(axis=1) == labels))


@click.command()
@click.option("--data", required=True, help="fashion-mnist, or a folder of the four IDX files.")
@click.option("--epochs", type=click.IntRange(1), default=12, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("-o", "--output", required=True, help="The .onnx file to write.")
def main(data: str, epochs: int, seed: int, device: str, output: str) -> None:
    """Train the feature network, export it, and measure the export on the test images."""
    from ddpm_edge.export.to_onnx import onnx_bytes, onnx_model

    try:
        training, test = load(data, "train"), load(data, "test")
        if training.labels is None or test.labels is None:
            raise DataError(f"{data} has no labels; give a folder of IDX files")
        torch.manual_seed(seed)
        channels, height, width = training.sample_shape
        model = Classifier(channels, len(training.class_names)).to(resolve_device(device))
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for epoch, loss in enumerate(train(model, training, epochs), start=1):
            click.echo(f"epoch {epoch} of {epochs}: mean loss {loss:.4f}")
        example = {"x": np.zeros((2, channels, height, width), np.float32)}
        proto = onnx_model(model.eval(), example, ["features", "logits"])
        network = FeatureNetwork(proto.SerializeToString(), device="cpu")
        share = accuracy(network, test.images, test.labels)
        command = ["python", "-m", "ddpm_edge.train.features", "--data", data]
        command += ["--epochs", str(epochs), "--seed", str(seed), "--device", device]
        properties = {
            "data": training.name,
            "class_names": json.dumps(training.class_names),
            "test_accuracy": f"{share:.4f}",
            "test_images": str(len(test.images)),
            "epochs": str(epochs),
            "seed": str(seed),
            "command": shlex.join(command),
            "torch": torch.__version__,
        }
        content = onnx_bytes(proto, properties)
        write_bytes(output, content)
    except (DdpmEdgeError, OSError) as error:
        raise click.ClickException(str(error)) from error
    parameters = sum(p.numel() for p in model.parameters())
    click.echo(
        f"{output}: test accuracy {share:.2%} of {len(test.images)} images, {parameters} "
        f"parameters, {len(content)} bytes"
    )


if __name__ == "__main__":
    main()
