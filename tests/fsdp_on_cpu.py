"""train_accelerate.py with Accelerate's FSDP2 on the CPU. Accelerate offers it on accelerators only, although all that
it calls runs on gloo as well. Started by `accelerate launch` with a config whose distributed_type is FSDP."""

import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType


ROOT = Path(__file__).resolve().parents[1]
without_fsdp = AcceleratorState.__init__


def with_fsdp(self, *args, fsdp_plugin=None, **kwargs) -> None:
    """What accelerate/state.py does for several GPUs, for several CPU processes."""
    without_fsdp(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from gpt2repro.errors import run_script
    from train_accelerate import main

    AcceleratorState.__init__ = with_fsdp
    run_script(main)
