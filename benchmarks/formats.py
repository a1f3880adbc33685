"""How far the logits of each export are from those of the model it was made from.

    python benchmarks/formats.py
    python benchmarks/formats.py --model runs/mine

Makes the exports of docs/formats.md, by its own commands and code, opens each with the software that it is for, and
compares. What is not installed is left out. Without --model: GPT-2 124M with random weights, of a spread that makes its
logits as large as a trained model's.
"""

import contextlib
import re
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import publish
from gpt2repro.data.tokenization import build_tokenizer
from gpt2repro.errors import Parser, run_script
from gpt2repro.hub.model_card import model_card
from gpt2repro.models.find import find_model
from gpt2repro.models.folder import save_model_folder
from gpt2repro.models.openai_weights import from_gpt2
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM


ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--model", help="run, checkpoint or model folder")
    parser.add_argument("--tokens", type=int, default=128, help="of the text that is compared (default: %(default)s)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(find_model(args.model)) if args.model else write_random_model(Path(scratch, "random"))
        source = str(folder.resolve())
        with contextlib.chdir(scratch):
            compare(source, args.tokens)


def write_random_model(folder: Path) -> Path:
    torch.manual_seed(0)
    model = GPT2ReproForCausalLM(GPT2ReproConfig(vocab_size=50257)).eval()
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.normal_(0, 0.04) if parameter.dim() == 2 else parameter.add_(0.1 * torch.randn_like(parameter))
    save_model_folder(folder, model, build_tokenizer("gpt2", ()).fast, model_card(model, "random"))
    return folder


def compare(source: str, tokens: int) -> None:
    """Make every export in the working directory and print a row for it."""
    model = from_gpt2(source).float()
    rows = model.config.unpadded_vocab_size
    ids = torch.randint(rows - 1, (min(tokens, model.config.n_positions),), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids[None]).logits[0, :, :rows].numpy()
    print(f"{'format':22} {'largest':>9} {'rms':>9}  same likeliest token; logits' deviation {expected.std():.2f}")
    for name, (package, logits_of) in FORMATS.items():
        try:
            release = version(package)
        except PackageNotFoundError:
            print(f"{name:22} {package} is not installed")
            continue
        logits = logits_of(source, ids)
        difference = np.abs(logits - expected)
        agreement = (logits.argmax(-1) == expected.argmax(-1)).mean()
        rms = float(np.sqrt((difference**2).mean()))
        print(f"{name:22} {difference.max():9.1e} {rms:9.1e}  {agreement:.1%}; {package} {release}", flush=True)


# ---- logits, (T, V) float32, of the tokens (T,) by each export of a model ----


def with_our_code(source: str, ids: torch.Tensor) -> np.ndarray:
    publish.main([source, "--to", "./ours"])
    return _of_transformers(AutoModelForCausalLM.from_pretrained("./ours", trust_remote_code=True), ids)


def plain(source: str, ids: torch.Tensor) -> np.ndarray:
    write_plain(source)
    return _of_transformers(GPT2LMHeadModel.from_pretrained("./plain"), ids)


def gguf(gguf_type: str) -> Callable[[str, torch.Tensor], np.ndarray]:
    def logits(source: str, ids: torch.Tensor) -> np.ndarray:
        from llama_cpp import Llama

        publish.main([source, "--to", f"./{gguf_type}", "--format", "gguf", "--gguf_type", gguf_type])
        file = f"{gguf_type}/{gguf_type}-{gguf_type.upper()}.gguf"
        with contextlib.closing(Llama(file, n_ctx=len(ids), logits_all=True, verbose=False)) as llama:
            llama.eval(ids.tolist())
            return np.array(llama.scores[: len(ids)])

    return logits


def onnx(source: str, ids: torch.Tensor) -> np.ndarray:
    import onnxruntime

    write_plain(source)
    run_recipe("ONNX")
    inputs = {"input_ids": ids[None].numpy(), "attention_mask": np.ones((1, len(ids)), np.int64)}
    return onnxruntime.InferenceSession("./onnx/model.onnx").run(["logits"], inputs)[0][0]


def mlx(source: str, ids: torch.Tensor) -> np.ndarray:
    import mlx.core
    from mlx_lm import load

    write_plain(source)
    run_recipe("MLX")
    mlx.core.set_default_device(mlx.core.cpu)  # a GPU may compute in less than float32
    model, *_ = load("./plain")
    return np.array(model(mlx.core.array(ids[None].numpy())))[0]


def ctranslate2(quantization: str | None) -> Callable[[str, torch.Tensor], np.ndarray]:
    def logits(source: str, ids: torch.Tensor) -> np.ndarray:
        import ctranslate2

        write_plain(source)
        ctranslate2.converters.TransformersConverter("./plain").convert("./ct2", quantization=quantization, force=True)
        return np.array(ctranslate2.Generator("./ct2").forward_batch([ids.tolist()]))[0]

    return logits


FORMATS = {  # name -> the package that reads it, what computes its logits
    "ours": ("transformers", with_our_code),
    "plain": ("transformers", plain),
    **{f"gguf, {gguf_type}": ("llama-cpp-python", gguf(gguf_type)) for gguf_type in ("f32", "f16", "bf16")},
    "onnx": ("onnxruntime", onnx),
    "mlx": ("mlx-lm", mlx),
    "ctranslate2": ("ctranslate2", ctranslate2(None)),
    "ctranslate2, int8": ("ctranslate2", ctranslate2("int8")),
    "gguf, q8_0": ("llama-cpp-python", gguf("q8_0")),  # last: see docs/formats.md on AMX
}


def write_plain(source: str) -> None:
    if not Path("plain").exists():
        publish.main([source, "--to", "./plain", "--format", "gpt2"])


def run_recipe(title: str) -> None:
    """Run the Python code of a section of docs/formats.md in the working directory."""
    section = (ROOT / "docs" / "formats.md").read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(block, {})


def _of_transformers(model, ids: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(ids[None]).logits[0].numpy()


if __name__ == "__main__":
    run_script(main)
