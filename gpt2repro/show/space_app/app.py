"""A demo of a language model, written by gpt2repro's publish.py: `pip install -r requirements.txt && python app.py`."""

import json
from pathlib import Path

import gradio as gr
import plotly.graph_objects as go
from language_model import LanguageModel


SHOWN_TOKENS = 20
LONGEST_ATTENTION = 64  # tokens
GRAY = "#808080"  # the text of the charts: legible on the light and on the dark page
CLEAR = "rgba(0, 0, 0, 0)"
FULL_BLUE = 0.5  # the attention from which on the color is the same
NO_BLUE, BLUE = "rgba(59, 130, 246, 0)", "rgb(59, 130, 246)"

here = Path(__file__).parent
settings = json.loads((here / "settings.json").read_text())
language_model = LanguageModel(settings["model"] or str(here / "model"), settings["revision"])


def write(prompt, max_new_tokens, temperature, top_k, seed):
    yield from language_model.continuation(prompt, int(max_new_tokens), temperature, int(top_k), int(seed))


def draw_next_tokens(prompt, temperature, top_k):
    tokens, probabilities = zip(*language_model.next_tokens(prompt, temperature, int(top_k), SHOWN_TOKENS))
    places = list(range(len(tokens)))  # two tokens may look alike
    bars = go.Bar(x=probabilities, y=places, orientation="h", marker_color=BLUE, texttemplate="%{x:.1%}")
    bars.update(textposition="outside", cliponaxis=False, hoverinfo="skip")
    figure = chart(bars, height=520)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(tickvals=places, ticktext=tokens)
    return figure


def draw_attention(prompt, layer, head):
    tokens, weights = language_model.attention(prompt, int(layer), int(head), LONGEST_ATTENTION)
    places = list(range(len(tokens)))
    triangle = [row[: place + 1].tolist() for place, row in enumerate(weights)]  # no token looks ahead
    pairs = [[(token, other) for other in tokens] for token in tokens]
    heatmap = go.Heatmap(z=triangle, x=places, y=places, customdata=pairs, zmin=0, zmax=FULL_BLUE)
    heatmap.update(colorscale=[(0, NO_BLUE), (1, BLUE)], showscale=False, hoverongaps=False)
    heatmap.update(hovertemplate="%{customdata[0]} looks at %{customdata[1]}: %{z:.1%}<extra></extra>")
    figure = chart(heatmap, height=640)
    figure.update_xaxes(tickvals=places, ticktext=tokens, tickangle=-90, title="looks at")
    figure.update_yaxes(tickvals=places, ticktext=tokens, title="token")
    return figure


def chart(trace, height):
    """The first place on top, on the page's own ground."""
    figure = go.Figure(trace)
    figure.update_layout(height=height, margin=dict(l=10, r=50, t=40, b=10), font_color=GRAY)
    figure.update_layout(paper_bgcolor=CLEAR, plot_bgcolor=CLEAR, modebar=dict(bgcolor=CLEAR, color=GRAY))
    figure.update_xaxes(showgrid=False, zeroline=False)
    figure.update_yaxes(showgrid=False, zeroline=False, autorange="reversed")
    return figure


with gr.Blocks(title=settings["title"]) as demo:
    gr.Markdown(f"# {settings['title']}\n\n{language_model.description}")
    prompt = gr.Textbox(settings["prompts"][0], label="Prompt", lines=3)
    gr.Examples(settings["prompts"], prompt)
    with gr.Tab("Continue the prompt"):
        with gr.Row():
            temperature = gr.Slider(0.1, 2.0, 1.0, step=0.05, label="Temperature")
            top_k = gr.Slider(0, 200, 50, step=1, label="Top-k (0: all tokens)")
        with gr.Row():
            most = language_model.positions - 1
            max_new_tokens = gr.Slider(1, most, min(100, most), step=1, label="New tokens")
            seed = gr.Number(1337, label="Seed", precision=0, minimum=0)
        continue_button = gr.Button("Continue", variant="primary")
        with gr.Row():
            text = gr.Textbox(label="Text", lines=22)
            next_plot = gr.Plot(label="Probabilities of the first new token")
    with gr.Tab("Attention"):
        with gr.Row():
            layer = gr.Slider(1, language_model.layers, 1, step=1, label="Layer")
            head = gr.Slider(1, language_model.heads, 1, step=1, label="Head")
        attention_button = gr.Button("Show where each token looks", variant="primary")
        attention_plot = gr.Plot(
            label=f"Attention among the last {LONGEST_ATTENTION} tokens; full blue from {FULL_BLUE:.0%} on"
        )
    continue_button.click(write, [prompt, max_new_tokens, temperature, top_k, seed], text)
    continue_button.click(draw_next_tokens, [prompt, temperature, top_k], next_plot)
    look = [attention_button.click, layer.release, head.release]
    gr.on(look, draw_attention, [prompt, layer, head], attention_plot)

if __name__ == "__main__":
    demo.launch(theme=gr.themes.Default(primary_hue="blue"), show_error=True)
