"""Turn a corpus into token shards.

    python prepare_data.py python-docs      --output_dir data/python-docs
    python prepare_data.py shakespeare-char --output_dir data/shakespeare-char
    python prepare_data.py files            --output_dir data/mine --source FOLDER --tokenizer bpe:8192
    python prepare_data.py fineweb-edu      --output_dir data/fineweb-edu
    python prepare_data.py owner/dataset    --output_dir data/theirs --text_column content
    python prepare_data.py --verify data/mine
    python prepare_data.py --describe data/mine

The output directory is described in gpt2repro/data/shards.py; train_accelerate.py reads it through `data_dir`.
"""

import argparse
import contextlib
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from gpt2repro import files
from gpt2repro.data import shards
from gpt2repro.data.manifest import MANIFEST, Manifest, TokenizerRecord, remedy
from gpt2repro.data.shards import Split
from gpt2repro.data.tokenization import build_tokenizer, expected_vocab_size
from gpt2repro.errors import Parser, UserError, run_script
from gpt2repro.prepare import parts as preparation
from gpt2repro.prepare.corpora import HUB_CORPORA, LOCAL_CORPORA, NOTES, SKIPPED, Corpus, open_corpus, with_attempts
from gpt2repro.prepare.deduplication import EXECUTORS, deduplicate


SETTINGS = "preparing.json"  # stands in an unfinished directory: what is being prepared there
LOCK = ".lock"
DEDUPLICATED = "deduplicated"  # the folder in the output directory that the deduplication writes
# Flags that change nothing in the result
NOT_SETTINGS = {"output_dir", "num_workers", "executor", "slurm_partition", "slurm_time", "verify", "describe"}
# What the deduplication depends on
DEDUPLICATION_SETTINGS = ("corpus", "source", "text_column", "hub_config", "split", "revision", "dedup", "url_column")


SHARD_TOKENS_HELP = (
    "tokens a shard, at most; a part of the corpus, about 90 million tokens, ends one too (default: %(default)s)"
)


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    if args.verify:
        manifest = Manifest.read(args.verify)
        manifest.verify(args.verify, args.num_workers, lambda shards: tqdm(shards, unit=" shards"))
        print(summary(args.verify, manifest))
        return
    if args.describe:
        # Here, as it imports half as much again, and the worker processes import this file too.
        from gpt2repro.prepare.describe import describe

        print(describe(args.describe))
        return

    output_dir = Path(args.output_dir)
    with preparation.no_space(output_dir):
        if not already_prepared(output_dir, args):
            with locked(output_dir):
                if not already_prepared(output_dir, args):  # by a command that has just let the lock go
                    prepare(output_dir, args)


def prepare(output_dir: Path, args: argparse.Namespace) -> None:
    """Make the directory, or what is missing of it."""
    corpus = open_asked(output_dir, args)
    split = split_settings(args, corpus)
    tokenizer_name = args.tokenizer or corpus.default_tokenizer
    check_space(output_dir, corpus, expected_vocab_size(tokenizer_name), args)
    begun = settings_of(args) | {"corpus_facts": corpus.facts, "modified": corpus.modified}
    built = tokenizer_of(output_dir, begun)
    files.write_json(output_dir / SETTINGS, begun | built)
    report = None
    if args.dedup:
        if (report := deduplicated(args, corpus)) is None:
            print("Slurm has the jobs; repeat this command when they are done, to tokenize what is kept")
            return
        corpus = replace(corpus, pieces=open_corpus("files", str(output_dir / DEDUPLICATED / "documents")).pieces)
    if not built:
        built = build_and_save(tokenizer_name, corpus, args)
        files.write_json(output_dir / SETTINGS, begun | built)
    tokenizer = built["tokenizer_facts"]
    common = preparation.Settings(
        output_dir=output_dir,
        tokenizer=tokenizer_name,
        vocab_size=tokenizer["vocab_size"],
        eot_id=tokenizer["eot_id"],
        shard_tokens=args.shard_tokens,
        val_fraction=split.get("val_fraction", 0.0),
        single_text=corpus.single_text,
    )
    quota = preparation.Quota(split.get("val_tokens", 0), args.max_tokens, args.max_documents)
    with Progress(corpus, args.num_workers) as progress:
        records = preparation.prepare_parts(corpus.parts(), common, quota, args.num_workers, progress.show)
    refuse_an_empty_split(output_dir, records, split, corpus, args)
    counted = [record["notes"] for record in records] + ([report["notes"]] if report else [])
    notes = {note: sum(counts[note] for counts in counted) for note in NOTES}
    manifest = Manifest(
        corpus={"name": args.corpus, **corpus.facts},
        tokenizer=TokenizerRecord.from_dict(tokenizer),
        splits={name: Split.from_dict(s) for name, s in preparation.put_together(records, common).items()},
        preparation={
            "tokenizer_files": built["tokenizer_files"],
            "deduplication": report,
            "split": split,
            "settings": settings_of(args),
            "repaired_documents": notes["repaired"],
            "skipped_documents": {note: notes[note] for note in SKIPPED},
        },
    )
    manifest.write(output_dir)
    tidy(output_dir)
    print(summary(output_dir, manifest))


def build_and_save(name: str, corpus: Corpus, args: argparse.Namespace) -> dict:
    """Build the tokenizer, of all the documents if its tokens are characters; returns what SETTINGS keeps of it."""
    count = args.max_documents if name == "char" else args.tokenizer_documents
    tokenizer = with_attempts(lambda: build_tokenizer(name, islice(corpus.texts(), count)))
    folder = Path(args.output_dir) / "tokenizer"
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer.fast.save_pretrained(folder)
    hashes = {path.name: files.file_sha256(path) for path in sorted(folder.iterdir())}
    return {"tokenizer_facts": tokenizer.describe(), "tokenizer_files": hashes}


def tokenizer_of(output_dir: Path, begun: dict) -> dict:
    """What build_and_save returned when the same preparation ran before; {} where it is not there."""
    recorded = recorded_settings(output_dir / SETTINGS) or {}
    built = {key: recorded.pop(key, {}) for key in ("tokenizer_facts", "tokenizer_files")}
    files = built["tokenizer_files"]
    if not files or recorded != begun:
        return {}
    damaged = any(files.file_problem(output_dir / "tokenizer" / name, sha256) for name, sha256 in files.items())
    return {} if damaged else built


def tidy(output_dir: Path) -> None:
    """Remove what only an unfinished directory needs."""
    preparation.clean_up(output_dir)
    for name in (SETTINGS, SETTINGS + ".tmp", MANIFEST + ".tmp", LOCK):
        (output_dir / name).unlink(missing_ok=True)


def deduplicated(args: argparse.Namespace, corpus: Corpus) -> dict | None:
    """Run the deduplication, whose statistics the manifest records; None while Slurm is at it."""
    if corpus.single_text or not all(piece.path for piece in corpus.pieces):
        raise UserError(f"--dedup {args.dedup}: {args.corpus} is not many documents in files; leave it out")
    return deduplicate(
        corpus.pieces,
        Path(args.output_dir) / DEDUPLICATED,
        args.dedup.split(","),
        args.executor,
        args.num_workers,
        args.text_column,
        args.url_column,
        slurm_partition=args.slurm_partition,
        slurm_time=args.slurm_time,
    )


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    corpora = ", ".join([*LOCAL_CORPORA, *HUB_CORPORA])
    parser.add_argument("corpus", nargs="?", help=f"{corpora}, or the Hub id of any dataset")
    parser.add_argument("--output_dir", help="where the shards go")
    parser.add_argument("--source", help="local file or folder, for `files` and the shakespeare corpora")
    parser.add_argument("--tokenizer", help="gpt2, char, bpe:N, or a saved one (default: the corpus's usual one)")
    parser.add_argument("--shard_tokens", type=int, default=100_000_000, help=SHARD_TOKENS_HELP)
    parser.add_argument("--val_tokens", type=int, help="validation: the first documents, at least so many tokens")
    parser.add_argument(
        "--val_fraction",
        type=float,
        help="validation: this fraction of the documents, chosen by hash; of one text, its end",
    )
    parser.add_argument("--text_column", default="text", help="column of the documents in tables (default: text)")
    parser.add_argument("--hub_config", help="configuration of a Hub dataset, e.g. sample-10BT")
    parser.add_argument("--split", default="train", help="split of a Hub dataset (default: train)")
    parser.add_argument("--revision", help="commit, branch or tag of a Hub dataset")
    parser.add_argument("--max_tokens", type=int, help="stop before the document with which there would be more")
    parser.add_argument("--max_documents", type=int, help="stop after so many documents")
    parser.add_argument(
        "--tokenizer_documents",
        type=int,
        default=1_000_000,
        help="bpe:N learns from the first so many documents (default: %(default)s); char takes them all",
    )
    parser.add_argument("--dedup", metavar="METHODS", help="remove duplicates first: url, minhash, or url,minhash")
    parser.add_argument("--url_column", default="url", help="column of the documents' URLs (default: url)")
    parser.add_argument("--executor", choices=EXECUTORS, default="local", help="of the deduplication (default: local)")
    parser.add_argument("--slurm_partition", help="Slurm's --partition for the deduplication")
    parser.add_argument("--slurm_time", default="24:00:00", help="Slurm's --time for each task (default: %(default)s)")
    parser.add_argument("--num_workers", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--verify", metavar="DIR", help="check a prepared directory against its manifest")
    parser.add_argument("--describe", metavar="DIR", help="say what a prepared directory holds")
    args = parser.parse_args(argv)

    problems = []
    if not (args.verify or args.describe or (args.corpus and args.output_dir)):
        problems.append("give a CORPUS and --output_dir DIR, or --verify DIR, or --describe DIR")
    if args.source and args.output_dir and Path(args.source).resolve() in Path(args.output_dir).resolve().parents:
        problems.append(
            f"--output_dir {args.output_dir} lies inside --source {args.source}, where its files would be taken for "
            "documents; choose one outside"
        )
    for name in ("shard_tokens", "num_workers", "tokenizer_documents", "max_tokens", "max_documents", "val_tokens"):
        if (value := getattr(args, name)) is not None and value < 1:
            problems.append(f"--{name} {value} must be at least 1")
    if args.val_tokens is not None and args.val_fraction is not None:
        problems.append("--val_tokens and --val_fraction exclude each other; give one")
    if args.val_fraction is not None and not 0 < args.val_fraction < 1:
        problems.append(f"--val_fraction {args.val_fraction} must lie between 0 and 1")
    if problems:
        raise UserError("\n".join(problems))
    return args


def settings_of(args: argparse.Namespace) -> dict:
    """What the result depends on."""
    return {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}


def already_prepared(output_dir: Path, args: argparse.Namespace) -> bool:
    """Whether the directory already holds just what is asked for; then it says so.

    Raises:
        UserError: it holds something else, which is not overwritten.
    """
    if not output_dir.exists():
        return False
    if output_dir.is_dir() and {path.name for path in output_dir.iterdir()} <= {SETTINGS + ".tmp", LOCK}:
        return False  # empty, or interrupted before the first file was written
    asked = settings_of(args)
    for name in (MANIFEST, SETTINGS):
        if (found := recorded_settings(output_dir / name)) is None:
            continue
        if name == SETTINGS and not any(output_dir.glob("parts/part_*.json")):  # only this may be made already:
            asked = {key: asked[key] for key in DEDUPLICATION_SETTINGS} if (output_dir / DEDUPLICATED).exists() else {}
        if differences := [key for key in asked if key in found and found[key] != asked[key]]:
            raise UserError(
                f"{output_dir} holds data prepared with other settings ({', '.join(differences)}); "
                "choose another --output_dir, or delete it"
            )
        if name == SETTINGS:
            return False
        if args.corpus == "files" or Path(args.corpus).is_dir():  # they may have changed since
            open_asked(output_dir, args)
        manifest = Manifest.read(output_dir)
        if damaged := manifest.missing_shards(output_dir):
            raise UserError("\n".join(f"{problem}; {remedy(output_dir)}" for problem in damaged))
        tidy(output_dir)  # perhaps the last moments were missing
        print(f"already prepared: {summary(output_dir, manifest)}")
        return True
    raise UserError(f"{output_dir} exists and was not made by prepare_data.py; choose another --output_dir")


NAMES = {"files": "list of files", "modified": "times of change"}  # of facts that are not called like their flags


def open_asked(output_dir: Path, args: argparse.Namespace) -> Corpus:
    """The corpus that is asked for. A preparation that goes on reads the commit of the Hub dataset that it began with.

    Raises:
        UserError: it cannot be had, or it is not the corpus that the directory was begun with.
    """
    recorded = {}
    if (output_dir / MANIFEST).exists():
        recorded = Manifest.read(output_dir).corpus
    elif (output_dir / DEDUPLICATED).exists() or any(output_dir.glob("parts/part_*.json")):
        found = recorded_settings(output_dir / SETTINGS) or {}
        recorded = found.get("corpus_facts", {}) | {"modified": found.get("modified")}
    revision = args.revision or recorded.get("revision")
    corpus = open_corpus(args.corpus, args.source, args.text_column, args.hub_config, args.split, revision)
    asked = corpus.facts | ({"modified": corpus.modified} if "modified" in recorded else {})
    if changed := [NAMES.get(fact, fact) for fact in asked if recorded and recorded.get(fact) != asked[fact]]:
        raise UserError(
            f"the corpus is not the one that {output_dir} was begun with: its {' and '.join(changed)} changed; "
            "choose another --output_dir, or delete it"
        )
    return corpus


def recorded_settings(path: Path) -> dict | None:
    """The settings that a manifest, or SETTINGS, records; None where there is no such file of ours."""
    try:
        content = json.loads(path.read_text())
        return dict(content["settings"] if path.name == MANIFEST else content)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def split_settings(args: argparse.Namespace, corpus: Corpus) -> dict:
    """How validation is split off: {"val_tokens": N} or {"val_fraction": F}."""
    if args.val_tokens is None and args.val_fraction is None:
        return corpus.default_split
    if args.val_fraction is not None:
        return {"val_fraction": args.val_fraction}
    if corpus.single_text:
        raise UserError(f"--val_tokens {args.val_tokens}: one long text is split by position; use --val_fraction F")
    return {"val_tokens": args.val_tokens}


@contextlib.contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Make the directory and hold it against another preparation; a process that dies lets it go."""
    output_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output_dir / LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"{output_dir} is being prepared by another process; wait for it, or choose another --output_dir"
        ) from error
    try:
        yield
    finally:
        (output_dir / LOCK).unlink(missing_ok=True)
        lock.release()
        with contextlib.suppress(OSError):
            output_dir.rmdir()  # where nothing was begun


def check_space(output_dir: Path, corpus: Corpus, vocab_size: int, args: argparse.Namespace) -> None:
    """Say how much disk the preparation will need, and refuse what cannot fit."""
    text = sum(piece.bytes for piece in corpus.pieces)
    characters = (args.tokenizer or corpus.default_tokenizer) == "char"
    bytes_per_token = 1 if characters else 4  # of UTF-8; English text has 4.2 to 4.8 with GPT-2's
    tokens = min(text // bytes_per_token, args.max_tokens or math.inf)
    made = sum(path.stat().st_size for path in output_dir.rglob("*") if path.is_file())
    # The deduplication keeps the text, compressed to a half or less, and 952 bytes of a document of a few thousand.
    need = (tokens * shards.token_dtype(vocab_size).itemsize + (0.75 * text if args.dedup else 0)) / 1e9
    free = (shutil.disk_usage(output_dir).free + made) / 1e9
    if tokens:
        print(f"needs about {need:,.1f} GB of disk, {free:,.1f} GB are free", flush=True)
    if need > free:
        raise UserError(
            f"{output_dir} needs about {need:,.1f} GB, but only {free:,.1f} GB are free; choose another disk, or fewer "
            "tokens with --max_tokens"
        )


class Progress(tqdm):
    """A bar of the text that is tokenized, with documents, tokens and tokens per second over all processes."""

    def __init__(self, corpus: Corpus, num_workers: int):
        super().__init__(
            desc=f"{num_workers} process{'es' if num_workers > 1 else ''}",
            total=sum(piece.bytes for piece in corpus.pieces) or None,
            unit="B",
            unit_scale=True,
        )
        self.total: int
        self.began: tuple[float, int] | None = None

    def show(self, documents: int, tokens: int, text_bytes: int) -> None:
        now = time.perf_counter()
        self.began = self.began or (now, tokens)
        rate = (tokens - self.began[1]) / max(now - self.began[0], 1e-9)
        self.total = max(self.total or 0, text_bytes)  # an estimate, for compressed files
        self.update(text_bytes - self.n)
        self.set_postfix_str(f"{documents:,} documents, {tokens:,} tokens, {rate:,.0f} tokens/s", refresh=False)


def refuse_an_empty_split(
    output_dir: Path, records: list[dict], split: dict, corpus: Corpus, args: argparse.Namespace
) -> None:
    for name in shards.SPLITS:
        if not any(record["splits"][name]["tokens"] for record in records):
            preparation.clean_up(output_dir)  # so that the same directory takes the other setting
            remedy = "choose another --val_tokens or --val_fraction"
            limits = {key: getattr(args, key) for key in ("max_tokens", "max_documents") if getattr(args, key)}
            if limits:
                limited = " and ".join(f"--{key} {value}" for key, value in limits.items())
                remedy = f"allow more than {limited}" + ("" if corpus.single_text else f", or {remedy}")
            raise UserError(f"the {name} split got no document ({split}); {remedy}")


def summary(directory: str | Path, manifest: Manifest) -> str:
    parts = [
        f"{name} {split.tokens:,} tokens, {split.documents:,} documents, {len(split.shards)} shards"
        for name, split in manifest.splits.items()
    ]
    if left_out := sum(manifest.preparation.get("skipped_documents", {}).values()):
        parts.append(f"{left_out:,} rows left out, which had no text")
    tokenizer = manifest.tokenizer
    return f"{directory}: {'; '.join(parts)}; tokenizer {tokenizer.name}, {tokenizer.vocab_size:,} ids"


if __name__ == "__main__":
    run_script(main)
