"""Between text and token ids: a model's own tokenizer, or a rule of bytes where a simulated model has none.

tokens = load_tokenizer(Path("/models/llama")) or BytesRule()
ids = tokens.encode("Hello"); decoder = tokens.decoder(ids)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engine.documents import read_json
from engine.errors import InputError
from engine.executors.start import need
from engine.specs.checks import short

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a part of a character decodes to
BYTES_PER_TOKEN = 4
FILLER = " the"  # of a simulated model without a tokenizer; one token by the rule


class Decoder(Protocol):
    """Turns one sequence's tokens into text as they come."""

    def add(self, token: int) -> str:
        """Return the text that a token completes; empty inside a character of several tokens."""

    def rest(self) -> str:
        """Return what was held back, at the end."""


class TextCodec(Protocol):
    """How a served model reads and writes text."""

    description: str  # how prompts are counted, in a sentence; empty for the model's own tokenizer
    vocab_size: int | None  # token ids of a prompt are below this; None: any
    end_tokens: frozenset[int]

    @property
    def filler(self) -> int:
        """A token that reads as one word wherever it stands: what a simulated model says."""

    def encode(self, text: str) -> list[int]:
        """Return a prompt's token ids."""

    def chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Return a conversation's token ids, up to where the answer begins. Raises InputError for roles it lacks."""

    def token_text(self, token: int) -> str:
        """Return one token as text."""

    def decoder(self) -> Decoder:
        """Return a decoder of one sequence's output."""


class BytesRule:
    """A token for every four bytes of text (UTF-8), about what tokenizers make of English; ids are these bytes."""

    description = (
        f"no tokenizer: {BYTES_PER_TOKEN} bytes of text count as a token, and a chat as its roles and messages, a line "
        "each"
    )
    vocab_size: int | None = None
    end_tokens: frozenset[int] = frozenset()

    def __init__(self) -> None:
        (self._filler,) = self.encode(FILLER)

    @property
    def filler(self) -> int:
        return self._filler

    def encode(self, text: str) -> list[int]:
        data = text.encode("utf-8", "replace")
        padded = data.ljust(-(-len(data) // BYTES_PER_TOKEN) * BYTES_PER_TOKEN, b" ")
        ids: list[int] = (np.frombuffer(padded, dtype="<u4") & 0x7FFFFFFF).tolist()
        return ids

    def chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        lines = [f"{message['role']}: {message['content']}\n" for message in messages]
        return self.encode("".join(lines) + "assistant:")

    def token_text(self, token: int) -> str:
        return FILLER if token == self.filler else token.to_bytes(4, "little").decode("utf-8", "replace")

    def decoder(self) -> Decoder:
        return _OneByOne(self)


class _OneByOne:
    """A decoder of tokens that are text by themselves."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec

    def add(self, token: int) -> str:
        return self._codec.token_text(token)

    def rest(self) -> str:
        return ""


class ModelTokenizer:
    """The tokenizer of a model's folder, with its chat template."""

    description = ""

    def __init__(self, tokenizer: Any, end_tokens: frozenset[int], folder: Path) -> None:
        self.tokenizer = tokenizer
        self.vocab_size: int | None = None  # the model's, set by who knows it
        self.end_tokens = end_tokens
        self._folder = folder
        self._filler: int | None = None
        self._texts: dict[int, str] = {}

    @property
    def filler(self) -> int:
        if self._filler is None:
            self._filler = self._find_filler()
        return self._filler

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(_whole(text))
        return ids

    def chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError(f"the tokenizer in {self._folder} has no chat template: use /v1/completions")
        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # whatever a template of Jinja raises
            raise InputError(f"the model's chat template refuses these messages: {error}") from None
        ids: list[int] = self.tokenizer.encode(_whole(text), add_special_tokens=False)
        return ids

    def token_text(self, token: int) -> str:
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = self.tokenizer.decode([token], skip_special_tokens=False)
        return text

    def decoder(self) -> Decoder:
        return _Growing(self.tokenizer)

    def _find_filler(self) -> int:
        """A token that gives the same token again wherever its text is read, of ordinary words if there is one."""
        for word in (" the", " a", " of", "a", "."):
            ids = self.tokenizer.encode(word, add_special_tokens=False)
            again = self.tokenizer.decode(ids * 8)
            if len(ids) == 1 and self.tokenizer.encode(again, add_special_tokens=False)[1:] == ids * 7:
                return int(ids[0])
        return int(self.tokenizer.encode(" the", add_special_tokens=False)[-1])


def _whole(text: str) -> str:
    """Return the text with a question mark for each half of a surrogate pair, which JSON may hold and no tokenizer."""
    return text.encode("utf-8", "replace").decode("utf-8")


class _Growing:
    """A decoder that looks back a few tokens: spaces and characters may hang on the token before."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # of the tokens that are decoded again
        self._read = 0  # tokens whose text was given out

    def add(self, token: int) -> str:
        self._ids.append(token)
        before, now = self._texts()
        if len(now) <= len(before) or now.endswith(UNFINISHED):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def rest(self) -> str:
        before, now = self._texts()
        self._start = self._read = len(self._ids)
        return now[len(before) :]

    def _texts(self) -> tuple[str, str]:
        decode = self._tokenizer.decode
        return (
            decode(self._ids[self._start : self._read], skip_special_tokens=True),
            decode(self._ids[self._start :], skip_special_tokens=True),
        )


def load_tokenizer(folder: Path | None) -> ModelTokenizer | None:
    """Return the tokenizer in a model's folder; None if there is none. Raises InputError for one that can't be read."""
    if folder is None or not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    need("transformers", "engine")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of many kinds, from several packages
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"can't read the tokenizer in {folder} ({what}): download its files again") from None
    return ModelTokenizer(tokenizer, end_tokens(folder), folder)


def end_tokens(folder: Path | None) -> frozenset[int]:
    """Return the end-of-text tokens in a model's folder."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name if folder is not None else None
        if path is not None and path.is_file():
            values = read_json(path, "download it again")
            found = values.get("eos_token_id") if isinstance(values, dict) else "no object"
            if found is not None:
                tokens = found if isinstance(found, list) else [found]
                if not all(type(token) is int for token in tokens):
                    raise InputError(f"{path}: eos_token_id {short(found)}: give whole numbers")
                return frozenset(tokens)
    return frozenset()
