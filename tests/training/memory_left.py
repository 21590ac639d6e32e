"""Worker: sums over ranks by DeepSpeed's shared memory, then prints what of it bears a name on the machine."""

from __future__ import annotations

import os
from pathlib import Path

import deepspeed.comm
import torch

from efficientclip.training.distributed import end_process, join_process_group

rank, _ = join_process_group()
value = torch.full((1000,), rank + 1.0)
deepspeed.comm.inference_all_reduce(value)
left = [file.name for file in Path("/dev/shm").iterdir() if os.environ["MASTER_PORT"] in file.name.split("_")]
if rank == 0:
    print(f"sum {value.unique().tolist()}, left {left}", flush=True)
torch.distributed.barrier()
end_process(0)
