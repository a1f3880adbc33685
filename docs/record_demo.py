"""Record the commands of `make demo` and a sample as an animated picture of a terminal, docs/demo.svg.

    python docs/record_demo.py            # runs them in a folder of their own (minutes), then draws
    python docs/record_demo.py --redraw   # draws the last recording anew

The output is what the commands printed, with nothing added; of more than a screenful the middle of a command's output
is left out, which is marked. The recording (build/demo.cast) is asciinema's format, with the true times; the picture
shortens waiting. It is one file of plain SVG and CSS: no script, no font, nothing to load.
"""

import json
import shlex
import subprocess
import sys
import tempfile
import time
from html import escape
from pathlib import Path

from gpt2repro.errors import Parser, run_script
from gpt2repro.files import CHECKOUT


COMMANDS = (
    "python prepare_data.py python-docs --output_dir data/python-docs",
    "accelerate launch --config_file accelerate_configs/cpu.yaml train_accelerate.py --config recipes/demo.yaml",
    'python sample.py runs/demo --prompt "class Queue" --num_samples 1 --max_new_tokens 60',
)
CAST = CHECKOUT / "build" / "demo.cast"
PICTURE = CHECKOUT / "docs" / "demo.svg"
COLUMNS, ROWS = 116, 24
HEAD, TAIL = 11, 11  # lines that are kept of a long output
COLUMN, ROW, MARGIN = 8.4, 19, 16  # pixels
LONGEST_WAIT = 1.2  # seconds, in the picture, between two lines
END = 6.0  # seconds that the last screen stays


def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--redraw", action="store_true", help=f"draw {CAST.relative_to(CHECKOUT)} again")
    if not parser.parse_args(argv).redraw:
        record()
    header, *events = map(json.loads, CAST.read_text().splitlines())
    PICTURE.write_text(draw([(at, text.removesuffix("\r\n")) for at, _, text in events]))
    print(f"{PICTURE.relative_to(CHECKOUT)}: {PICTURE.stat().st_size / 1000:.0f} kB, {events[-1][0]:.0f} s recorded")


def record() -> None:
    """Run the commands in an empty folder, and write what they print with its time."""
    CAST.parent.mkdir(exist_ok=True)
    began = time.monotonic()
    with CAST.open("w", buffering=1) as cast, tempfile.TemporaryDirectory() as folder:
        for name in ("recipes", "accelerate_configs", *(path.name for path in CHECKOUT.glob("*.py"))):
            Path(folder, name).symlink_to(CHECKOUT / name)

        def write(text: str) -> None:
            event = [round(time.monotonic() - began, 3), "o", text + "\r\n"]
            cast.write(json.dumps(event, ensure_ascii=False) + "\n")

        cast.write(json.dumps({"version": 2, "width": COLUMNS, "height": ROWS, "title": "make demo"}) + "\n")
        for command in COMMANDS:
            write(f"$ {command}")
            words = shlex.split(command)
            words = [str(Path(sys.executable).with_name(words[0])), *words[1:]]
            process = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            assert process.stdout is not None
            for line in process.stdout:
                write(line.rstrip("\n"))
            if process.wait():
                raise SystemExit(f"{command}: exit code {process.returncode}")


# ---- drawing ----


def draw(events: list[tuple[float, str]]) -> str:
    """The picture of a recording: every line is there from the start, and becomes visible when its time has come; the
    whole scrolls."""
    lines = wrapped(shortened(events))
    times, now, before = [], 0.0, lines[0][0]
    for at, _ in lines:
        now += min(max(at - before, 0.03), LONGEST_WAIT) if times else 0.0
        before = at
        times.append(now)
    length = times[-1] + END
    scroll = [(time, max(0, number + 1 - ROWS) * ROW) for number, time in enumerate(times)]
    width, height = COLUMNS * COLUMN + 2 * MARGIN, ROWS * ROW + 2 * MARGIN
    frames = "".join(f"{100 * time / length:.3f}%{{transform:translateY(-{y}px)}}" for time, y in scroll if y)
    rules = "".join(
        f"@keyframes k{number}{{0%,{100 * time / length:.3f}%{{opacity:0}}{100 * time / length + 0.001:.3f}%,100%"
        f"{{opacity:1}}}}#l{number}{{animation:k{number} {length:.2f}s infinite}}"
        for number, time in enumerate(times)
    )
    body = "\n".join(
        f'<text id="l{number}" y="{(number + 1) * ROW - 5}"{shade(text)}>{escape(text)}</text>'
        for number, (_, text) in enumerate(lines)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" role="img" '
        f'aria-label="A terminal in which the demo is prepared, trained and sampled from">\n'
        f"<style>text{{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;fill:#d7dae0;"
        f"white-space:pre}}.c{{fill:#7ee787;font-weight:bold}}.d{{fill:#7d8590}}.v{{fill:#79c0ff}}"
        f"@keyframes s{{0%{{transform:none}}{frames}100%{{transform:translateY(-{scroll[-1][1]}px)}}}}"
        f"#s{{animation:s {length:.2f}s step-end infinite}}{rules}"
        f"@media (prefers-reduced-motion){{#s,text{{animation:none!important}}"
        f"#s{{transform:translateY(-{scroll[-1][1]}px)}}}}</style>\n"
        f'<rect width="100%" height="100%" rx="8" fill="#0d1117"/>\n'
        f'<svg x="{MARGIN}" y="{MARGIN}" width="{width - 2 * MARGIN:.0f}" height="{ROWS * ROW}"><g id="s">\n{body}\n'
        "</g></svg>\n</svg>\n"
    )


def shortened(events: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Of each command's output at most HEAD lines from its start and TAIL from its end."""
    starts = [number for number, (_, text) in enumerate(events) if text.startswith("$ ")] + [len(events)]
    kept = []
    for start, end in zip(starts, starts[1:]):
        output = events[start + 1 : end]
        kept.append(events[start])
        if len(output) > HEAD + TAIL + 1:
            left_out = len(output) - HEAD - TAIL
            output = [*output[:HEAD], (output[HEAD][0], f"   ⋮  {left_out} lines"), *output[-TAIL:]]
        kept += [*output, (output[-1][0], "")]
    return kept


def wrapped(events: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Lines of at most COLUMNS characters, as a terminal breaks them."""
    return [
        (at, text[start : start + COLUMNS]) for at, text in events for start in range(0, max(len(text), 1), COLUMNS)
    ]


def shade(text: str) -> str:
    marks = {"$ ": "c", "   ⋮": "d"}
    names = [name for start, name in marks.items() if text.startswith(start)] or ["v"] * ("validation loss" in text)
    return f' class="{names[0]}"' if names else ""


if __name__ == "__main__":
    run_script(main)
