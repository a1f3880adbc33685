"""Token files of other GPT-2 trainers, read where they lie.

- nanoGPT (karpathy/nanoGPT, data/openwebtext/prepare.py): train.bin and val.bin, uint16 and nothing else. If meta.pkl
  lies beside them (data/shakespeare_char/prepare.py), the tokens are of a vocabulary of their own that is in that file;
  a pickle is a program, so it is not opened, and the folder is refused.
- build-nanogpt (karpathy/build-nanogpt, fineweb.py): *_train_*.npy and *_val_*.npy, 1-D arrays of uint16.
- llm.c (karpathy/llm.c, dev/data/data_common.py; its reader is llmc/dataloader.h): *_train*.bin and *_val*.bin, 256
  int32 of header (magic, version, number of tokens, zeros), then uint16.
- datatrove (huggingface/datatrove, pipeline/tokens/tokenizer.py): *.ds, uint16, each with a .metadata that names the
  tokenizer and counts the tokens; a task without documents leaves an empty file. There is no validation split: the
  last hundredth of all tokens in the order of the file names, at most 10 million, is held out, and the document that
  lies across that border is cut.

All integers are little-endian. None of the four comes with a tokenizer, so GPT-2's is assumed, and an id that GPT-2
does not have is an error. Both ends of each file are checked when the folder is opened, the rest as it is read.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2repro.errors import UserError, first_line
from gpt2repro.files import is_special


GPT2_VOCAB_SIZE = 50_257
END_BYTES = 4096  # of each end of a file that are checked when it is opened
HELD_OUT_TOKENS = 10_000_000

LLM_C_HEADER_BYTES = 256 * 4
LLM_C_GPT2 = (20240520, 1)  # magic, version; Llama 3's uint32 files have 20240801 and 7
DATATROVE_GPT2 = re.compile(r"(openai-community/)?gpt2(-medium|-large|-xl)?")


class TokenFile(NamedTuple):
    path: Path
    offset: int  # the byte at which the tokens begin
    tokens: int


class Format(NamedTuple):
    train: str  # pattern of the file names
    val: str | None  # None: the end of the others is held out
    locate: Callable[[Path], TokenFile]  # checks a file and finds its tokens


@dataclass(frozen=True)
class ForeignTokens:
    """The token files of a folder.

    name: of the folder and its format, for reports.
    train, val: the files of each split, in order; little-endian uint16.
    fingerprint: a hash of the names, the sizes and the first and last END_BYTES of tokens of the files: hashing a
        whole corpus would take minutes.
    """

    name: str
    train: list[TokenFile]
    val: list[TokenFile]
    fingerprint: str


def foreign_format(folder: Path) -> str | None:
    """Whose token files a folder holds: a key of FORMATS; None if it holds nobody's."""
    for name, (train, val, _) in FORMATS.items():
        patterns = [train] if val is None else [train, val]
        if any(any(folder.glob(pattern)) for pattern in patterns):
            return name
    return None


def read_foreign_tokens(folder: Path) -> ForeignTokens | None:
    """Find and check the token files of another trainer; None if the folder holds none.

    Raises:
        UserError: a split is missing, or a file is damaged or holds other tokens than GPT-2's.
    """
    name = foreign_format(folder)
    if name is None:
        return None
    train_pattern, val_pattern, locate = FORMATS[name]
    for path in folder.iterdir():
        if is_special(path):  # a pipe would be waited for
            raise UserError(f"{path} is neither a file nor a folder; remove it")
    try:
        train = [locate(path) for path in sorted(folder.glob(train_pattern))]
        val = [locate(path) for path in sorted(folder.glob(val_pattern))] if val_pattern else []
        fingerprint = _fingerprint(train + val)
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({first_line(error)}); check its permissions") from error
    if not val_pattern:
        train, val = _hold_out(train)
    for split, files, pattern in (("train", train, train_pattern), ("val", val, val_pattern or train_pattern)):
        if not any(file.tokens for file in files):
            raise UserError(
                f"{folder} holds {name}'s tokens, but none for the split {split} ({pattern}); add them there"
            )
    return ForeignTokens(f"{folder.absolute().name} ({name}'s tokens)", train, val, fingerprint)


def _hold_out(files: list[TokenFile]) -> tuple[list[TokenFile], list[TokenFile]]:
    """Cut the files in two: training, and the last hundredth (at most HELD_OUT_TOKENS) for validation."""
    total = sum(file.tokens for file in files)
    remaining = total - min(total // 100, HELD_OUT_TOKENS)  # training tokens in this file and the next ones
    train, val = [], []
    for path, offset, tokens in files:
        kept = min(tokens, remaining)
        remaining -= kept
        train.append(TokenFile(path, offset, kept))
        val.append(TokenFile(path, offset + 2 * kept, tokens - kept))
    return train, val


def _fingerprint(files: list[TokenFile]) -> str:
    """The hash of names, sizes and ends; the ids at the ends are checked on the way."""
    digest = hashlib.sha256()
    for path, offset, tokens in files:
        length = min(END_BYTES, 2 * tokens)
        with path.open("rb") as file:
            file.seek(offset)
            ends = file.read(length)
            file.seek(offset + 2 * tokens - length)
            ends += file.read(length)
        largest = np.frombuffer(ends, "<u2").max(initial=0)
        if largest >= GPT2_VOCAB_SIZE:
            raise UserError(
                f"{path} holds token {largest}, GPT-2's largest is {GPT2_VOCAB_SIZE - 1}: these are not GPT-2's "
                f"tokens; prepare the text with {prepare_text('NAME')}"
            )
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + ends)
    return digest.hexdigest()


def prepare_text(tokenizer: str) -> str:
    """The command that tokenizes a text with another tokenizer."""
    return f"`python prepare_data.py files --source TEXT --tokenizer {tokenizer} --output_dir DIR`"


# ---- one file of each ----


def _nanogpt(path: Path) -> TokenFile:
    size, meta = path.stat().st_size, path.with_name("meta.pkl")
    if meta.exists():
        raise UserError(
            f"{meta} holds the vocabulary of {path.name}, which is not GPT-2's, and a pickle is not opened; prepare "
            f"the text with {prepare_text('char')}"
        )
    if size % 2:
        raise UserError(f"{path} has {size:,} bytes, an odd number, and each token is two; copy it again")
    return TokenFile(path, 0, size // 2)


def _build_nanogpt(path: Path) -> TokenFile:
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is truncated or not an .npy file ({first_line(error)}); copy it again") from error
    if array.dtype != "<u2" or array.ndim != 1:
        raise UserError(
            f"{path} holds {array.dtype} in {array.ndim} dimensions, not uint16 in one; write it as build-nanogpt does"
        )
    return TokenFile(path, array.offset, len(array))


def _llm_c(path: Path) -> TokenFile:
    size, header = path.stat().st_size, np.fromfile(path, "<i4", 256)
    if len(header) < 256:
        raise UserError(f"{path} has {size:,} bytes, llm.c's header alone has {LLM_C_HEADER_BYTES:,}; copy it again")
    magic, version, tokens = header[:3].tolist()
    if (magic, version) != LLM_C_GPT2:
        raise UserError(
            f"{path} begins with magic {magic}, version {version}; GPT-2's tokens with {LLM_C_GPT2[0]}, "
            f"{LLM_C_GPT2[1]}, Llama 3's with 20240801, 7, which is not read; make it with --model_desc gpt-2"
        )
    expected = LLM_C_HEADER_BYTES + 2 * tokens
    if size != expected:
        raise UserError(
            f"{path} has {size:,} bytes, by its header of {tokens:,} tokens it should have {expected:,}; copy it again"
        )
    return TokenFile(path, LLM_C_HEADER_BYTES, tokens)


def _datatrove(path: Path) -> TokenFile:
    size, metadata = path.stat().st_size, Path(f"{path}.metadata")
    if not size:
        return TokenFile(path, 0, 0)
    try:  # "gpt2|2", the bytes of a token; before 0.2 only "gpt2"
        written, count = metadata.read_text().splitlines()[:2]
        tokenizer, bar, token_bytes = written.rpartition("|")
        tokens = int(count)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(
            f"{metadata} is missing or damaged, so {path.name} may be unfinished; run datatrove again, with "
            "save_final_metadata"
        ) from error
    if not bar:
        tokenizer, token_bytes = written, "2"
    if not DATATROVE_GPT2.fullmatch(tokenizer) or token_bytes != "2":
        raise UserError(
            f"{path} holds tokens of {tokenizer}, not GPT-2's; prepare the text with {prepare_text('NAME')}, or if "
            f"that is GPT-2's tokenizer, write gpt2|2 into the first line of {metadata.name}"
        )
    if size != 2 * tokens:
        raise UserError(f"{path} has {size:,} bytes, {metadata.name} says {tokens:,} tokens of 2; copy it again")
    return TokenFile(path, 0, tokens)


FORMATS = {
    "nanoGPT": Format("train.bin", "val.bin", _nanogpt),
    "build-nanogpt": Format("*_train_*.npy", "*_val_*.npy", _build_nanogpt),
    "llm.c": Format("*_train*.bin", "*_val*.bin", _llm_c),
    "datatrove": Format("*.ds", None, _datatrove),
}
