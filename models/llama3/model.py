"""Llama 3 (arXiv 2407.21783): pre-norm Transformer with RMSNorm, rotary positions, grouped-query attention and SwiGLU.

Letters: B batch, S seq, D dim, V vocab.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from models.common.attention import Attention, AttentionMask, build_document_mask
from models.common.feed_forward import FeedForward
from models.common.init import Init
from models.common.output import LossFunction, Output
from models.common.rope import RotaryEmbedding, scale_frequencies
from models.llama3.args import LlamaArgs


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each behind its norm, each added to the residual stream."""

    def __init__(self, args: LlamaArgs, rope: RotaryEmbedding) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.attention = Attention(args.dim, args.n_heads, args.n_kv_heads, rope)
        self.ffn_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.feed_forward = FeedForward(args.dim, args.hidden_dim)

    def forward(
        self, x: torch.Tensor, *, positions: torch.Tensor | None = None, mask: AttentionMask = None
    ) -> torch.Tensor:
        """Return the residual stream after this block.

        x: (B, S, D); positions: (B, S) int64, by default 0 to S-1; mask: see `AttentionMask` -> (B, S, D)
        """
        h = x + self.attention(self.attention_norm(x), positions=positions, mask=mask)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    """The network. Built under `torch.device("meta")` it takes no memory; `to_empty`, then `init_buffers` and the
    distributions of `param_inits` make it ready. Tied embeddings stay tied through `to_empty`, `to` and sharding.

    It can be a part of the network, as a stage of a pipeline is. `layers` then has the blocks that are here, under
    their numbers in the whole network, and a module that is elsewhere is None. What comes in and goes out is hidden
    states, where it is not tokens and logits or loss.
    """

    def __init__(self, args: LlamaArgs) -> None:
        super().__init__()
        self.args = args
        scaling = args.rope_scaling
        rescale = functools.partial(scale_frequencies, **dataclasses.asdict(scaling)) if scaling else None
        self.rope = RotaryEmbedding(args.head_dim, args.max_seq_len, theta=args.rope_theta, rescale=rescale)
        self.tok_embeddings: nn.Embedding | None = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleDict({str(i): TransformerBlock(args, self.rope) for i in range(args.n_layers)})
        self.norm: nn.RMSNorm | None = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.output: Output | None = Output(args.dim, args.vocab_size)
        if args.tie_embeddings:
            self.tok_embeddings.weight = self.output.weight

    def forward(
        self,
        inputs: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        mask: AttentionMask = None,
        labels: torch.Tensor | None = None,
        loss_fn: LossFunction | None = None,
    ) -> torch.Tensor:
        """Return logits (B, S, V), or with `labels` and `loss_fn` the loss.

        inputs: tokens (B, S) int64; positions: (B, S) int64, by default 0 to S-1; labels: (B, S) int64; mask: see
        `AttentionMask`. With attn_mask_type "block_causal" a missing mask is built from the positions.

        A part without embeddings takes hidden states (B, S, D); one without output returns them, and `labels` and
        `loss_fn` are not for it.

        Raises:
            ValueError: more tokens than `max_seq_len`, or "block_causal" with neither mask nor positions.
        """
        if inputs.shape[1] > self.args.max_seq_len:
            raise ValueError(
                f"a sequence of {inputs.shape[1]} tokens is longer than max_seq_len = {self.args.max_seq_len}"
            )
        if mask is None and self.args.attn_mask_type == "block_causal":
            if positions is None:
                raise ValueError("attn_mask_type 'block_causal' needs positions (0 where a document begins) or a mask")
            mask = build_document_mask(positions, device_type=positions.device.type)
        h = inputs if self.tok_embeddings is None else self.tok_embeddings(inputs)
        for block in self.layers.values():
            h = block(h, positions=positions, mask=mask)
        if self.norm is not None:
            h = self.norm(h)
        return h if self.output is None else self.output(h, labels=labels, loss_fn=loss_fn)

    def param_inits(self) -> dict[str, Init]:
        """Return the distribution of each parameter by its name, a shared one once (as `named_parameters` has it).

        As torchtitan's Llama 3 begins, so that curves compare: 0.02, and for wo, w2 and w3 0.02 / sqrt(2 (layer + 1)),
        which keeps the residual stream from growing with depth. Tied embeddings serve as output matrix, so they begin
        as one: logits of about unit variance.
        """
        output = Init("trunc_normal", std=self.args.dim**-0.5)
        inits = {}
        if self.tok_embeddings is not None:
            inits["tok_embeddings.weight"] = output if self.args.tie_embeddings else Init("normal", std=1.0)
        plain = Init("trunc_normal", std=0.02)
        for layer in self.layers:  # numbers in the whole network
            deep = Init("trunc_normal", std=0.02 / (2 * (int(layer) + 1)) ** 0.5)
            block = f"layers.{layer}"
            inits |= {f"{block}.attention.{name}.weight": plain for name in ("wq", "wk", "wv")}
            inits |= {f"{block}.feed_forward.w1.weight": plain, f"{block}.attention.wo.weight": deep}
            inits |= {f"{block}.feed_forward.{name}.weight": deep for name in ("w2", "w3")}
            inits |= {f"{block}.{name}.weight": Init("ones") for name in ("attention_norm", "ffn_norm")}
        if self.norm is not None:
            inits["norm.weight"] = Init("ones")
        if self.output is not None and not self.args.tie_embeddings:
            inits["output.weight"] = output
        return inits

    def init_buffers(self, device: torch.device | str) -> None:
        """Fill the buffers that no state dict holds (the rotary table), on `device`."""
        self.rope.init_buffers(device)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Transformer":
        # `to_empty` makes a new parameter for each place that holds one, which would untie shared ones.
        super()._apply(fn, recurse)
        if self.args.tie_embeddings and self.output is not None and self.tok_embeddings is not None:
            self.output.weight = self.tok_embeddings.weight
        return self
