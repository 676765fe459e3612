"""FSDP on processes of a CPU.

accelerate 1.15 follows what its launcher says about FSDP on GPUs alone, and takes DistributedDataParallel on CPUs;
what FSDP does needs no GPU.
"""

import os

from accelerate.state import PartialState
from accelerate.utils import DistributedType


def admit() -> None:
    """From here on, processes on a CPU count as processes with a device of their own where FSDP is asked for."""
    begin = PartialState.__init__

    def __init__(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU and "ACCELERATE_USE_FSDP" in os.environ:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = __init__
