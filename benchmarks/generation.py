"""Greedy generation, tokens/s: ours beside GPT2LMHeadModel.generate(), and on the CPU beside CTranslate2 and, where
llama-cpp-python is installed, llama.cpp, whose rows are generated one by one.

    python benchmarks/generation.py --output benchmarks/results/generation_cpu.json
    python benchmarks/generation.py --device cuda

GPT-2's size with random weights, the same ones for all; every row generates the same number of tokens, and nothing ends
early. The variants take turns, after one unmeasured call each. The table shows medians over the rounds.
"""

import argparse
import copy
import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.train_step import processor_name
from gpt2repro.data.tokenization import build_tokenizer
from gpt2repro.errors import quiet_broken_pipe
from gpt2repro.models.gguf_file import write_gguf
from gpt2repro.models.openai_weights import from_gpt2
from gpt2repro.models.packed_weights import pack_weights
from gpt2repro.train.report import provenance


OTHERS = {"CTranslate2": "ctranslate2", "llama.cpp": "llama_cpp_python"}
PROMPT = [464, 3290, 373, 1043]  # "The dog was found"


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)
    sizes = {"n_layer": args.n_layer, "n_head": args.n_head, "n_embd": args.n_embd}
    reference = GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=None)).eval()
    if args.device == "cpu":
        variants = our_variants(reference) | reference_variants(reference)
        variants |= ctranslate2_variants(reference) | llama_cpp_variants(reference)
    else:
        variants = gpu_variants(reference.to(args.device, torch.bfloat16))
    rates: dict[str, dict[str, list[float]]] = {str(batch): {name: [] for name in variants} for batch in args.batches}
    for batch in args.batches:
        for generate in variants.values():
            generate(batch, args.new_tokens)  # as long as the measured ones: a static cache is compiled for its size
        for _ in range(args.rounds):
            for name, generate in variants.items():
                began = time.perf_counter()
                generate(batch, args.new_tokens)
                seconds = time.perf_counter() - began
                rates[str(batch)][name].append(batch * args.new_tokens / seconds)
    report(args, rates)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="rows generated together")
    parser.add_argument("--new_tokens", type=int, default=64, help="of each row")
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--n_head", type=int, default=12)
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", help="write every measurement as JSON")
    return parser.parse_args()


def our_variants(reference: GPT2LMHeadModel) -> dict[str, Callable]:
    """The same weights as sample.py runs them, in each --dtype."""
    model = as_ours(reference)
    variants = {}
    for name, dtype in {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16}.items():
        packed = copy.deepcopy(model).to(dtype)
        pack_weights(packed, int8=name == "int8")
        variants[f"ours, {name}"] = generation(packed)
    return variants


def as_ours(reference: GPT2LMHeadModel) -> PreTrainedModel:
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        return from_gpt2(folder).eval()


def gpu_variants(reference: GPT2LMHeadModel) -> dict[str, Callable]:
    """In bfloat16; with a static cache generate() compiles the step, during the unmeasured call."""
    model = as_ours(reference).to(reference.device, reference.dtype)
    return {
        "ours, bfloat16": generation(model),
        "ours, bfloat16, static cache": generation(model, cache_implementation="static"),
        "GPT2LMHeadModel, bfloat16": generation(reference),
        "GPT2LMHeadModel, bfloat16, static cache": generation(reference, cache_implementation="static"),
    }


def reference_variants(reference: GPT2LMHeadModel) -> dict[str, Callable]:
    half = copy.deepcopy(reference).bfloat16()
    return {
        "GPT2LMHeadModel, float32": generation(reference),
        "GPT2LMHeadModel, bfloat16": generation(half),
    }


def generation(model: PreTrainedModel, **cache) -> Callable[[int, int], None]:
    def generate(batch: int, new_tokens: int) -> None:
        ids = torch.tensor([PROMPT] * batch, device=model.device)
        options = cache | {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": new_tokens}
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert output.shape == (batch, len(PROMPT) + new_tokens)

    return generate


def ctranslate2_variants(reference: GPT2LMHeadModel) -> dict[str, Callable]:
    """Without bfloat16, which CTranslate2 runs on GPUs only."""
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    tokenizer = build_tokenizer("gpt2", []).fast
    variants = {}
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        tokenizer.unk_token = tokenizer.eos_token  # its converter asks for one
        tokenizer.save_pretrained(folder)
        converted = TransformersConverter(folder).convert(f"{folder}/converted")
        for name in ("float32", "int8"):
            generator = ctranslate2.Generator(converted, compute_type=name, intra_threads=torch.get_num_threads())
            variants[f"CTranslate2, {name}"] = ctranslate2_generation(generator, tokenizer)
    return variants


def ctranslate2_generation(generator, tokenizer) -> Callable[[int, int], None]:
    prompt = tokenizer.convert_ids_to_tokens(PROMPT)

    def generate(batch: int, new_tokens: int) -> None:
        lengths = {"max_length": new_tokens, "min_length": new_tokens, "include_prompt_in_result": False}
        results = generator.generate_batch([prompt] * batch, sampling_topk=1, **lengths)
        assert all(len(result.sequences_ids[0]) == new_tokens for result in results)

    return generate


def llama_cpp_variants(reference: GPT2LMHeadModel) -> dict[str, Callable]:
    if importlib.util.find_spec("llama_cpp") is None:
        return {}
    import llama_cpp

    variants = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("f32", "f16", "q8_0"):
            file = Path(folder, f"{name}.gguf")
            write_gguf(file, as_ours(reference), build_tokenizer("gpt2", []).fast, name, "random")
            threads = torch.get_num_threads()
            llama = llama_cpp.Llama(
                str(file), n_ctx=reference.config.n_positions, n_threads=threads, use_mmap=False, verbose=False
            )
            variants[f"llama.cpp, {name}"] = llama_cpp_generation(llama)
    return variants


def llama_cpp_generation(llama) -> Callable[[int, int], None]:
    def generate(batch: int, new_tokens: int) -> None:
        for _ in range(batch):
            tokens = llama.generate(PROMPT, temp=0.0, repeat_penalty=1.0)
            assert len(list(itertools.islice(tokens, new_tokens))) == new_tokens

    return generate


def report(args: argparse.Namespace, rates: dict[str, dict[str, list[float]]]) -> None:
    """Print the table, and write --output."""
    medians = {batch: {name: statistics.median(of) for name, of in found.items()} for batch, found in rates.items()}
    names = " ".join(medians[str(args.batches[0])])
    versions = {package: importlib.metadata.version(package) for name, package in OTHERS.items() if name in names}
    header = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else f"{os.cpu_count()} x {processor_name()}",
        "versions": provenance() | versions,
        "settings": {name: value for name, value in vars(args).items() if name != "output"},
    }
    size = f"{args.n_layer} layers, width {args.n_embd}, {args.new_tokens} new tokens, greedy"
    print(f"{size}; {header['device']}; torch {torch.__version__}; {header['date']}\n")
    print("| tokens/s |" + "".join(f" batch {batch} |" for batch in args.batches))
    print("| --- |" + " ---: |" * len(args.batches))
    for name in medians[str(args.batches[0])]:
        print(f"| {name} |" + "".join(f" {medians[str(batch)][name]:,.1f} |" for batch in args.batches))
    if args.output:
        Path(args.output).write_text(
            json.dumps(header | {"medians": medians, "tokens_per_second": rates}, indent=2) + "\n"
        )


if __name__ == "__main__":
    with quiet_broken_pipe():
        main()
