"""Which checkpoints are whole: a manifest, written last, names every file of a checkpoint with its size and hash.

A checkpoint is a folder of many files, some of them written by other processes. Without its manifest it was not written to
its end, and with a manifest that does not fit it was damaged later. Neither is resumed from.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
# The card and other text for people may be edited at any time.
_NOT_CHECKED = (MANIFEST_NAME, "README.md")


def discard(checkpoint: Path) -> None:
    """Remove what an earlier run left of a checkpoint, so that none of its files can be taken for one of the new one."""
    if checkpoint.is_dir():
        # First, so that an interrupt cannot leave a part that looks whole.
        (checkpoint / MANIFEST_NAME).unlink(missing_ok=True)
        shutil.rmtree(checkpoint)


@contextmanager
def whole_or_nothing(checkpoint: Path) -> Iterator[None]:
    """Remove a checkpoint if writing it fails, and say so in an error that names it.

    Raises:
        OSError: The files could not be written.
    """
    try:
        yield
    except Exception as error:
        if not _is_of_writing(error):
            raise
        shutil.rmtree(checkpoint, ignore_errors=True)
        raise OSError(
            f"The checkpoint {str(checkpoint)!r} could not be written ({_reason(error, checkpoint.parent)}); what there was of "
            "it is removed. Earlier checkpoints are whole: make room or permit writing, and go on with "
            "`resume_from_checkpoint=True`."
        ) from error


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """A folder to write to, whose files replace those of `directory` once all of them are written, and not if that fails.

    Raises:
        OSError: The files could not be written; the message names `directory`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=directory, prefix=".saving-"))
    try:
        yield staging
        for name in _files(staging, ()):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / name, directory / name)
    except Exception as error:
        if not _is_of_writing(error):
            raise
        raise OSError(
            f"The files of {str(directory)!r} could not be written ({_reason(error, directory)}); those that were there are as "
            "they were. Make room or permit writing, and save again."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_manifest(checkpoint: Path, num_processes: int) -> None:
    """Declare a checkpoint whole. To be called when every process has written its part."""
    manifest = {
        "num_processes": num_processes,
        "files": {name: _describe(checkpoint / name) for name in _files(checkpoint)},
    }
    partial = checkpoint / f"{MANIFEST_NAME}.partial"
    with partial.open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, checkpoint / MANIFEST_NAME)


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if it is whole."""
    try:
        manifest = json.loads((checkpoint / MANIFEST_NAME).read_text(encoding="utf-8"))
        files = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"it has no readable {MANIFEST_NAME}, so it was not written to its end"
    for name, expected in files.items():
        try:
            found = _describe(checkpoint / name)
        except OSError as error:
            return f"its file {name} cannot be read ({error.strerror})"
        if found["bytes"] != expected["bytes"]:
            return f"its file {name} has {found['bytes']} bytes in place of {expected['bytes']}"
        if found != expected:
            return f"its file {name} was changed after it was written"
    return None


def last_whole_checkpoint(output_dir: Path) -> Path:
    """The newest checkpoint in `output_dir` that is whole; others are passed over with a warning.

    Raises:
        ValueError: There is none.
    """
    passed_over = []
    for _, checkpoint in sorted(_numbered(output_dir), reverse=True):
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint
        logger.warning("The checkpoint %s is passed over: %s.", checkpoint, damage)
        passed_over.append(f"{checkpoint.name}: {damage}")
    found = f" Passed over: {'; '.join(passed_over)}." if passed_over else ""
    raise ValueError(
        f"There is no whole checkpoint in {str(output_dir)!r} to resume from.{found} Start without `resume_from_checkpoint`, "
        "and set `save_steps` to have checkpoints."
    )


def check_checkpoint(checkpoint: Path) -> None:
    """Raise a ValueError unless a checkpoint that the user names is whole."""
    if not checkpoint.is_dir():
        raise ValueError(f"`resume_from_checkpoint`: there is no directory {str(checkpoint)!r}.")
    damage = find_damage(checkpoint)
    if damage is not None:
        raise ValueError(
            f"`resume_from_checkpoint`: {str(checkpoint)!r} cannot be resumed from: {damage}. Name another checkpoint, or "
            "True for the newest whole one."
        )


def processes_of(checkpoint: Path) -> int:
    """The number of processes that wrote a whole checkpoint."""
    return json.loads((checkpoint / MANIFEST_NAME).read_text(encoding="utf-8"))["num_processes"]


def _is_of_writing(error: Exception) -> bool:
    # torch tells a full disk by a RuntimeError of its file writer.
    writer = ("PytorchStreamWriter", "inline_container", "iostream")
    return isinstance(error, (OSError, SafetensorError)) or any(name in str(error) for name in writer)


def _reason(error: Exception, directory: Path) -> str:
    megabytes = shutil.disk_usage(directory).free / (1 << 20)
    return f"{error.__cause__ or error}; {megabytes:.2f} MB are free there"


def _numbered(output_dir: Path) -> Iterator[tuple[int, Path]]:
    for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = path.name.rsplit("-", 1)[1]
        if number.isdigit() and path.is_dir():
            yield int(number), path


def _files(directory: Path, without: tuple[str, ...] = _NOT_CHECKED) -> list[str]:
    files = (path for path in directory.rglob("*") if path.is_file() and path.name not in without)
    return sorted(path.relative_to(directory).as_posix() for path in files)


def _describe(path: Path) -> dict[str, int | str]:
    digest, size = hashlib.blake2b(), 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "blake2b": digest.hexdigest()}
