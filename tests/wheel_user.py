"""What a user does with the wheel outside a checkout: wheel_user.py SITE, where SITE is the folder it is installed in.

test_packaging.py runs this in an empty folder and with SITE as PYTHONPATH.
"""

import importlib
import pkgutil
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

import gpt2repro
from gpt2repro.evaluation.hellaswag import EncodedItem, score_encoded
from gpt2repro.evaluation.multiple_choice import Question
from gpt2repro.models.openai_weights import to_gpt2
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM


def main(site: Path) -> None:
    for module in pkgutil.walk_packages(gpt2repro.__path__, "gpt2repro."):
        importlib.import_module(module.name)

    vocabulary = {"vocab_size": 64, "unpadded_vocab_size": 61, "bos_token_id": 0, "eos_token_id": 0}
    config = GPT2ReproConfig(**vocabulary, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    model = GPT2ReproForCausalLM(config).eval()
    model.save_pretrained("model")
    loaded = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True)
    assert type(loaded).__module__.startswith("transformers_modules."), "the folder's own copy of the code is not used"

    tokens = torch.arange(10)[None]
    logits = model(tokens).logits
    torch.testing.assert_close(loaded(tokens).logits, logits, rtol=0, atol=0)
    torch.testing.assert_close(to_gpt2(model)(tokens).logits, logits[..., :61])

    question = Question(context=[1, 2, 3], endings=[[ending, 7] for ending in range(4)])
    lengths = {"ending_tokens": [2] * 4, "ending_characters": [9] * 4, "ending_bytes": [9] * 4}
    item = EncodedItem([question], label=0, **lengths, source=None, cut=False)
    scores = score_encoded(model, [item], Accelerator(cpu=True), batch_size=1)
    assert scores.metrics()["hellaswag_items"] == 1

    for name, module in sys.modules.items():
        is_ours = name.partition(".")[0] in ("gpt2repro", "modeling_gpt2repro")
        if is_ours and module.__file__ is not None:  # a folder of metrics is no package
            assert Path(module.__file__).is_relative_to(site), f"{name} is not the wheel's but {module.__file__}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
