"""What Transformers' Trainer, or TRL's, is trained by."""

from __future__ import annotations

from typing import Any

from tolaria.integrations._found import classes_of


def is_judged_by_loss(trainer: Any) -> bool:  # noqa: ANN401  (Transformers')
    """Whether its loss says how well it does; that of a trainer that maximises rewards is about zero."""
    return not hasattr(trainer, "reward_funcs")


def classes_of_trainer(trainer: Any) -> int | None:  # noqa: ANN401  (Transformers')
    """How many answers there are, where the loss is the cross entropy of Transformers or of TRL's SFT."""
    of = type(trainer).compute_loss.__module__
    if trainer.compute_loss_func is not None or "compute_loss" in vars(trainer):
        return None
    if of != "transformers.trainer" and not (
        of == "trl.trainer.sft_trainer" and trainer.args.loss_type == "nll"
    ):
        return None
    model = trainer.model
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind = str(getattr(base, "loss_type", None))
    is_causal = type(base).__name__.endswith("LMHeadModel")  # older names, of which loss_type knows nothing
    if is_causal or kind in ("ForCausalLM", "ForMaskedLM", "ForConditionalGeneration"):
        return getattr(base.config.get_text_config(), "vocab_size", None)
    return classes_of(base) if kind.endswith("Classification") else None
