"""How a script that the tests start on several processes ends."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import torch


def leave() -> NoReturn:
    """End this process, whose work is done, together with the others.

    Without the interpreter's own end: a thread of gloo that lets go of a tensor meanwhile aborts the process now and then
    (pytorch issue 190489), after everything was right, and DDP and DeepSpeed keep such threads past `destroy_process_group`.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
