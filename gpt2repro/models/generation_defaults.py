"""A model's generation defaults, and which of them travel with its weights: one rule for opening, training, checkpoints
and exports.

generation_config.json is kept as it is, except that sampling settings beside do_sample=false are dropped: transformers
ignores them, and some releases refuse to save them; and so are fields that transformers does not know, as
custom_generate and auto_map would name code to run. If transformers would not save the rest either, or if there is no
such file, the model gets `our_generation_defaults`. Legacy settings in config.json are dropped. sample.py and the
samples of a run do not use them at all, see `gpt2repro.models.sampling.generate`.
"""

from pathlib import Path

from transformers import GenerationConfig, PreTrainedConfig

from gpt2repro.errors import first_line
from gpt2repro.processes import note


FILE = "generation_config.json"
# What transformers uses only when it samples, with the values that mean "not set".
SAMPLING_SETTINGS = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}


def our_generation_defaults(config: PreTrainedConfig) -> GenerationConfig:
    """What a model is given for which nobody has chosen any: sampling from the likeliest tokens."""
    text_config = config.get_text_config()
    return GenerationConfig(
        bos_token_id=getattr(text_config, "bos_token_id", None),
        eos_token_id=getattr(text_config, "eos_token_id", None),
        do_sample=True,
        top_k=50,
    )


def load_generation_defaults(
    source: str | Path, config: PreTrainedConfig, revision: str | None = None
) -> GenerationConfig:
    """The generation defaults of a folder or Hub id, by the rule above. A line says what was dropped.

    Args:
        config: the model's, for the ids of the special tokens.
    """
    try:
        defaults = GenerationConfig.from_pretrained(source, revision=revision)
        if defaults._from_model_config:  # derived from config.json, nobody has chosen them
            return our_generation_defaults(config)
        _drop_unknown(defaults, source)
        _drop_unused(defaults, source)
        defaults.validate(strict=True)
    except OSError as error:
        if (Path(source) / FILE).is_file():
            note(f"{source}: {FILE} cannot be read ({first_line(error)}); using top_k sampling instead")
        return our_generation_defaults(config)
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        note(f"{source}: {FILE} contradicts itself ({reason}); using top_k sampling instead")
        return our_generation_defaults(config)
    return defaults


def _drop_unknown(defaults: GenerationConfig, source: str | Path) -> None:
    unknown = vars(defaults).keys() - vars(GenerationConfig()).keys() - {"_original_object_hash"}  # from_pretrained's
    for name in unknown:
        delattr(defaults, name)
    if unknown:
        note(f"{source}: {FILE} sets {', '.join(sorted(unknown))}, which transformers does not read there; dropped")


def _drop_unused(defaults: GenerationConfig, source: str | Path) -> None:
    if defaults.do_sample:
        return
    dropped = []
    for name, unset in SAMPLING_SETTINGS.items():
        if getattr(defaults, name, None) not in (None, unset):
            setattr(defaults, name, unset)
            dropped.append(name)
    if dropped:
        note(f"{source}: {FILE} sets {', '.join(dropped)} beside do_sample=false, which has no effect; dropped")
