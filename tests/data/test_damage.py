"""Manifest.verify against random damage of every kind, and --describe against a recount."""

import json
import random
import re
import shutil

import numpy as np
import pytest
from support import ROOT, prepare, write_jsonl

from gpt2repro.data.manifest import Manifest
from gpt2repro.data.shards import SPLITS
from gpt2repro.data.token_stream import TokenStream
from gpt2repro.errors import UserError
from gpt2repro.prepare import describe


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, topics):
    """Several shards of each split."""
    root = tmp_path_factory.mktemp("prepared")
    source = write_jsonl(root / "a.jsonl", topics)
    flags = ("--tokenizer", "bpe:500", "--shard_tokens", 20_000, "--val_fraction", 0.3)
    prepare("files", "--source", source, "--output_dir", root / "out", *flags)
    return root / "out"


def flip_a_byte(path, chance):
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def truncate(path, chance):
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])


def lengthen(path, chance):
    path.write_bytes(path.read_bytes() + bytes(chance.randrange(1, 100)))


def swap(path, chance):
    other = chance.choice([p for p in path.parent.glob("*.npy") if p.read_bytes() != path.read_bytes()])
    data = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(data)


def remove(path, chance):
    path.unlink()


def edit(path, chance):
    """Change one letter or digit of the manifest, which may then no longer be JSON."""
    text = path.read_text()
    place = chance.choice([match.start() for match in re.finditer(r"[a-z0-9]", text)])
    new = chance.choice([c for c in "abcdefxyz123456789" if c != text[place]])
    path.write_text(text[:place] + new + text[place + 1 :])


SHARD_DAMAGE = [flip_a_byte, truncate, lengthen, swap, remove]


def damage_at_random(folder, chance):
    """Damage one file of a prepared directory; returns its name."""
    damage = chance.choice([*SHARD_DAMAGE, *SHARD_DAMAGE, edit])
    if damage is edit:
        path = folder / "manifest.json"
    else:
        files = sorted(folder.glob("*.npy")), sorted((folder / "tokenizer").iterdir())
        path = chance.choice(files[chance.random() < 0.2])
        if damage is swap and path.suffix != ".npy":
            damage = flip_a_byte
    damage(path, chance)
    return path.name


def test_random_damage_is_found_and_named(prepared, tmp_path):
    for seed in range(100):
        folder = tmp_path / f"seed_{seed}"
        shutil.copytree(prepared, folder)
        name = damage_at_random(folder, random.Random(seed))
        try:
            Manifest.read(folder).verify(folder, num_workers=2)
        except UserError as error:
            assert name in str(error), f"seed {seed}"
        else:
            pytest.fail(f"seed {seed}: the damage to {name} was not found")
        shutil.rmtree(folder)


def test_a_manifest_that_lies_about_its_shards_is_found_out(prepared, tmp_path):
    """Even if its seal is valid."""
    shutil.copytree(prepared, tmp_path / "data")
    for key in ("tokens", "documents"):
        manifest = json.loads((prepared / "manifest.json").read_text())
        split = manifest["splits"]["train"]
        split[key] += 1
        split["shards"][0][key] += 1
        Manifest.from_dict(manifest).write(tmp_path / "data")
        with pytest.raises(UserError, match="train_00000.npy"):
            Manifest.read(tmp_path / "data").verify(tmp_path / "data")


@pytest.mark.parametrize(
    "place, why",
    [
        ("run", "belongs to a run, not to its data; give data"),
        ("run/checkpoints/step_00000004", "belongs to a run, not to its data; give data"),
        ("data/manifest.json", "is a file, but prepared data is opened by its folder; give "),
    ],
)
def test_what_is_taken_for_prepared_data_is_recognised(place, why):
    with pytest.raises(UserError, match=f"golden/{place} {why}"):
        Manifest.read(ROOT / "tests" / "golden" / place)


def test_a_model_is_not_prepared_data(tmp_path):
    shutil.copy(ROOT / "tests" / "golden" / "model" / "config.json", tmp_path)
    with pytest.raises(UserError, match="holds a model, not tokens; give the directory that"):
        Manifest.read(tmp_path)


def test_a_description_counts_what_the_shards_hold(prepared):
    text = describe.describe(prepared)
    manifest = json.loads((prepared / "manifest.json").read_text())
    for split in SPLITS:
        tokens = np.concatenate([np.load(prepared / shard["file"]) for shard in manifest["splits"][split]["shards"]])
        lengths = np.diff(np.flatnonzero(tokens == 499), append=len(tokens))
        starts, _ = describe.document_lengths(TokenStream.open(prepared, split), 499)
        assert starts == np.flatnonzero(tokens == 499)[:3].tolist()
        assert f"{split}: {len(tokens):,} tokens in {len(lengths):,} documents" in text
        for power in range(4, 16):
            count = int(((lengths >= 2**power) & (lengths < 2 ** (power + 1))).sum())
            assert not count or re.search(rf"{2**power:,} to {2 ** (power + 1) - 1:,} +{count} #", text)
    assert "tokens per byte" in text and 'The "assert" statement' in text
