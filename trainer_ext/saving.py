"""Saving so that nothing is ever half there, and going on from what was saved as if there had been no break."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, rotate_checkpoints

from peft_mcl import export_hypotheses
from peft_mcl.card import CARD_NAME
from trainer_ext import checkpoints, checks, launches
from trainer_ext.config import MCLConfig
from trainer_ext.hub import HubTrainer


logger = logging.getLogger(__name__)


class SavingTrainer(HubTrainer):
    """A trainer whose checkpoints are whole or not taken, and whose adapters replace earlier ones whole or not at all."""

    # Untyped in the parents.
    model: Any
    args: MCLConfig

    # ------------------------------------------------------------------------------------------------------------
    # Saving

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As Trainer; a checkpoint is whole once its manifest is there, and older ones are removed only then."""
        checks.check_finite(self.model)
        checkpoint = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            checkpoints.discard(checkpoint)
        # On several machines, too, nothing is written before.
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with checkpoints.whole_or_nothing(checkpoint):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    checkpoints.write_manifest(checkpoint, self.accelerator.num_processes)
        finally:
            self.args.save_total_limit = limit
        self.push_due_checkpoint()
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(checkpoint.parent),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As Trainer, but no file that is there is ever half overwritten."""
        if not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        directory = Path(str(output_dir or self.args.output_dir))
        with checkpoints.staged(directory) as staging:
            super()._save(str(staging), state_dict)
            checks.check_saved_adapter(staging / self._adapter_folder / SAFETENSORS_WEIGHTS_NAME, self.model)
            # PEFT's card. It must not replace one that is there, which may be a user's.
            (staging / CARD_NAME).unlink(missing_ok=True)
        self.write_card(directory)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As SFTTrainer, and with `save_hypotheses` each hypothesis as an ordinary LoRA adapter beside the model."""
        super().save_model(output_dir, _internal_call)
        folder = Path(output_dir or str(self.args.output_dir))
        # Trainer would resume from the adapters in a checkpoint as from those of the model.
        if not folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
            self._save_hypotheses(folder, folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.args.hub_strategy != HubStrategy.END:
            self._save_hypotheses(Path(checkpoint_folder), Path(str(self.args.output_dir)))
        super()._push_from_checkpoint(checkpoint_folder)

    def _save_hypotheses(self, saved: Path, folder: Path) -> None:
        """Write the hypotheses of the saved adapter into `folder`, if the user wants them."""
        if not self.args.save_hypotheses or not self.args.should_save:
            return
        name = self._adapter_folder
        if not (saved / name / SAFETENSORS_WEIGHTS_NAME).is_file():
            logger.warning(
                "`save_hypotheses`: there is no adapter in %s, because this run saves its weights in shards (FSDP with "
                "SHARDED_STATE_DICT, say), so its hypotheses are not written. Save the adapter whole, or export it later.",
                saved / name,
            )
            return
        # From the file that was just written: it holds all of the weights, also where this process does not.
        export_hypotheses(saved / name, folder / name)
        # Which tells how to use them.
        self.write_card(folder)

    @property
    def _adapter_folder(self) -> str:
        """Where PEFT saves the adapter, below the directory it is given."""
        name = self.model.active_adapter
        return "" if name == "default" else name

    # ------------------------------------------------------------------------------------------------------------
    # Going on

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with _dtypes_kept(self.model):
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_best_model(self) -> None:
        with _dtypes_kept(self.model):
            super()._load_best_model()

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As SFTTrainer. `resume_from_checkpoint=True` takes the newest checkpoint that is whole.

        Raises:
            ValueError: There is no whole checkpoint, or the named one is not whole or from another number of processes; or
                the model has nothing to train, or weights that are not finite.
        """
        checks.check_trainable(self.model)
        checks.check_finite(self.model)
        launches.check_first_training(self)
        if resume_from_checkpoint:
            resume_from_checkpoint = self._choose_checkpoint(resume_from_checkpoint)
            self._go_on_from(resume_from_checkpoint)
        self._forget_evaluation()
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _go_on_from(self, checkpoint: str) -> None:
        """Load what a trainer knows besides weights, optimizer and schedule, before the first batch is fetched."""

    def _run_epoch(self, **kwargs: Any) -> None:
        """As Trainer, which trains one step too many if a run is resumed that has done them all."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def _forget_evaluation(self) -> None:
        """Let the model be wrapped for training, though it was evaluated before.

        accelerate marks a model that it has prepared, and returns it as it is from then on. For an evaluation it does not wrap
        it in DDP, so each process would train on its own.
        """
        # What FSDP has wrapped is the model itself, and stays so; DeepSpeed wraps it for an evaluation, too.
        is_ddp = self.accelerator.num_processes > 1 and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if is_ddp and self.model_wrapped is self.model and hasattr(self.model, "_is_accelerate_prepared"):
            # Without the autocast of the evaluation: that of training comes on top.
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.model._is_accelerate_prepared = False

    def _choose_checkpoint(self, wanted: str | bool) -> str:
        """The checkpoint to resume from, which the first process chooses for all."""
        choice: list[Any] = [None, None]
        if self.is_world_process_zero():
            try:
                if wanted is True:
                    checkpoint = checkpoints.last_whole_checkpoint(Path(str(self.args.output_dir)))
                else:
                    checkpoint = Path(str(wanted))
                    checkpoints.check_checkpoint(checkpoint)
                launches.check_same_processes(checkpoint, checkpoints.processes_of(checkpoint), self.accelerator)
                choice = [str(checkpoint), None]
            except ValueError as error:
                choice = [None, str(error)]
        checkpoint_name, problem = broadcast_object_list(choice)
        if problem is not None:
            raise ValueError(problem)
        return checkpoint_name


@contextmanager
def _dtypes_kept(model: nn.Module) -> Iterator[None]:
    """What is trained keeps its dtype while PEFT loads it from a checkpoint.

    TRL trains the adapters of a quantised model in bfloat16. PEFT would go on with them in float32, which is another run.
    """
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if parameter.dtype != dtypes.get(name, parameter.dtype):
            parameter.data = parameter.data.to(dtypes[name])
