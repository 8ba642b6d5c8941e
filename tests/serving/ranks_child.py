"""Run by a server's Python, once for each of two ranks: prints what updates answer there and whether they were begun.

    ranks_child.py RANK MEETING_FILE CHECKPOINT_FOLDER CASES

CASES are JSON, [the folder that this rank sees, whether it can read the weights in it] for each update.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import sglang.srt.runtime_context as runtime_context
import torch

from m1jax.serving import plugin
from m1jax.serving.config import MiniMaxM1Config

rank, meeting, checkpoint, cases = sys.argv[1:]
torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=int(rank), world_size=2)
group = types.SimpleNamespace(world_size=2, cpu_group=torch.distributed.group.WORLD)
runtime_context.get_parallel = lambda: types.SimpleNamespace(tp_group=group)
config = MiniMaxM1Config(**json.loads((Path(checkpoint) / "config.json").read_text()))
updater, told = types.SimpleNamespace(model_config=types.SimpleNamespace(hf_config=config)), []
for folder, readable in json.loads(cases):
    begun = []

    def update(updater, path, *_, begun=begun, readable=readable):
        begun.append(path)
        return readable, "as it may be"

    done, message = plugin.refuse_bad_folders(update, updater, folder, "auto")
    told.append({"done": done, "begun": bool(begun), "message": message})
print(json.dumps(told))
