"""prepare_data.py --dedup: removed documents are in no shard, and the manifest records how many there were."""

import gzip
import importlib.util
import json

import numpy as np
import pytest
from support import prepare, write_jsonl

import prepare_data
from gpt2repro.errors import UserError
from gpt2repro.prepare.prepared import OutputDirectory


DATATROVE = importlib.util.find_spec("datatrove") is not None


@pytest.fixture
def source(tmp_path, topics):
    """Thirty documents, the first ten again under the same URL."""
    rows = [{"text": text, "url": f"https://example.org/{n}"} for n, text in enumerate(topics[:30])]
    rows += [{"text": f"another version {n}", "url": f"https://EXAMPLE.org/{n}#top"} for n in range(10)]
    return write_jsonl(tmp_path / "a.jsonl", rows)


@pytest.mark.slow
@pytest.mark.skipif(not DATATROVE, reason="datatrove is not installed: pip install gpt2repro[dedup]")
@pytest.mark.parametrize("num_workers", [1, 2])
def test_only_what_is_kept_is_tokenized(source, tmp_path, encoding, topics, num_workers):
    command = ("files", "--source", source, "--dedup", "url", "--val_tokens", 1000, "--output_dir", tmp_path / "out")
    prepare(*command, "--num_workers", num_workers)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["deduplication"]["documents"] == {"in": 40, "removed_url": 10, "out": 30}
    tokens = np.concatenate(
        [np.load(path) for split in ("val", "train") for path in sorted((tmp_path / "out").glob(f"{split}_*"))]
    )
    assert tokens.tolist() == [id for text in topics[:30] for id in (50_256, *encoding.encode_ordinary(text))]
    prepare(*command)  # already prepared
    prepare("--verify", tmp_path / "out")


@pytest.mark.skipif(DATATROVE, reason="shows what happens without datatrove")
def test_without_datatrove_the_error_names_the_install_line_and_leaves_nothing(source, tmp_path):
    command = ("files", "--source", source, "--output_dir", tmp_path / "out", "--val_tokens", 1000)
    with pytest.raises(UserError, match=r"pip install .gpt2repro\[dedup\]"):
        prepare(*command, "--dedup", "url,minhash")
    prepare(*command)  # the directory takes other settings


@pytest.mark.slow
@pytest.mark.skipif(not DATATROVE, reason="datatrove is not installed: pip install gpt2repro[dedup]")
def test_without_duplicates_the_result_is_that_without_deduplication(tmp_path, topics):
    """The same reader reads every format: the same tokens, and the same rows skipped and repaired."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a.txt").write_text(topics[0])
    lines = b'\xef\xbb\xbf{"text": "one"}\n{"text": null}\n{"text": "\\ud800"}\n'
    (folder / "b.JSONL.GZ").write_bytes(gzip.compress(lines))
    (folder / "c.json").write_text(json.dumps([{"text": ""}, {"text": topics[1]}]))
    command = ("files", "--source", folder, "--val_tokens", 5)
    prepare(*command, "--output_dir", tmp_path / "plain")
    prepare(*command, "--output_dir", tmp_path / "unique", "--dedup", "minhash")
    plain, unique = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("plain", "unique"))
    for name in ("repaired_documents", "skipped_documents"):
        assert plain[name] == unique[name]
    assert plain["repaired_documents"] == plain["skipped_documents"]["no text"] == 1
    for split in ("train", "val"):
        (a, *_), (b, *_) = (plain["splits"][split]["shards"], unique["splits"][split]["shards"])
        tokens = [np.load(tmp_path / name / shard["file"]) for name, shard in (("plain", a), ("unique", b))]
        assert np.array_equal(*tokens)


@pytest.mark.skipif(not DATATROVE, reason="datatrove is not installed: pip install gpt2repro[dedup]")
def test_a_wrong_column_can_be_corrected_in_the_same_directory(source, tmp_path):
    command = ["files", "--source", str(source), "--output_dir", str(tmp_path / "out"), "--dedup", "url"]
    with pytest.raises(UserError, match="no column 'link' but text, url"):
        prepare(*command, "--url_column", "link")
    request = prepare_data.request_of(prepare_data.parse_arguments(command))
    assert OutputDirectory(tmp_path / "out").already_prepared(request) is None  # nor refused


def test_one_text_has_no_duplicates(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    for corpus in (["files", "--source", tmp_path / "a.txt"], ["python-docs"]):
        with pytest.raises(UserError, match="is not many documents in files"):
            prepare(*corpus, "--output_dir", tmp_path / "out", "--dedup", "minhash")


@pytest.mark.slow
@pytest.mark.skipif(not DATATROVE, reason="datatrove is not installed: pip install gpt2repro[dedup]")
def test_text_files_without_urls(tmp_path, topics, capsys):
    """The README's command on a folder of text: the URLs that text cannot have remove nothing, which is said."""
    folder = tmp_path / "source"
    folder.mkdir()
    for number, text in enumerate([*topics[:8], topics[3], topics[5]]):
        (folder / f"{number}.txt").write_text(text)
    prepare("files", "--source", folder, "--dedup", "url,minhash", "--output_dir", tmp_path / "out")
    assert "note: text files have no URLs" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["deduplication"]["documents"] == {"in": 10, "removed_url": 0, "removed_minhash": 2, "out": 8}


@pytest.mark.skipif(not DATATROVE, reason="datatrove is not installed: pip install gpt2repro[dedup]")
def test_tables_without_urls(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n')
    with pytest.raises(
        UserError, match="b.jsonl has no column 'url' but text; choose with --url_column, or leave url out"
    ):
        prepare("files", "--source", tmp_path, "--output_dir", tmp_path.parent / "out", "--dedup", "url,minhash")
