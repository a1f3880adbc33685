"""Turn a corpus into token shards.

    python prepare_data.py python-docs      --output_dir data/python-docs
    python prepare_data.py shakespeare-char --output_dir data/shakespeare-char
    python prepare_data.py files            --output_dir data/mine --source FOLDER --tokenizer bpe:8192
    python prepare_data.py fineweb-edu      --output_dir data/fineweb-edu
    python prepare_data.py owner/dataset    --output_dir data/theirs --text_column content
    python prepare_data.py --verify data/mine

The output directory is described in gpt2repro/shards.py; train_accelerate.py reads it through `data_dir`.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from gpt2repro import shards
from gpt2repro.corpora import HUB_CORPORA, LOCAL_CORPORA, Corpus, open_corpus
from gpt2repro.errors import Parser, UserError, run_script
from gpt2repro.tokenization import Tokenizer, build_tokenizer


SETTINGS = "preparing.json"  # stands in an unfinished directory: what is being prepared there
BATCH_DOCUMENTS = 512


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    if args.verify:
        manifest = shards.verify(args.verify, progress=lambda shards: tqdm(shards, unit=" shards"))
        print(summary(args.verify, manifest))
        return

    output_dir = Path(args.output_dir)
    settings = {name: value for name, value in vars(args).items() if name not in ("output_dir", "num_workers")}
    if is_prepared(output_dir, settings):
        print(f"already prepared: {summary(output_dir, shards.read_manifest(output_dir))}")
        return
    corpus = open_corpus(args.corpus, args.source, args.text_column, args.hub_config, args.split, args.revision)
    split = split_settings(args, corpus)
    tokenizer = build_tokenizer(args.tokenizer or corpus.default_tokenizer, corpus.documents(), args.num_workers)

    output_dir.mkdir(parents=True, exist_ok=True)
    shards.write_json(output_dir / SETTINGS, settings)
    manifest = {
        "format_version": shards.FORMAT_VERSION,
        "corpus": {"name": args.corpus, **corpus.facts},
        "tokenizer": tokenizer.describe(),
        "deduplication": None,
        "split": split,
        "settings": settings,
        "splits": write_shards(output_dir, corpus, tokenizer, split, args.shard_tokens),
    }
    tokenizer.fast.save_pretrained(output_dir / "tokenizer")
    shards.write_json(output_dir / shards.MANIFEST, manifest)
    (output_dir / SETTINGS).unlink()
    print(summary(output_dir, manifest))


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    corpora = ", ".join([*LOCAL_CORPORA, *HUB_CORPORA])
    parser.add_argument("corpus", nargs="?", help=f"{corpora}, or the Hub id of any dataset")
    parser.add_argument("--output_dir", help="where the shards go")
    parser.add_argument("--source", help="local file or folder, for `files` and the shakespeare corpora")
    parser.add_argument("--tokenizer", help="gpt2, char, bpe:N, or a saved one (default: the corpus's usual one)")
    parser.add_argument("--shard_tokens", type=int, default=100_000_000, help="tokens a shard (default: %(default)s)")
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
    parser.add_argument("--num_workers", type=int, default=1, help="threads of the gpt2 tokenizer (default: 1)")
    parser.add_argument("--verify", metavar="DIR", help="check a prepared directory against its manifest")
    args = parser.parse_args(argv)

    problems = []
    if not args.verify and not (args.corpus and args.output_dir):
        problems.append("give a CORPUS and --output_dir DIR, or --verify DIR")
    if args.source and args.output_dir and Path(args.source).resolve() in Path(args.output_dir).resolve().parents:
        problems.append(
            f"--output_dir {args.output_dir} lies inside --source {args.source}, where its files would be taken for "
            "documents; choose one outside"
        )
    if args.shard_tokens < 1:
        problems.append(f"--shard_tokens {args.shard_tokens} must be at least 1")
    if args.num_workers < 1:
        problems.append(f"--num_workers {args.num_workers} must be at least 1")
    if args.val_tokens is not None and args.val_fraction is not None:
        problems.append("--val_tokens and --val_fraction exclude each other; give one")
    if args.val_tokens is not None and args.val_tokens < 1:
        problems.append(f"--val_tokens {args.val_tokens} must be at least 1")
    if args.val_fraction is not None and not 0 < args.val_fraction < 1:
        problems.append(f"--val_fraction {args.val_fraction} must lie between 0 and 1")
    if problems:
        raise UserError("\n".join(problems))
    return args


def is_prepared(output_dir: Path, settings: dict) -> bool:
    """Whether the directory already holds just what is asked for.

    Raises:
        UserError: it holds something else, which is not overwritten.
    """
    if not output_dir.exists():
        return False
    if output_dir.is_dir() and {path.name for path in output_dir.iterdir()} <= {SETTINGS + ".tmp"}:
        return False  # empty, or interrupted while the first file was written
    for name in (shards.MANIFEST, SETTINGS):
        if (found := recorded_settings(output_dir / name)) is not None:
            if found == settings:
                return name == shards.MANIFEST
            differences = [k for k in settings if found.get(k) != settings[k]]
            raise UserError(
                f"{output_dir} holds data prepared with other settings ({', '.join(differences)}); "
                "choose another --output_dir, or delete it"
            )
    raise UserError(f"{output_dir} exists and was not made by prepare_data.py; choose another --output_dir")


def recorded_settings(path: Path) -> dict | None:
    """The settings that a manifest, or SETTINGS, records; None where there is no such file of ours."""
    try:
        content = json.loads(path.read_text())
        return dict(content["settings"] if path.name == shards.MANIFEST else content)
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


def write_shards(output_dir: Path, corpus: Corpus, tokenizer: Tokenizer, split: dict, shard_tokens: int) -> dict:
    """Tokenize every document into its split's shards; returns the manifest's record of each split."""
    dtype = shards.token_dtype(tokenizer.vocab_size)
    writers = {
        name: shards.ShardWriter(output_dir, name, dtype, shard_tokens, tokenizer.eot_id) for name in shards.SPLITS
    }
    documents = divided(corpus, split.get("val_fraction"))
    with tqdm(unit=" tokens", unit_scale=True, desc=corpus.facts.get("hub_id", output_dir.name)) as progress:
        while batch := list(islice(documents, BATCH_DOCUMENTS)):
            for (name, text), tokens in zip(batch, tokenizer.encode_batch([text for _, text in batch])):
                if "val_tokens" in split:
                    name = "val" if writers["val"].tokens < split["val_tokens"] else "train"
                writers[name].add(tokens, len(text.encode()))
            progress.update(sum(writer.tokens for writer in writers.values()) - progress.n)
            progress.set_postfix(documents=sum(writer.documents for writer in writers.values()))
    for name, writer in writers.items():
        if not writer.tokens:
            (output_dir / SETTINGS).unlink()  # so that the same directory takes the other setting
            for path in output_dir.glob("*.npy"):
                path.unlink()
            raise UserError(
                f"the {name} split got no document ({split}); choose another --val_tokens or --val_fraction"
            )
    return {name: writer.finish() for name, writer in writers.items()}


def divided(corpus: Corpus, val_fraction: float | None) -> Iterator[tuple[str, str]]:
    """(split, text) of every document; without a fraction all are of the train split.

    One long text is cut by position, as nanoGPT's data/shakespeare*/prepare.py cut it. Of many documents those are
    held out whose hash falls below the fraction, so that a document keeps its place when the corpus grows, and its
    exact copies go where it goes.
    """
    for text in corpus.documents():
        if val_fraction is None:
            yield "train", text
        elif corpus.single_text:
            cut = int(len(text) * (1 - val_fraction))
            yield "train", text[:cut]
            yield "val", text[cut:]
        else:
            digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
            yield "val" if int.from_bytes(digest) < val_fraction * 2**64 else "train", text


def summary(directory: str | Path, manifest: dict) -> str:
    parts = [
        f"{name} {split['tokens']:,} tokens, {split['documents']:,} documents, {len(split['shards'])} shards"
        for name, split in manifest["splits"].items()
    ]
    tokenizer = manifest["tokenizer"]
    return f"{directory}: {'; '.join(parts)}; tokenizer {tokenizer['name']}, {tokenizer['vocab_size']:,} ids"


if __name__ == "__main__":
    run_script(main)
