"""What the tests of FSDP2 start: accelerate's own sharding by `fully_shard`, on a mesh of two CPU processes.

accelerate turns FSDP into DDP on CPUs, only because of the name of the device; these runs tell it to go on.

torchrun --nproc_per_node 2 tests/trainer_ext/fsdp2.py launched|killed, and the arguments of launched_run.py or killed_run.py
"""

from __future__ import annotations

import sys

from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from tests.trainer_ext import killed_run, launched_run, reference
from trainer_ext import MCLTrainer


class ShardedTrainer(MCLTrainer):
    """Shards on CPUs, too."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # Both, for one is copied to the other now and then.
        for state in (PartialState(), self.accelerator.state):
            state.distributed_type = DistributedType.FSDP
        self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            state_dict_type="FULL_STATE_DICT",
            cpu_ram_efficient_loading=False,
            reshard_after_forward=True,
        )
        self.is_fsdp_enabled = True


if __name__ == "__main__":
    reference.MCLTrainer = ShardedTrainer  # what `trainer_for` makes
    {"launched": launched_run, "killed": killed_run}[sys.argv.pop(1)].main()
