"""The manifest of a directory of tokens: what it holds, where that comes from, and the hashes that prove it.

manifest.json is written last and atomically, so a directory without one is unfinished. A folder with another trainer's
tokens has no such file; its manifest is inferred from its files.
"""

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gpt2repro.data.foreign_tokens import GPT2_VOCAB_SIZE, ForeignTokens, TokenFile, foreign_format, read_foreign_tokens
from gpt2repro.data.shards import SPLITS, Shard, Split, checked_value, has_tokens, map_npy, token_dtype
from gpt2repro.errors import CHECK_PERMISSIONS, UserError, first_line, refuse
from gpt2repro.files import file_problem, file_sample, write_json
from gpt2repro.run_folder import RunFolder


MANIFEST = "manifest.json"
FORMAT_VERSION = 1
UNFINISHED = ("preparing.json", "parts")  # what prepare_data.py removes when it has written the manifest
PREPARED = ("tokenizer", "deduplicated")  # and what it leaves
TEXT_FORMATS = (".txt", ".jsonl", ".json", ".parquet")  # what `prepare_data.py files` reads
TABLE_FORMATS = (".csv", ".tsv")  # what `prepare_data.py FOLDER` reads, as datasets.load_dataset does

States = dict[str, list]  # of each shard, by its path; see shard_state


@dataclass(frozen=True)
class TokenizerRecord:
    """Which tokenizer made the tokens.

    name: as `prepare_data.py --tokenizer` names it.
    vocab_size: number of token ids, end-of-text included.
    eot_id: id of `<|endoftext|>`; None if the tokenizer has none.
    sha256: of tokenizer.json; None: the directory comes without a tokenizer.
    """

    name: str
    vocab_size: int
    eot_id: int | None
    sha256: str | None

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "TokenizerRecord":
        """Raises KeyError or TypeError for a key that is missing or has another type."""
        return cls(
            name=checked_value(content, "name", str),
            vocab_size=checked_value(content, "vocab_size", int),
            eot_id=checked_value(content, "eot_id", int | None),
            sha256=checked_value(content, "sha256", str | None),
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def is_same_as(self, other: "TokenizerRecord") -> bool:
        """By definition; by name and size if one of the two directories comes without a tokenizer."""
        if self.sha256 and other.sha256:
            return self.sha256 == other.sha256
        return (self.name, self.vocab_size) == (other.name, other.vocab_size)

    def __str__(self) -> str:
        definition = f", sha256 {self.sha256[:8]}..." if self.sha256 else ""
        return f"{self.name} ({self.vocab_size} ids{definition})"


GPT2_TOKENIZER = TokenizerRecord("gpt2", GPT2_VOCAB_SIZE, GPT2_VOCAB_SIZE - 1, sha256=None)


@dataclass(frozen=True)
class Manifest:
    """What a directory of tokens holds.

    corpus: its name and origin (Hub id, configuration, commit; or files and their sizes).
    tokenizer: which made the tokens.
    splits: "train" and "val".
    preparation: what else prepare_data.py records, by its keys in manifest.json: tokenizer_files, deduplication,
        split, settings, repaired_documents, skipped_documents, special_tokens, left_out_files. Empty for another
        trainer's tokens.
    sha256: the hash of itself that the file carries (see `seal`); None: it carries none.
    fingerprint: the identity of the data, by which a run recognises it: the sha256 of manifest.json, or for another
        trainer's tokens that of the names, sizes and ends of their files.
    """

    corpus: dict[str, Any]
    tokenizer: TokenizerRecord
    splits: dict[str, Split]
    preparation: dict[str, Any] = field(default_factory=dict)
    sha256: str | None = None
    fingerprint: str = ""

    @classmethod
    def from_dict(cls, content: dict[str, Any], fingerprint: str = "") -> "Manifest":
        """The manifest in the content of a manifest.json.

        Raises:
            KeyError, TypeError, ValueError or AttributeError: a key is missing, or a value is of another type.
        """
        known = {"format_version", "corpus", "tokenizer", "splits", "sha256"}
        return cls(
            corpus=content["corpus"],
            tokenizer=TokenizerRecord.from_dict(content["tokenizer"]),
            splits={name: Split.from_dict(content["splits"][name]) for name in SPLITS},
            preparation={key: value for key, value in content.items() if key not in known},
            sha256=content.get("sha256"),
            fingerprint=fingerprint,
        )

    def to_dict(self) -> dict[str, Any]:
        """The content of manifest.json."""
        content = {
            "format_version": FORMAT_VERSION,
            "corpus": self.corpus,
            "tokenizer": self.tokenizer.to_dict(),
            **self.preparation,
            "splits": {name: split.to_dict() for name, split in self.splits.items()},
        }
        if self.sha256 is not None:
            content["sha256"] = self.sha256
        return content

    def record(self) -> dict[str, Any]:
        """What recipe.yaml records of the data: all but the list of shards."""
        return {
            "manifest_sha256": self.fingerprint,
            "corpus": self.corpus,
            "deduplicated": self.is_deduplicated,
            "validation": self.validation,
            "tokenizer": self.tokenizer.to_dict(),
            "splits": {name: split.totals() for name, split in self.splits.items()},
        }

    def content_sha256(self) -> str:
        """The hash of all that manifest.json says but its own hash."""
        content = dataclasses.replace(self, sha256=None).to_dict()
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def seal(self) -> "Manifest":
        """The manifest with a hash of its content, so that an edit shows."""
        return dataclasses.replace(self, sha256=self.content_sha256())

    def write(self, data_dir: Path) -> None:
        """Write manifest.json, sealed."""
        write_json(data_dir / MANIFEST, self.seal().to_dict())

    @classmethod
    def read(cls, data_dir: str | Path) -> "Manifest":
        """The manifest of a prepared directory.

        Raises:
            UserError: the directory is missing or unfinished, its manifest damaged or of another format version.
        """
        path = Path(data_dir) / MANIFEST
        if path.parent.is_file():
            raise UserError(_why_a_file_is_none(path.parent))
        if not path.parent.is_dir():
            raise UserError(f"data directory {data_dir} does not exist; make it with `python prepare_data.py`")
        if not path.exists():
            raise UserError(_why_there_is_none(path.parent))
        try:
            data = path.read_bytes()
            content = json.loads(data)
            version = content.get("format_version")
            if version == FORMAT_VERSION:
                return cls.from_dict(content, fingerprint=hashlib.sha256(data).hexdigest())
        except PermissionError as error:
            raise UserError(f"{path} cannot be read ({first_line(error)}); {CHECK_PERMISSIONS}") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({first_line(error)}); {remedy(data_dir)}") from error
        raise UserError(f"{path} has format version {version}, this program reads {FORMAT_VERSION}; {remedy(data_dir)}")

    @classmethod
    def open(cls, data_dir: str | Path) -> "Manifest":
        """The manifest of a prepared directory, or one inferred from the files of another trainer.

        Raises:
            UserError: neither of the two, unfinished or damaged; the manifest or the tokenizer was changed.
        """
        folder = Path(data_dir)
        foreign = None if (folder / MANIFEST).exists() else read_foreign_tokens(folder)
        if foreign is not None:
            return cls._of_foreign(foreign)
        manifest = cls.read(data_dir)
        refuse_damage(manifest._seal_problems(folder), folder)
        refuse_damage(manifest._tokenizer_problems(folder), folder)
        return manifest

    @classmethod
    def _of_foreign(cls, tokens: ForeignTokens) -> "Manifest":
        splits = {"train": _foreign_split(tokens.train), "val": _foreign_split(tokens.val)}
        return cls({"name": tokens.name}, GPT2_TOKENIZER, splits, fingerprint=tokens.fingerprint)

    @property
    def shards(self) -> list[Shard]:
        """Those of all splits."""
        return [shard for name in SPLITS for shard in self.splits[name].shards]

    @property
    def validation(self) -> str:
        """How its validation documents were chosen."""
        return "chosen by hash" if "val_fraction" in self.preparation.get("split", {}) else "the first documents"

    @property
    def is_deduplicated(self) -> bool:
        return bool(self.preparation.get("deduplication"))

    # ---- checks ----

    def missing_files(self, data_dir: str | Path) -> list[str]:
        """One line for each shard that is missing or has another size, without reading it, and each file of the
        tokenizer that is missing."""
        dtype = token_dtype(self.tokenizer.vocab_size)
        problems = []
        for shard in self.shards:
            path = Path(data_dir) / shard.file
            if not has_tokens(path, shard.tokens, dtype):
                problems.append(f"{path} is missing or has another size")
        tokenizer = [Path(data_dir) / "tokenizer" / name for name in self._tokenizer_hashes]
        return problems + [f"{path} is missing" for path in tokenizer if not path.is_file()]

    def verify(self, data_dir: str | Path, num_workers: int = 1, progress: Callable = iter) -> None:
        """Compare every shard and the tokenizer with the manifest, and the manifest with itself.

        Args:
            data_dir: the directory that it was read from.
            num_workers: threads; hashing and counting release the GIL.
            progress: wraps the iterable of shards, e.g. tqdm.
        Raises:
            UserError: one line for each file that is missing or damaged.
        """
        root = Path(data_dir)
        refuse_damage(self._seal_problems(root), root)
        with ThreadPoolExecutor(num_workers) as pool:
            checked = pool.map(lambda shard: self._shard_problem(root, shard), self.shards)
            problems = [problem for problem in progress(checked) if problem]
        problems += self._total_problems(root)
        problems += self._tokenizer_problems(root)
        refuse_damage(problems, root)

    def verify_changed(self, data_dir: str | Path, verified: States, all_shards: bool = False) -> States:
        """Hash the shards that have changed since the last call. Another trainer's files have no hashes: only their
        state tells a change.

        Args:
            verified: what the last call returned; in entries of another form, as older versions wrote them, all shards
                count as changed.
            all_shards: hash the others, too.
        Raises:
            UserError: one line for each shard that is missing or not what was prepared.
        """
        paths = [Path(data_dir) / shard.file for shard in self.shards]

        def problem(path: Path, shard: Shard) -> str | None:
            before, now = verified.get(str(path)), states[str(path)]
            if now == before and not all_shards:
                return None
            if shard.sha256:
                damage = file_problem(path, shard.sha256)
                return damage and f"{damage}; {remedy(data_dir)}"
            if _content(before) in (None, _content(now)):
                return None
            return f"{path} is not what it was when the run began; restore it, or choose another --output_dir"

        with ThreadPoolExecutor() as pool:  # hashing releases the GIL
            states = dict(zip(map(str, paths), pool.map(shard_state, paths)))
            refuse([line for line in pool.map(problem, paths, self.shards) if line])
        return states

    def _shard_problem(self, root: Path, shard: Shard) -> str | None:
        path, vocab_size, eot_id = root / shard.file, self.tokenizer.vocab_size, self.tokenizer.eot_id
        damage = file_problem(path, shard.sha256)
        if damage:
            return damage
        try:
            tokens = map_npy(path)
        except ValueError as error:
            return f"{path} is damaged: {first_line(error)}"
        if len(tokens) != shard.tokens:
            return f"{path} holds {len(tokens):,} tokens, the manifest says {shard.tokens:,}"
        largest = int(tokens.max(initial=0))
        if largest >= vocab_size:
            return f"{path} holds token {largest}, above the vocabulary"
        if eot_id is not None:  # it only ever opens a document: written in a text, <|endoftext|> is ordinary text
            starts = int(np.count_nonzero(tokens == eot_id))
            if starts != shard.documents:
                return f"{path}: {starts:,} documents start there, the manifest says {shard.documents:,}"
        return None

    def _seal_problems(self, root: Path) -> list[str]:
        is_sealed = self.sha256 == self.content_sha256()
        return [] if is_sealed else [f"{root / MANIFEST} was changed after it was written"]

    def _total_problems(self, root: Path) -> list[str]:
        problems = []
        for name, split in self.splits.items():
            in_shards = {
                "tokens": (split.tokens, sum(shard.tokens for shard in split.shards)),
                "documents": (split.documents, sum(shard.documents or 0 for shard in split.shards)),
            }
            for unit, (stated, total) in in_shards.items():
                if stated != total:
                    problems.append(f"{root / MANIFEST}: {name} has {stated:,} {unit}, its shards have {total:,}")
        return problems

    @property
    def _tokenizer_hashes(self) -> dict[str, str | None]:
        """The sha256 of each file of the tokenizer, by name."""
        return self.preparation.get("tokenizer_files", {"tokenizer.json": self.tokenizer.sha256})

    def _tokenizer_problems(self, root: Path) -> list[str]:
        checked = [file_problem(root / "tokenizer" / name, sha256) for name, sha256 in self._tokenizer_hashes.items()]
        return [problem for problem in checked if problem]


def corpus_title(corpus: dict[str, Any]) -> str:
    """A corpus's name for everyone to read; of one on this machine, which has no revision, the path's last part."""
    return corpus["name"] if corpus.get("revision") else Path(corpus["name"]).name


def corpus_identity(corpus: dict[str, Any]) -> str:
    """Hub id and configuration of a corpus, which tell it from all others; the title of one that is not on the Hub."""
    if not corpus.get("revision"):  # a local folder has none
        return corpus_title(corpus)
    return ", ".join(corpus[key] for key in ("hub_id", "config") if corpus.get(key))


def shard_state(path: Path) -> list:
    """Size in bytes, times of the last modification and change of status in nanoseconds, and a hash of a sample of the
    content; empty if it cannot be read.

    The second time shows a change after which the first was set back, as `rsync -t` does; the sample one that left no
    trace in the file system, such as a rotten disk's.
    """
    try:
        status = path.stat()
        return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, file_sample(path)]
    except OSError:
        return []


def _content(state: Any) -> list | None:
    """What a state says about the content; None if it is of another form."""
    return [state[0], state[3]] if isinstance(state, list) and len(state) == 4 else None


def refuse_damage(problems: list[str], data_dir: str | Path) -> None:
    """Raise a UserError with all problems of a prepared directory, and what to do about them, if there are any."""
    refuse([f"{problem}; {remedy(data_dir)}" for problem in problems])


def remedy(data_dir: str | Path) -> str:
    """What to do about damaged data."""
    return f"prepare the data again: delete {data_dir} and repeat the `python prepare_data.py` command that made it"


def _why_there_is_none(folder: Path) -> str:
    trainer = foreign_format(folder)
    if trainer:
        return (
            f"{folder} holds {trainer}'s tokens, which have no {MANIFEST} that describes them; train on them as they "
            "are, or prepare the text with `python prepare_data.py`"
        )
    if any((folder / name).exists() for name in UNFINISHED):
        return (
            f"data directory {folder} has no {MANIFEST}, so its preparation is unfinished; repeat the "
            "`python prepare_data.py` command that started it"
        )
    if any(folder.glob("train_*.npy")) or any((folder / name).exists() for name in PREPARED):
        return f"data directory {folder} has no {MANIFEST}, as if not all of it was copied; copy that file too"
    run = RunFolder.around(folder) or RunFolder(folder)
    if run.recipe.is_file() and run.metrics.is_file():
        return f"{folder} belongs to a run, not to its data; give {run.read_record().get('data_dir') or 'its data'}"
    if (folder / "config.json").exists():
        return f"{folder} holds a model, not tokens; give the directory that `python prepare_data.py` made"
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if not names:
        return (
            f"{folder} is empty; fill it with `python prepare_data.py CORPUS --output_dir {shlex.quote(str(folder))}`"
        )
    if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
        return (
            f"{folder} holds a dataset saved by save_to_disk, not tokens; write each split to a file with "
            "`load_from_disk(...).to_parquet(FILE)`, then run `python prepare_data.py files --source FILE`"
        )
    for name in names:
        if name.removesuffix(".gz").endswith(TEXT_FORMATS):
            return f"{folder} holds text ({name}), not tokens; {_prepare('files --source ', folder)}"
        if name.endswith(TABLE_FORMATS):
            return f"{folder} holds a table ({name}), not tokens; {_prepare('', folder)}"
    return f"{folder} holds no tokens and no {MANIFEST}; `python prepare_data.py` makes a directory that does"


def _why_a_file_is_none(file: Path) -> str:
    if file.name == MANIFEST:
        return f"{file} is a file, but prepared data is opened by its folder; give {file.parent}"
    if file.suffix in (".bin", ".npy", ".ds"):
        return f"{file} is a file, but token files are opened by their folder; give {file.parent}"
    if file.name.endswith(TABLE_FORMATS):
        return f"{file} is a table, not tokens; {_prepare('', file.parent)}"
    return f"{file} is a file of text, not of tokens; {_prepare('files --source ', file)}"


def _prepare(corpus: str, source: Path) -> str:
    """The command that tokenizes a file or folder of text."""
    output_dir = f"data/{source.absolute().stem}-tokens"
    command = f"python prepare_data.py {corpus}{shlex.quote(str(source))} --output_dir {shlex.quote(output_dir)}"
    return f"prepare it with `{command}` and train on {output_dir}"


def _foreign_split(files: list[TokenFile]) -> Split:
    shards = [Shard(file.path.name, file.tokens, None, None, file.offset) for file in files if file.tokens]
    return Split(sum(shard.tokens for shard in shards), documents=None, bytes=None, shards=tuple(shards))
