"""Prompts of a workload as text: words that are a token each, as many as the workload says.

A request's words depend on the seed and its id alone; with a content, on the seed and the content's streams, so that
prompts share what the workload says they share. A turn of a conversation goes on from the text that was really
generated in the turn before.
"""

from __future__ import annotations

from engine.runtime.serve import Sender
from engine.scheduling.request import Request
from engine.server.text import TextCodec
from engine.workload.workload import Workload

# three letters and a space: one token of most tokenizers, and of the rule of four bytes
COMMON = " the and for are but not you all any can had her was one our out day get has him his how man new now old see"
COMMON += " two way who boy did its let put say she too use"
WORDS = tuple(f" {word}" for word in COMMON.split())
APPROXIMATE = (
    "prompts are of common English words, about a token each: their exact lengths need the model's tokenizer "
    "(--tokenizer DIR)"
)
NO_WORDS = "prompts are of common English words, of which the tokenizer has none: their lengths are not exact"
_TRIED = 400  # of a tokenizer's own tokens, where common words are none


class Prompts(Sender):
    """The requests of a workload with their prompts, sent when its client sends them.

    Args:
        codec: the model's tokenizer, for exact lengths; None: approximate ones.
        chat: whether the server puts prompts into its chat template.
    """

    def __init__(self, workload: Workload, seed: int, codec: TextCodec | None = None, *, chat: bool = False) -> None:
        found = () if codec is None else single_tokens(codec)
        self.exact = bool(found)  # whether lengths are
        self.words = found or WORDS
        super().__init__(workload, len(self.words), seed)
        self.frame_tokens = _frame_tokens(codec, found[0], chat) if codec is not None and found else 0
        self._texts: dict[int, str] = {}  # of the turns that others follow: prompt and answer, by id

    def pop_text(self) -> tuple[Request, str]:
        """Take the next request and its prompt."""
        request = self._client.pop()
        before = self._before.get(request.id, -1)
        text = self._texts.pop(before, "")
        known = min(len(self._ended.pop(before, [])), request.prompt_tokens)
        tokens = self._tokens(request, [0] * known)
        count = max(1, request.prompt_tokens - self.frame_tokens) - known
        return request, text + "".join([self.words[token] for token in tokens[known : known + max(0, count)]])

    def ended(self, request: Request, time: float, prompt: str = "", answer: str = "") -> None:
        """A request has ended, with this answer to its prompt."""
        if request.id in self._followed:
            self._texts[request.id] = prompt + answer
            self._ended[request.id] = [0] * (request.prompt_tokens + request.output_tokens) if prompt else []
        self._client.finished(request, time)


def single_tokens(codec: TextCodec) -> tuple[str, ...]:
    """Return words that are a token each, side by side as alone: common ones, else tokens as text; none may do."""
    plain = len(codec.encode(""))
    own = [codec.token_text(token).strip() for token in range(min(_TRIED, codec.vocab_size or _TRIED))]
    own = [text for text in own if text.isalnum()]
    for words in (WORDS, [f" {text}" for text in own], own):
        found = [word for word in dict.fromkeys(words) if len(codec.encode(word * 3)) == plain + 3]
        if found and len(codec.encode("".join(found))) == plain + len(found):
            return tuple(found)
    return ()


def _frame_tokens(codec: TextCodec, word: str, chat: bool) -> int:
    """Return the tokens that a server adds to a prompt: special ones, or its chat template's."""
    if chat:
        return len(codec.chat([{"role": "user", "content": word * 8}])) - 8
    return len(codec.encode(word * 8)) - 8
