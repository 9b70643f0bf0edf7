"""Saved adapters: where they are, and reading them without unpickling anything."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

from peft_mcl.config import check_safetensors


HUB_ADAPTER = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(/(?P<folder>[^@]+))?(@(?P<revision>.+))?")


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter in a folder or on the Hub.

    Attributes:
        name (`str`): What the user called it, for messages.
        location (`str`): The folder, or the repository on the Hub.
        subfolder (`str`, *optional*): The folder inside of the repository.
        revision (`str`, *optional*): Branch, tag or commit of the repository.
        token (`str`, *optional*): Token of the Hub, instead of the one that is logged in.
    """

    name: str
    location: str
    subfolder: str | None = None
    revision: str | None = None
    token: str | None = field(default=None, repr=False)

    @classmethod
    def find(cls, adapter: str | os.PathLike[str], token: str | None = None) -> SavedAdapter:
        """Tell a folder, which comes first, from `user/name`, `user/name/folder` or `user/name/folder@revision` of the Hub.

        Raises:
            ValueError: There is no such folder, and the name is none of the Hub.
        """
        name = os.fspath(adapter)
        if Path(name).is_dir():
            return cls(name, name)
        match = HUB_ADAPTER.fullmatch(name)
        if match is None or isinstance(adapter, os.PathLike):
            raise ValueError(
                f"There is no {CONFIG_NAME} in {name}: there is no such folder, and it is no adapter of the Hub "
                "('user/name', 'user/name/folder' or 'user/name/folder@revision')."
            )
        return cls(name, match["repository"], match["folder"], match["revision"], token)

    def read_config(self) -> PeftConfig:
        """The configuration, of the class that belongs to the type of the adapter.

        Raises:
            ValueError: There is none, or it cannot be read.
        """
        try:
            return PeftConfig.from_pretrained(
                self.location, subfolder=self.subfolder, revision=self.revision, token=self.token
            )
        # A file that is no JSON, of an unknown type, or without one.
        except (ValueError, KeyError, TypeError) as error:
            missing = str(error).startswith("Can't find")
            problem = "cannot be found" if missing else f"cannot be used ({type(error).__name__}: {error})"
            raise ValueError(f"The {CONFIG_NAME} of the adapter {self.name} {problem}.") from error

    def read_weights(self) -> dict[str, torch.Tensor]:
        """The parameters, on the CPU, in the dtypes of the file.

        Raises:
            ValueError: There is no safetensors file, or it is not whole.
        """
        path = Path(self.location, self.subfolder or "", SAFETENSORS_WEIGHTS_NAME)
        if not Path(self.location).is_dir():
            try:
                path = Path(
                    hf_hub_download(
                        self.location,
                        SAFETENSORS_WEIGHTS_NAME,
                        subfolder=self.subfolder,
                        revision=self.revision,
                        token=self.token,
                    )
                )
            except LocalEntryNotFoundError:
                raise  # The Hub could not be asked.
            except EntryNotFoundError as error:
                raise self._no_safetensors() from error
        elif not path.is_file():
            raise self._no_safetensors()
        check_safetensors(path)
        return load_file(path)

    def _no_safetensors(self) -> ValueError:
        # PEFT would fall back to a pickle file, which can run any code.
        return ValueError(
            f"There is no {SAFETENSORS_WEIGHTS_NAME} in {self.name}. Load the adapter with PEFT, if you trust its author, and "
            "save it again with `save_pretrained`; other formats are not read."
        )
