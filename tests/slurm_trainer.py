"""A stand-in for train_accelerate.py in test_slurm_train.py: slurm_trainer.py wait|finish|crash [flags].

It says in ready-RANK-of-N what flags it got, waits for SIGUSR1 if told to, and exits as the trainer does when it was
stopped, has finished, or failed.
"""

import signal
import sys
import time
from pathlib import Path

from accelerate import Accelerator


EXIT_CODES = {"wait": 75, "finish": 0, "crash": 3}

if __name__ == "__main__":
    stopped = []
    signal.signal(signal.SIGUSR1, lambda *_: stopped.append(True))
    accelerator = Accelerator(cpu=True)
    Path(f"ready-{accelerator.process_index}-of-{accelerator.num_processes}").write_text(" ".join(sys.argv[1:]))
    while not stopped and sys.argv[1] == "wait":
        time.sleep(0.05)
    accelerator.wait_for_everyone()  # the nodes have found each other
    sys.exit(EXIT_CODES[sys.argv[1]])
