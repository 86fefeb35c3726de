"""Runs a batch through the base model as one packed sequence, and returns the shapes of PEFT.

Shapes: B rows, T padded text length, P virtual tokens, N packed tokens, V words, H hidden size, C classes, L labelled
tokens.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper

from ..labels import IGNORE_INDEX
from .interface import make_arguments
from .layout import PackedLayout
from .packed_pass import PackedPass
from .transfer import download, upload


def causal_lm(
    base_model: Any,
    embeds: torch.Tensor,
    packed: PackedPass,
    labels: torch.Tensor | None = None,
    logits_to_keep: int | torch.Tensor = 0,
    supervised: bool = False,
    shift_labels: torch.Tensor | None = None,
    num_items_in_batch: Any = None,
) -> Any:
    """Run a model with a language modelling head.

    Args:
        base_model: A `...ForCausalLM` of transformers.
        embeds: [1, N, H]; only tokens of branches if the pass has constant trunks.
        packed: The batch's layout and attention.
        labels: [B, T], -100 at tokens without a label.
        logits_to_keep: The number of last columns, or the indices of columns, of [B, P+T]; 0: all.
        supervised: If there are labels, run the head only where a label is predicted. `logits_to_keep` and
            `shift_labels` override it.
        shift_labels: Labels that the kept columns predict, in the shape of these columns; they replace `labels`.
        num_items_in_batch: See the loss functions of transformers.

    Returns:
        The base model's output with logits [B, P+T, V] (or of the kept columns), zero at pads; with `supervised`
        [1, L, V], in the order of the labels.

    Raises:
        ValueError: The labels do not have the shape of the text.
    """
    layout = packed.layout
    if labels is not None and labels.shape != layout.shape:
        raise ValueError(
            f"labels are {list(labels.shape)}; wanted {list(layout.shape)}, one for each text token. Pass none for "
            "virtual tokens."
        )
    places, targets = _find_labelled(labels if shift_labels is None else None, layout)
    has_columns = shift_labels is not None or isinstance(logits_to_keep, torch.Tensor) or logits_to_keep != 0
    if supervised and labels is not None and not has_columns:
        output = _run_at(places, base_model, embeds, packed)
        return _replace(output, output.logits, _compute_loss(base_model, output.logits, targets, num_items_in_batch))

    sources = layout.columns
    if isinstance(logits_to_keep, torch.Tensor):
        keep = download(logits_to_keep)[0]
        sources = sources[:, keep.nonzero()[:, 0] if logits_to_keep.dtype == torch.bool else keep]
    elif logits_to_keep:
        sources = sources[:, -logits_to_keep:]
    if labels is not None and shift_labels is not None:
        labelled = (download(shift_labels)[0] != IGNORE_INDEX) & (sources >= 0)
        places, targets = sources[labelled], _take(shift_labels, labelled.flatten().nonzero()[:, 0])
    wanted = torch.cat([sources.flatten(), places])
    # a pad gets the logits of any token that runs, and zeros after that
    wanted, number = torch.where(wanted < 0, packed.first_place, wanted).unique(return_inverse=True)
    output = _run_at(wanted, base_model, embeds, packed)
    number, empty = upload(output.logits.device, number, (sources < 0).flatten().nonzero()[:, 0])
    loss = None
    if labels is not None:
        labelled_logits = output.logits[:, number[sources.numel() :]]
        loss = _compute_loss(base_model, labelled_logits, targets, num_items_in_batch)
    logits = output.logits[0][number[: sources.numel()]].index_fill_(0, empty, 0).view(*sources.shape, -1)
    return _replace(output, logits, loss)


def _run_at(places: torch.Tensor, base_model: Any, embeds: torch.Tensor, packed: PackedPass) -> Any:
    """Run the model, with its head only at the given places of the packed sequence: logits [1, L, V]."""
    if packed.trunks is None:
        return run(base_model, embeds, packed, logits_to_keep=upload(embeds.device, places)[0])
    in_branch = places >= packed.first_place
    in_trunks = packed.trunks.read(places[~in_branch])
    wanted = upload(embeds.device, places[in_branch] - packed.first_place)[0]
    output = run(base_model, embeds, packed, logits_to_keep=wanted)
    if in_trunks is None:
        return output
    order = torch.cat([in_branch.nonzero()[:, 0], (~in_branch).nonzero()[:, 0]]).argsort()
    together = torch.cat([output.logits[0], in_trunks.to(output.logits)])
    return _replace(output, together[upload(together.device, order)[0]][None], None)


def _find_labelled(labels: torch.Tensor | None, layout: PackedLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the places that predict a label, on the host, and their labels; both [L]."""
    tokens = layout.places_of_text()
    if labels is None:
        return tokens.flatten()[:0], tokens.flatten()[:0]
    before = torch.where(tokens >= 0, layout.previous()[tokens], -1)
    labelled = (download(labels)[0] != IGNORE_INDEX) & (before >= 0)
    return before[labelled], _take(labels, labelled.flatten().nonzero()[:, 0])


def _take(labels: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Take labels at flat indices that are on the host."""
    return labels.flatten()[upload(labels.device, source)[0]]


def causal_lm_with_own_head(
    base_model: Any, embeds: torch.Tensor, packed: PackedPass, labels: torch.Tensor | None = None, **kwargs: Any
) -> Any:
    """Run a model's own forward, with its own head, on hidden states in the shape of the padded batch.

    TRL replaces a model's forward, so that its head computes log-probabilities of the labels without all logits.

    Args:
        base_model: A `...ForCausalLM` of transformers.
        embeds: [1, N, H]; only tokens of branches if the pass has constant trunks.
        packed: The batch's layout and attention.
        labels: [B, T], -100 at tokens without a label.
        **kwargs: Arguments of the forward, such as `fused_lm_head`.

    Returns:
        The forward's output for labels [B, P+T]. A column's hidden state is that of the token that predicts the next
        column, so only predictions of labels are valid.

    Raises:
        ValueError: The labels are missing, or do not have the shape of the text.
    """
    layout = packed.layout
    if labels is None or labels.shape != layout.shape:
        got = None if labels is None else list(labels.shape)
        raise ValueError(f"labels are {got}; wanted {list(layout.shape)}, one for each text token.")
    name, places = base_model.base_model_prefix, layout.predicting() - packed.first_place
    backbone = base_model._modules[name]
    if packed.trunks is not None:
        packed.trunks.read(places[:0, 0])

    def run_unpacked(*_: Any, **__: Any) -> Any:
        output = run(backbone, embeds, packed)
        hidden = output.last_hidden_state[0]
        where, empty = upload(hidden.device, places.clamp(min=0), places < 0)
        return type(output)(last_hidden_state=hidden[where].masked_fill(empty[..., None], 0))  # [B, P+T, H]

    view, inside = copy(base_model), copy(backbone)  # copies, because a head may read other attributes
    inside.forward, inside._forward_hooks, inside._forward_pre_hooks = run_unpacked, {}, {}
    view._modules = {**base_model._modules, name: inside}
    wide = labels.new_full(places.shape, IGNORE_INDEX)
    wide.scatter_(1, upload(labels.device, layout.text_columns)[0], labels)
    return base_model.forward.__func__(view, labels=wide, **kwargs)


def sequence_classification(
    base_model: Any,
    embeds: torch.Tensor,
    packed: PackedPass,
    labels: torch.Tensor | None = None,
    num_items_in_batch: Any = None,
    adapter_names: list[str] | None = None,
) -> Any:
    """Run a decoder with a classification head on each row's last real token.

    Args:
        base_model: A `...ForSequenceClassification` of transformers with the head `score`.
        embeds: [1, N, H]; only tokens of branches if the pass has constant trunks, and then every row needs one.
        packed: The batch's layout and attention.
        labels: [B], or [B, C] for several labels per row.
        num_items_in_batch: Passed by the Trainer; ignored, because classification losses of transformers are means.
        adapter_names: The adapter whose head each row gets; by default the active one's.

    Returns:
        The output with logits [B, C].
    """
    from transformers.modeling_outputs import SequenceClassifierOutputWithPast

    backbone = getattr(base_model, base_model.base_model_prefix)
    if packed.trunks is not None:
        packed.trunks.read(packed.layout.columns[:0, 0])
    states = run(backbone, embeds, packed).last_hidden_state[0]
    hidden = states[packed.layout.to(states.device).last - packed.first_place]  # [B, H]
    has_own_heads = adapter_names is not None and isinstance(base_model.score, ModulesToSaveWrapper)
    logits = base_model.score(hidden, **({"adapter_names": adapter_names} if has_own_heads else {}))
    loss = None
    if labels is not None:
        loss = base_model.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=base_model.config)
    return SequenceClassifierOutputWithPast(loss=loss, logits=logits)


def run(model: Any, embeds: torch.Tensor, packed: PackedPass, **kwargs: Any) -> Any:
    """Run a model, with or without its head."""
    return model(
        inputs_embeds=embeds,
        use_cache=False,
        return_dict=True,
        **make_arguments(model, packed, embeds),
        **kwargs,
    )


def _compute_loss(
    base_model: Any, logits: torch.Tensor, targets: torch.Tensor, num_items_in_batch: Any
) -> torch.Tensor:
    """Compute the base model's own loss of logits [1, L, V] that predict `targets` [L]."""
    return base_model.loss_function(
        logits=logits,
        labels=targets[None],
        vocab_size=logits.shape[-1],
        shift_labels=targets[None],
        num_items_in_batch=num_items_in_batch,
    )


def _replace(output: Any, logits: torch.Tensor, loss: torch.Tensor | None) -> Any:
    return type(output)(**{**output, "loss": loss, "logits": logits})
