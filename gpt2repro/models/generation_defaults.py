"""A model's generation defaults, and which of them travel with its weights: one rule for opening, training, checkpoints
and exports.

generation_config.json is kept as it is, except that sampling settings beside do_sample=false are dropped: transformers
ignores them, and some releases refuse to save them; and so are fields that transformers does not know, as
custom_generate and auto_map would name code to run. If transformers would not save the rest either, or if there is no
such file, the model gets `our_generation_defaults`, with the file's ids of the special tokens. Legacy settings in
config.json are dropped. sample.py and the samples of a run use only the ids, see `gpt2repro.models.sampling.generate`.
"""

import json
from pathlib import Path

from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import cached_file

from gpt2repro.errors import first_line
from gpt2repro.models.errors import LIBRARY_ERRORS
from gpt2repro.processes import note


FILE = "generation_config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
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
    ours = our_generation_defaults(config)
    try:
        file = cached_file(source, FILE, revision=revision)
    except OSError:  # there is none
        return ours
    try:
        stored = dict(json.loads(Path(file).read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        note(f"{source}: {FILE} cannot be read ({first_line(error)}); using top_k sampling instead")
        return ours
    if stored.get("_from_model_config"):  # derived from config.json, nobody has chosen them
        return ours
    _drop_unknown(stored, source)
    ids = {name: stored[name] for name in TOKEN_IDS if name in stored}
    try:
        for name, value in ids.items():
            if not _is_id(value):
                raise ValueError(f"{name}={value!r} is no token id")
        defaults = GenerationConfig.from_dict(stored)
        _drop_unused(defaults, source)
        defaults.validate(strict=True)
    except LIBRARY_ERRORS as error:
        reason = " ".join(str(error).split())
        note(f"{source}: {FILE} contradicts itself ({reason}); using top_k sampling instead, with its token ids")
        for name, value in ids.items():
            if _is_id(value):
                setattr(ours, name, value)
        return ours
    return defaults


def _is_id(value: object) -> bool:
    ids = value if isinstance(value, list) and value else [value]
    return value is None or all(type(id) is int and id >= 0 for id in ids)


def _drop_unknown(stored: dict, source: str | Path) -> None:
    unknown = sorted(stored.keys() - vars(GenerationConfig()).keys())
    for name in unknown:
        del stored[name]
    if unknown:
        note(f"{source}: {FILE} sets {', '.join(unknown)}, which transformers does not read there; dropped")


def _drop_unused(defaults: GenerationConfig, source: str | Path) -> None:
    if defaults.do_sample:
        return
    dropped = []
    for name, unset in SAMPLING_SETTINGS.items():
        # Contrastive search reads top_k, and is another search without.
        is_contrastive = name == "top_k" and defaults.penalty_alpha
        if getattr(defaults, name, None) not in (None, unset) and not is_contrastive:
            setattr(defaults, name, unset)
            dropped.append(name)
    if dropped:
        note(f"{source}: {FILE} sets {', '.join(dropped)} beside do_sample=false, which has no effect; dropped")
