"""Engines kept on the device: never a wrong, half or foreign one, and never a build lost."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from test_crash import outcomes

from ddpm_edge.errors import CacheWarning, EngineMissingError
from ddpm_edge.runtimes import engine_cache
from ddpm_edge.runtimes.engine_cache import EngineCache, EngineKey, cache_directory

KEY = EngineKey(
    model="ab" * 32,
    variant="fp16",
    flavour="tensorrt",
    version="10.13.3",
    device="Orin",
    compute_capability="8.7",
    profile=(1, 1, 32),
    flags={"optimization_level": 3, "workspace_mb": 1024},
)
OTHERS = {
    "model": "cd" * 32,
    "variant": "fp32",
    "flavour": "tensorrt_rtx",
    "version": "10.3.0",
    "device": "Thor",
    "compute_capability": "11.0",
    "profile": (1, 4, 8),
    "flags": {"optimization_level": 5, "workspace_mb": 1024},
}
ENGINE = bytes(range(256)) * 8
NOTHING = "no engine of this model was built here"
posix = pytest.mark.skipif(os.name != "posix", reason="links, owners and signals of POSIX")
linux = pytest.mark.skipif(sys.platform != "linux", reason="forks, and kills the children")


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "cache")


def put(cache: EngineCache, key: EngineKey = KEY, engine: bytes = ENGINE) -> Path:
    """Keep an engine and return its file."""
    path = cache.get(key, lambda: engine, rebuild="a test").path
    assert path is not None
    return path


def never() -> bytes:
    raise AssertionError("built what is there")


def names(cache: EngineCache) -> list[str]:
    return sorted(os.listdir(cache.directory / "engines"))


# Keys


def test_every_field_of_a_key_counts() -> None:
    assert OTHERS.keys() == vars(KEY).keys()
    keys = [KEY, *(replace(KEY, **{name: other}) for name, other in OTHERS.items())]
    keys.append(replace(KEY, flags={"optimization_level": 3}))
    keys.append(replace(KEY, profile=(1, 2, 32)))
    assert len({key.digest() for key in keys}) == len(keys)
    for key in keys:
        again = EngineKey.from_dict(json.loads(json.dumps(key.to_dict())))
        assert (again, again.digest()) == (key, key.digest())


def test_the_order_of_flags_does_not_count() -> None:
    turned = replace(KEY, flags=dict(reversed(KEY.flags.items())))
    assert list(turned.flags) != list(KEY.flags)
    assert turned.digest() == KEY.digest()


# What is kept, and found again


def why_not(cache: EngineCache, key: EngineKey) -> str:
    """Why the engine of exactly this key is not there; "" = it is."""
    try:
        cache._select(key)
    except EngineMissingError as error:
        return str(error)
    return ""


def test_built_once_then_read(cache: EngineCache) -> None:
    assert cache.entries() == []
    assert why_not(cache, KEY) == NOTHING
    built = cache.get(KEY, lambda: ENGINE)
    assert (built.engine, built.cached, built.reason) == (ENGINE, False, NOTHING)
    again = EngineCache(cache.directory).get(KEY, never)
    assert again == (ENGINE, built.path, True, "")
    assert why_not(cache, KEY) == ""
    stem = KEY.digest()[:16]
    assert names(cache) == [f"{stem}.json", f"{stem}.lock", f"{stem}.plan"]
    assert built.path is not None
    assert built.path.read_bytes() == ENGINE  # and nothing else, for trtexec
    [entry] = cache.entries()
    assert (entry.key, entry.path, entry.size) == (KEY, built.path, len(ENGINE))
    assert 0 <= entry.seconds < 60
    said = json.loads(built.path.with_suffix(".json").read_text())
    assert list(said) == ["format", "key", "size", "sha256", "built", "seconds"]


@posix
def test_directories_are_the_user_s_alone(cache: EngineCache) -> None:
    put(cache)
    for path in (cache.directory, cache.directory / "engines"):
        assert path.stat().st_mode & 0o777 == 0o700


@posix
@pytest.mark.parametrize("suffix", [".plan", ".json"])
def test_files_that_others_may_write_are_not_trusted(cache: EngineCache, suffix: str) -> None:
    usual = os.umask(0)
    try:
        path = put(cache)
    finally:
        os.umask(usual)
    assert path.stat().st_mode & 0o777 == path.with_suffix(".json").stat().st_mode & 0o777 == 0o644
    path.with_suffix(suffix).chmod(0o664)
    assert "other users may write it" in why_not(cache, KEY)
    assert cache.get(KEY, lambda: b"new").engine == b"new"


def test_rebuilding(cache: EngineCache) -> None:
    put(cache)
    built = cache.get(KEY, lambda: b"new", rebuild="asked for")
    assert (built.engine, built.cached, built.reason) == (b"new", False, "asked for")
    assert cache.get(KEY, never).engine == b"new"


def test_find_takes_the_newest_that_fits(cache: EngineCache) -> None:
    small, large = replace(KEY, profile=(1, 1, 8)), replace(KEY, profile=(4, 8, 64))
    put(cache, large, b"large")
    put(cache, small, b"small")
    for name in ("model", "variant", "flavour", "version", "device", "compute_capability"):
        put(cache, replace(KEY, **{name: OTHERS[name]}), b"of another place")
    looking = replace(KEY, profile=(0, 0, 0), flags={})
    assert cache.find(looking)[0] == b"small"
    put(cache, large, b"newest")
    engine, entry = cache.find(looking)
    assert (engine, entry.key) == (b"newest", large)
    assert [e.key for e in cache.entries()][-1] == large


def test_find_takes_an_older_engine_if_the_newest_is_damaged(cache: EngineCache) -> None:
    put(cache, replace(KEY, flags={}), b"older")
    put(cache).write_bytes(b"junk")
    assert cache.find(KEY)[0] == b"older"


@pytest.mark.parametrize(
    ("name", "place", "exact"),
    [
        ("model", NOTHING, NOTHING),
        ("variant", "is for fp32; this is fp16", "is for fp32; asked for fp16"),
        ("flavour", "is for TensorRT for RTX 10.13.3; this is TensorRT 10.13.3", None),
        ("version", "is for TensorRT 10.3.0; this is TensorRT 10.13.3", None),
        ("device", "is for Thor (8.7); this is Orin (8.7)", None),
        ("compute_capability", "is for Orin (11.0); this is Orin (8.7)", None),
        ("profile", "", "is for profile 1..4..8; asked for profile 1..1..32"),
        ("flags", "", "is for optimization_level 5, workspace_mb 1024; asked for "
                      "optimization_level 3, workspace_mb 1024"),
    ],
)  # fmt: skip
def test_reasons(cache: EngineCache, name: str, place: str, exact: str | None) -> None:
    put(cache, replace(KEY, **{name: OTHERS[name]}))
    [entry] = cache.entries()
    told = why_not(cache, KEY).replace(f"the engine built on {entry.built[:10]} ", "")
    assert told == (exact or place.replace("this is", "asked for"))
    if place:
        with pytest.raises(EngineMissingError) as caught:
            cache.find(KEY)
        assert str(caught.value).endswith(place)
    else:
        assert cache.find(KEY)[0] == ENGINE


def test_the_reason_is_the_nearest_engine_s(cache: EngineCache) -> None:
    place = {name: OTHERS[name] for name in ("version", "device", "compute_capability")}
    put(cache, replace(KEY, version="10.16.1"))
    put(cache, replace(KEY, **place))
    put(cache, replace(KEY, model=OTHERS["model"], flags={}))
    reason = "is for TensorRT 10.16.1; asked for TensorRT 10.13.3"
    assert why_not(cache, KEY).endswith(reason)
    put(cache, replace(KEY, **place, flags={}))  # two that differ in three ways: still farther
    assert why_not(cache, KEY).endswith(reason)
    put(cache, replace(KEY, flags={}))
    assert "is for no flags; asked for optimization_level 3" in why_not(cache, KEY)


# What is not to be trusted


def sidecar(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Damage: change the side-car's JSON."""

    def damage(path: Path) -> None:
        said = json.loads(path.with_suffix(".json").read_text())
        change(said)
        path.with_suffix(".json").write_text(json.dumps(said, indent=2) + "\n")

    return damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def link(kind: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path = path.with_suffix(kind)
        elsewhere = path.parent.parent / "elsewhere"
        path.replace(elsewhere)
        path.symlink_to(elsewhere)

    return damage


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


SHA, WRITTEN = "its SHA-256 is not the one written beside it", "is not as this version writes it"
DAMAGES = {
    "one bit": (flip, SHA),
    "truncated": (lambda path: os.truncate(path, 100), SHA),
    "empty": (lambda path: os.truncate(path, 0), SHA),
    "longer": (lambda path: path.write_bytes(ENGINE + b"0"), SHA),
    "no plan": (lambda path: path.unlink(), "No such file"),
    "no side-car": (lambda path: path.with_suffix(".json").unlink(), NOTHING),
    "no JSON": (lambda path: path.with_suffix(".json").write_text("{"), WRITTEN),
    "no object": (lambda path: path.with_suffix(".json").write_text("[1]"), WRITTEN),
    "no text": (lambda path: path.with_suffix(".json").write_bytes(b"\xff\xfe\0"), WRITTEN),
    "deep": (lambda path: path.with_suffix(".json").write_text("[" * 200_000), WRITTEN),
    "SHA-256": (sidecar(lambda said: said.update(sha256="0" * 64)), SHA),
    "size": (sidecar(lambda said: said.update(size=5)), SHA),
    "size of another type": (sidecar(lambda said: said.update(size=str(len(ENGINE)))), WRITTEN),
    "endless size": (sidecar(lambda said: said.update(size=float("inf"))), WRITTEN),
    "no number": (sidecar(lambda said: said.update(seconds=float("nan"))), WRITTEN),
    "a path": (sidecar(lambda said: said.update(path="/etc/passwd")), WRITTEN),
    "no size": (sidecar(lambda said: said.pop("size")), WRITTEN),
    "a newer format": (sidecar(lambda said: said.update(format=2)), WRITTEN),
    "another key": (sidecar(lambda said: said["key"].update(version="10.3.0")), WRITTEN),
    "more in the key": (sidecar(lambda said: said["key"].update(sm=87)), WRITTEN),
    "less in the key": (sidecar(lambda said: said["key"].pop("device")), WRITTEN),
    "no flags": (sidecar(lambda said: said["key"].update(flags=3)), WRITTEN),
    "a flag of another type": (sidecar(lambda said: said["key"].update(flags={"a": []})), WRITTEN),
    "a short profile": (sidecar(lambda said: said["key"].update(profile=[1, 2])), WRITTEN),
    "the plan a link": (link(".plan"), "plan is a link"),
    "the side-car a link": (link(".json"), "json is a link"),
    "a pipe": (pipe, "is not a plain file"),
}


@posix
@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_damaged_or_changed_is_built_again(cache: EngineCache, name: str) -> None:
    damage, reason = DAMAGES[name]
    path = put(cache)
    damage(path)
    with pytest.raises(EngineMissingError, match=reason):
        cache.find(KEY)
    assert reason in why_not(cache, KEY)
    built = cache.get(KEY, lambda: b"new")
    assert (built.engine, built.path, built.cached) == (b"new", path, False)
    assert reason in built.reason
    assert cache.get(KEY, never).engine == b"new"
    assert not path.is_symlink()
    if (elsewhere := cache.directory / "elsewhere").exists():
        assert elsewhere.read_bytes() not in (b"new", b"")  # nothing was written through the link


def test_a_side_car_under_another_name_is_not_used(cache: EngineCache) -> None:
    path, other = put(cache), put(cache, replace(KEY, version="10.3.0"), b"other")
    other.with_suffix(".json").write_bytes(path.with_suffix(".json").read_bytes())
    other.write_bytes(ENGINE)
    assert [entry.path for entry in cache.entries()] == [path]
    assert "is not as this version" in why_not(cache, replace(KEY, version="10.3.0"))


def test_an_unreadable_side_car_is_the_reason_if_there_is_no_better(cache: EngineCache) -> None:
    other = put(cache, replace(KEY, flags={}))
    other.with_suffix(".json").write_text("{}")
    assert why_not(cache, KEY).startswith(f"{NOTHING}; {other.with_suffix('.json')} is not as")


@posix
@pytest.mark.parametrize("kind", [".plan", ".json"])
def test_another_user_s_files_are_not_used(
    cache: EngineCache, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = put(cache)
    if os.geteuid() == 0:
        os.chown(path.with_suffix(kind), 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    reason = r"it belongs to another user \(\d+\)"
    with pytest.raises(EngineMissingError, match=reason):
        cache.find(KEY)
    if os.geteuid() == 0:
        assert "another user" in cache.get(KEY, lambda: b"new").reason
        assert path.with_suffix(kind).stat().st_uid == 0
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        assert cache.find(KEY)[0] == b"new"  # root's are everybody's
    else:  # a file system that gives what is written to somebody else
        with pytest.warns(CacheWarning, match=reason):
            assert cache.get(KEY, lambda: b"new").path is None


# Several at once

CHILD = """
import json, logging, os, sys, time
from pathlib import Path
from ddpm_edge.runtimes.engine_cache import EngineCache, EngineKey
folder = Path(sys.argv[1])
cache, key = EngineCache(folder / "cache"), EngineKey.from_dict(json.loads(sys.argv[2]))
said = []
class Handler(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())
        print(said[-1], flush=True)
log = logging.getLogger("ddpm_edge")
log.setLevel(logging.INFO)
log.addHandler(Handler())
"""
WAITING = "another process is building it; waiting"


def start(script: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD + script, str(folder), json.dumps(KEY.to_dict())],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts a process; all of them are ended with the test."""
    started: list[subprocess.Popen[str]] = []

    def begin(script: str) -> subprocess.Popen[str]:
        started.append(start(script, tmp_path))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_eight_processes_build_once(
    tmp_path: Path, child: Callable[[str], subprocess.Popen[str]]
) -> None:
    script = """
def build():
    with open(folder / "builds", "a") as file:
        file.write("x")
    time.sleep(1)
    return os.urandom(1000)
print("ready", flush=True)
sys.stdin.readline()
built = cache.get(key, build)
print(json.dumps([built.engine.hex(), built.cached, len(said)]))
"""
    processes = [child(script) for _ in range(8)]
    assert [line(process) for process in processes] == ["ready"] * 8
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    results = [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]
    assert (tmp_path / "builds").read_text() == "x"
    assert len({engine for engine, _, _ in results}) == 1
    # A second is long for eight processes to start in: the seven found the lock held, said so once.
    assert sorted(result[1:] for result in results) == [[False, 0]] + [[True, 1]] * 7


def test_threads_build_once(cache: EngineCache) -> None:
    builds: list[int] = []

    def build() -> bytes:
        builds.append(1)
        threading.Event().wait(0.2)
        return ENGINE

    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: cache.get(KEY, build), range(4)))
    assert {built.engine for built in done} == {ENGINE}
    assert len(builds) == 1


def test_two_keys_are_built_at_the_same_time(cache: EngineCache) -> None:
    both = threading.Barrier(2, timeout=10)  # breaks if one waits for the other

    def build() -> bytes:
        both.wait()
        return ENGINE

    with ThreadPoolExecutor(2) as pool:
        keys = [KEY, replace(KEY, flags={})]
        done = list(pool.map(lambda key: cache.get(key, build), keys))
    assert [built.cached for built in done] == [False, False]
    assert {entry.key.digest() for entry in cache.entries()} == {key.digest() for key in keys}


@posix
def test_ctrl_c_while_waiting(
    cache: EngineCache, child: Callable[[str], subprocess.Popen[str]]
) -> None:
    building, interrupted = threading.Event(), threading.Event()

    def build() -> bytes:
        building.set()
        assert interrupted.wait(20)
        return ENGINE

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(cache.get, KEY, build)
        assert building.wait(10)
        try:
            waiting = child(  # background jobs begin with SIGINT ignored
                "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
                "cache.get(key, lambda: b'')"
            )
            assert line(waiting) == WAITING
            waiting.send_signal(signal.SIGINT)
            assert "KeyboardInterrupt" in waiting.communicate(timeout=10)[1]
        finally:
            interrupted.set()
        assert not done.result().cached


# Killed


@posix
def test_a_killed_build_leaves_nothing_and_who_waits_builds(
    cache: EngineCache,
    child: Callable[[str], subprocess.Popen[str]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    killed = child("cache.get(key, lambda: print('building', flush=True) or time.sleep(60))")
    assert line(killed) == "building"
    assert names(cache) == [f"{KEY.digest()[:16]}.lock"]
    waiting = child("print(cache.get(key, lambda: b'second').engine)")
    assert line(waiting) == WAITING
    killed.kill()
    assert waiting.communicate(timeout=10)[0].strip() == "b'second'"
    with caplog.at_level(logging.INFO, "ddpm_edge"):
        assert cache.get(KEY, never).engine == b"second"
    assert WAITING not in caplog.text


KILLED = """
from ddpm_edge.errors import EngineMissingError
from ddpm_edge.runtimes.engine_cache import EngineCache, EngineKey
import filelock  # what it imports later is no part of what is killed
filelock.FileLock
key = EngineKey("ab", "fp32", "tensorrt", "10.3.0", "Orin", "8.7", (1, 1, 8), {})
cache = EngineCache(folder / "cache")

def found():
    try:
        return cache.find(key)[0].decode()
    except EngineMissingError:
        return "none"

def look():
    seen = found()
    builds = []
    built = cache.get(key, lambda: builds.append(1) or b"next")
    assert built.cached == (seen != "none") != bool(builds)
    assert built.engine.decode() == ("next" if builds else seen)
    if builds:  # and it swept up
        assert {path.suffix for path in cache.directory.glob("*/*")} == {".plan", ".json", ".lock"}
    return seen

def reset():
    shutil.rmtree(cache.directory, ignore_errors=True)
    OLD

reset()
killed_runs(lambda: cache.get(key, lambda: b"new", rebuild="asked for"), look, reset)
"""


@linux
@pytest.mark.parametrize("old", ["old", "none"])
def test_killed_after_any_call_leaves_the_old_engine_the_new_or_none(
    tmp_path: Path, old: str
) -> None:
    prepared = 'cache.get(key, lambda: b"old")' if old == "old" else "pass"
    *killed, last = outcomes(KILLED.replace("OLD", prepared), tmp_path / "folder")
    assert last == (0, "new")
    assert len(killed) > 15
    seen = [state for _, state in killed]
    assert seen == sorted(seen, key=[old, "none", "new"].index)
    assert set(seen) == {old, "none", "new"}  # none: a new plan beside the old side-car


# A cache that cannot keep anything


def test_a_file_in_the_directory_s_place(cache: EngineCache) -> None:
    cache.directory.write_text("mine")
    for _ in range(2):
        with pytest.warns(CacheWarning, match="--cache-dir or DDPM_EDGE_CACHE") as caught:
            built = cache.get(KEY, lambda: ENGINE)
        assert (built.engine, built.path, built.cached) == (ENGINE, None, False)
        assert len(caught) == 1
        assert str(cache.directory) in str(caught[0].message)
        assert caught[0].filename == __file__
    assert cache.directory.read_text() == "mine"
    assert cache.entries() == []
    assert cache.clear() == (0, 0)
    with pytest.raises(EngineMissingError, match=NOTHING):
        cache.find(KEY)


@posix
def test_no_permission(child: Callable[[str], subprocess.Popen[str]]) -> None:
    process = child("""
import warnings
from dataclasses import replace
import filelock
filelock.FileLock
from ddpm_edge.errors import EngineMissingError
os.umask(0o022)
os.chdir(folder)  # the way to it may be closed to others, it must not be
folder.chmod(0o755)
cache = EngineCache(Path("cache"))
cache.get(key, lambda: b"old")
folders = [Path("cache"), Path("cache/engines")]
for path in folders:
    path.chmod(0o555)
hidden = EngineCache(Path("hidden"))
hidden.get(key, lambda: b"old")
Path("hidden").chmod(0)
if os.geteuid() == 0:
    os.setuid(65534)
results = []
for where, of in ((cache, key), (cache, replace(key, flags={})), (hidden, key)):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        built = where.get(of, lambda: b"new")
    results.append([built.engine.decode(), built.path is None, [str(w.message) for w in caught]])
try:
    hidden.find(key)
except EngineMissingError as error:
    results.append(str(error))
print(json.dumps(results))
""")
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    there, denied, hidden, missing = json.loads(output)
    assert there == ["old", False, []]  # of a read-only cache, as on a read-only image
    for engine, lost, [warning] in (denied, hidden):
        assert (engine, lost) == ("new", True)
        assert "(Permission denied)" in warning
    assert missing.startswith(f"{NOTHING}; [Errno 13] Permission denied")


@linux
@pytest.mark.parametrize("limit", [1000, 100])  # the side-car fits, or neither
def test_a_full_disk(child: Callable[[str], subprocess.Popen[str]], limit: int) -> None:
    process = child(f"""
import resource, warnings
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    built = cache.get(key, lambda: bytes(2000))
print(json.dumps([len(built.engine), built.path, [str(w.message) for w in caught]]))
print(sorted(os.listdir(folder / "cache" / "engines")))
""")
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    result, left = output.splitlines()
    size, path, [warning] = json.loads(result)
    assert (size, path) == (2000, None)
    assert "(File too large)" in warning
    assert left == f"['{KEY.digest()[:16]}.lock']"


@linux
def test_a_disk_that_becomes_full_before_the_side_car(
    cache: EngineCache, child: Callable[[str], subprocess.Popen[str]]
) -> None:
    process = child("""
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
print(cache.get(key, lambda: bytes(50)).path)
""")
    output, errors = process.communicate()
    assert "CacheWarning" in errors
    assert output.strip() == "None"
    assert why_not(cache, KEY) == NOTHING
    assert cache.get(KEY, lambda: ENGINE).cached is False
    assert cache.get(KEY, never).engine == ENGINE


def test_what_reads_back_differently_is_not_kept(
    cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        engine_cache, "write_bytes", lambda path, data, mode: path.write_bytes(data[1:])
    )
    with pytest.warns(CacheWarning, match="reads back differently"):
        assert cache.get(KEY, lambda: ENGINE).path is None


@pytest.mark.parametrize(
    "error", [ValueError("no"), KeyboardInterrupt(), OSError(28, "No space left on device")]
)
def test_what_a_build_raises_passes_and_nothing_stays(
    cache: EngineCache, error: BaseException
) -> None:
    def build() -> bytes:
        raise error

    with pytest.raises(type(error)) as caught:
        cache.get(KEY, build)
    assert caught.value is error
    assert names(cache) == [f"{KEY.digest()[:16]}.lock"]
    assert cache.get(KEY, lambda: ENGINE).engine == ENGINE  # the lock is free


# The rest


def test_clear_removes_its_own(cache: EngineCache) -> None:
    assert cache.clear() == (0, 0)
    path = put(cache)
    put(cache, replace(KEY, flags={}))
    cache.keep(cache.timing_path(KEY), b"timing")
    engines = path.parent
    (engines / f".{path.name}.0123abcd.tmp").write_bytes(b"half")
    (engines / "0123456789abcdef.plan").symlink_to(cache.directory / "notes.txt")
    strangers = [
        cache.directory / "notes.txt", cache.directory / "0123456789abcdef.plan",
        engines / "notes.txt", engines / f"{path.name}.bak", engines / f".{path.name}",
        engines / f"x{path.name}", engines / f"{path.name}.0123abcd.tmp", engines / "abc.plan",
        engines / f".{path.name}.tmp",
    ]  # fmt: skip
    for stranger in strangers:
        stranger.write_text("mine")
    (engines / "fedcba9876543210.plan").mkdir()
    own = [p for p in engines.glob("*") if p not in strangers and not p.is_dir()]
    size = sum(p.lstat().st_size for p in own)
    assert cache.clear() == (3, size)  # two, and the link
    assert all(stranger.read_text() == "mine" for stranger in strangers)
    (engines / "fedcba9876543210.plan").rmdir()
    assert sorted(engines.glob("*")) == sorted(s for s in strangers if s.parent == engines)
    assert not cache.get(KEY, lambda: ENGINE).cached


def test_clear_leaves_alone_what_is_being_built(cache: EngineCache) -> None:
    put(cache, replace(KEY, flags={}))

    def build() -> bytes:
        assert cache.clear()[0] == 1
        return ENGINE

    built = cache.get(KEY, build)
    assert built.path is not None
    assert cache.get(KEY, never).engine == ENGINE
    assert f"{KEY.digest()[:16]}.lock" in names(cache)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DDPM_EDGE_CACHE", str(tmp_path / "environment"))
    assert cache_directory(tmp_path / "given") == tmp_path / "given"
    assert cache_directory(str(tmp_path / "given")) == tmp_path / "given"
    assert cache_directory() == tmp_path / "environment"
    for unset in (lambda: monkeypatch.setenv("DDPM_EDGE_CACHE", ""),
                  lambda: monkeypatch.delenv("DDPM_EDGE_CACHE")):  # fmt: skip
        unset()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        if sys.platform == "linux":
            assert cache_directory() == tmp_path / "ddpm-edge"
        assert cache_directory().is_absolute()


@posix
def test_timing_caches(cache: EngineCache) -> None:
    path = cache.timing_path(KEY)
    assert path == cache.timing_path(replace(KEY, model="cd", profile=(1, 2, 3), flags={}))
    for name in ("flavour", "version", "device", "compute_capability"):
        assert cache.timing_path(replace(KEY, **{name: OTHERS[name]})) != path
    assert cache.kept(path) == b""
    assert cache.keep(path, b"timing")
    assert cache.kept(path) == b"timing"
    link(".timing")(path)
    assert cache.kept(path) == b""
    assert cache.entries() == []
