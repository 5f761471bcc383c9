"""Log-probabilities of labels under a frozen output layer, without the logits of a whole batch."""

import functools
from typing import Any, NamedTuple

import torch
from trl.trainer.utils import FusedCausalLMOutput

from karla_hf.modeling.modeling_karla import KarlaForCausalLM
from karla_hf.modeling.pretrained_karla import logit_scale


ROWS = 64  # positions whose logits are there at once: 12.6 MB for 49,152 tokens


class LabelScores(NamedTuple):
    """What is known of n labels.

    Attributes:
        log_probs: [n] float32, with gradients to the hidden states.
        entropy: [n] float32 in nats, without gradients.
        is_top1: [n] bool, whether the label is the likeliest token.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor
    is_top1: torch.Tensor


def score_labels(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    scale: float = 1.0,
    cap: float | None = None,
) -> LabelScores:
    """Score labels, a few positions at a time; equal to `log_softmax` of the logits up to rounding.

    With z = scale (W h + b), perhaps capped to cap tanh(z / cap), and p = softmax(z): log p_y = z_y - log sum exp z. Since W
    is frozen, all that a backward pass needs is d log p_y / dh = scale ((onehot_y - p) dcap) W, [D] per position. It is
    computed together with p, so that no logits are kept and none are computed twice.

    Args:
        hidden: [n, D]. Not modified.
        weight: [V, D] rows of the output layer; gets no gradient.
        bias: [V] or None.
        labels: [n] int64 in [0, V).
        scale: factor of the logits.
        cap: soft cap of the logits, or None.

    Returns:
        The scores.

    Raises:
        ValueError: if the output layer trains.

    Example:
        >>> scores = score_labels(torch.zeros(1, 2), torch.eye(2), None, torch.tensor([1]))
        >>> [round(value, 3) for value in (scores.log_probs.item(), scores.entropy.item())]
        [-0.693, 0.693]
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("The output layer requires gradients, which are not computed here; freeze it.")
    return LabelScores(*_ScoreLabels.apply(hidden, weight, bias, labels, scale, cap))


class _ScoreLabels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, labels, scale, cap):
        log_probs = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        entropy, is_top1 = torch.empty_like(log_probs), torch.empty_like(labels, dtype=torch.bool)
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), ROWS):
            part = slice(start, start + ROWS)
            label = labels[part, None]
            z = torch.nn.functional.linear(hidden[part].to(weight.dtype), weight, bias).to(log_probs.dtype)
            z, bend = _finish(z, scale, cap)
            top = z.max(-1, keepdim=True)
            own = z.gather(1, label)
            p = (z - top.values).exp_()
            total = p.sum(-1, keepdim=True)
            log_total = total.log() + top.values
            p /= total
            log_probs[part], is_top1[part] = (own - log_total)[:, 0], (top.indices == label)[:, 0]
            entropy[part] = log_total[:, 0] - torch.linalg.vecdot(p, z)
            if slope is not None:
                p.neg_().scatter_add_(1, label, torch.ones_like(own))
                slope[part] = ((p if bend is None else p.mul_(bend)).to(weight.dtype) @ weight).mul_(scale)
        ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(entropy, is_top1)
        return log_probs, entropy, is_top1

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad, _entropy, _is_top1):
        (slope,) = ctx.saved_tensors
        return (None if slope is None else slope * grad[:, None].to(slope.dtype)), None, None, None, None, None


def _finish(z: torch.Tensor, scale: float, cap: float | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits from the output layer's result, and what the cap leaves of a small change; None without a cap."""
    if scale != 1.0:
        z = z * scale
    if cap is None:
        return z, None
    bent = torch.tanh(z / cap)
    return bent * cap, 1.0 - bent * bent


def score_labels_only(model: KarlaForCausalLM) -> None:
    """Let the fused output layer that TRL's trainers give a model think and score where there are labels, and only there.

    `model(..., labels=labels, fused_lm_head=True)` returns what it did: zeros where the label is -100, and elsewhere, up to
    rounding, the same. The head thinks from the first labelled position of the batch on; TRL's own way is taken where the
    output layer trains or is sharded, or where no label is left.

    Args:
        model: a Karla in an `SFTTrainer`. Its `forward` is replaced in place.
    """
    theirs = model.forward

    @functools.wraps(type(model).forward)
    def forward(*args, fused_lm_head=False, labels=None, **kwargs):
        layer = model.get_output_embeddings()
        own = fused_lm_head and labels is not None and not kwargs.get("output_router_logits") and not args
        if not own or "shift_labels" in kwargs or layer.weight.requires_grad or not (labels[:, 1:] != -100).any():
            return theirs(*args, **{**kwargs, "fused_lm_head": fused_lm_head, "labels": labels})
        kwargs.pop("num_items_in_batch", None)
        return _score_batch(model, labels[:, 1:], kwargs)

    model.forward = forward  # type: ignore[method-assign]


def _score_batch(model: KarlaForCausalLM, labels: torch.Tensor, inputs: dict[str, Any]) -> FusedCausalLMOutput:
    """Scores of labels [B, T - 1]; the last token predicts nothing and is left out."""
    length = labels.shape[1]
    for name in ("input_ids", "attention_mask", "position_ids", "source_states"):
        if inputs.get(name) is not None:
            inputs[name] = inputs[name][:, :length]
    wanted = labels != -100
    first = int(wanted.any(0).int().argmax())
    out = model.model(**{**inputs, "use_cache": False, "logits_to_keep": length - first})
    config, layer = model.config.text_config, model.get_output_embeddings()
    scores = score_labels(
        out.last_hidden_state[wanted[:, first:]],
        layer.weight,
        getattr(layer, "bias", None),
        labels[wanted],
        logit_scale(config),
        getattr(config, "final_logit_softcapping", None),
    )
    spread = [part.new_zeros(labels.shape).masked_scatter(wanted, part) for part in scores]
    return FusedCausalLMOutput(
        loss=-scores.log_probs.mean(),
        log_probs=spread[0],
        entropy=spread[1],
        is_top1=spread[2],
        label_mask=wanted,
    )
