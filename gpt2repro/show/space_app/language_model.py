"""What the demo asks of its model: continuations, the probabilities of the next token, attention."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

from modeling_gpt2repro import register_auto_classes


# Models in gpt2repro's own format get their class from the file beside this one; of what lies in the model's repository
# no code is run.
register_auto_classes()


class LanguageModel:
    """A GPT-2 in float32 with its tokenizer.

    Args:
        name: Hub id or folder.
        revision: branch or tag on the Hub; None: main.
    """

    def __init__(self, name: str, revision: str | None = None):
        self.tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        # The other attention implementations do not compute the weights that `attention` returns.
        self.model = AutoModelForCausalLM.from_pretrained(
            name, revision=revision, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.description = (
            f"{self.model.num_parameters():,} parameters in {self.model.config.num_hidden_layers} layers of "
            f"{self.model.config.num_attention_heads} heads; {self.model.config.max_position_embeddings} positions, "
            f"{len(self.tokenizer):,} tokens"
        )
        self.positions = self.model.config.max_position_embeddings
        self.layers = self.model.config.num_hidden_layers
        self.heads = self.model.config.num_attention_heads
        self._drawer = ThreadPoolExecutor(max_workers=1)  # one text at a time, as torch has one random state for all

    def encode(self, prompt: str, longest: int) -> torch.Tensor:
        """(1, T) int64: at most the last `longest` tokens; an empty prompt is the start of a document.

        Raises:
            ValueError: the tokenizer has no token for the prompt.
        """
        text = prompt or self.tokenizer.bos_token or "\n"
        ids = self.tokenizer(text, return_tensors="pt").input_ids.long()
        if not ids.numel():
            raise ValueError("The model's tokenizer knows none of these characters.")
        return ids[:, -longest:]

    def continuation(
        self, prompt: str, max_new_tokens: int, temperature: float, top_k: int, seed: int
    ) -> Iterator[str]:
        """The prompt and ever more of its continuation. It is what `sample.py --num_samples 1` prints for the
        same settings, unless it exceeds the model's positions: then the prompt's beginning is left out.

        Args:
            temperature: divides the logits.
            top_k: draw from this many likeliest tokens; 0: from all.
        """
        ids = self.encode(prompt, max(1, self.positions - max_new_tokens))
        streamer = TextIteratorStreamer(self.tokenizer, skip_special_tokens=True)

        def draw() -> None:
            torch.manual_seed(seed)
            try:
                self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    streamer=streamer,
                    do_sample=True,
                    max_new_tokens=min(max_new_tokens, self.positions - ids.shape[1]),
                    temperature=temperature,
                    top_k=top_k,
                    pad_token_id=self.tokenizer.eos_token_id,
                )
            finally:
                streamer.end()  # or the loop below would wait for ever after an error

        drawing = self._drawer.submit(draw)
        text = ""
        for piece in streamer:
            text += piece
            yield text
        drawing.result()

    @torch.no_grad()
    def next_tokens(self, prompt: str, temperature: float, top_k: int, count: int) -> list[tuple[str, float]]:
        """The likeliest next tokens with the probabilities that `continuation` draws with, the likeliest first."""
        ids = self.encode(prompt, self.positions)
        logits = self.model(ids).logits[0, -1] / temperature
        drawn_from = logits.topk(min(top_k or len(logits), len(logits)))
        probabilities = drawn_from.values.softmax(0)
        shown = zip(drawn_from.indices[:count].tolist(), probabilities.tolist())
        return [(self.token_text(id), probability) for id, probability in shown]

    @torch.no_grad()
    def attention(self, prompt: str, layer: int, head: int, longest: int) -> tuple[list[str], torch.Tensor]:
        """Where each token looks, for at most the last `longest` tokens.

        Args:
            layer, head: from 1.
        Returns:
            The T tokens; and (T, T) float32 weights: row i says how token i divides its attention among tokens 0 ... i.
        """
        ids = self.encode(prompt, min(longest, self.positions))
        attentions = self.model(ids, output_attentions=True).attentions
        return [self.token_text(id) for id in ids[0].tolist()], attentions[layer - 1][0, head - 1]

    def token_text(self, id: int) -> str:
        """A token as Python writes it, with its number where it is only a part of a character."""
        text = self.tokenizer.decode([id])
        return f"part {id}" if "\N{REPLACEMENT CHARACTER}" in text else repr(text)[1:-1].replace(" ", "\N{OPEN BOX}")
