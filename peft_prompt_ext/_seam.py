"""Every change that the plugin makes to PEFT, transformers, accelerate or logging. Each can be undone.

- PEFT's tables of tuners and model classes: `register_peft_method` accepts only new enum members.
- `PeftModel.from_pretrained`: PEFT raises for every trainable prompt before any class is built.
- `PeftConfigMixin.from_peft_type`, `PeftModel.add_adapter` and the functions that get and set the tensors of a saved
  adapter: a prompt behind the text has other files, so that stock PEFT does not load it as a prefix.
- `AttentionInterface.get_interface`: a packed batch needs its own attention, and the config has to keep its name.
- `LabelSmoother.__call__`, and `compute_loss`, `prediction_step` and `evaluate` of `Trainer`: it compares PEFT's
  logits [B, P+T, V] with labels [B, T], its default learning rate is too low for a prompt, and a loss of its own takes
  the labels that say where a suffix stands.
- The logger of bitsandbytes' matrix products: it repeats one message for every product.

A replacement calls the original for models and adapters of other libraries. `deactivate` restores the originals.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any, cast

import peft
import peft.peft_model
import peft.utils
from peft.config import PeftConfigMixin


_REPLACED: dict[str, tuple[Any, ...]] = {  # name: its owners, where PEFT and other libraries look it up
    "from_pretrained": (peft.PeftModel,),
    "add_adapter": (peft.PeftModel,),
    "from_peft_type": (PeftConfigMixin,),
    "get_peft_model_state_dict": (peft, peft.utils, peft.peft_model),
    "set_peft_model_state_dict": (peft, peft.utils, peft.peft_model),
}
_originals: dict[tuple[Any, str], tuple[Any, Any]] = {}  # (owner, name): original, replacement
_tables: list[tuple[dict[Any, Any], dict[Any, Any]]] = []  # table, original entries
_filters: list[tuple[logging.Logger, logging.Filter]] = []
LOWEST_RATE, USUAL_RATE = 1e-3, 0.01  # AdamW's learning rates for a prompt


def is_replaced(owner: Any, name: str) -> bool:
    """Whether `replace` has replaced an attribute."""
    return (owner, name) in _originals


def is_in_place(owner: Any, name: str) -> bool:
    """Whether the attribute is what `replace` set, or a wrapper of that (`functools.wraps`)."""
    now, (_, replacement) = vars(owner).get(name), _originals.get((owner, name), (None, None))
    while now is not None and now is not replacement:
        now = getattr(now, "__wrapped__", None)
    return now is not None


def replace(owner: Any, name: str, replacement: Any) -> None:
    """Replace an attribute of a library's class or module."""
    _originals[owner, name] = vars(owner)[name], replacement
    setattr(owner, name, replacement)


def restore(owner: Any, name: str) -> None:
    """Restore a replaced attribute, unless another library has replaced it since and may call the replacement."""
    original, replacement = _originals.get((owner, name), (None, None))
    if original is not None and vars(owner)[name] is replacement:
        setattr(owner, name, original)
        del _originals[owner, name]


def is_active() -> bool:
    """Whether PEFT's tables contain the plugin's classes."""
    return bool(_tables)


def activate(tuner: Any, classes: Mapping[str, Any], calls: Mapping[str, Callable[..., Any]]) -> None:
    """Put the plugin's classes into PEFT's tables. A second call changes nothing.

    Args:
        tuner: The class of soft prompts.
        classes: The model class of each task type.
        calls: What runs in place of each name in `_REPLACED`, with PEFT's own function as the first argument.
    """
    if is_active():
        return
    changes: list[tuple[dict[Any, Any], Mapping[Any, Any]]] = [
        (cast(Any, peft.PEFT_TYPE_TO_TUNER_MAPPING), {peft.PeftType.PROMPT_TUNING: tuner}),
        (cast(Any, peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING), classes),
    ]
    for table, entries in changes:
        _tables.append((table, {key: table[key] for key in entries}))
        table.update(entries)
    for name, owners in _REPLACED.items():
        for owner in owners:
            if not is_in_place(owner, name):  # else another library wrapped it, and it was not restored
                replace(owner, name, _wrap(vars(owner)[name], calls[name]))


def _wrap(own: Any, call: Callable[..., Any]) -> Any:
    if not isinstance(own, classmethod):
        return wraps(own)(lambda *args, **kwargs: (partial(call, own) if is_active() else own)(*args, **kwargs))

    def run(cls: Any, *args: Any, **kwargs: Any) -> Any:
        stock = own.__get__(None, cls)
        return call(stock, *args, **kwargs) if is_active() else stock(*args, **kwargs)

    return classmethod(wraps(own.__func__)(run))


def deactivate() -> None:
    """Restore everything that was changed."""
    for table, entries in _tables:
        table.update(entries)
    for log, added in _filters:
        log.removeFilter(added)
    _tables.clear()
    _filters.clear()
    for owner, name in list(_originals):
        restore(owner, name)


def log_once(name: str) -> None:
    """Log each message of a logger once."""
    log = logging.getLogger(name)
    if all(log is not known for known, _ in _filters):
        _filters.append((log, _RepeatFilter()))
        log.addFilter(_filters[-1][1])


class _RepeatFilter(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_new = message not in self.seen
        self.seen.add(message)
        return is_new


def prepare_trainer() -> None:
    """Adapt transformers' Trainer and LabelSmoother to prompts, if a Trainer has been imported.

    The Trainer shifts labels by the class name of `model.base_model.model`, where LoRA stores the base model. A prompt
    stores it one level higher. T5, GPT-2 and BERT have no such attribute, so the Trainer fails; Llama has its decoder
    there, so labels are not shifted.
    """
    smoother = getattr(sys.modules.get("transformers.trainer_pt_utils"), "LabelSmoother", None)
    if smoother is not None and not is_in_place(smoother, "__call__"):
        replace(smoother, "__call__", _cut_prompt_columns(smoother.__call__))
    trainer = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    if trainer is not None and not is_in_place(trainer, "compute_loss"):
        replace(trainer, "compute_loss", _prepare_loss(trainer.compute_loss))
    if trainer is not None and not is_in_place(trainer, "prediction_step"):
        replace(trainer, "prediction_step", _prepare_prediction(trainer.prediction_step))
    if trainer is not None and not is_in_place(trainer, "evaluate"):
        replace(trainer, "evaluate", _prepare_evaluation(trainer.evaluate))


def _cut_prompt_columns(original: Any) -> Any:
    @wraps(original)
    def call(
        self: Any, model_output: Any, labels: Any, shift_labels: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        logits = model_output["logits"] if isinstance(model_output, dict) else model_output[0]
        if labels.dim() == 2 and logits.dim() == 3 and logits.shape[1] > labels.shape[1]:
            # the last virtual token predicts the first text token
            model_output, shift_labels = {"logits": logits[:, -labels.shape[1] - 1 : -1]}, False
        return original(self, model_output, labels, shift_labels, num_items_in_batch)

    return call


def _prepare_loss(original: Any) -> Any:
    @wraps(original)
    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        prompted = self.accelerator.unwrap_model(model, keep_torch_compile=False)  # which would change the wrapper
        if not hasattr(prompted, "predicts_next"):  # not a model of the plugin
            return original(self, model, inputs, return_outputs, *args, **kwargs)
        if model.training:
            _check_rate(self, prompted)
        smoother, loss_func = self.label_smoother, self.compute_loss_func
        if smoother is None and loss_func is None:
            # the model computes the loss, and nothing else reads its outputs
            hooks = (*model._forward_hooks.values(), *prompted._forward_hooks.values())
            prompted.loss_alone = not return_outputs and not hooks
        elif getattr(prompted, "has_suffix", False):
            # the model gets no labels, so they cannot say where the answer begins
            inputs = {**inputs, **prompted.find_answer_start(inputs)}
        if smoother is not None and loss_func is None:
            # with a loss function of its own, the Trainer does not read the model's name
            self.compute_loss_func = partial(smoother, shift_labels=prompted.predicts_next)
        try:
            return original(self, model, inputs, return_outputs, *args, **kwargs)
        finally:
            self.compute_loss_func, prompted.loss_alone = loss_func, False

    return compute_loss


def _prepare_evaluation(original: Any) -> Any:
    @wraps(original)
    def evaluate(self: Any, *args: Any, **kwargs: Any) -> Any:
        prompted = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not getattr(prompted, "has_suffix", False):
            return original(self, *args, **kwargs)
        prompted.has_answers = True  # also where a trainer has a prediction step of its own (DPO)
        try:
            return original(self, *args, **kwargs)
        finally:
            prompted.has_answers = False

    return evaluate


def _prepare_prediction(original: Any) -> Any:
    @wraps(original)
    def prediction_step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        prompted = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        if not getattr(prompted, "has_suffix", False) or inputs.get("labels") is None:
            return original(self, model, inputs, *args, **kwargs)
        before, prompted.has_answers = prompted.has_answers, True  # a call without labels is refused
        try:
            return original(self, model, inputs, *args, **kwargs)
        finally:
            prompted.has_answers = before

    return prediction_step


def _check_rate(trainer: Any, model: Any) -> None:
    """Warn once per Trainer if the learning rate is too low for a prompt."""
    if getattr(trainer, "_prompt_rate_is_checked", False):
        return
    trainer._prompt_rate_is_checked = True
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # inside accelerate's wrapper
    if "adam" not in type(optimizer).__name__.lower():
        return
    prompts = {id(parameter) for parameter in model.prompt_encoder.parameters()}
    rates = [
        group.get("initial_lr", group["lr"])  # before the warm-up of the schedule
        for group in optimizer.param_groups
        if any(id(parameter) in prompts for parameter in group["params"])
    ]
    if rates and 0 < max(rates) < LOWEST_RATE:
        warnings.warn(
            f"The prompt trains with {type(optimizer).__name__} at a learning rate of {max(rates):g}. That suits full "
            f"fine-tuning; a prompt hardly changes. Set learning_rate={USUAL_RATE} in the training arguments.",
            stacklevel=2,
        )
