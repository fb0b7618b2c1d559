"""The command line: what it writes and prints, its help, its errors and exit codes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from ddpm_edge import Generator, files, save_image
from ddpm_edge.bundle import BUILT_IN
from ddpm_edge.cli import main
from ddpm_edge.images import read_image

QUICK = ["--steps", "2", "--seed", "5"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(autouse=True)
def _needs_a_runtime() -> None:
    pytest.importorskip("onnxruntime")


def test_sample_writes_a_grid(tmp_path: Path) -> None:
    result = run("sample", "-n", 5, *QUICK, "-o", tmp_path / "out.png")
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "out.png") as image:
        assert image.mode == "L"
        assert image.size == (3 * 58 + 2, 2 * 58 + 2)  # 3 columns, 28 pixels twice as large, gaps
    lines = result.output.splitlines()
    assert lines[0] == f"{tmp_path}/out.png: 5 images, seed 5"
    assert lines[1].startswith("dpmpp(steps=2, order=2, sde=True, spacing=logsnr, clip=1), ")
    assert lines[2] == "Next: ddpm-edge info"


def test_sample_writes_an_array_and_single_images(tmp_path: Path, generator: Generator) -> None:
    expected = generator.sample(3, seed=5, steps=2, label=["bag", 7, "bag"])
    labels = ["--label", "bag", "--label", "7"]
    assert run("sample", "-n", 3, *QUICK, *labels, "-o", tmp_path / "a.npy").exit_code == 0
    assert (np.load(tmp_path / "a.npy") == expected).all()
    assert run("sample", "-n", 3, *QUICK, *labels, "-o", tmp_path / "new" / "dir").exit_code == 0
    files = sorted((tmp_path / "new" / "dir").iterdir())
    assert [f.name for f in files] == ["00000.png", "00001.png", "00002.png"]
    for file, image in zip(files, expected, strict=True):
        with Image.open(file) as opened:
            assert (np.asarray(opened) == image[:, :, 0]).all()


def test_sample_options_reach_the_plan(tmp_path: Path) -> None:
    options = ["--sampler", "ddpm", "--variance", "beta-tilde", "--steps", "3", "--clip", "off"]
    where = ["--runtime", "onnxruntime", "--device", "cpu", "--threads", "1", "--batch", "2"]
    result = run("sample", "-n", 3, *options, *where, "--json", "-o", tmp_path / "a.npy")
    assert result.exit_code == 0, result.output
    report = json.loads(result.output)
    assert report["plan"] == "ddpm(steps=3, variance=beta-tilde)"
    assert report["images"] == report["evaluations"] == 3
    assert report["runtime"] == "onnxruntime on cpu"
    again = run("sample", "-n", 3, *options, "--seed", report["seed"], "-o", tmp_path / "b.npy")
    assert again.exit_code == 0
    assert (np.load(tmp_path / "a.npy") == np.load(tmp_path / "b.npy")).mean() > 0.999


def test_one_image_is_written_as_it_is(tmp_path: Path, generator: Generator) -> None:
    assert run("sample", "-n", 1, *QUICK, "-o", tmp_path / "one.png").exit_code == 0
    expected = generator.sample(1, seed=5, steps=2)[0]
    assert (read_image(tmp_path / "one.png", 1) == expected).all()


@pytest.fixture
def photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """photo.png 28 x 28, small.png 14 x 14, mask.png, in the working directory."""
    monkeypatch.chdir(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (28, 28, 1), np.uint8)
    mask = np.zeros((28, 28), np.uint8)
    mask[8:18, 9:19] = 255
    save_image(image, "photo.png")
    save_image(mask, "mask.png")
    save_image(image[::2, ::2], "small.png")
    return image


def test_inpaint(photo: np.ndarray, generator: Generator) -> None:
    result = run("inpaint", "photo.png", "--mask", "mask.png", *QUICK, "-o", "out.png")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("out.png: 1 image, seed 5\n")
    mask = read_image("mask.png", 1)[..., 0]
    expected = generator.inpaint(photo, mask, seed=5, steps=2)[0]
    assert (read_image("out.png", 1) == expected).all()
    assert (expected[mask == 0] == photo[mask == 0]).all()
    masks = ["inpaint", "photo.png", "--mask", "mask.png", "--mask", "mask.png", *QUICK]
    assert run(*masks, "-o", "two").exit_code == 0
    assert len(list(Path("two").iterdir())) == 2
    many = ["inpaint", "photo.png", "photo.png", "--mask", "mask.png", "--mask", "mask.png"]
    guided = ["--label", "bag", "--guidance", 2, "--guidance-interval", 1, 500]
    result = run(*many, *guided, *QUICK, "--json", "-o", "new")
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["images"] == len(list(Path("new").iterdir())) == 2


def test_upscale_and_vary(photo: np.ndarray, generator: Generator) -> None:
    small = photo[::2, ::2]
    result = run("upscale", "small.png", "-n", 3, "--travel-repeat", 2, *QUICK, "-o", "out.npy")
    assert result.exit_code == 0, result.output
    expected = generator.upscale(small, 2, n=3, seed=5, steps=2, travel_repeat=2)
    assert (np.load("out.npy") == expected).all()
    assert run("vary", "photo.png", "--strength", 0, "-o", "same.png").exit_code == 0
    assert (read_image("same.png", 1) == photo).all()
    assert run("vary", "photo.png", "-n", 2, *QUICK, "-o", "out.npy").exit_code == 0
    assert (np.load("out.npy") == generator.vary(photo, 0.5, n=2, seed=5, steps=2)).all()


def test_a_deadline_on_the_command_line(tmp_path: Path) -> None:
    result = run("sample", "-n", 2, "--deadline-ms", 0.001, "-o", tmp_path / "a.png")
    assert "stopped by the deadline" in result.output.splitlines()[0]
    result = run("sample", "-n", 2, "--deadline-ms", 0.001, "--json", "-o", tmp_path / "a.png")
    assert json.loads(result.output)["stopped"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["inpaint", "photo.png"], 2, "Missing option '--mask'"),
        (["inpaint", "--mask", "mask.png"], 2, "Missing argument 'IMAGES...'"),
        (["inpaint", "photo.png", "--mask", "photo.png"], 2, "a mask must hold bools, 0 and 1"),
        (["inpaint", "photo.png", "--mask", "small.png"], 2, "a mask must hold bools"),
        (["inpaint", "small.png", "--mask", "mask.png"], 2, "got (1, 14, 14, 1): crop or resize"),
        (["inpaint", "none.png", "--mask", "mask.png"], 1, "No such file or directory: 'none.png'"),
        (["inpaint", "notes.txt", "--mask", "mask.png"], 1, "notes.txt is not an image of a forma"),
        (["inpaint", "half.png", "--mask", "mask.png"], 1, "half.png cannot be read as an image"),
        (
            ["inpaint", "deep.png", "--mask", "mask.png"],
            1,
            "deep.png has 16 or more bits",
        ),
        (["vary", "photo.png", "small.png"], 2, "small.png is 14 x 14, but photo.png is 28 x 28"),
        (["vary", "photo.png", "photo.png", "-n", "3"], 2, "got 2 images or states in task for n"),
        (["vary", "photo.png", "--strength", "2"], 2, "strength must be in 0..1; got 2.0"),
        (["upscale", "small.png", "--factor", "3"], 2, "factor 3 does not divide 28 x 28"),
        (["upscale", "small.png", "--bundle", "none"], 1, "no bundle at none: no such directory"),
    ],
)
def test_errors_of_images_from_images(
    photo: np.ndarray, arguments: list[str], code: int, message: str
) -> None:
    Path("notes.txt").write_text("mine")
    Path("half.png").write_bytes(Path("photo.png").read_bytes()[:300])
    Image.fromarray(np.zeros((28, 28), np.uint16)).save("deep.png")
    before = sorted(Path().iterdir())
    result = run(*arguments, "-o", "out.png")
    assert result.exit_code == code, result.output
    assert message in " ".join(result.output.split())
    assert sorted(Path().iterdir()) == before


def test_info() -> None:
    result = run("info")
    assert result.exit_code == 0, result.output
    for text in ("28 x 28, 1 channel", "ankle-boot", "linear(T=1000", "ddpm-edge train --data"):
        assert text in result.output
    assert json.loads(run("info", "--json").output)["null_label"] == 10
    table = run("info", "--plan", "--sampler", "ddim", "--steps", 4).output.splitlines()
    assert table[0].startswith("ddim(steps=4, eta=0, clip=1)")
    assert [line.split()[1] for line in table[2:]] == ["1000", "750", "500", "250"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["sample", "-n", "0", "-o", "a.png"], 2, "n must be a whole number >= 1; got 0"),
        (
            ["sample", "--steps", "-3", "-o", "a.png"],
            2,
            "steps must be a whole number >= 1; got -3",
        ),
        (["sample", "--steps", "2000", "-o", "a.png"], 2, "got 2000"),
        (["sample", "--sampler", "dpmpp_2m", "-o", "a.png"], 2, "did you mean 'dpmpp'"),
        (["sample", "--spacing", "100,200", "-o", "a.png"], 2, "must descend; got 200 after 100"),
        (["sample", "--spacing", "100,x", "-o", "a.png"], 2, "--spacing must be one of trailing"),
        (["info", "--plan", "--clip", "of"], 2, "(at the command line: off); got 'of'"),
        (["info", "--plan", "--spacing", "kara"], 2, "did you mean 'karras'"),
        (
            ["info", "--plan", "--order", "9", "--sampler", "unipc"],
            2,
            "order must be a whole",
        ),
        (["sample", "--seed", "1.5", "-o", "a.png"], 2, "'1.5' is not a valid integer"),
        (["sample", "--seed", "-1", "-o", "a.png"], 2, "seed must be in 0..2**64 - 1; got -1"),
        (["sample", "--label", "hat", "-o", "a.png"], 2, "no label 'hat'; labels are 0 t-shirt"),
        (
            ["sample", "--clip", "hard", "-o", "a.png"],
            2,
            "clip must be a number above 0, a percentile",
        ),
        (["sample", "--threads", "0", "-o", "a.png"], 2, "threads must be a whole number >= 1"),
        (["sample", "--guidance", "2", "-o", "a.png"], 2, "guidance needs a label"),
        (["sample", "-o", "a.jpg"], 2, "end the name in .png (one grid) or .npy"),
        (["sample"], 2, "Missing option '-o'"),
        (["sample", "-o", "nowhere/a.png"], 1, "there is no directory nowhere"),
        (["sample", "-o", "file.txt/a.png"], 1, "file.txt is a file"),
        (["sample", "nothing", "-o", "a.png"], 1, "no bundle at nothing: no such directory"),
        (["sample", "file.txt", "-o", "a.png"], 1, "file.txt is a file; a bundle is the directory"),
        (["sample", "--device", "tpu", "-o", "a.png"], 1, "ONNX Runtime has no device 'tpu'"),
        (["sample", "--variant", "int4", "-o", "a.png"], 1, "has no variant 'int4'"),
        (["info", "file.txt"], 1, "is a file; a bundle is the directory"),
        (["info", "bundle"], 1, "unet.onnx was changed or damaged since the export"),
        (["infos"], 2, "No such command 'infos'"),
    ],
)
def test_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file.txt").write_text("mine")
    if "bundle" in arguments:
        shutil.copytree(BUILT_IN, "bundle")
        with open("bundle/unet.onnx", "r+b") as file:
            file.write(b"\xff")
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.output.split())
    left = {p.name for p in tmp_path.iterdir()} - {"bundle"}
    assert left == {"file.txt"}  # nothing else was left behind


def test_unwritable_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.os, "access", lambda *_: False)  # CI may run as root
    for output in (tmp_path / "a.png", tmp_path / "new" / "dir"):
        result = run("sample", "-o", output)
        assert result.exit_code == 1
        assert f"no permission to write in {tmp_path}" in " ".join(result.output.split())


def test_a_full_disk_is_an_error_not_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ddpm_edge.images.write_bytes", full)
    result = run("sample", "-n", 1, *QUICK, "-o", tmp_path / "a.png")
    assert result.exit_code == 1
    assert "No space left on device" in result.output


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_has_help_with_an_example(name: str) -> None:
    command = main.commands[name]
    assert f"Example:  ddpm-edge {name}" in (command.help or "")
    assert all(p.help for p in command.params if isinstance(p, click.Option))
    assert run(name, "--help").exit_code == 0
    assert name in (Path(__file__).parents[1] / "README.md").read_text()


def test_version_and_verbose(tmp_path: Path) -> None:
    assert run("--version").output.startswith("ddpm-edge, version ")
    assert run("-v", "sample", "-n", 1, *QUICK, "-o", tmp_path / "a.png").exit_code == 0


def test_presets_on_the_command_line_are_all_there_are() -> None:
    pytest.importorskip("torch")
    from ddpm_edge.train.unet import PRESETS

    option = next(p for p in main.commands["train"].params if p.name == "preset")
    assert list(option.type.choices) == list(PRESETS)  # type: ignore[attr-defined]


def test_train_refuses_before_it_starts(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    result = run("train", "--data", "fashion-mnist", "-o", tmp_path / "run")
    assert result.exit_code == 2
    assert "give steps or minutes" in result.output
    result = run("train", "--data", "nothing", "--steps", 1, "-o", tmp_path / "run")
    assert result.exit_code == 1
    assert "no data at 'nothing'" in result.output
    assert not (tmp_path / "run").exists()


def test_a_reader_that_has_enough() -> None:
    """As `ddpm-edge info | head -1`."""
    command = [sys.executable, "-m", "ddpm_edge", "info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
