"""Checkpoints that are complete or absent."""

import json
import shutil
from pathlib import Path

from accelerate import Accelerator

from gpt2repro.shards import flush


STATE = "trainer_state.json"


def latest(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    found = sorted((Path(output_dir) / "checkpoints").glob("step_*"))
    return found[-1] if found else None


def save(accelerator: Accelerator, output_dir: str | Path, state: dict, keep_last: int, model, tokenizer) -> None:
    """Save model, optimizer and `state` as checkpoints/step_{state["step"]}; called by all processes.

    With the configuration of the model and the tokenizer in it, it opens as a model folder does.

    The checkpoint is written under another name, flushed to disk and renamed; only then are older ones removed, so a
    crash at any moment leaves at least as many good checkpoints as before.
    """
    root = Path(output_dir) / "checkpoints"
    final = root / f"step_{state['step']:08d}"
    temporary = root / f"writing_{final.name}"
    if accelerator.is_main_process:
        for unfinished in (*root.glob("writing_*"), *root.glob("removing_*")):
            shutil.rmtree(unfinished)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()  # save_state returns on a rank before the others have written
    if accelerator.is_main_process:
        (temporary / STATE).write_text(json.dumps(state) + "\n")
        model.config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for path in (*temporary.rglob("*"), temporary):
            flush(path)
        temporary.rename(final)
        flush(root)
        for old in sorted(root.glob("step_*"))[:-keep_last]:
            shutil.rmtree(old.rename(old.with_name(f"removing_{old.name}")))
    accelerator.wait_for_everyone()


def load(accelerator: Accelerator, checkpoint: Path) -> dict:
    """Load model and optimizer into what was prepared; returns the `state` that was saved with them."""
    accelerator.load_state(str(checkpoint))
    # The saved count of micro-batches belongs to the accumulation of then; every checkpoint lies between two steps.
    accelerator.step = 0
    return json.loads((checkpoint / STATE).read_text())
