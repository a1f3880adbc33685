"""The output directory of a run: its layout, and how its records are written.

recipe.yaml                 the resolved recipe, with versions and git commit; written at the first start, and when a
                            resumed run changes it
metrics.jsonl               one JSON object per row, appended and never rewritten
loss.png                    training and validation loss, drawn anew as the run trains
report.html                 verdict, curves, samples, recipe, data and cost; written at the end, with the extra [report]
checkpoints/step_00001000/  complete or absent
model/                      what from_pretrained opens; complete or absent
adapter/                    with lora_rank: the adapter alone, in PEFT's format; in model/ it is merged
.lock                       held by the process that writes here
.verified.json              sizes, times and a sample of the shards whose hashes were verified, so that a resume skips
                            them
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from gpt2repro.errors import UserError, first_line
from gpt2repro.files import acquire_lock, holds_only, is_special, write_json, write_text


MODEL_FOLDER, ADAPTER_FOLDER = "model", "adapter"
LOCK_TIMEOUT = 60.0  # seconds: a run whose launcher was killed needs some to save and exit
CHECKPOINT_NAME = re.compile(r"step_\d{8}")


class RunFolder:
    """The output directory of a run. Creating the object touches no file."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.picture = self.path / "loss.png"
        self.report = self.path / "report.html"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / MODEL_FOLDER
        self.adapter = self.path / ADAPTER_FOLDER
        self.lock_file = self.path / ".lock"
        self.verified = self.path / ".verified.json"
        self._held_lock: FileLock | None = None

    @classmethod
    def around(cls, folder: Path) -> "RunFolder | None":
        """The run that a checkpoint or an exported model or adapter belongs to; None if there is no record of one."""
        folder = folder.resolve()
        is_checkpoint = CHECKPOINT_NAME.fullmatch(folder.name) is not None
        if not is_checkpoint and folder.name not in (MODEL_FOLDER, ADAPTER_FOLDER):
            return None
        run = cls(folder.parents[1] if is_checkpoint else folder.parent)
        return run if run.recipe.is_file() and run.metrics.is_file() else None

    @property
    def name(self) -> str:
        return self.path.name

    def is_untouched(self) -> bool:
        """Whether the directory is absent, or holds only what a start leaves behind that ends before its first step."""
        records = (self.recipe.name, self.verified.name)
        return holds_only(self.path, {self.lock_file.name, *records, *(f"{name}.tmp" for name in records)})

    def layout_problem(self) -> str | None:
        """A file of the run that is a folder or a pipe, or a folder that is none; None: there is none."""
        files = (self.recipe, self.metrics, self.picture, self.report, self.lock_file, self.verified)
        folders = (self.checkpoints, self.model, self.adapter)
        for path in (*files, *folders):
            if is_special(path):
                return f"{path} is a pipe or device"
            if path.exists() and path.is_dir() != (path in folders):
                return f"{path} is a {'folder' if path.is_dir() else 'file'}"
        return None

    # ---- checkpoints ----

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:08d}"

    def complete_checkpoints(self) -> list[Path]:
        """Oldest first. Checkpoints that are being written or deleted, or were found damaged, have other names."""
        found = self.checkpoints.glob("step_*")
        return sorted(path for path in found if CHECKPOINT_NAME.fullmatch(path.name) and path.is_dir())

    def latest_checkpoint(self) -> Path | None:
        return next(reversed(self.complete_checkpoints()), None)

    # ---- records ----

    def read_record(self) -> dict[str, Any]:
        """The content of recipe.yaml.

        Raises:
            UserError: it is damaged.
        """
        try:
            record = yaml.safe_load(self.recipe.read_text())
            if isinstance(record, dict) and "data" in record:  # a recipe that nobody ran has no such field
                return record
            problem = "it holds no record of a run"
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            problem = first_line(error)
        raise UserError(f"{self.recipe} is damaged ({problem}); restore it, or choose another --output_dir")

    def write_record(self, record: dict[str, Any]) -> None:
        write_text(self.recipe, yaml.safe_dump(record, sort_keys=False))

    def override_steps(self) -> list[int]:
        """The steps after which the run was resumed with another recipe."""
        if not self.recipe.is_file():
            return []
        return [override["step"] for override in self.read_record().get("overrides", [])]

    def read_verified(self) -> dict[str, list]:
        """What the last `write_verified` wrote; empty if there is none or it is damaged: all is verified again."""
        try:
            verified = json.loads(self.verified.read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        return verified if isinstance(verified, dict) else {}

    def write_verified(self, verified: dict[str, list]) -> None:
        write_json(self.verified, verified)

    def lock(self) -> None:
        """Keep other runs out of the directory, which is created if it is absent, until `unlock` or the process ends.

        Raises:
            UserError: another run keeps writing to it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        busy = f"another run is writing to {self.path}; wait for it, or choose another --output_dir"
        self._held_lock = acquire_lock(self.lock_file, busy, LOCK_TIMEOUT)

    def unlock(self) -> None:
        """Release the lock, if this process holds it."""
        if self._held_lock is not None:
            self._held_lock.release()


def checkpoint_step(checkpoint: Path) -> int:
    """The step of checkpoints/step_00001000 is 1000."""
    return int(checkpoint.name.removeprefix("step_"))
