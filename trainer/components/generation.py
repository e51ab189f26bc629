"""Sampling from a model: keys and values kept from step to step, the choice of tokens, and text as it comes.

Letters: B batch, S tokens of a call, T tokens so far, N query heads, M key-value heads, H head_dim, V vocab.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.common.attention import AttentionMask, DotProductAttention
from models.plan import ParallelPlan, match_modules
from trainer.components.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 1.0
    """Divides the logits. 0 takes the likeliest token."""
    top_k: int = 0
    """Only so many of the likeliest tokens may be chosen. 0: all."""
    top_p: float = 1.0
    """Only the fewest likeliest tokens whose probabilities sum to this may be chosen (Holtzman et al., arXiv 1904.09751)."""

    def __post_init__(self) -> None:
        """Raises ValueError for values out of range."""
        if self.temperature < 0:
            raise ValueError(f"temperature = {self.temperature} must be at least 0")
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k} must be at least 0 (0 for all tokens)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} must be above 0 and at most 1")


def choose_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Return a token. logits: (V,), on the CPU, where the generator is, so that a seed means the same on every device"""
    logits = logits.float()
    if sampling.temperature == 0:
        return int(logits.argmax())
    ordered, tokens = (logits / sampling.temperature).sort(descending=True, stable=True)
    if sampling.top_k:
        ordered, tokens = ordered[: sampling.top_k], tokens[: sampling.top_k]
    probabilities = ordered.softmax(dim=0)
    # A token stays if those before it do not reach the sum.
    is_kept = probabilities.cumsum(dim=0) - probabilities < sampling.top_p
    kept = probabilities * is_kept
    return int(tokens[torch.multinomial(kept, 1, generator=generator)])


class CachedAttention(DotProductAttention):
    """Attends to the keys and values of earlier calls, too. In the place of a model's `DotProductAttention`.

    Of latent attention it keeps the keys and values of all heads, not the latent vectors that they are made from: right, and
    as large as those of plain attention.
    """

    def __init__(self, length: int) -> None:
        """length: tokens that there is room for."""
        super().__init__()
        self._length = length
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self.start = 0
        """Tokens kept; the next call's come after them."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, mask: AttentionMask = None) -> Tensor:
        """Keep `k` and `v`, and attend causally. q: (B, N, S, H); k, v: (B, M, S, H) -> (B, N, S, H)"""
        assert mask is None, "sequences are whole documents"
        begin, end = self.start, self.start + q.shape[2]
        if self._keys is None or self._values is None:
            self._keys, self._values = (x.new_empty(*x.shape[:2], self._length, x.shape[3]) for x in (k, v))
        self._keys[:, :, begin:end], self._values[:, :, begin:end] = k, v
        if begin == 0:
            return super().forward(q, k, v)
        is_visible = torch.arange(end, device=q.device) <= torch.arange(begin, end, device=q.device).unsqueeze(1)
        return super().forward(q, self._keys[:, :, :end], self._values[:, :, :end], mask=is_visible[None, None])


class Generator:
    """Continues token sequences by a model.

    plan: names the attention modules; without them (a model of the user's) the whole sequence is computed for each token.
    max_length: tokens of prompt and continuation together. vocab_size: the tokenizer's; the model may have rows beyond.
    multiple_of: the number of tokens in a call must be a multiple of this (tensor parallelism cuts sequences). agree: makes of
    each rank's token the same one.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        plan: ParallelPlan,
        max_length: int,
        vocab_size: int,
        multiple_of: int = 1,
        agree: Callable[[int], int] = lambda token: token,
    ) -> None:
        self._model = model.eval()
        self._device = next(model.parameters()).device
        # The last call is filled up, too.
        self._max_length = max_length // multiple_of * multiple_of
        self._vocab_size, self._multiple_of, self._agree = vocab_size, multiple_of, agree
        modules = dict(model.named_modules())
        self._attention_names = match_modules(plan.attention, modules) if plan.attention else []
        self._caches: list[CachedAttention] = []

    @torch.no_grad()
    def generate(
        self, prompt: Sequence[int], *, max_new_tokens: int, sampling: Sampling, seed: int, stop: int | None
    ) -> Iterator[int]:
        """Yield the tokens after `prompt` as they are chosen, up to `stop`, which is yielded too. Collective.

        Raises:
            ValueError: an empty prompt, or more tokens than there is room for.
        """
        if not prompt:
            raise ValueError("the prompt is empty, and the tokenizer has no token that begins a document")
        if len(prompt) + max_new_tokens > self._max_length:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones are more than the {self._max_length} that the "
                "model was made for (its max_seq_len)"
            )
        self._install_caches(len(prompt) + max_new_tokens + self._multiple_of)
        generator = torch.Generator().manual_seed(seed)
        tokens = list(prompt)
        for _ in range(max_new_tokens):
            logits = self._get_logits(tokens)
            token = self._agree(choose_token(logits.cpu(), sampling, generator))
            tokens.append(token)
            yield token
            if token == stop:
                return

    def _install_caches(self, room: int) -> None:
        self._caches = [CachedAttention(room) for _ in self._attention_names]
        for name, cache in zip(self._attention_names, self._caches, strict=True):
            self._model.set_submodule(name, cache)

    def _get_logits(self, tokens: Sequence[int]) -> Tensor:
        """Return the logits after the last token, computing those that no cache has. -> (V,)"""
        start = self._caches[0].start if self._caches else 0
        new = list(tokens[start:])
        # Tokens to fill up come after all others, which do not see them; the next call writes over them.
        padded = new + [new[-1]] * (-len(new) % self._multiple_of)
        inputs = torch.tensor([padded], device=self._device)
        positions = torch.arange(start, start + len(padded), device=self._device).clamp(max=self._max_length - 1)
        logits = self._model(inputs, positions=positions.unsqueeze(0))[0, len(new) - 1, : self._vocab_size]
        for cache in self._caches:
            cache.start = len(tokens)
        return logits


def stream_text(tokenizer: Tokenizer, tokens: Iterator[int], *, skip: int | None = None) -> Iterator[str]:
    """Yield the text of tokens piece by piece, none of which ends inside of a character.

    skip: a token that is not shown
    """
    held: list[int] = []
    shown = ""
    for token in tokens:
        if token == skip:
            continue
        held.append(token)
        text = tokenizer.decode(held)
        # Not all bytes of a character are there; four are the most that one has.
        if text.endswith("\ufffd") and len(text) - len(shown) <= _MOST_BYTES:
            continue
        yield text[len(shown) :]
        shown = text
        if len(held) > _WINDOW:
            # Some tokenizers decode the first token in another way than a later one: one that was shown stays in front.
            held = held[-1:]
            shown = tokenizer.decode(held)
    yield tokenizer.decode(held)[len(shown) :] if held else ""


_MOST_BYTES = 3
_WINDOW = 64
