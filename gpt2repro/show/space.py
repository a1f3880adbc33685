"""A demo to touch: a Gradio app that continues a prompt and shows the next token's probabilities and attention.

Its files, in space_app/, run on a Hugging Face Space or on any machine, without this package.
"""

import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import yaml

import modeling_gpt2repro
from gpt2repro.files import write_json, write_text


APP = Path(__file__).with_name("space_app")
MODEL_FOLDER = "model"  # in the Space's folder
GRADIO, PLOTLY = "6.31.0", "7.1.0"  # the releases that the app is tested with


@dataclass(frozen=True)
class Space:
    """What a Space shows.

    title: its name for readers.
    model_id: the model's repository on the Hub; None: it lies in MODEL_FOLDER.
    revision: a branch of that repository; None: main.
    prompts: to begin with, the first one filled in.
    license: of the Space, as the Hub abbreviates it; None: not stated.
    """

    title: str
    model_id: str | None
    revision: str | None
    prompts: list[str]
    license: str | None


def write_space(folder: Path, space: Space) -> None:
    """Write everything but MODEL_FOLDER into an existing folder.

    The class of models in our own format is copied beside the app, so nothing needs `trust_remote_code`: who may change
    the model's repository can change what the Space says, not what it runs.
    """
    for source in (*APP.glob("*.py"), Path(modeling_gpt2repro.__file__)):
        shutil.copy(source, folder)
    settings = {
        "title": space.title,
        "model": space.model_id,
        "revision": space.revision,
        "prompts": space.prompts,
    }
    write_json(folder / "settings.json", settings)
    pins = {"gradio": GRADIO, "plotly": PLOTLY}
    pins |= {name: version(name).partition("+")[0] for name in ("transformers", "torch")}
    write_text(folder / "requirements.txt", "".join(f"{name}=={release}\n" for name, release in pins.items()))
    write_text(folder / "README.md", _readme(space))


def _readme(space: Space) -> str:
    """With the header that the Hub builds the Space by. Source: huggingface.co/docs/hub/spaces-config-reference."""
    metadata = {
        "title": space.title,
        "emoji": "✍️",
        "colorFrom": "blue",
        "colorTo": "gray",
        "sdk": "gradio",
        "sdk_version": GRADIO,
        "app_file": "app.py",
        "short_description": "Write with a GPT-2, and look inside",
        "license": space.license,
        "models": [space.model_id] if space.model_id else None,
    }
    stated = {name: value for name, value in metadata.items() if value is not None}
    header = yaml.safe_dump(stated, sort_keys=False, allow_unicode=True)
    return (
        f"---\n{header}---\n\n# {space.title}\n\n"
        "Continue a prompt, see the probabilities of the next token, and see where each attention head looks.\n\n"
        "On your own machine:\n\n```\npip install -r requirements.txt\npython app.py\n```\n"
    )
