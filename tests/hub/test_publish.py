"""publish.py to folders: from runs, checkpoints, model folders and other trainers' files, in both formats."""

import json
import math
import shutil
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from support import contents
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import publish
from gpt2repro.data.tokenization import build_tokenizer
from gpt2repro.errors import UserError
from gpt2repro.evaluation.score_cache import model_sha256
from gpt2repro.files import file_sha256
from gpt2repro.hub.model_card import model_card
from gpt2repro.models.folder import save_model_folder
from gpt2repro.models.gguf_file import check_gguf
from gpt2repro.models.openai_weights import SHARED_FIELDS
from gpt2repro.models.unwrap import unwrapped
from gpt2repro.run_folder import RunFolder
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM


SIZES = dict(n_positions=32, n_embd=32, n_layer=2, n_head=2, vocab_size=320, unpadded_vocab_size=300)
SIZES |= dict(bos_token_id=299, eos_token_id=299)
RECIPE = {
    "data_dir": "/home/ada/data",
    "init_from": "gpt2-medium",
    "base_model": "gpt2-medium",
    "license": "apache-2.0",
    "max_steps": 20,
    "global_batch_tokens": 1000,
    "data": {
        "manifest_sha256": "f" * 64,
        "corpus": {
            "name": "fineweb-edu",
            "hub_id": "HuggingFaceFW/fineweb-edu",
            "config": "sample-10BT",
            "revision": "0a1",
        },
        "tokenizer": {"name": "bpe:300"},
        "splits": {"train": {"tokens": 123456}, "val": {"tokens": 1000, "bytes": 4000}},
    },
    "hardware": "8 x NVIDIA H200",
    "versions": {"torch": "2.13.0", "git_commit": None},
}
METRICS = [
    {"step": 10, "tokens": 10_000, "loss": 4.5},
    {"step": 10, "tokens": 10_000, "val_loss": 4.0},
    {"step": 20, "tokens": 20_000, "loss": 3.5},
    {"step": 20, "tokens": 20_000, "val_loss": 3.0},
    {"step": 20, "tokens": 20_000, "hellaswag_acc": 0.26, "hellaswag_acc_stderr": 0.0044, "hellaswag_acc_norm": 0.28,
     "hellaswag_acc_norm_stderr": 0.0045, "hellaswag_items": 10042},
]  # fmt: skip


def make_model(seed: int) -> GPT2ReproForCausalLM:
    torch.manual_seed(seed)
    return GPT2ReproForCausalLM(GPT2ReproConfig(**SIZES)).eval()


@pytest.fixture(scope="module")
def tokenizer(python_docs):
    return build_tokenizer("bpe:300", python_docs[:20]).fast


@pytest.fixture
def run_dir(tmp_path, tokenizer):
    """A run of 20 steps with a checkpoint at step 10, as the trainer leaves it."""
    run_dir = tmp_path / "run"
    checkpoint = run_dir / "checkpoints" / "step_00000010"
    checkpoint.mkdir(parents=True)
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in METRICS))
    model = make_model(2)
    save_model_folder(run_dir / "model", model, tokenizer, model_card(model, "run", None, RunFolder(run_dir)))
    make_model(1).save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    write_state(checkpoint, 10)
    return run_dir


def write_state(checkpoint, step):
    """With the hashes of what is published."""
    (checkpoint / "trainer_state.json").write_text(json.dumps({"step": step}))
    names = ("trainer_state.json", "config.json", "model.safetensors", "generation_config.json")
    (checkpoint / "hashes.json").write_text(json.dumps({name: file_sha256(checkpoint / name) for name in names}))


@pytest.fixture
def ids():
    return torch.arange(20).view(2, 10)


# ---- what is published ----


@pytest.mark.slow
@pytest.mark.parametrize("source, seed", [("", 2), ("model", 2), ("checkpoints/step_00000010", 1)])
def test_both_formats_have_the_sources_function(run_dir, tmp_path, ids, source, seed):
    expected = make_model(seed)(ids).logits[..., :300]
    publish.main([str(run_dir / source), "--to", str(tmp_path / "ours")])
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", trust_remote_code=True)
    assert_close(ours(ids).logits, expected, atol=1e-6, rtol=0)
    publish.main([str(run_dir / source), "--to", str(tmp_path / "gpt2"), "--format", "gpt2"])
    gpt2 = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")
    assert_close(gpt2(ids).logits, expected, atol=1e-5, rtol=1e-5)
    files = {path.name for path in (tmp_path / "gpt2").iterdir()}
    assert files == {"README.md", "config.json", "generation_config.json", "loss.png", "model.safetensors",
                     "tokenizer.json", "tokenizer_config.json"}  # fmt: skip
    assert {path.name for path in (tmp_path / "ours").iterdir()} == files | {"modeling_gpt2repro.py"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpt2", "ours", "run"], "nothing else is left behind"


TOKENIZER_KEYS = {"added_tokens", "decoder", "model", "normalizer", "padding", "post_processor", "pre_tokenizer"}
TOKENIZER_CONFIG_KEYS = {"bos_token", "clean_up_tokenization_spaces", "eos_token", "model_input_names", "unk_token"}
SHARED_KEYS = {*SHARED_FIELDS, "architectures", "dtype", "model_type", "transformers_version", "vocab_size"}
LEAVES = {  # every file of a published folder, and every key of the JSON files
    "README.md": None,
    "config.json": SHARED_KEYS | {"auto_map", "bias", "unpadded_vocab_size"},
    "generation_config.json": {"bos_token_id", "do_sample", "eos_token_id", "top_k", "transformers_version"},
    "loss.png": None,
    "model.safetensors": None,
    "modeling_gpt2repro.py": None,
    "tokenizer.json": TOKENIZER_KEYS | {"truncation", "version"},
    "tokenizer_config.json": TOKENIZER_CONFIG_KEYS | {"model_max_length", "padding_side", "tokenizer_class"},
}
GPT2_LEAVES = LEAVES | {"config.json": {*GPT2Config().to_dict(), "dtype", "n_ctx"}}
del GPT2_LEAVES["modeling_gpt2repro.py"]


@pytest.mark.parametrize("format, leaves", [("gpt2repro", LEAVES), ("gpt2", GPT2_LEAVES)])
def test_nothing_leaves_that_a_stranger_put_into_the_folder(run_dir, tmp_path, format, leaves):
    """An auto_map of theirs would make whoever opens our export run their code."""
    theirs = {"auto_map": {"AutoModelForCausalLM": "stranger/code--evil.Model"}, "custom_generate": "stranger/code"}
    theirs |= {"custom_pipelines": {"x": {"impl": "evil.Pipe"}}, "_note": "/home/ada"}
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        path = run_dir / "model" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | theirs))
    for name in ("evil.py", "custom_generate/generate.py", "special_tokens_map.json"):
        (run_dir / "model" / name).parent.mkdir(exist_ok=True)
        (run_dir / "model" / name).write_text("{}")
    publish.main([str(run_dir), "--to", str(tmp_path / "out"), "--format", format])
    published = contents(tmp_path / "out")
    assert published.keys() == leaves.keys()
    for name, keys in leaves.items():
        if keys is not None:
            assert json.loads(published[name]).keys() <= keys, name
        assert b"stranger" not in published[name] and b"/home/ada" not in published[name], name


def test_another_trainers_file_is_converted(tmp_path, tokenizer, ids):
    """nanoGPT's form: see tests/models/test_foreign_checkpoints.py for the files themselves."""
    model = make_model(3)
    args = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, bias=True, vocab_size=300, dropout=0.0)
    state = {
        name: t[:300] if name.endswith(("wte.weight", "lm_head.weight")) else t
        for name, t in model.state_dict().items()
    }
    torch.save({"model": state, "model_args": args}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="tokens and no tokenizer; add --tokenizer FOLDER to this command"):
        publish.main([str(tmp_path / "ckpt.pt"), "--to", str(tmp_path / "out")])
    tokenizer.save_pretrained(tmp_path / "prepared" / "tokenizer")
    publish.main([str(tmp_path / "ckpt.pt"), "--to", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "prepared")])
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert converted.config.activation_function == "gelu"
    assert torch.equal(converted.transformer.wte.weight, model.transformer.wte.weight[:300])


# ---- the model card ----


def test_the_card_says_what_was_measured(run_dir):
    card = ModelCard.load(run_dir / "model" / "README.md")
    assert card.data.license == "apache-2.0" and card.data.pipeline_tag == "text-generation"
    assert (
        card.data.datasets == ["HuggingFaceFW/fineweb-edu"] and card.data.base_model == "openai-community/gpt2-medium"
    )
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {
        "val_loss": 3.0,
        "perplexity": pytest.approx(20.085537),
        "bits_per_byte": pytest.approx(3.0 / 0.6931472 / 4, abs=1e-5),
        "acc": 0.26,
        "acc_norm": 0.28,
    }
    for fact in ("123,456 training tokens", "f" * 64, "20 steps of 1,000 tokens", "8 x NVIDIA H200", "torch 2.13.0"):
        assert fact in card.text, fact
    assert "| HellaSwag acc_norm | 0.2800 ± 0.0045 | 0.2955 |" in card.text
    assert "10,042 items" in card.text and "loss.png" in card.text
    assert "/home/ada" not in card.text and "None" not in card.text


def test_a_broken_models_card_has_a_number_for_its_perplexity(run_dir):
    """e to 812 is no float; a run that ends there still exports its model."""
    (run_dir / "metrics.jsonl").write_text(json.dumps(METRICS[3] | {"val_loss": 812.5}) + "\n")
    card = model_card(make_model(2), "run", None, RunFolder(run_dir))
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert math.isfinite(results["perplexity"]) and "| validation perplexity | 1e+304 |" in card.text


def test_a_checkpoints_card_ends_at_its_step(run_dir, tmp_path):
    publish.main([str(run_dir / "checkpoints" / "step_00000010"), "--to", str(tmp_path / "out"), "--license", "mit"])
    card = ModelCard.load(tmp_path / "out" / "README.md")
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["val_loss"] == 4.0 and "acc" not in results and "HellaSwag" not in card.text
    assert "10 steps of 1,000 tokens, 10,000 in all" in card.text and card.data.license == "mit"


def test_what_lies_between_validation_and_checkpoint_is_not_claimed(run_dir, tmp_path):
    """The model of step 15 was not validated; that of step 10 was."""
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 25, "tokens": 25_000, "loss": 3.3}) + '\n{"step": 26, "tok')
    checkpoint = run_dir / "checkpoints" / "step_00000010"
    write_state(checkpoint, 25)
    publish.main([str(checkpoint), "--to", str(tmp_path / "out")])
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.eval_results is None and "3.3000" in card.text and "validation loss, nats" not in card.text


@pytest.mark.parametrize("items, error", [(500, 0.02), (1, None)])
def test_hellaswag_on_a_sample_is_no_benchmark_result(run_dir, items, error):
    row = METRICS[-1] | {"hellaswag_items": items, "hellaswag_acc_stderr": error, "hellaswag_acc_norm_stderr": error}
    (run_dir / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    card = model_card(make_model(2), "run", None, RunFolder(run_dir))
    assert card.data.eval_results is None and f"HellaSwag: {items} items" in card.text
    assert "0.2955" not in card.text


def test_local_paths_stay_private(run_dir):
    record = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    record |= {"init_from": "/home/ada/start", "base_model": None, "corpus": "/home/ada/corpus"}
    record["data"]["corpus"] = {"name": "/home/ada/corpus", "hub_id": "/home/ada/corpus", "revision": None}
    record["data"]["tokenizer"]["name"] = "/home/ada/tokenizer"
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(record))
    card = model_card(make_model(2), "run", None, RunFolder(run_dir))
    assert "/home/ada" not in str(card) and "starting from start" in card.text
    assert card.data.base_model is None and card.data.datasets is None


def test_without_a_record_the_card_claims_nothing(run_dir, tmp_path):
    shutil.copytree(run_dir / "model", tmp_path / "moved")
    publish.main([str(tmp_path / "moved"), "--to", str(tmp_path / "out"), "--format", "gpt2"])
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.eval_results is None and card.data.datasets is None
    for absent in ("Evaluation", "loss.png", "trust_remote_code", "training", "Recipe"):
        assert absent not in card.text, absent
    assert "2 layers" in card.text


def test_files_beside_the_target_are_left_alone(run_dir, tmp_path):
    for name in ("out.png", "writing_out/a", "replaced_out/a", "removing_out/a", "unfinished_out/a"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    publish.main([str(run_dir), "--to", str(tmp_path / "out")])
    assert {name: content for name, content in contents(tmp_path).items() if not name.startswith("out/")} == before


def test_the_second_of_two_that_publish_to_one_folder_is_refused(run_dir, tmp_path, monkeypatch):
    flags = [str(run_dir), "--to", str(tmp_path / "out")]
    save = save_model_folder

    def save_second(*args):
        monkeypatch.setattr(publish, "save_model_folder", save)
        publish.main([*flags, "--license", "first"])
        save(*args)

    monkeypatch.setattr(publish, "save_model_folder", save_second)
    with pytest.raises(UserError, match="is no longer empty .*; choose a new folder"):
        publish.main([*flags, "--license", "mit"])
    assert ModelCard.load(tmp_path / "out" / "README.md").data.license == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_older_releases_of_transformers_get_no_token_types_from_the_tokenizer(run_dir):
    """GPT2LMHeadModel would add the embedding of token 0 to every position."""
    settings = json.loads((run_dir / "model" / "tokenizer_config.json").read_text())
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_the_unknown_token_is_end_of_text_as_in_gpt2s_own_tokenizer(run_dir):
    settings = json.loads((run_dir / "model" / "tokenizer_config.json").read_text())
    assert settings["unk_token"] == settings["eos_token"] == "<|endoftext|>"


@pytest.mark.parametrize("quantization, tolerance", [(None, 1e-3), ("int8", 0.05)], ids=["float32", "int8"])
def test_ctranslate2_opens_the_export(run_dir, tmp_path, ids, quantization, tolerance):
    ctranslate2 = pytest.importorskip("ctranslate2")
    publish.main([str(run_dir), "--to", str(tmp_path / "gpt2"), "--format", "gpt2"])
    ctranslate2.converters.TransformersConverter(str(tmp_path / "gpt2")).convert(
        tmp_path / "ct2", quantization=quantization
    )
    generator = ctranslate2.Generator(str(tmp_path / "ct2"))
    logits = torch.as_tensor(np.array(generator.forward_batch(ids.tolist())))
    expected = make_model(2)(ids).logits[..., :300]
    assert_close(logits, expected, atol=tolerance, rtol=0)


# ---- GGUF ----


@pytest.mark.slow
def test_gguf_has_the_sources_function(run_dir, tmp_path, ids):
    """Opened by transformers, which takes only 1,024 positions for granted."""
    publish.main([str(run_dir), "--to", str(tmp_path / "it"), "--format", "gguf", "--gguf_type", "f32"])
    assert {path.name for path in (tmp_path / "it").iterdir()} == {"it-F32.gguf", "README.md", "loss.png"}
    card = ModelCard.load(tmp_path / "it" / "README.md")
    assert card.data.library_name == "gguf" and 'Llama("it-F32.gguf")' in card.text
    assert card.data.eval_results, "the card says what was measured, as in every format"
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "it", gguf_file="it-F32.gguf", n_positions=32)
    assert_close(again(ids).logits, make_model(2)(ids).logits[..., :300], atol=1e-5, rtol=1e-5)


@pytest.fixture
def biasless(tokenizer, tmp_path):
    """A model folder with everything that GPT-2 124M has not: no biases, a head of its own, another inner width."""
    torch.manual_seed(5)
    fields = SIZES | dict(n_embd=64, n_inner=96, bias=False, tie_word_embeddings=False)
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**fields)).eval()
    save_model_folder(tmp_path / "biasless", model, tokenizer, model_card(model, "biasless"))
    return tmp_path / "biasless", model


@pytest.mark.parametrize("gguf_type", publish.GGUF_TYPES)
def test_gguf_holds_weights_tokens_and_sizes(biasless, tokenizer, tmp_path, gguf_type):
    """Read by the gguf package."""
    folder, model = biasless
    publish.main([str(folder), "--to", str(tmp_path / "it"), "--format", "gguf", "--gguf_type", gguf_type])
    reader = gguf.GGUFReader(tmp_path / "it" / f"it-{gguf_type.upper()}.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "gpt2" and fields["gpt2.context_length"] == 32
    sizes = ("embedding_length", "block_count", "attention.head_count", "feed_forward_length")
    assert [fields[f"gpt2.{name}"] for name in sizes] == [64, 2, 2, 96]
    assert fields["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    by_id = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    assert fields["tokenizer.ggml.tokens"] == by_id
    assert fields["tokenizer.ggml.token_type"] == [gguf.TokenType.NORMAL] * 299 + [gguf.TokenType.CONTROL]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]] == [tuple(pair) for pair in merges]
    assert fields["tokenizer.ggml.bos_token_id"] == fields["tokenizer.ggml.eos_token_id"] == 299

    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    assert len(tensors) == 4 + 1 + 2 * 12  # embeddings, last layer norm and head; twelve a block
    ours = model.state_dict()
    relative = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 127}[gguf_type]
    named = {
        "token_embd.weight": ours["transformer.wte.weight"][:300],
        "output.weight": ours["lm_head.weight"][:300],
        "blk.1.attn_qkv.weight": ours["transformer.h.1.attn.c_attn.weight"],
        "blk.1.ffn_down.weight": ours["transformer.h.1.mlp.c_proj.weight"],
    }
    for name, weight in named.items():
        assert_close(torch.tensor(tensors[name]), weight, atol=relative * weight.abs().max().item() + 1e-7, rtol=0)
    assert np.array_equal(tensors["position_embd.weight"], ours["transformer.wpe.weight"])
    assert not tensors["blk.0.attn_qkv.bias"].any() and tensors["blk.0.attn_qkv.bias"].shape == (192,)


@pytest.mark.slow
@pytest.mark.parametrize("gguf_type, tolerance", [("f32", 0.01), ("f16", 0.02)])
def test_llama_cpp_computes_the_same(run_dir, tmp_path, tokenizer, gguf_type, tolerance):
    """Logits and tokens. It looks GELU up in a table of float16, so its logits are off even in float32."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")
    publish.main([str(run_dir), "--to", str(tmp_path / "it"), "--format", "gguf", "--gguf_type", gguf_type])
    path = str(tmp_path / "it" / f"it-{gguf_type.upper()}.gguf")
    llama = llama_cpp.Llama(path, n_ctx=32, logits_all=True, verbose=False)
    text = "Return a tuple (x, y)'s sum:\n    2 + 3 == 5  # naïve\n\n\nclass A:"
    ids = tokenizer(text).input_ids
    assert llama.tokenize(text.encode(), add_bos=False) == ids
    assert llama.detokenize(ids).decode() == text
    ids = ids[:32]
    llama.eval(ids)
    logits = torch.tensor(llama.scores[: len(ids)])
    assert_close(logits, make_model(2)(torch.tensor([ids])).logits[0, :, :300], atol=tolerance, rtol=0)


def test_what_gguf_cannot_carry_is_one_line(run_dir, tmp_path, monkeypatch):
    to = ["--to", str(tmp_path / "it"), "--format", "gguf"]
    model, characters = make_model(1), build_tokenizer("char", ["".join(map(chr, range(32, 132)))]).fast
    save_model_folder(tmp_path / "characters", model, characters, model_card(model, "characters"))
    for flags, complaint in (
        ([str(tmp_path / "characters"), *to], "byte-level BPE .* use --format gpt2$"),
        ([str(run_dir), *to, "--space", str(tmp_path / "demo")], "--space is a demo"),
        ([str(run_dir), *to[:2], "--gguf_type", "f32"], "--gguf_type f32 is for --format gguf"),
    ):
        with pytest.raises(UserError, match=complaint):
            publish.main(flags)
    for activation in ("gelu", "relu"):
        model.config.activation_function = activation
        with pytest.raises(UserError, match=f"gelu_new, not {activation};"):
            check_gguf(model, AutoTokenizer.from_pretrained(run_dir / "model"), "f16")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'gpt2repro\[gguf\]'"):
        publish.main([str(run_dir), *to])
    assert not (tmp_path / "it").exists()


# ---- wrapped models ----

WRAPPED = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoTokenizer
from gpt2repro.evaluation.score_cache import model_sha256
from gpt2repro.files import file_sha256
from gpt2repro.hub.model_card import model_card
from gpt2repro.models.folder import save_model_folder
from gpt2repro.models.openai_weights import SHARED_FIELDS
from gpt2repro.models.unwrap import unwrapped
from gpt2repro.run_folder import RunFolder
from modeling_gpt2repro import GPT2ReproForCausalLM

folder, kind, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous_{kind}", rank=rank, world_size=2)
model = GPT2ReproForCausalLM.from_pretrained(f"{folder}/plain")
if kind == "fsdp2":
    mesh = init_device_mesh("cpu", (2,))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard([model.transformer.wte, model.transformer.ln_f, model.lm_head], mesh=mesh)
    model = fully_shard(model, mesh=mesh)
elif kind == "ddp of compiled":
    model = torch.nn.parallel.DistributedDataParallel(torch.compile(model))
plain = unwrapped(model)
if rank == 0:
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/plain")
    save_model_folder(Path(folder) / kind, plain, tokenizer, model_card(plain, "plain"))
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2", "ddp of compiled"])
def test_a_wrapped_model_is_saved_as_the_plain_one(kind, tmp_path, tokenizer):
    model = make_model(4)
    save_model_folder(tmp_path / "plain", model, tokenizer, model_card(model, "plain"))
    command = [sys.executable, "-c", WRAPPED, str(tmp_path), kind]
    processes = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    for process in processes:
        assert process.wait(120) == 0, process.stderr.read()
    for path in (tmp_path / "plain").iterdir():
        name = path.name
        assert (tmp_path / kind / name).read_bytes() == (tmp_path / "plain" / name).read_bytes(), name
    assert {path.name for path in (tmp_path / kind).iterdir()} == {path.name for path in (tmp_path / "plain").iterdir()}


def test_a_compiled_model_is_unwrapped_and_stays_compiled(tokenizer):
    model = make_model(4)
    compiled = torch.compile(model)
    assert unwrapped(compiled) is model and compiled._orig_mod is model


# ---- mistakes ----


@pytest.mark.parametrize(
    "flags, message",
    [
        (["nowhere/at/all", "--to", "./out"], "does not exist"),
        ([".", "--to", "./out"], "holds no model"),
        (["run", "--to", "out"], "a folder starts with ./"),
        (["run", "--to", "a/b/c"], "is not owner/name"),
        (["run", "--to", "./run"], "exists already"),
        (["run", "--to", "/proc/out"], "/proc cannot be written"),
        (["run", "--to", "./out", "--space", "./run/../out"], "a folder for each"),
        (["run", "--to", "./out", "--private"], "are for the Hub"),
        (["run", "--to", "./out", "--tokenizer", "./gpt2_folder"], "no tokenizer can be loaded"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(run_dir, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message) as caught:
        publish.main(flags)
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_is_one_line(run_dir, small_disk):
    disk = small_disk(4096 * 8)
    with pytest.raises(UserError, match="cannot be written .*No space left on device.*; make room for it"):
        publish.main([str(run_dir), "--to", str(disk / "out")])
    assert list(disk.iterdir()) == []


def test_the_tokenizer_may_be_a_runs(run_dir, tmp_path):
    for path in (run_dir / "checkpoints" / "step_00000010").glob("tokenizer*"):
        path.rename(tmp_path / path.name)
    flags = ["--to", str(tmp_path / "out"), "--tokenizer", str(run_dir)]
    write_state(run_dir / "checkpoints" / "step_00000010", 10)
    publish.main([str(run_dir / "checkpoints" / "step_00000010"), *flags])
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_a_tokenizer_of_another_size_is_refused(run_dir, tmp_path, python_docs):
    build_tokenizer("bpe:310", python_docs[:20]).fast.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="has 310 tokens, the model 300"):
        publish.main([str(run_dir), "--to", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "tokenizer")])


def test_the_picture_is_the_runs_and_of_a_checkpoint_one_with_its_reference_losses(run_dir, tmp_path, monkeypatch):
    (run_dir / "loss.png").write_bytes(b"as the run drew it")
    publish.main([str(run_dir), "--to", str(tmp_path / "out")])
    assert (tmp_path / "out" / "loss.png").read_bytes() == b"as the run drew it"

    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"reference_losses": {"OpenAI": 3.29}}))
    drawn = []
    monkeypatch.setattr(publish, "loss_picture", lambda runs: drawn.extend(runs) or b"drawn")
    publish.main([str(run_dir / "checkpoints" / "step_00000010"), "--to", str(tmp_path / "early")])
    (run,) = drawn
    assert (tmp_path / "early" / "loss.png").read_bytes() == b"drawn"
    assert run.name == "early" and {row["step"] for row in run.rows} == {10}
    assert run.record["reference_losses"] == {"OpenAI": 3.29}


@pytest.mark.parametrize("damage", ["missing key", "truncated"])
def test_a_damaged_model_folder_is_refused(run_dir, tmp_path, damage):
    from safetensors.torch import load_file, save_file

    path = run_dir / "model" / "model.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        save_file({k: v for k, v in load_file(path).items() if "h.1.ln_2.bias" not in k}, path, {"format": "pt"})
    with pytest.raises(UserError, match="h.1.ln_2.bias" if damage == "missing key" else "damaged"):
        publish.main([str(run_dir), "--to", str(tmp_path / "out")])


@pytest.mark.parametrize("name", ["trainer_state.json", "config.json", "model.safetensors"])
def test_a_damaged_checkpoint_is_refused(run_dir, tmp_path, name):
    path = run_dir / "checkpoints" / "step_00000010" / name
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    with pytest.raises(UserError, match=f"step_00000010 is damaged .*{name}.*; publish another checkpoint"):
        publish.main([str(path.parent), "--to", str(tmp_path / "out")])


# ---- the scorecard in the card ----


def write_scorecard(run_dir, sha256, complete=True):
    """A scorecard of the run's model and another one of the user's, beside published figures."""
    data = {"name": "val.jsonl", "hub_id": "Rowan/hellaswag", "sha256": "0" * 64, "n": 10_042, "units": "items"}
    metric = {
        "key": "hellaswag_harness_acc_norm",
        "task": "hellaswag",
        "title": "HellaSwag acc_norm (harness)",
        "unit": "share",
        "higher_is_better": True,
        "headline": True,
        "method": "zero-shot",
        "data": data | {"complete": complete},
    }
    models = [("mine", sha256, "measured"), ("private", "other", "measured"), ("gpt2 (124M)", None, "published")]
    values = {"mine": 0.33, "private": 0.3, "gpt2 (124M)": 0.3114}
    pair = {"model": "mine", "metric": metric["key"], "low": 0.01, "high": 0.03, "verdict": "above"}
    card = {
        "format": "gpt2repro scorecard 1",
        "made": {},
        "models": [{"name": name, "sha256": sha, "origin": origin} for name, sha, origin in models],
        "metrics": [metric],
        "results": [
            {"model": name, "metric": metric["key"], "value": value, "low": None, "high": None}
            | {"origin": "published" if name.startswith("gpt2") else "measured"}
            | {"source": "a paper", "same_method": True, "note": None}
            for name, value in values.items()
        ],
        "differences": [
            pair | {"against": "private", "value": 0.03, "interval": "paired bootstrap over items"},
            pair | {"against": "gpt2 (124M)", "value": 0.0186, "interval": "sampling error of mine alone"},
        ],
        "sentences": [],
        "notes": [],
    }
    (run_dir / "scorecard.json").write_text(json.dumps(card))


def test_the_runs_scorecard_stands_in_the_card(run_dir, tmp_path):
    write_scorecard(run_dir, model_sha256(run_dir / "model"))
    publish.main([str(run_dir), "--to", str(tmp_path / "out")])
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "- this model: above gpt2 (124M) on HellaSwag acc\\_norm (harness) by 1.9 points [1.0, 3.0]" in card.text
    assert "|  | this model | gpt2 (124M) |" in card.text and "33.00%" in card.text
    assert "private" not in card.text and "mine" not in card.text.replace("determine", "")
    [result] = [result for result in card.data.eval_results if result.dataset_type == "Rowan/hellaswag"]
    assert (result.metric_type, result.metric_value) == ("harness_acc_norm", 0.33)
    assert result.metric_args == {"method": "zero-shot"}
    assert "HellaSwag acc | " not in card.text  # in training it was scored in another style: one is enough


def test_a_part_of_a_benchmark_is_no_result_of_it(run_dir, tmp_path):
    write_scorecard(run_dir, model_sha256(run_dir / "model"), complete=False)
    publish.main([str(run_dir), "--to", str(tmp_path / "out")])
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "33.00%" in card.text
    assert not [result for result in card.data.eval_results if result.dataset_type == "Rowan/hellaswag"]


def test_a_scorecard_of_other_weights_is_left_out(run_dir, tmp_path, capsys):
    write_scorecard(run_dir, "sha of weights before the last step")
    publish.main([str(run_dir), "--to", str(tmp_path / "out")])
    assert "is of other weights than" in capsys.readouterr().err
    assert "Scorecard" not in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(UserError, match="does not hold"):
        publish.main([str(run_dir), "--to", str(tmp_path / "out2"), "--scorecard", str(run_dir / "scorecard.json")])
