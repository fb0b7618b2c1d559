"""samples/jetson runs on a CPU as far as it can, and says nothing that the command line lacks."""

from __future__ import annotations

import configparser
import json
import os
import queue
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image

from ddpm_edge.cli import main

ROOT = Path(__file__).parents[1]
JETSON = ROOT / "samples" / "jetson"
SERVICE = JETSON / "service.py"
UNITS = sorted(JETSON.glob("*.service"))
BUILD, RUN = "ddpm-edge-build.service", "ddpm-edge.service"
PAGE = ROOT / "docs" / "jetson.md"
VENV = "/opt/ddpm-edge/venv/bin/"
CPU = ("--runtime", "onnxruntime", "--variant", "fp32")
SECONDS = 120.0  # to load and run 20 steps, which take one
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a Jetson runs Linux")


class Manager:
    """What systemd is to a service: a socket that it tells its state, and that is always read."""

    def __init__(self, address: str) -> None:
        self.environment = {"NOTIFY_SOCKET": address}
        self._said: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address.replace("@", "\0"))
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while said := self._socket.recv(1000).decode():
            self._said.put(said)

    def next(self) -> str:
        return self._said.get(timeout=SECONDS)

    def close(self) -> set[str]:
        """Listen no more; what was said that was not yet read."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.sendto(b"", self._socket.getsockname())
        self._thread.join(SECONDS)
        self._socket.close()
        return {self._said.get() for _ in range(self._said.qsize())}


@pytest.fixture(params=["a path", "an abstract name"])
def manager(request: pytest.FixtureRequest) -> Iterator[Manager]:
    with tempfile.TemporaryDirectory() as directory:  # shorter than tmp_path: at most 108 bytes
        address = f"{directory}/notify"
        yield Manager(address if request.param == "a path" else f"@{address}")


def start(*arguments: object, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, *(str(argument) for argument in arguments)]
    return subprocess.Popen(
        command,
        env=os.environ | environment,
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_service_is_short_and_says_that_it_was_not_run_on_a_jetson() -> None:
    assert len(SERVICE.read_text().splitlines()) <= 40
    for path in (*JETSON.iterdir(), PAGE):
        if path.is_file():
            assert re.search(r"not (built or )?run on a Jetson yet", path.read_text()), path


@linux
def test_service_makes_images_and_tells_systemd(tmp_path: Path, manager: Manager) -> None:
    pytest.importorskip("onnxruntime")
    arguments = (*CPU, "--output", tmp_path, "--every", 0.1, "--count", 2)
    process = start(SERVICE, *arguments, cwd=tmp_path, **manager.environment)
    assert manager.next() == "READY=1"
    assert manager.next() == "WATCHDOG=1"
    said, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors
    assert said == ""
    assert manager.close() == {"WATCHDOG=1"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000.png", "001.png"]
    images = []
    for path in sorted(tmp_path.iterdir()):
        with Image.open(path) as image:
            images.append(np.asarray(image))
    assert images[0].shape == (28, 28)
    assert (images[0] != images[1]).any()  # a seed each


@linux
@pytest.mark.parametrize("every", [0, 3600], ids=["at work", "asleep"])
def test_sigterm_ends_the_service_well(tmp_path: Path, every: int) -> None:
    pytest.importorskip("onnxruntime")
    with tempfile.TemporaryDirectory() as directory:
        manager = Manager(f"{directory}/notify")
        arguments = (*CPU, "--output", tmp_path, "--every", every)
        process = start(SERVICE, *arguments, cwd=tmp_path, **manager.environment)
        try:
            assert manager.next() == "READY=1"
            while not (tmp_path / "000.png").exists():
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
            manager.close()
    assert (process.returncode, errors) == (0, "")
    assert not list(tmp_path.glob(".*"))  # nothing half written


def test_without_systemd_the_service_runs_by_its_environment(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    asked = {"DDPM_EDGE_RUNTIME": "onnxruntime", "DDPM_EDGE_VARIANT": "fp32", "NOTIFY_SOCKET": ""}
    process = start(SERVICE, "--every", 0, "--count", 1, cwd=tmp_path, **asked)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors
    assert (tmp_path / "000.png").is_file()


def test_a_lost_gpu_ends_the_service_with_1(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    arguments = ["service.py", *CPU, "--output", str(tmp_path)]
    source = f"""
import runpy, sys
from ddpm_edge import Generator
from ddpm_edge.errors import EngineLostError

def lost(*_, **__):
    raise EngineLostError("the GPU is lost to this process")

Generator.run, sys.argv = lost, {arguments!r}
runpy.run_path({str(SERVICE)!r}, run_name="__main__")
"""
    process = start("-c", source, cwd=tmp_path)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert "EngineLostError: the GPU is lost to this process" in errors


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    assert parser.read(JETSON / name)
    return parser


def test_the_build_comes_first_and_both_use_one_cache() -> None:
    build, run = unit(BUILD), unit(RUN)
    assert build["Service"]["Type"] == "oneshot"
    assert build["Service"]["RemainAfterExit"] == "yes"
    assert run["Unit"]["Requires"] == run["Unit"]["After"] == BUILD
    assert run["Service"]["Type"] == "notify"
    assert run["Service"]["Restart"] == "on-failure"
    cache = f"DDPM_EDGE_CACHE=/var/cache/{build['Service']['CacheDirectory']}"
    for service in (build["Service"], run["Service"]):
        assert service["Environment"] == cache
        assert service["User"] == "ddpm-edge"  # an engine of another user is not read
        assert "PrivateDevices" not in service
    arguments = shlex.split(run["Service"]["ExecStart"])
    assert float(run["Service"]["WatchdogSec"]) > float(arguments[-1])  # --every
    state = f"/var/lib/{run['Service']['StateDirectory']}"
    assert arguments[arguments.index("--output") + 1] == state


def test_the_units_type_what_the_programs_take(tmp_path: Path) -> None:
    program, *words = shlex.split(unit(BUILD)["Service"]["ExecStart"])
    assert program == f"{VENV}ddpm-edge"
    assert words[0] == "build"
    main.commands["build"].make_context("build", words[1:])
    python, script, *words = shlex.split(unit(RUN)["Service"]["ExecStart"])
    assert (python, Path(script).name) == (f"{VENV}python", SERVICE.name)
    known = re.findall(r'add_argument\("(--[a-z]+)"', SERVICE.read_text())
    assert {word for word in words if word.startswith("-")} <= set(known)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    for path in UNITS:  # as they are, but for programs that exist
        text = path.read_text().replace(f"{VENV}ddpm-edge", "/bin/true")
        (tmp_path / path.name).write_text(text.replace(f"{VENV}python", "/bin/true"))
    command = ["systemd-analyze", "verify", "--man=no", *(path.name for path in UNITS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "ddpm-edge" not in done.stderr, done.stderr


def commands(path: Path) -> list[str]:
    """Whatever comes after "ddpm-edge" and is a command of it."""
    names = "|".join(main.commands)
    found = re.findall(rf"\bddpm-edge ((?:{names})\b[^`\n&|#]*)", path.read_text())
    return [text.strip() for text in found]


TYPED = [command for path in (PAGE, JETSON / "Dockerfile") for command in commands(path)]


@pytest.mark.parametrize("typed", sorted(set(TYPED)))
def test_commands_of_the_page_and_the_dockerfile_exist(typed: str) -> None:
    words = typed.split()
    command: click.Command = main
    while isinstance(command, click.Group):
        assert words, f"{typed} names no command"
        command = command.commands[words.pop(0)]
    known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
    assert {word for word in words if word.startswith("-")} <= known


def test_the_page_names_every_command_that_a_jetson_needs() -> None:
    named = {command.split()[0] for command in TYPED}
    assert {"export", "doctor", "build", "verify", "bench", "sample", "cache"} <= named
    assert len(PAGE.read_text().splitlines()) <= 140


def test_the_page_s_app_runs(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (app,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    where = '"my-bundle", runtime="tensorrt", variant="fp16", build="missing"'
    assert where in app
    here = app.replace(where, 'runtime="onnxruntime"')
    here = here.replace("deadline_ms=200", "deadline_ms=1e5")  # not of how quick this machine is
    process = start("-c", here, cwd=tmp_path)
    said, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors
    assert len(said.splitlines()) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png", "2.png"]


@linux
def test_the_entrypoint_builds_and_then_becomes_the_service(tmp_path: Path) -> None:
    text = (JETSON / "Dockerfile").read_text()
    entrypoint = json.loads(re.findall(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)[0])
    assert entrypoint[:2] == ["sh", "-c"]
    for name in ("ddpm-edge", "python3"):  # which say what they were called with
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        [*entrypoint, "--every", "2"],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [
        "ddpm-edge build /bundle --variant fp16 --max-batch 1",
        "python3 /opt/ddpm-edge/service.py /bundle --output /images --every 2",
    ]
    (copied,) = re.findall(r"^COPY (\S+) (\S+)$", text, re.MULTILINE)
    assert copied == (SERVICE.name, "/opt/ddpm-edge/service.py")
