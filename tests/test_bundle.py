"""The closed list of files, strict JSON, atomic writes."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import rewrite

from ddpm_edge import Bundle, Generator, bundle, files
from ddpm_edge.bundle import BUILT_IN, write_bundle
from ddpm_edge.errors import BundleError
from ddpm_edge.manifest import MANIFEST, Manifest
from ddpm_edge.schedule import Schedule

MANIFEST_OF_TWO = Manifest(
    name="two",
    sample_shape=(1, 4, 4),
    schedule=Schedule.linear(),
    prediction="eps",
    timestep_offset=-1,
    class_names=("a", "b"),
    plan={"sampler": "ddim", "steps": 5},
    variants={"fp32": {"file": "unet.onnx"}},
    training={"steps": 3},
    licence="CC0-1.0",
)


def test_round_trip(tmp_path: Path) -> None:
    written = write_bundle(tmp_path / "b", MANIFEST_OF_TWO, {"unet.onnx": b"model"})
    opened = Bundle.open(tmp_path / "b")
    assert opened.manifest.to_dict() == MANIFEST_OF_TWO.to_dict()
    assert opened.read("unet.onnx") == b"model"
    assert opened.digest == written.digest
    assert sorted(os.listdir(tmp_path)) == ["b"]  # no temporary files stay


@pytest.mark.parametrize(("has", "null"), [(True, 2), (False, None)])
def test_null_label(tmp_path: Path, has: bool, null: int | None) -> None:
    manifest = replace(MANIFEST_OF_TWO, has_null_label=has)
    read = write_bundle(tmp_path / "b", manifest, {"unet.onnx": b"model"}).manifest
    assert (read.null_label, read.labels) == (null, 2 + has)
    assert json.loads((tmp_path / "b" / MANIFEST).read_text())["null_label"] == null
    assert read == Manifest(**{**vars(manifest), "schedule": read.schedule})


def test_variance_is_what_ddpm_takes_by_default(tmp_path: Path) -> None:
    manifest = replace(MANIFEST_OF_TWO, variance="beta-tilde")
    read = write_bundle(tmp_path / "b", manifest, {"unet.onnx": b"model"}).manifest
    assert read.make_plan().name == "ddim(steps=5, eta=0)"  # has no such option
    assert read.make_plan(sampler="ddpm", steps=5).name == "ddpm(steps=5, variance=beta-tilde)"
    assert (
        read.make_plan(sampler="ddpm", steps=200, variance="beta").name
        == "ddpm(steps=200, variance=beta)"
    )
    assert Bundle.open().manifest.variance == "beta"  # of a bundle without the field
    stored = replace(manifest, plan={"sampler": "ddpm", "steps": 200, "variance": "beta"})
    assert stored.make_plan().name == "ddpm(steps=200, variance=beta)"


def test_built_in_bundle_is_whole_and_small() -> None:
    opened = Bundle.open()
    for name in opened.files:
        opened.read(name)
    assert sum(entry["size"] for entry in opened.files.values()) <= 10_000_000


def test_missing_file(copy: Path) -> None:
    (copy / "unet.onnx").unlink()
    with pytest.raises(BundleError, match=r"lacks 'unet.onnx'; copy the bundle again"):
        Generator.load(copy)


def test_truncated_file(copy: Path) -> None:
    os.truncate(copy / "unet.onnx", 1000)
    with pytest.raises(BundleError, match=r"unet.onnx has 1000 bytes, expected \d+"):
        Generator.load(copy)


@pytest.mark.parametrize("where", [0, 1_000, -1])
def test_flipped_bit_is_refused_before_a_parser_sees_it(
    copy: Path, where: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytearray((copy / "unet.onnx").read_bytes())
    data[where] ^= 1
    (copy / "unet.onnx").write_bytes(data)
    monkeypatch.setattr("ddpm_edge.generator.open_engine", lambda *_, **__: pytest.fail("parsed"))
    with pytest.raises(BundleError, match=r"unet.onnx was changed or damaged .* SHA-256"):
        Generator.load(copy)


def test_extra_file(copy: Path) -> None:
    (copy / "weights.bin").write_bytes(b"")
    with pytest.raises(BundleError, match=r"holds 'weights.bin', which bundle.json does not list"):
        Generator.load(copy)


@pytest.mark.parametrize("name", ["unet.onnx", MANIFEST])
def test_linked_file(copy: Path, name: str, tmp_path: Path) -> None:
    (copy / name).rename(tmp_path / name)
    (copy / name).symlink_to(tmp_path / name)
    with pytest.raises(BundleError, match=r"is a link|has no file bundle.json"):
        Generator.load(copy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": NaN}', "NaN is not JSON"),
        ('{"format": 1, "x": Infinity}', "Infinity is not JSON"),
        ('{"format": 1, "x": 1e999}', "1e999 is out of range"),
        ('{"format": 1, "name": "a", "name": "b"}', "duplicate key 'name'"),
        ('{"format": 1', "not valid JSON"),
        ("\x80", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "must hold a JSON object; got list"),
        ("{}", "bundle format None, this ddpm-edge reads 1; export the model again"),
        ('{"format": 2}', "bundle format 2, this ddpm-edge reads 1; pip install --upgrade"),
        ('{"format": 1, "digest": "0"}', "was changed since the export"),
        (" " * (bundle.MAX_MANIFEST_BYTES + 1), "larger than"),
    ],
)
def test_bad_manifest_text(copy: Path, text: str, message: str) -> None:
    (copy / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(BundleError, match=message):
        Bundle.open(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"remove": "name"}, "no field 'name'"),
        ({"name": 3}, "expected str, got 3"),
        ({"sample_shape": [1, 28]}, r"sample_shape \(1, 28\)"),
        ({"sample_shape": [1, True, 28]}, "expected int, got True"),
        ({"schedule": {"rule": "linear", "T": 0}}, "T must be a whole number >= 1; got 0"),
        ({"schedule": {"rule": "mine"}}, "got 'mine'"),
        ({"prediction": "score"}, "must be one of eps, x0, v, velocity; got 'score'"),
        ({"timestep": {"offset": -1, "dtype": "float32"}}, "timestep.dtype = 'float32'"),
        ({"null_label": 3}, "null_label = 3; this version knows 10"),
        ({"null_label": 0}, "null_label = 0; this version knows 10"),
        ({"class_names": []}, "null_label = 10; this version knows None"),
        ({"variance": "small"}, "variance 'small'; expected one of beta, beta-tilde"),
        ({"variance": 1}, "expected str, got 1"),
        ({"noise_version": 2}, "noise_version = 2"),
        ({"value_range": [0, 1]}, r"value_range = \[0, 1\]"),
        ({"variants": {}}, "lists no variants"),
        ({"variants": {"fp16": {"file": "fp16.onnx"}}}, "variant 'fp16' has no file"),
        ({"files": {"unet.onnx": {"size": "big", "sha256": ""}}}, "list of files is not valid"),
        ({"plan": {"sampler": "magic"}}, "got 'magic'"),
    ],
)
def test_bad_manifest_fields(copy: Path, changes: dict[str, object], message: str) -> None:
    rewrite(copy, **changes)
    with pytest.raises(BundleError, match=message):
        Bundle.open(copy)


def test_a_listed_path_outside_is_not_followed(copy: Path) -> None:
    (copy.parent / "secret").write_bytes(b"1")
    files = json.loads((copy / MANIFEST).read_text())["files"]
    rewrite(copy, files=files | {"../secret": {"size": 1, "sha256": "0"}})
    with pytest.raises(BundleError, match=r"'../secret' is not a plain file name"):
        Bundle.open(copy)


def test_paths_that_are_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such directory"):
        Bundle.open(tmp_path / "nothing")
    with pytest.raises(BundleError, match="has no file bundle.json"):
        Bundle.open(tmp_path)
    with pytest.raises(BundleError, match="is a file; a bundle is the directory"):
        Bundle.open(BUILT_IN / "unet.onnx")


def test_unknown_variant() -> None:
    with pytest.raises(BundleError, match="has no variant 'fp64'; its variants are fp32"):
        Bundle.open().model("fp64")


def test_write_does_not_touch_what_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(BundleError, match="exists and is not a bundle"):
        write_bundle(tmp_path, MANIFEST_OF_TWO, {"unet.onnx": b""})
    with pytest.raises(BundleError, match="is not a directory"):
        write_bundle(tmp_path / "photo.jpg", MANIFEST_OF_TWO, {"unet.onnx": b""})
    assert (tmp_path / "photo.jpg").read_bytes() == b"mine"
    assert os.listdir(tmp_path) == ["photo.jpg"]


def test_failed_write_leaves_the_old_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "b"
    write_bundle(path, MANIFEST_OF_TWO, {"unet.onnx": b"old"})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_bundle(path, MANIFEST_OF_TWO, {"unet.onnx": b"new"})
    assert Bundle.open(path).read("unet.onnx") == b"old"
    assert os.listdir(tmp_path) == ["b"]


def test_replacement_without_renameat2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: object())
    for content in (b"one", b"two"):
        write_bundle(tmp_path / "b", MANIFEST_OF_TWO, {"unet.onnx": content})
        assert Bundle.open(tmp_path / "b").read("unet.onnx") == content
    assert os.listdir(tmp_path) == ["b"]


def test_what_cannot_be_read_back_does_not_take_a_good_bundle_s_place(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", MANIFEST_OF_TWO, {"unet.onnx": b"old"})
    wrong = replace(MANIFEST_OF_TWO, class_names=(0, 1))  # type: ignore[arg-type]
    with pytest.raises(BundleError, match="expected str, got 0"):
        write_bundle(tmp_path / "b", wrong, {"unet.onnx": b"new"})
    assert Bundle.open(tmp_path / "b").read("unet.onnx") == b"old"
    assert os.listdir(tmp_path) == ["b"]


def test_a_replacement_that_fails_half_way_puts_the_old_bundle_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.sys, "platform", "other")  # no swap in one step there
    path = tmp_path / "b"
    write_bundle(path, MANIFEST_OF_TWO, {"unet.onnx": b"old"})
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp" and target == path:
            raise OSError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Permission denied"):
        write_bundle(path, MANIFEST_OF_TWO, {"unet.onnx": b"new"})
    assert Bundle.open(path).read("unet.onnx") == b"old"
    assert os.listdir(tmp_path) == ["b"]


@pytest.mark.parametrize("parity", [3, {"answers": 3}, {"answers": {}}, {"answers": {
    "max_abs_error": "none", "tolerance": 1.0}}, {"answers": {"max_abs_error": 0.0}},
    {"answers": {"max_abs_error": 0.0, "tolerance": 1.0, "more": 1}}])  # fmt: skip
def test_parity_figures_are_two_numbers(copy: Path, parity: object) -> None:
    rewrite(copy, variants={"fp32": {"file": "unet.onnx", "parity": parity}})
    with pytest.raises(BundleError, match=r"bundle.json"):
        Bundle.open(copy)
