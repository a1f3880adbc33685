"""How many of the duplicates planted in real text deduplication finds, and how many MinHash's formula predicts.

    python benchmarks/deduplication.py
    python benchmarks/deduplication.py --source FOLDER_OF_TXT --num_workers 8 --output benchmarks/results/NAME.json

The text is the documentation in the machine's Python packages (docstrings of 30 words or more, CPython's topics) and
passages of 250 words from --source. A first run deduplicates --pool such documents; what it keeps is the corpus, so
that few natural duplicates remain. After it, in files of their own, come copies of --pairs documents at each level:
with the same URL in another form, and with a passage replaced by one from another document, of the length that gives
the desired Jaccard similarity. Similarities are measured on datatrove's own normalized 5-grams.

Recall: pairs whose two documents end up in one cluster. Precision: of the copies removed, those that share a cluster
with their original; of the other documents removed, those whose cluster holds a document of similarity --duplicate or
more.
"""

import argparse
import ast
import datetime
import itertools
import json
import os
import platform
import random
import resource
import statistics
import sys
import sysconfig
import tempfile
import time
import warnings
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import pyarrow.parquet


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpt2repro.errors import quiet_broken_pipe
from gpt2repro.prepare.built_in import python_docs
from gpt2repro.prepare.corpora import CorpusQuery, open_corpus
from gpt2repro.prepare.deduplication import METHODS, DedupOptions, deduplicate
from gpt2repro.prepare.deduplication_report import match_probability
from gpt2repro.prepare.readers import Piece
from gpt2repro.prepare.request import Execution


LEVELS = {0.95: 0.02, 0.8: 0.03, 0.5: 0.03}  # Jaccard similarity -> half the width of its bin
FILES = 8
MIN_SHINGLES = 200  # of an original: one word of 204 replaced is five 5-grams of 200, Jaccard 195/205 = 0.95


def main() -> None:
    args = parse_arguments()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        pool = [{"text": text} for text in texts(args.source)]
        rng.shuffle(pool)
        pool = pool[: args.pool]
        refuse_too_few([document for document in pool if len(document["text"].split()) > MIN_SHINGLES + 3], args.pairs)
        write_files(work / "pool", pool)
        execution = Execution(args.num_workers)
        deduplicate(pieces(work / "pool"), work / "corpus", DedupOptions(("minhash",)), execution)
        kept = pyarrow.parquet.read_table(work / "corpus" / "documents", columns=["text"])["text"].to_pylist()
        corpus = [{"text": text, "url": f"https://example.org/{number}"} for number, text in enumerate(kept)]

        planted = plant(corpus, args.pairs, rng)
        write_files(work / "input", corpus)
        for level, pairs in planted.items():
            write_files(work / "input", [copy for _, copy, _ in pairs], name=f"z{level}")
        began, cpu = time.perf_counter(), time.process_time()
        found = deduplicate(pieces(work / "input"), work / "output", DedupOptions(METHODS), execution)
        cost = {
            "bytes": found["bytes"]["in"],
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - cpu,  # of this process: everything if --num_workers is 1
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,  # the benchmark's own lists included
        }
        rows = {
            part: pyarrow.parquet.read_table(work / "output" / part, columns=["text", "url", "cluster"]).to_pylist()
            for part in ("documents", "removed/url", "removed/minhash")
        }
    report(args, planted, rows, {"corpus": len(corpus), **found["documents"]}, cost)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source", help="file or folder of .txt, cut into passages, in addition to the packages' documentation"
    )
    parser.add_argument("--pool", type=int, default=28_000, help="documents before the first run")
    parser.add_argument("--pairs", type=int, default=900, help="planted duplicates at each level")
    parser.add_argument("--duplicate", type=float, default=0.5, help="Jaccard similarity of a true duplicate")
    parser.add_argument("--num_workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="JSON file for every number")
    return parser.parse_args()


# ---- documents ----


def texts(source: str | None) -> list[str]:
    """Distinct documents, in an order determined by the machine's packages."""
    found = itertools.chain(python_docs(), docstrings(Path(sysconfig.get_path("purelib"))))
    if source:
        paths = sorted(Path(source).rglob("*.txt")) if Path(source).is_dir() else [Path(source)]
        found = itertools.chain(found, *(passages(path.read_text()) for path in paths))
    return list(dict.fromkeys(found))


def docstrings(root: Path):
    warnings.simplefilter("ignore", SyntaxWarning)
    for path in sorted(root.rglob("*.py")):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # some packages contain files that are broken on purpose
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text.split()) >= 30:
                    yield text


def passages(text: str):
    words = text.split()
    yield from (" ".join(words[start : start + 250]) for start in range(0, len(words), 250))


def write_files(folder: Path, documents: list[dict], name: str = "") -> None:
    """Several files of equal length; those with a `name` come later in corpus order."""
    folder.mkdir(exist_ok=True)
    for number in range(FILES):
        share = documents[len(documents) * number // FILES : len(documents) * (number + 1) // FILES]
        lines = "".join(json.dumps(document) + "\n" for document in share)
        (folder / f"{name or 'corpus'}_{number}.jsonl").write_text(lines)


def pieces(folder: Path) -> list[Piece]:
    return open_corpus(CorpusQuery("files", str(folder))).pieces


# ---- planting ----


def refuse_too_few(originals: list[dict], pairs: int) -> None:
    needed = pairs * (len(LEVELS) + 1)
    if len(originals) < needed:
        sys.exit(f"{len(originals)} documents of {MIN_SHINGLES} 5-grams, {needed} needed: lower --pairs, raise --pool")


def plant(corpus: list[dict], pairs: int, rng: random.Random) -> dict[str, list[tuple[dict, dict, float]]]:
    """level -> (original, copy, true Jaccard similarity); no original is used twice."""
    shingles = shingler()
    originals = [document for document in corpus if len(shingles(document["text"])) >= MIN_SHINGLES]
    refuse_too_few(originals, pairs)
    chosen = iter(rng.sample(originals, pairs * (len(LEVELS) + 1)))
    planted = {
        "url": [(o, {"text": o["text"], "url": variant(o["url"], rng)}, 1.0) for o in itertools.islice(chosen, pairs)]
    }
    for level in LEVELS:
        planted[str(level)] = []
        for number, original in enumerate(itertools.islice(chosen, pairs)):
            text = near_copy(original["text"], rng.choice(originals)["text"], level, rng)
            a, b = shingles(original["text"]), shingles(text)
            copy = {"text": text, "url": f"https://example.org/{level}/{number}"}
            planted[str(level)].append((original, copy, len(a & b) / len(a | b)))
    return planted


def shingler():
    """text -> set of datatrove's hashed 5-grams."""
    from datatrove.pipeline.dedup import MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.hashing import HashConfig

    block = MinhashDedupSignature(tempfile.gettempdir(), MinhashConfig(hash_config=HashConfig(hash_fc="sha1")))
    return lambda text: set(block.get_shingles(text).ravel().tolist())


def variant(url: str, rng: random.Random) -> str:
    """The same address in another form."""
    path = url.removeprefix("https://example.org")
    return rng.choice(
        [
            f"HTTPS://Example.org{path}",
            f"https://example.org:443{path}",
            f"https://example.org{path}/",
            f"https://example.org{path}#top",
            f"https://example.org{path}?utm_source=feed",
        ]
    )


def near_copy(text: str, donor: str, jaccard: float, rng: random.Random) -> str:
    """`text` with a run of words replaced by the donor's. Replacing w words changes w + 4 of the n 5-grams, which
    leaves a similarity of (n - w - 4) / (n + w + 4). Words are split at blanks; datatrove's tokenizer finds a few more.
    """
    words, others = text.split(), donor.split()
    run = max(1, round((len(words) - 4) * (1 - jaccard) / (1 + jaccard)) - 4)
    start = rng.randrange(len(words) - run + 1)
    begin = rng.randrange(max(1, len(others) - run + 1))
    return " ".join(words[:start] + (others[begin : begin + run] * run)[:run] + words[start + run :])


# ---- the table ----


def report(args: argparse.Namespace, planted: dict, rows: dict, documents: dict, cost: dict) -> None:
    kept = {row["url"]: row["cluster"] for row in rows["documents"]}
    removed = {row["url"]: row["cluster"] for row in rows["removed/minhash"]}
    by_url = {row["url"] for row in rows["removed/url"]}
    copies = {copy["url"] for pairs in planted.values() for _, copy, _ in pairs}

    results = {}
    pairs = planted["url"]
    results["same URL"] = {
        "pairs": len(pairs),
        "recall": statistics.mean(copy["url"] in by_url for _, copy, _ in pairs),
        "predicted": 1.0,
        "removed": len(by_url),
        "precision": len(by_url & copies) / len(by_url),
    }
    for level, width in LEVELS.items():
        within = [pair for pair in planted[str(level)] if abs(pair[2] - level) <= width]
        gone = [(original, copy) for original, copy, _ in within if copy["url"] in removed]
        together = sum(
            removed[copy["url"]] in (kept.get(original["url"]), removed.get(original["url"])) for original, copy in gone
        )
        results[f"{level} ± {width}"] = {
            "pairs": len(within),
            "jaccard": statistics.mean(jaccard for *_, jaccard in within),
            "recall": together / len(within),
            "predicted": statistics.mean(match_probability(jaccard) for *_, jaccard in within),
            "removed": len(gone),
            "precision": together / len(gone) if gone else None,
        }
    others = other_precision(rows, copies, args.duplicate)
    results["not planted"] = {"removed": len(others), "precision": statistics.mean(others) if others else None}

    header = {
        "date": datetime.date.today().isoformat(),
        "device": f"{os.cpu_count()} x {platform.machine()}",
        "versions": {"python": platform.python_version(), "datatrove": version("datatrove"), "spacy": version("spacy")},
        "settings": {name: value for name, value in vars(args).items() if name not in ("output", "source")},
        "documents": documents,
        **cost,
    }
    print(
        f"\n{documents['in']:,} documents, {documents['in'] - documents['corpus']:,} of them planted; "
        f"{cost['bytes'] / 1e6:.0f} MB in {cost['seconds']:.0f} s, {cost['cpu_seconds']:.0f} s of one core\n"
    )
    print("| Jaccard | pairs | mean | recall | predicted | standard error | removed | precision |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, row in results.items():
        if "pairs" in row:
            error = (row["predicted"] * (1 - row["predicted"]) / row["pairs"]) ** 0.5
            numbers = f"{row['recall']:.3f} | {row['predicted']:.3f} | {error:.3f}"
            start = f"{row['pairs']} | {row.get('jaccard', 1):.3f} | {numbers}"
        else:
            start = " | | | | "
        precision = "" if row["precision"] is None else f"{row['precision']:.3f}"
        print(f"| {name} | {start} | {row['removed']} | {precision} |")
    if args.output:
        Path(args.output).write_text(json.dumps(header | {"results": results}, indent=2) + "\n")


def other_precision(rows: dict, copies: set[str], duplicate: float) -> list[bool]:
    """For each document that MinHash removed and that was not planted: whether its cluster holds a true duplicate."""
    shingles = shingler()
    clusters = defaultdict(list)
    for row in rows["documents"] + rows["removed/minhash"]:
        if row["cluster"] >= 0:
            clusters[row["cluster"]].append(row)
    result = []
    for row in rows["removed/minhash"]:
        if row["url"] not in copies:
            a = shingles(row["text"])
            mates = [shingles(mate["text"]) for mate in clusters[row["cluster"]] if mate["url"] != row["url"]]
            result.append(any(len(a & b) >= duplicate * len(a | b) for b in mates))
    return result


if __name__ == "__main__":
    with quiet_broken_pipe():
        main()
