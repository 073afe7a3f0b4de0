"""A model as a body and a head: what is inside the wrappers, its last hidden states, and the head that reads them.

Shapes: B rows, L tokens, H hidden size, V logit width, C positions of a chunk.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsekd.errors import ModelError
from sparsekd.fused_parallel import gathered


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """How a model turns hidden states into logits: z = softcap * tanh(scale * (h Wᵀ + bias) / softcap).

    `weight_VH` is None for a model whose head could not be rebuilt: its "hidden states" are the logits themselves.
    """

    weight_VH: Tensor | None
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_CH: Tensor) -> Tensor:
        """[C, V] logits in the model's dtype."""
        if self.weight_VH is None:
            return hidden_CH
        logits = nn.functional.linear(hidden_CH, self.weight_VH, self.bias)
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def write_logits(self, hidden_CH: Tensor, out_CV: Tensor) -> Tensor:
        """`out_CV.copy_(logits(hidden_CH))`, the same to the bit, without gradients and without memory besides."""
        assert self.weight_VH is not None
        if self.bias is None:
            torch.mm(hidden_CH, self.weight_VH.T, out=out_CV)
        else:
            torch.addmm(self.bias, hidden_CH, self.weight_VH.T, out=out_CV)
        if self.scale != 1:
            out_CV.mul_(self.scale)
        return out_CV if self.softcap is None else out_CV.div_(self.softcap).tanh_().mul_(self.softcap)

    def in_order(self, order_V: Tensor) -> Head:
        """A head whose logits come in another order of the ids: `in_order(o).logits(h)` is `logits(h)[:, o]`. Its
        weight is a copy, once for all positions, where ordering their logits would be a pass over V for each."""
        if self.weight_VH is None:
            raise ModelError("a model without a head apart has no rows to put in order")
        bias = None if self.bias is None else self.bias[order_V]
        return replace(self, weight_VH=self.weight_VH[order_V], bias=bias)

    def whole(self) -> Head:
        """The head with all of its rows, where processes hold a part each (DTensors); all must ask for it."""
        if self.weight_VH is None:
            return self
        bias = None if self.bias is None else gathered(self.bias)
        return replace(self, weight_VH=gathered(self.weight_VH), bias=bias)


def inner_model(model: Any) -> Any:
    """The causal language model inside PEFT and data-parallel wrappers."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif hasattr(model, "module") and isinstance(model.module, nn.Module):
            model = model.module
        else:
            return model


def body_of(model: Any) -> Any:
    """The model without its head: ids -> last hidden state after the final norm."""
    inner = inner_model(model)
    body = getattr(inner, inner.base_model_prefix, None)
    if body is None or body is inner:
        raise ModelError(f"{type(inner).__name__} has no separate body ({inner.base_model_prefix!r})")
    return body


def replace_forward(model: Any, forward: Any, *, targets: Collection[str] = ()) -> None:
    """Make `forward(self, ...)` the model's own; inputs named `targets` are for it alone.

    Liger's kernels and TRL's trainers put another forward over it when training begins, one that hands keywords it
    does not know on to the model's parts: plain cross-entropy would be trained on a cache's batches, without a word.
    So no part of the model takes them.
    """
    inner = inner_model(model)
    inner.forward = types.MethodType(forward, inner)
    inner.accepts_loss_kwargs = True  # some families say that they do not; this forward does

    def refuse(part: Any, args: Any, given: dict[str, Any]) -> None:
        if lost := sorted(given.keys() & set(targets)):
            raise ModelError(
                f"{', '.join(lost)} came to {type(part).__name__}: the forward that takes these targets was replaced "
                "after it was attached, and the loss would leave them out; train with a stock Trainer, and beside "
                'use_liger_kernel give liger_kernel_config={"fused_linear_cross_entropy": False}'
            )

    for part in inner.children() if targets else ():
        part.register_forward_pre_hook(refuse, with_kwargs=True)


def head_of(model: Any) -> Head:
    """The head's weights and form, as the forward pass uses them now.

    Raises:
        ModelError: no model of transformers, no output embedding, or one that an adapter rewrites (LoRA on the head
            would get no gradient).
    """
    inner = inner_model(model)
    if not hasattr(inner, "get_output_embeddings"):
        raise ModelError(
            f"{type(inner).__name__} is no model of transformers, whose head could be found; in a loop of your own, "
            "give its hidden states and head to fused_linear_sparse_kl, or its logits to sparse_kl"
        )
    module = inner.get_output_embeddings()
    if module is None:
        raise ModelError(f"{type(inner).__name__} has no output embedding")
    if hasattr(module, "modules_to_save"):
        module = module.modules_to_save[module.active_adapters[0]]
    if hasattr(module, "base_layer"):
        raise ModelError(
            "LoRA on the output embedding is not supported: the loss reads the head's weight, so the adapter would get "
            "no gradient; take it out of target_modules, or train the head whole with modules_to_save=['lm_head']"
        )
    config = inner.config.get_text_config()
    return Head(
        weight_VH=module.weight,
        bias=getattr(module, "bias", None),
        scale=_logit_scale(config),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def router_loss(model: Any, output: Any) -> Tensor | float:
    """λ · the load-balancing loss that a mixture of experts adds to its own loss where its config asks for it
    (`output_router_logits`); else 0. `output` is the body's, or the model's.

    Raises:
        ModelError: a family without the loss that its config asks for.
    """
    inner = inner_model(model)
    if not getattr(inner.config.get_text_config(), "output_router_logits", False):
        return 0.0
    balance = getattr(sys.modules[type(inner).__module__], "load_balancing_loss_func", None)
    if balance is None:
        raise ModelError(
            f"{type(inner).__name__} has no load-balancing loss that a loss from a cache could add; set "
            "output_router_logits=False in its config to train without one"
        )
    return inner.router_aux_loss_coef * balance(output.router_logits, inner.num_experts, inner.num_experts_per_tok)


def _logit_scale(config: Any) -> float:
    """The factors that families put on their logits: Cohere, Falcon-H1 and friends multiply, Granite divides."""
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)
    return scale / float(getattr(config, "logits_scaling", None) or 1.0)


@torch.no_grad()
def rebuilt_error(model: Any) -> float:
    """How far body + head are from the model's own logits on a probe, relative to the logits' spread.

    A family with a form of head that we do not know shows here, before anything is trained or cached.
    """
    inner, was_training = inner_model(model), model.training
    inner.eval()
    head = head_of(model).whole()
    assert head.weight_VH is not None
    width = min(len(head.weight_VH), inner.get_input_embeddings().weight.shape[0])
    probe = (torch.arange(16, device=head.weight_VH.device) * 7919 % width)[None]
    own = type(inner).forward(inner, input_ids=probe, use_cache=False).logits.float()
    ours = head.logits(body_of(model)(input_ids=probe, use_cache=False).last_hidden_state).float()
    inner.train(was_training)
    return float((own - ours).abs().max() / own.std().clamp(min=1e-6))


def check_rebuilt(model: Any) -> None:
    """Raise ModelError when body + head do not reproduce the model's logits."""
    error = rebuilt_error(model)
    if error > 0.05:
        raise ModelError(
            f"{type(inner_model(model)).__name__}: body and head do not reproduce the model's logits (they differ by "
            f"{error:.2g} standard deviations); its head has a form that sparsekd does not know"
        )


def logit_width(model: Any) -> int:
    """V: how many logits the model makes (its embedding may be padded beyond the tokenizer)."""
    return int(inner_model(model).get_output_embeddings().weight.shape[0])
