"""DeepSeek-V3 (arXiv 2412.19437) and V2: latent attention, a mixture of experts, and prediction of several tokens ahead.

Letters: B batch, S seq, D dim, V vocab, E experts, M depth of multi-token prediction.
"""

import functools
from typing import Any

import torch
import torch.nn as nn

from models.common.attention import AttentionMask, build_document_mask
from models.common.feed_forward import FeedForward
from models.common.init import Init
from models.common.latent_attention import LatentAttention
from models.common.moe import ExpertLoad, MoE
from models.common.multi_token import DepthLoss, shift_ahead
from models.common.output import LossFunction, Output
from models.common.rope import RotaryEmbedding, get_yarn_mscale, scale_frequencies_yarn
from models.common.router import Router
from models.deepseek_v3.args import DeepSeekV3Args


class TransformerBlock(nn.Module):
    """Attention and feed-forward, dense or a mixture of experts, each behind its norm, each added to the residual stream."""

    def __init__(self, args: DeepSeekV3Args, layer: int, rope: RotaryEmbedding) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.attention = _build_attention(args, rope)
        self.ffn_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.feed_forward = FeedForward(args.dim, args.hidden_dim) if args.is_dense(layer) else None
        self.moe = None if args.is_dense(layer) else _build_moe(args)

    def forward(
        self, x: torch.Tensor, *, positions: torch.Tensor | None = None, mask: AttentionMask = None
    ) -> tuple[torch.Tensor, ExpertLoad | None]:
        """Return the residual stream after this block, and what its experts had to do, if it has any.

        x: (B, S, D); positions: (B, S) int64, by default 0 to S-1; mask: see `AttentionMask` -> (B, S, D)
        """
        h, normed = self.attend(x, positions=positions, mask=mask)
        if self.moe is None:
            assert self.feed_forward is not None, "a block has a feed-forward or a mixture of experts"
            return h + self.feed_forward(normed), None
        out, load = self.moe(normed)
        return h + out, load

    def attend(
        self, x: torch.Tensor, *, positions: torch.Tensor | None, mask: AttentionMask
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the residual stream after attention, and the same normalized for what follows: (B, S, D) each."""
        h = x + self.attention(self.attention_norm(x), positions=positions, mask=mask)
        return h, self.ffn_norm(h)

    def init_buffers(self, device: torch.device | str) -> None:
        """Set counts and biases to zero, on `device`."""
        if self.moe is not None:
            self.moe.init_buffers(device)


class PredictionBlock(TransformerBlock):
    """One depth of multi-token prediction (section 2.2): from a token's hidden state one depth before, and the next token."""

    def __init__(self, args: DeepSeekV3Args, layer: int, rope: RotaryEmbedding) -> None:
        super().__init__(args, layer, rope)
        self.enorm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.hnorm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.eh_proj = nn.Linear(2 * args.dim, args.dim, bias=False)
        self.norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.depth_loss = DepthLoss()

    def forward(  # type: ignore[override]  # it takes one thing more
        self,
        x: torch.Tensor,
        embeddings: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        mask: AttentionMask = None,
    ) -> tuple[torch.Tensor, ExpertLoad | None]:
        """Return hidden states for the output matrix and for the next depth, and what the experts had to do.

        x: (B, S, D), what the output matrix gets one depth before; embeddings: (B, S, D), of the tokens as many places ahead as
        the depth; the others as in a block -> (B, S, D)
        """
        both = torch.cat((self.enorm(embeddings), self.hnorm(x)), dim=-1)  # (B, S, 2 D), as published
        h, load = super().forward(self.eh_proj(both), positions=positions, mask=mask)
        return self.norm(h), load

    def init_buffers(self, device: torch.device | str) -> None:
        """Set counts, biases and the sum of losses to zero, on `device`."""
        super().init_buffers(device)
        self.depth_loss.init_buffers(device)


class Transformer(nn.Module):
    """The network. Built under `torch.device("meta")` it takes no memory; `to_empty`, then `init_buffers` and the
    distributions of `param_inits` make it ready.

    It can be a part of the network, as a stage of a pipeline is. `layers` then has the blocks that are here, under their
    numbers in the whole network, and a module that is elsewhere is None. What comes in and goes out is hidden states,
    where it is not tokens and logits or loss. Blocks from number `n_layers` on are those of multi-token prediction; they
    need the output in the same part, and the embeddings, or a copy of them.

    In training each forward pass adds to the counts of its mixtures (`MoE.tokens_per_expert`) and to the losses of multi-token
    prediction (`PredictionBlock.depth_loss`). The trainer reads them, sums over ranks, calls `Router.update_expert_bias`
    once an optimizer step, and sets them to zero.
    """

    def __init__(self, args: DeepSeekV3Args) -> None:
        super().__init__()
        self.args = args
        self.rope = _build_rope(args)
        self.tok_embeddings: nn.Embedding | None = nn.Embedding(args.vocab_size, args.dim)
        blocks = [TransformerBlock(args, i, self.rope) for i in range(args.n_layers)]
        blocks += [PredictionBlock(args, args.n_layers + i, self.rope) for i in range(args.mtp_depth)]
        self.layers = nn.ModuleDict({str(i): block for i, block in enumerate(blocks)})
        self.norm: nn.RMSNorm | None = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.output: Output | None = Output(args.dim, args.vocab_size)
        self.loss_gradient: torch.Tensor | None = None
        """0-dim: what the caller will multiply the loss with. Only a part without output asks for it, and only where there is an
        auxiliary loss: no gradient that comes from the next part tells it."""

    def forward(
        self,
        inputs: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        mask: AttentionMask = None,
        labels: torch.Tensor | None = None,
        loss_fn: LossFunction | None = None,
        mtp_tokens: torch.Tensor | None = None,
        mtp_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return logits (B, S, V), or with `labels` and `loss_fn` the loss.

        In training the loss includes the weighted losses of multi-token prediction, and its gradient that of the auxiliary loss,
        whose value it does not include. Both are sums over tokens as `loss_fn` is: divide by the labels of the global batch.

        inputs: tokens (B, S) int64; positions: (B, S) int64, by default 0 to S-1; labels: (B, S) int64; mask: see
        `AttentionMask`. With attn_mask_type "block_causal" a missing mask is built from the positions. mtp_tokens,
        mtp_labels: (B, S, M) int64, what `shift_ahead` returns, needed where `inputs` are parts of sequences.

        A part that does not begin with the embeddings takes hidden states (B, S, D) as `inputs`; one without output returns them,
        and `labels` and `loss_fn` are not for it.

        Raises:
            ValueError: more tokens than `max_seq_len`, "block_causal" with neither mask nor positions, or a part that lacks
                what multi-token prediction or the auxiliary loss need.
        """
        mask = self._get_mask(inputs, positions, mask)
        blocks, predictions = self._list_blocks()
        if not self.training or labels is None or loss_fn is None:
            predictions = []
        elif predictions:
            if mtp_tokens is None or mtp_labels is None:
                mtp_tokens, mtp_labels = self._shift_ahead(inputs, labels, positions)
            # One call of the output for all depths, so that its weight is gathered and reduced once.
            labels = torch.cat((labels, *mtp_labels.unbind(-1)))  # ((1 + M) B, S)
            loss_fn = functools.partial(self._add_losses, loss_fn=loss_fn)
        h, embeddings = self._embed(inputs, mtp_tokens if predictions else None)
        loads = []
        for block in blocks:
            h, load = block(h, positions=positions, mask=mask)
            loads.append(load)
        if self.norm is not None:
            h = self.norm(h)
        depths = [h]
        for block, embedding in zip(predictions, embeddings, strict=True):
            h, load = block(h, embedding, positions=positions, mask=mask)
            depths.append(h)
            loads.append(load)
        balance_loss = self._take_loads([*blocks, *predictions], loads)
        if self.output is None:
            return _add_balance_gradient(h, balance_loss, self._get_loss_gradient(balance_loss))
        out = self.output(torch.cat(depths) if predictions else h, labels=labels, loss_fn=loss_fn)
        return out if labels is None else _add_balance_gradient(out, balance_loss)

    def _get_mask(self, inputs: torch.Tensor, positions: torch.Tensor | None, mask: AttentionMask) -> AttentionMask:
        if inputs.shape[1] > self.args.max_seq_len:
            raise ValueError(
                f"a sequence of {inputs.shape[1]} tokens is longer than max_seq_len = {self.args.max_seq_len}"
            )
        if mask is not None or self.args.attn_mask_type == "causal":
            return mask
        if positions is None:
            raise ValueError("attn_mask_type 'block_causal' needs positions (0 where a document begins) or a mask")
        return build_document_mask(positions, device_type=positions.device.type)

    def _shift_ahead(
        self, inputs: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if inputs.is_floating_point():
            raise ValueError(
                "multi-token prediction in a part of the network that takes hidden states needs mtp_tokens and mtp_labels"
            )
        return shift_ahead(inputs, labels, depth=self.args.mtp_depth, positions=positions)

    def _embed(self, inputs: torch.Tensor, ahead: torch.Tensor | None) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return what the first block here takes, and the embeddings of the tokens ahead, of each depth: (B, S, D) all.

        One call for all of them, so that the weight is gathered and reduced once.

        inputs: tokens (B, S), or hidden states (B, S, D); ahead: (B, S, M)
        """
        tokens = [] if inputs.is_floating_point() else [inputs]
        if ahead is not None:
            tokens.extend(ahead.unbind(-1))
        if not tokens:
            return inputs, ()
        assert self.tok_embeddings is not None, "a part without embeddings takes hidden states"
        embeddings = self.tok_embeddings(torch.cat(tokens)).chunk(len(tokens))
        if inputs.is_floating_point():
            return inputs, embeddings
        return embeddings[0], embeddings[1:]

    def _list_blocks(self) -> tuple[list[TransformerBlock], list[PredictionBlock]]:
        """Return the blocks of the network that are here, and those of multi-token prediction."""
        blocks: list[TransformerBlock] = []
        predictions: list[PredictionBlock] = []
        for block in self.layers.values():
            if isinstance(block, PredictionBlock):
                predictions.append(block)
            else:
                assert isinstance(block, TransformerBlock), "layers holds blocks"
                blocks.append(block)
        if predictions and (self.tok_embeddings is None or self.output is None):
            raise ValueError(
                f"multi-token prediction (mtp_depth = {self.args.mtp_depth}) needs embeddings and output in one part of the network"
            )
        return blocks, predictions

    def _add_losses(
        self, h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *, loss_fn: LossFunction
    ) -> torch.Tensor:
        """The loss function that `output` gets in multi-token prediction. h: ((1 + M) B, S, D); labels: ((1 + M) B, S)"""
        _, predictions = self._list_blocks()
        n_depths = 1 + len(predictions)
        parts = zip(h.chunk(n_depths), labels.chunk(n_depths), strict=True)
        main, *ahead = (loss_fn(part, weight, its_labels) for part, its_labels in parts)
        for block, loss, its_labels in zip(predictions, ahead, labels.chunk(n_depths)[1:], strict=True):
            block.depth_loss.add(loss.detach(), its_labels)
        return main + self.args.mtp_weight * torch.stack(ahead).mean()

    def _take_loads(self, blocks: list[TransformerBlock], loads: list[ExpertLoad | None]) -> torch.Tensor | None:
        """Add to the mixtures' counts, in training. Return the sum of their auxiliary losses, if there are any."""
        balance_losses = []
        for block, load in zip(blocks, loads, strict=True):
            if block.moe is None or load is None:
                continue
            if self.training:
                block.moe.tokens_per_expert.add_(load.tokens)
            if load.balance_loss is not None:
                balance_losses.append(load.balance_loss)
        return torch.stack(balance_losses).sum() if balance_losses else None

    def _get_loss_gradient(self, balance_loss: torch.Tensor | None) -> torch.Tensor | None:
        if balance_loss is not None and self.loss_gradient is None:
            raise ValueError(
                f"balance_loss_alpha = {self.args.balance_loss_alpha} in a part of the network without output: set `loss_gradient` "
                "to what the loss will be multiplied with (one over the labels of the global batch), or the alpha to 0"
            )
        return self.loss_gradient

    def param_inits(self) -> dict[str, Init]:
        """Return the distribution of each parameter by its name.

        As torchtitan's DeepSeek-V3 begins, so that curves compare, and as Llama 3 does here: 0.02, and for wo, w2, w3 (of
        experts, too) and the router 0.02 / sqrt(2 (layer + 1)), which keeps the residual stream from growing with depth.
        """
        inits = {}
        if self.tok_embeddings is not None:
            inits["tok_embeddings.weight"] = Init("normal", std=1.0)
        plain = Init("trunc_normal", std=0.02)
        for layer, block in self.layers.items():  # numbers in the whole network
            deep = Init("trunc_normal", std=0.02 / (2 * (int(layer) + 1)) ** 0.5)
            for name, _ in block.named_parameters():
                leaf = name.removesuffix(".weight").rpartition(".")[2]
                init = deep if leaf in ("wo", "w2", "w3", "gate") else plain
                inits[f"layers.{layer}.{name}"] = Init("ones") if leaf.endswith("norm") else init
        if self.norm is not None:
            inits["norm.weight"] = Init("ones")
        if self.output is not None:
            inits["output.weight"] = Init("trunc_normal", std=self.args.dim**-0.5)
        return inits

    def init_buffers(self, device: torch.device | str) -> None:
        """Fill the buffers on `device`: the rotary table, and zeros for what the forward passes and the trainer add up."""
        self.rope.init_buffers(device)
        for block in self.layers.values():
            assert isinstance(block, TransformerBlock), "layers holds blocks"
            block.init_buffers(device)


def _build_rope(args: DeepSeekV3Args) -> RotaryEmbedding:
    rescale = None
    if args.yarn is not None:
        rescale = functools.partial(
            scale_frequencies_yarn,
            theta=args.rope_theta,
            factor=args.yarn.factor,
            beta_fast=args.yarn.beta_fast,
            beta_slow=args.yarn.beta_slow,
            original_max_seq_len=args.yarn.original_max_seq_len,
        )
    return RotaryEmbedding(args.qk_rope_head_dim, args.max_seq_len, theta=args.rope_theta, rescale=rescale)


def _build_attention(args: DeepSeekV3Args, rope: RotaryEmbedding) -> LatentAttention:
    # Queries and keys are both to be multiplied by YaRN's mscale.
    query_scale = get_yarn_mscale(args.yarn.factor, args.yarn.mscale) ** 2 if args.yarn is not None else 1.0
    return LatentAttention(
        args.dim,
        args.n_heads,
        q_lora_rank=args.q_lora_rank,
        kv_lora_rank=args.kv_lora_rank,
        qk_nope_head_dim=args.qk_nope_head_dim,
        qk_rope_head_dim=args.qk_rope_head_dim,
        v_head_dim=args.v_head_dim,
        rope=rope,
        query_scale=query_scale,
    )


def _build_moe(args: DeepSeekV3Args) -> MoE:
    router = Router(
        args.dim,
        args.n_experts,
        args.top_k,
        score_func=args.score_func,
        n_groups=args.n_expert_groups,
        n_limited_groups=args.n_limited_groups,
        normalizes=args.normalizes_gates,
        scale=args.route_scale,
        uses_bias=args.uses_expert_bias,
        bias_update=args.bias_update,
        balance_alpha=args.balance_loss_alpha,
    )
    return MoE(args.dim, args.moe_hidden_dim, router=router, n_shared_experts=args.n_shared_experts)


def _add_balance_gradient(
    x: torch.Tensor, balance_loss: torch.Tensor | None, gradient: torch.Tensor | None = None
) -> torch.Tensor:
    return x if balance_loss is None else _GradientOf.apply(x, balance_loss, gradient)


class _GradientOf(torch.autograd.Function):
    """x, with the gradient of x + extra: what `extra` gets is the gradient of x, or `gradient` where x is not the loss."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, extra: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
        ctx.extra_gradient = gradient
        return x.clone()  # FSDP warns of a view

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return grad, grad if ctx.extra_gradient is None else ctx.extra_gradient, None
