"""Turn a corpus into token shards.

    python prepare_data.py python-docs      --output_dir data/python-docs
    python prepare_data.py shakespeare-char --output_dir data/shakespeare-char
    python prepare_data.py files            --output_dir data/mine --source FOLDER --tokenizer bpe:8192
    python prepare_data.py fineweb-edu      --output_dir data/fineweb-edu
    python prepare_data.py owner/dataset    --output_dir data/theirs --text_column content
    python prepare_data.py --verify data/mine
    python prepare_data.py --describe data/mine

gpt2repro/prepare/prepared.py describes the layout of the output directory, gpt2repro/data/manifest.py its manifest;
train_accelerate.py reads it through `data_dir`.
"""

import argparse
import os
import time
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from gpt2repro.data.manifest import Manifest
from gpt2repro.data.tokenization import (
    KEEP,
    SPECIAL_TOKEN_CHOICES,
    SpecialTokens,
    build_tokenizer,
    expected_vocab_size,
    save_tokenizer,
)
from gpt2repro.errors import Parser, UserError, problems_of, refuse, run_script
from gpt2repro.files import file_sha256, new_folder
from gpt2repro.prepare import parts, workers
from gpt2repro.prepare.corpora import HUB_CORPORA, LOCAL_CORPORA, Corpus, CorpusQuery, open_corpus
from gpt2repro.prepare.deduplication import DedupOptions, check_methods, deduplicate
from gpt2repro.prepare.describe import describe
from gpt2repro.prepare.executors import check_executor
from gpt2repro.prepare.local_files import describe_left_out
from gpt2repro.prepare.plan import PartRecord, Quota
from gpt2repro.prepare.prepared import (
    OutputDirectory,
    SavedTokenizer,
    Unfinished,
    check_space,
    explain_disk_errors,
    refuse_empty_splits,
    summary,
    uneven_split,
    unused_separator,
)
from gpt2repro.prepare.readers import DOCUMENT_NOTES, SKIP_REASONS
from gpt2repro.prepare.request import EXECUTORS, Execution, Request
from gpt2repro.prepare.retries import with_retries
from gpt2repro.prepare.validation import ValidationSplit


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    if args.verify:
        manifest = Manifest.read(args.verify)
        manifest.verify(args.verify, args.num_workers, lambda shards: tqdm(shards, unit=" shards"))
        print(summary(args.verify, manifest))
        return
    if args.describe:
        print(describe(args.describe))
        return

    request = request_of(args)
    execution = execution_of(args)
    directory = OutputDirectory(Path(args.output_dir))
    with explain_disk_errors(directory.path):
        if say_if_prepared(directory, request):
            return
        with directory.locked():
            if not say_if_prepared(directory, request):  # another command may have finished it just now
                prepare(directory, request, execution)


def say_if_prepared(directory: OutputDirectory, request: Request) -> bool:
    """Whether there is nothing to do."""
    manifest = directory.already_prepared(request)
    if manifest is None:
        return False
    print(f"already prepared: {summary(directory.path, manifest)}")
    return True


def prepare(directory: OutputDirectory, request: Request, execution: Execution) -> None:
    """Start or resume: open the corpus, deduplicate it, build the tokenizer, tokenize all parts, write the manifest."""
    corpus = directory.open_corpus(request)
    print_corpus_notes(corpus)
    val_split = request.validation_split(corpus)
    check_space(directory, corpus, expected_vocab_size(request.tokenizer_of(corpus)), request)
    unfinished = Unfinished(request.settings(), corpus.facts, corpus.modified)
    tokenizer = directory.saved_tokenizer(unfinished)
    replace(unfinished, tokenizer=tokenizer).write(directory.unfinished)

    report = None
    if request.dedup_methods:
        report = run_deduplication(directory, corpus, request, execution)
        kept = open_corpus(CorpusQuery("files", str(directory.deduplicated / "documents")))
        corpus = replace(corpus, pieces=kept.pieces)

    if tokenizer is None:
        tokenizer = build_and_save_tokenizer(directory, corpus, request)
        replace(unfinished, tokenizer=tokenizer).write(directory.unfinished)

    val_split = fit_split(val_split, corpus, request)
    special_tokens = SpecialTokens.read(directory.tokenizer, request.special_tokens)
    print_tokenizer_notes(tokenizer, special_tokens, corpus)

    job = parts.Job(
        directory=directory,
        tokenizer=request.tokenizer_of(corpus),
        vocab_size=tokenizer.record.vocab_size,
        eot_id=tokenizer.record.eot_id,
        shard_tokens=request.shard_tokens,
        special_tokens=request.special_tokens,
        val_fraction=val_split.fraction,
        single_text=corpus.single_text,
    )
    quota = Quota(val_split.tokens, request.max_tokens, request.max_documents)
    # The characters are those of the first documents, and only one process after the other knows where these end.
    if job.tokenizer == "char" and request.max_documents:
        execution = replace(execution, num_workers=1)
    with Progress(corpus, execution.num_workers) as progress:
        records = workers.prepare_parts(corpus.parts(), job, quota, execution, progress.show)
    refuse_empty_splits(directory, records, val_split, corpus, request)
    if corpus.modified:
        directory.open_corpus(request)  # refuses a source that changed while it was read
    for note in (unused_separator(records, corpus, request), uneven_split(records, val_split)):
        if note:
            print(note, flush=True)

    preparation = {
        "tokenizer_files": tokenizer.files,
        "deduplication": report,
        "split": val_split.to_dict(),
        "settings": request.settings(),
        **count_notes(records, report),
        "special_tokens": special_tokens.to_dict(),
        "left_out_files": {reason: len(names) for reason, names in corpus.left_out.items()},
    }
    corpus_record = {"name": request.corpus, **corpus.facts}
    manifest = Manifest(corpus_record, tokenizer.record, parts.finalize_shards(records, job), preparation)
    manifest.write(directory.path)
    directory.tidy()
    print(summary(directory.path, manifest))


def print_corpus_notes(corpus: Corpus) -> None:
    if corpus.left_out:
        print(describe_left_out(corpus.left_out), flush=True)
    for note in corpus.notes:
        print(note, flush=True)


def print_tokenizer_notes(tokenizer: SavedTokenizer, special_tokens: SpecialTokens, corpus: Corpus) -> None:
    if special_tokens.kept:
        print(special_tokens, flush=True)
    if tokenizer.record.eot_id is None and not corpus.single_text:
        print("note: the tokenizer has no end-of-text token, so nothing separates documents", flush=True)


def fit_split(default: ValidationSplit, corpus: Corpus, request: Request) -> ValidationSplit:
    """The split, which a small corpus needs to be larger if it is a default."""
    split = with_retries(lambda: request.fitted_split(corpus, default))
    if split != default:
        print(f"validation: {split}, as the default {default.fraction} takes no document of so few", flush=True)
    return split


def run_deduplication(directory: OutputDirectory, corpus: Corpus, request: Request, execution: Execution) -> dict:
    """Write the documents to keep to directory.deduplicated; returns the statistics."""
    if corpus.single_text or not all(piece.path for piece in corpus.pieces):
        raise UserError(f"--dedup {request.dedup}: {request.corpus} is not many documents in files; leave it out")
    options = DedupOptions(request.dedup_methods, request.text_column, request.url_column)
    return deduplicate(corpus.pieces, directory.deduplicated, options, execution)


def build_and_save_tokenizer(directory: OutputDirectory, corpus: Corpus, request: Request) -> SavedTokenizer:
    """Build the tokenizer that is asked for, from all the documents if its tokens are characters."""
    name = request.tokenizer_of(corpus)
    count = request.max_documents if name == "char" else request.tokenizer_documents
    tokenizer = with_retries(lambda: build_tokenizer(name, islice(corpus.texts(), count)))
    with new_folder(directory.tokenizer) as folder:
        save_tokenizer(folder, tokenizer.fast)
    hashes = {path.name: file_sha256(path) for path in sorted(directory.tokenizer.iterdir())}
    return SavedTokenizer(tokenizer.record(), hashes)


def count_notes(records: list[PartRecord], report: dict | None) -> dict:
    """The manifest's counts of repaired and skipped documents, over all parts and what the deduplication read."""
    counted = [record.notes for record in records]
    if report:
        counted.append(report["notes"])
    totals = {note: sum(notes[note] for notes in counted) for note in DOCUMENT_NOTES}
    skipped = {reason: totals[reason] for reason in SKIP_REASONS}
    return {"repaired_documents": totals["repaired"], "skipped_documents": skipped}


class Progress(tqdm):
    """A progress bar in bytes of text, with documents, tokens and tokens per second over all processes."""

    def __init__(self, corpus: Corpus, num_workers: int):
        super().__init__(
            desc=f"{num_workers} process{'es' if num_workers > 1 else ''}",
            total=sum(piece.bytes for piece in corpus.pieces) or None,
            unit="B",
            unit_scale=True,
        )
        self.total: int
        self.started: float | None = None  # when the first counts came
        self.tokens_before = 0  # what was done by then

    def show(self, counts: parts.Counts) -> None:
        now = time.perf_counter()
        if self.started is None:
            self.started, self.tokens_before = now, counts.tokens
        rate = (counts.tokens - self.tokens_before) / max(now - self.started, 1e-9)
        self.total = max(self.total or 0, counts.bytes)  # an estimate, for compressed files
        self.update(counts.bytes - self.n)
        done = f"{counts.documents:,} documents, {counts.tokens:,} tokens, {rate:,.0f} tokens/s"
        self.set_postfix_str(done, refresh=False)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    path = os.path.expanduser  # the shell leaves --flag=~/x as it is
    corpora = ", ".join([*LOCAL_CORPORA, *HUB_CORPORA])
    parser.add_argument("corpus", nargs="?", type=path, help=f"{corpora}, or the Hub id of any dataset")
    parser.add_argument("--output_dir", type=path, help="where the shards go")
    parser.add_argument("--source", type=path, help="file or folder, for `files` and the shakespeare corpora")
    parser.add_argument(
        "--tokenizer",
        help="gpt2, char, bpe:N, or a saved tokenizer: a Hub id, its folder, or that of a run, a prepared directory or "
        "a model (default: depends on the corpus)",
    )
    parser.add_argument(
        "--special_tokens",
        choices=SPECIAL_TOKEN_CHOICES,
        default=KEEP,
        help="a saved tokenizer's own markers such as <|user|>, written in a document: keep them as one id, as at "
        "inference, or encode them as ordinary text; <|endoftext|>, padding and the like are always text (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--shard_tokens",
        type=int,
        default=100_000_000,
        help="maximum tokens per shard; a part of the corpus, about 90 million tokens, also ends a shard (default: "
        "%(default)s)",
    )
    parser.add_argument("--val_tokens", type=int, help="validation: the first documents, at least this many tokens")
    parser.add_argument(
        "--val_fraction",
        type=float,
        help="validation: this fraction of the documents, chosen by hash; of a single text, its end",
    )
    parser.add_argument("--text_column", default="text", help="column of the documents in tables (default: text)")
    parser.add_argument(
        "--document_separator",
        metavar="SEP",
        help="what separates documents in a text file, or in rows that are lines: text such as '<|endoftext|>', or "
        "`blank` for blank lines (default: a file is a document, and so is a row)",
    )
    parser.add_argument("--hub_config", help="configuration of a Hub dataset, e.g. sample-10BT")
    parser.add_argument("--split", default="train", help="split of a Hub dataset (default: train)")
    parser.add_argument("--revision", help="commit, branch or tag of a Hub dataset")
    parser.add_argument("--max_tokens", type=int, help="stop before the document that would exceed this many tokens")
    parser.add_argument("--max_documents", type=int, help="stop after this many documents")
    parser.add_argument(
        "--tokenizer_documents",
        type=int,
        default=1_000_000,
        help="bpe:N is trained on this many documents from the start (default: %(default)s); char uses all of them",
    )
    parser.add_argument("--dedup", metavar="METHODS", help="remove duplicates first: url, minhash, or url,minhash")
    parser.add_argument("--url_column", default="url", help="column of the documents' URLs (default: url)")
    parser.add_argument(
        "--executor",
        choices=EXECUTORS,
        default="local",
        help="where deduplication and tokenization run: on this machine, on the Ray cluster of RAY_ADDRESS, or under "
        "Slurm (default: %(default)s)",
    )
    parser.add_argument("--slurm_partition", help="Slurm's --partition")
    parser.add_argument("--slurm_time", default="24:00:00", help="Slurm's --time for each task (default: %(default)s)")
    parser.add_argument("--num_workers", type=int, default=1, help="processes, or tasks at a time (default: 1)")
    parser.add_argument("--verify", metavar="DIR", type=path, help="check a prepared directory against its manifest")
    parser.add_argument("--describe", metavar="DIR", type=path, help="show what a prepared directory holds")
    args = parser.parse_args(argv)
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    refuse(argument_problems(args) + ignored_flags(args, given))
    return args


def request_of(args: argparse.Namespace) -> Request:
    return Request(**{field.name: getattr(args, field.name) for field in fields(Request)})


def execution_of(args: argparse.Namespace) -> Execution:
    return Execution(**{field.name: getattr(args, field.name) for field in fields(Execution)})


def _lies_inside(path: str, folder: str) -> bool:
    return Path(os.path.realpath(folder)) in Path(os.path.realpath(path)).parents


def argument_problems(args: argparse.Namespace) -> list[str]:
    """One line for each mistake."""
    problems = []
    if not (args.verify or args.describe or (args.corpus and args.output_dir)):
        problems.append("give a CORPUS and --output_dir DIR, or --verify DIR, or --describe DIR")
    if sum(map(bool, (args.corpus or args.output_dir, args.verify, args.describe))) > 1:
        problems.append("CORPUS, --verify and --describe exclude each other; give one")
    if args.source and not os.path.exists(args.source):
        problems.append(f"--source {args.source} does not exist; choose another")
    if args.source and args.output_dir and _lies_inside(args.output_dir, args.source):
        problems.append(
            f"--output_dir {args.output_dir} lies inside --source {args.source}, where its files would be taken for "
            "documents; choose one outside"
        )
    for name in ("shard_tokens", "num_workers", "tokenizer_documents", "max_tokens", "max_documents", "val_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            problems.append(f"--{name} {value} must be at least 1")
    if args.val_tokens is not None and args.val_fraction is not None:
        problems.append("--val_tokens and --val_fraction exclude each other; give one")
    if args.val_fraction is not None and not 0 < args.val_fraction < 1:
        problems.append(f"--val_fraction {args.val_fraction} must lie between 0 and 1")
    if args.tokenizer and args.tokenizer.startswith("bpe:"):
        problems += problems_of(expected_vocab_size, args.tokenizer)
    if args.dedup:
        problems += problems_of(check_methods, tuple(args.dedup.split(",")))
    problems += problems_of(check_executor, execution_of(args))
    return problems


def ignored_flags(args: argparse.Namespace, given: set[str]) -> list[str]:
    """One line for each flag that is given and would change nothing."""
    has_source = args.corpus in ("files", "shakespeare", "shakespeare-char")
    is_dataset = args.corpus not in LOCAL_CORPORA
    by_url = "url" in (args.dedup or "").split(",")
    uses = {
        "source": (has_source, "for the corpora `files`, which is text of your own, and shakespeare"),
        "hub_config": (is_dataset, "for a dataset"),
        "split": (is_dataset, "for a dataset"),
        "revision": (is_dataset, "for a dataset"),
        "url_column": (by_url, "with --dedup url"),
        "executor": (args.corpus, "to prepare a corpus"),
        "slurm_partition": (args.executor == "slurm", "with --executor slurm"),
        "slurm_time": (args.executor == "slurm", "with --executor slurm"),
    }
    return [
        f"--{name} {getattr(args, name)} is only used {use}; leave it out"
        for name, (is_used, use) in uses.items()
        if name in given and not is_used
    ]


if __name__ == "__main__":
    run_script(main)
