"""Saving with a model card, and pushing to the Hub without harm: to the run, to local files, to what a user wrote."""

from __future__ import annotations

import logging
import os
import shlex
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils.hub import hf_api
from trl import SFTTrainer
from trl.trainer.utils import get_config_model_id

from peft_mcl.card import (
    CARD_NAME,
    base_license,
    create_model_card,
    is_as_written,
    is_edited,
    load_card,
    write_model_card,
    write_text,
)
from trainer_ext.card import decode_examples, training_facts


logger = logging.getLogger(__name__)


class PushFailed(RuntimeError):
    """The adapter is saved but is not on the Hub; the message says why and how to push it later."""


class HubTrainer(SFTTrainer):
    """SFTTrainer with the model card of hypotheses, for which no push is worth a training run.

    A push that the trainer makes by itself, at a checkpoint or in `save_model`, is a warning if it fails. Only `push_to_hub`
    raises. A card that somebody has edited, here or on the Hub, is left alone.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._card_names: dict[str, Any] = {"model_name": None, "dataset_name": None, "tags": []}
        self._card_license: dict[str, str] | None = None
        # The examples of a card, and the step that they are of.
        self._card_examples: tuple[int, list[tuple[str, list[str]]]] = (-1, [])
        self._due_push: str | None = None
        self._pushes: list[Future[Any]] = []
        super().__init__(*args, **kwargs)

    # ------------------------------------------------------------------------------------------------------------
    # The card

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the model card to `output_dir`, unless the one there was edited.

        Args:
            model_name (`str`, *optional*): The title.
            dataset_name (`str`, *optional*): Hub id or path of the data set.
            tags (`str` or `list[str]`, *optional*): More tags.

        What is given is kept for the cards that follow, such as those of checkpoints.
        """
        given = {
            "model_name": model_name,
            "dataset_name": dataset_name,
            "tags": [tags] if isinstance(tags, str) else tags,
        }
        self._card_names.update({name: value for name, value in given.items() if value})
        if self.is_world_process_zero():
            self.write_card(Path(str(self.args.output_dir)))

    def write_card(self, directory: Path) -> None:
        """Write the model card to any directory, by what is known now, unless the one there was edited."""
        config = self._adapter_config
        step, examples = self._card_examples
        names = self._card_names
        facts = replace(
            training_facts(self),
            dataset=names["dataset_name"],
            examples=examples if step == self.state.global_step else [],
            license=self._card_license or {},
            tags=sorted({*self._tag_names, *names["tags"]}),
        )
        card = create_model_card(
            replace(config, base_model_name_or_path=self._base_model_name),
            repo_id=self.hub_model_id or self.args.hub_model_id,
            title=names["model_name"] or directory.absolute().name,
            facts=facts,
            exported=(directory / "hypothesis_0").is_dir(),
        )
        write_model_card(card, directory)

    @property
    def _adapter_config(self) -> Any:
        """The `MCLoraConfig` of the adapter that is trained."""
        return self.accelerator.unwrap_model(self.model).active_peft_config

    @property
    def _base_model_name(self) -> str | None:
        # PEFT notes it in the configuration, but not before it has saved the adapter once.
        return self._adapter_config.base_model_name_or_path or get_config_model_id(self.model.config) or None

    def _complete_card(self, is_pushed: bool) -> None:
        """Find out what takes a while, at the end: the continuations of a few prompts, and the licence of the base model."""
        if self._card_license is None and self.is_world_process_zero():
            base = self._base_model_name or ""
            # Nothing is asked of the Hub by those who do not use it.
            if is_pushed or os.path.isdir(base):
                self._card_license = base_license(base, token=self.args.hub_token)
        count, step = self.args.card_prompts, self.state.global_step
        if not count or self._card_examples[0] == step:
            return
        if self.accelerator.num_processes > 1:
            logger.info("The model card gets no examples: they are decoded on one process, and there are several.")
            return
        try:
            self._card_examples = (step, decode_examples(self, count))
        except Exception:
            logger.warning("The model card gets no examples, because decoding them failed.", exc_info=True)
            self._card_examples = (step, [])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As SFTTrainer, with a complete model card. With `push_to_hub=True` it is pushed; if that fails, there is a warning."""
        is_pushed = self.args.push_to_hub and not _internal_call
        if not _internal_call:
            self._complete_card(is_pushed)
        super().save_model(output_dir, _internal_call=True)
        if is_pushed:
            try:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
            except PushFailed as error:
                logger.warning("%s", error)

    # ------------------------------------------------------------------------------------------------------------
    # The Hub

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As SFTTrainer; also makes the branch `hub_revision`, and finds out whether the token may write.

        Raises:
            ValueError: The repository cannot be made or written to.
        """
        if not self.is_world_process_zero():
            return
        wanted = self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name
        token = token if token is not None else self.args.hub_token
        try:
            super().init_hf_repo(token=token, private=private)
            hf_api().auth_check(self.hub_model_id, token=token, write=True)
            branch = self.args.hub_revision
            if branch and not branch.startswith("refs/"):
                hf_api().create_branch(self.hub_model_id, branch=branch, token=token, exist_ok=True)
        except Exception as error:
            raise ValueError(
                f"`hub_model_id`: the repository {wanted!r} cannot be made or written to on {constants.ENDPOINT}: "
                f"{_in_one_line(error)} Check the name and `hub_token` (or `hf auth login`), or train with "
                "`push_to_hub=False` and push later."
            ) from error

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As SFTTrainer, with a complete model card; a card that was edited on the Hub is taken over.

        Raises:
            PushFailed: The adapter is saved in `output_dir`, but could not be pushed.
            ValueError: The repository cannot be made or written to.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self._complete_card(is_pushed=True)
        # First and by itself: what fails after this has lost nothing.
        self.save_model(_internal_call=True)
        try:
            if self.is_world_process_zero():
                self._take_over_card_of_hub(token, revision)
            return super().push_to_hub(
                commit_message=commit_message,
                blocking=blocking,
                token=token,
                revision=revision,
                private=private,
                **kwargs,
            )
        except Exception as error:
            command = ["hf", "upload", str(self.hub_model_id), str(self.args.output_dir), "."]
            command += ["--exclude", f"{PREFIX_CHECKPOINT_DIR}-*/*", "--exclude", "_*"]
            if revision or self.args.hub_revision:
                command += ["--revision", revision or self.args.hub_revision]
            raise PushFailed(
                f"The adapter is saved in {self.args.output_dir}, but it could not be pushed to {self.hub_model_id}: "
                f"{_in_one_line(error)} Push it later with `trainer.push_to_hub()`, or from the command line with "
                f"`{shlex.join(command)}`."
            ) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer asks for it before the checkpoint is whole.
        self._due_push = checkpoint_folder

    def push_due_checkpoint(self) -> None:
        """Push what `hub_strategy` says of the checkpoint that was just written; if that fails, there is a warning."""
        checkpoint_folder, self._due_push = self._due_push, None
        if checkpoint_folder is None or not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        try:
            if self.args.hub_always_push:
                # Uploads read `output_dir`: one that waited would send the files of a later checkpoint under its own name.
                self._finish_current_push()
            if self.push_in_progress is None or self.push_in_progress.is_done():
                self._take_over_card_of_hub()
            super()._push_from_checkpoint(checkpoint_folder)
        except Exception as error:
            self._warn_of_push(error)
        jobs = self.push_in_progress.jobs if self.push_in_progress is not None else []
        self._pushes = [*self._pushes, *(push for push in jobs if push not in self._pushes)]
        self._report_pushes()

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._report_pushes()

    def _report_pushes(self) -> None:
        """Uploads run in the background, where nobody would hear of their errors."""
        done = [push for push in self._pushes if push.done()]
        self._pushes = [push for push in self._pushes if push not in done]
        for push in done:
            if not push.cancelled() and (error := push.exception()) is not None:
                self._warn_of_push(error)

    def _warn_of_push(self, error: BaseException) -> None:
        logger.warning(
            "A checkpoint could not be pushed to %s: %s Training goes on, and the checkpoint is in %s.",
            self.hub_model_id,
            _in_one_line(error),
            self.args.output_dir,
        )

    def _take_over_card_of_hub(self, token: str | None = None, revision: str | None = None) -> None:
        """Fetch the card of the repository if somebody has edited it there, so that pushing does not undo that."""
        try:
            path = hf_hub_download(
                self.hub_model_id,
                CARD_NAME,
                revision=revision or self.args.hub_revision,
                token=token if token is not None else self.args.hub_token,
            )
        except LocalEntryNotFoundError:
            raise  # Not known to be missing: the Hub did not answer.
        except (EntryNotFoundError, RevisionNotFoundError, RepositoryNotFoundError):
            return
        local = Path(str(self.args.output_dir), CARD_NAME)
        theirs, ours = load_card(path), load_card(local)
        is_edited_here = local.is_file() and (ours is None or is_edited(ours))
        if not is_edited_here and (theirs is None or not is_as_written(theirs)):
            write_text(local, Path(path).read_text(encoding="utf-8"))
            # Of a card without text, only the metadata stay.
            self.write_card(local.parent)


def _in_one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if error.__cause__ is not None and not isinstance(error, HfHubHTTPError):
        # The client tells which file could not be uploaded, and why in another error.
        return f"{text.rstrip('.')}: {_in_one_line(error.__cause__)}"
    return text if text.endswith(".") else f"{text}."
