"""Training of LoRA-MCL hypotheses on top of TRL."""

from trainer_ext.config import MCLConfig
from trainer_ext.hub import PushFailed
from trainer_ext.trainer import MCLTrainer


__all__ = ["MCLConfig", "MCLTrainer", "PushFailed"]
