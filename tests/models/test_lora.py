"""LoRA beside transformers' GPT2LMHeadModel with PEFT; and what users have of adapters."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import SIZES, tiny_model
from transformers import GPT2LMHeadModel

from gpt2repro.data.tokenization import build_tokenizer
from gpt2repro.errors import UserError
from gpt2repro.evaluation.score_cache import model_sha256
from gpt2repro.hub.model_card import model_card
from gpt2repro.models import find
from gpt2repro.models.find import find_model
from gpt2repro.models.folder import load_tokenizer, open_model, save_adapter_folder, save_model_folder
from gpt2repro.models.lora import ALPHA, TARGETS, add_lora, lora_of, merge_lora, new_lora
from gpt2repro.models.openai_weights import from_gpt2, to_gpt2
from gpt2repro.models.padding import without_padding
from gpt2repro.plan.sizes import flops_per_token


peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

CLOSE = {"atol": 1e-5, "rtol": 0}
REAL = SIZES["unpadded_vocab_size"]
IDS = torch.randint(0, REAL, (4, 33), generator=torch.Generator().manual_seed(1))
TOKENIZER = build_tokenizer("char", ["".join(map(chr, range(65, 65 + REAL)))]).fast


def loss_of(model) -> torch.Tensor:
    return model(input_ids=IDS[:, :32], labels=IDS[:, :32]).loss


def adapted(model, rank=4, base="base", scale=0.05):
    """A copy of the model with an adapter that does something: neither factor is zero."""
    model = copy.deepcopy(model)
    add_lora(model, new_lora(rank, base))
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def base(tmp_path) -> Path:
    """A model folder, and beside it, in adapter/, an adapter of that model."""
    model = tiny_model()
    save_model_folder(tmp_path / "base", model, TOKENIZER, model_card(model, "base"))
    save_adapter_folder(tmp_path / "adapter", adapted(model, base=tmp_path / "base"), TOKENIZER)
    return tmp_path / "base"


def test_training_merging_and_export_agree_with_gpt2_under_peft():
    """The independent reference: transformers' own model, whose projections are Conv1D, with an adapter by PEFT."""
    model = tiny_model()
    ours, config = (
        copy.deepcopy(model),
        peft.LoraConfig(
            r=4, lora_alpha=ALPHA, target_modules=list(TARGETS), fan_in_fan_out=True, task_type="CAUSAL_LM"
        ),
    )
    add_lora(ours, new_lora(4, "base"))
    assert_trains = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert len(assert_trains) == 2 * 4 * SIZES["n_layer"] and all("lora_" in name for name in assert_trains)
    theirs = peft.get_peft_model(to_gpt2(model), config)
    factors = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            factors[f"base_model.model.{name}"].data.copy_(parameter)

    torch.testing.assert_close(loss_of(ours), loss_of(model), atol=0, rtol=0)  # B is zero
    networks = ours, theirs
    optimizers = [
        torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2, eps=1e-3) for net in networks
    ]
    for _ in range(5):
        losses = [loss_of(network) for network in networks]
        torch.testing.assert_close(*losses, **CLOSE)
        for loss, optimizer in zip(losses, optimizers):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    expected = loss_of(theirs)
    assert loss_of(model) - expected > 0.05, "it has learned too little to tell"

    before = loss_of(ours.eval())
    merge_lora(ours)
    stripped = without_padding(ours)
    assert lora_of(ours) is None and stripped.transformer.wte.num_embeddings == REAL
    assert ours.state_dict().keys() == model.state_dict().keys()
    for loss in (before, loss_of(ours), loss_of(stripped), loss_of(to_gpt2(ours)), loss_of(theirs.merge_and_unload())):
        torch.testing.assert_close(loss, expected, **CLOSE)


def test_an_adapter_opens_in_peft_on_both_formats_and_here_merged(base, tmp_path):
    adapter = base.with_name("adapter")
    expected = loss_of(adapted(tiny_model()).eval())
    to_gpt2(from_gpt2(base)).save_pretrained(tmp_path / "gpt2")
    plain = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")
    opened = {
        "on GPT2LMHeadModel": peft.PeftModel.from_pretrained(plain, str(adapter)),
        "by its base's name": peft.AutoPeftModelForCausalLM.from_pretrained(str(adapter), trust_remote_code=True),
        "for training": from_gpt2(adapter),
        "for inference": open_model(str(adapter))[0],
    }
    for way, model in opened.items():
        torch.testing.assert_close(loss_of(model.eval()), expected, **CLOSE, msg=way)
    assert opened["for training"].config.vocab_size == REAL
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["target_modules"] == list(TARGETS)  # PEFT's set has another order in each process


def test_an_adapter_of_others_is_merged_with_its_base_models_tokenizer(base, tmp_path):
    """Trained on GPT2LMHeadModel, whose weights are transposed; PEFT saves no tokenizer."""
    to_gpt2(from_gpt2(base)).save_pretrained(tmp_path / "gpt2")
    TOKENIZER.save_pretrained(tmp_path / "gpt2")
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")
    config = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False, use_dora=True)
    theirs = peft.get_peft_model(model, config)
    theirs.save_pretrained(tmp_path / "theirs")
    merged, tokenizer = open_model(str(tmp_path / "theirs"))
    torch.testing.assert_close(loss_of(merged), loss_of(theirs.eval()), **CLOSE)
    assert tokenizer.get_vocab() == load_tokenizer(base).get_vocab()


def edit_adapter(base, **settings) -> Path:
    path = base.with_name("adapter") / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return path.parent


def edit_weights(change):
    def edit(base):
        path = base.with_name("adapter") / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return edit


def adapt_head(base):
    model = peft.get_peft_model(from_gpt2(base), peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    model.save_pretrained(base.with_name("adapter"))
    edit_adapter(base, base_model_name_or_path=str(base))


def adapt_itself(base):
    """The base model is a run, whose model/ is the adapter."""
    edit_adapter(base, base_model_name_or_path=str(base.parent))
    shutil.copytree(base.with_name("adapter"), base.with_name("model"))


LORA_A = "base_model.model.transformer.h.1.mlp.c_fc.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit_weights(lambda tensors: tensors.pop(LORA_A)), f"only one of them has {LORA_A}"),
        (edit_weights(lambda tensors: tensors.update({LORA_A: torch.ones(4, 5)})), "size mismatch|cannot be merged"),
        (edit_weights(lambda tensors: tensors[LORA_A].fill_(torch.nan)), "cannot be merged into .*base"),
        (lambda base: (base.with_name("adapter") / "adapter_model.safetensors").unlink(), "cannot be merged into"),
        (adapt_head, "changes the token embedding or the head, which are one matrix"),
        (lambda base: edit_adapter(base, base_model_name_or_path="./gone"), "is not found from here: ./gone does not"),
        (lambda base: edit_adapter(base, base_model_name_or_path=str(base.with_name("adapter"))), "of another adapter"),
        (adapt_itself, "of another adapter"),
    ],
    ids=["missing", "misshapen", "nan", "no weights", "head", "no base", "of an adapter", "of itself"],
)
def test_an_adapter_that_does_not_fit_is_one_line(base, damage, message):
    damage(base)
    with pytest.raises(UserError, match=message) as caught:
        from_gpt2(find_model(str(base.with_name("adapter"))))
    assert len(str(caught.value).splitlines()) == 1


def test_without_peft_the_install_command_is_named(base, monkeypatch):
    monkeypatch.setattr(find, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'which PEFT merges; run `pip install "gpt2repro\[lora\]"`'):
        find_model(str(base.with_name("adapter")))


def test_scores_of_an_adapter_are_not_those_of_another_base(base):
    before = model_sha256(base.with_name("adapter"))
    tensors = load_file(base / "model.safetensors")
    tensors["transformer.wpe.weight"][0, 0] += 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert model_sha256(base.with_name("adapter")) != before


def test_flops_count_no_gradient_of_frozen_weights():
    """2 per weight forward, 2 for the gradient of its input, 2 for its own if it is trained."""
    config = tiny_model().config
    attention, looked_up = 12 * 2 * 32 * 16, 32 * 32
    assert flops_per_token(config, 5000, 16) == 6 * (5000 - looked_up) + attention
    assert flops_per_token(config, 300, 16, frozen=5000) == 4 * (5000 - looked_up) + 6 * 300 + attention
