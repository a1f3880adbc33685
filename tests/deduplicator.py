"""Deduplication in a process that tests can kill: deduplicator.py OUTPUT_DIR OPTIONS_AS_JSON FILE_OR_FOLDER ...

OPTIONS has the fields of DedupOptions and Execution, and may have `die_writing`: [END_OF_A_FILE_NAME, N]. The process
then writes half of that file when it opens it for the N-th time, and kills itself.
"""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

from datatrove.io import DataFolder

from gpt2repro.prepare.corpora import CorpusQuery, open_corpus
from gpt2repro.prepare.deduplication import METHODS, DedupOptions, deduplicate
from gpt2repro.prepare.readers import Piece
from gpt2repro.prepare.request import Execution


def die_writing(suffix: str, times: int) -> None:
    """SIGKILL in the middle of a file."""
    open_file = DataFolder.open

    def open_and_die(self, path, mode="rb", *args, **kwargs):
        nonlocal times
        file = open_file(self, path, mode, *args, **kwargs)
        if "w" in mode and f"{self.path}/{path}".endswith(suffix):
            times -= 1
            if not times:
                file.write(b"half of what should be there" if "b" in mode else "half")
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        return file

    DataFolder.open = open_and_die


def pieces_of(source: str) -> list[Piece]:
    if Path(source).is_fifo():  # a file without an end, which open_corpus refuses
        return [Piece("json lines", source)]
    return open_corpus(CorpusQuery("files", source)).pieces


if __name__ == "__main__":
    _, output_dir, options, *sources = sys.argv
    options = json.loads(options)
    if "die_writing" in options:
        die_writing(*options.pop("die_writing"))
    options["methods"] = tuple(options.get("methods", METHODS))
    execution = {field.name for field in dataclasses.fields(Execution)} & options.keys()
    execution = Execution(**{name: options.pop(name) for name in execution})
    pieces = [piece for source in sources for piece in pieces_of(source)]
    deduplicate(pieces, Path(output_dir), DedupOptions(**options), execution)
