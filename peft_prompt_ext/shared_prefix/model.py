"""PeftModels that run a batch as one packed sequence where their base model allows it.

The rest of the engine is imported where it is first needed: every import of the plugin pays for this file.

Shapes: B rows, T padded text length, P virtual tokens, N packed tokens, H hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper

from ..decoding.feed import cache_of
from ..tokens import OF_PACKED_ROWS, check_mask
from .status import EngineStatus


if TYPE_CHECKING:
    from .cache import PromptState
    from .layout import PackedLayout
    from .watch import Watch


logger = logging.getLogger(__name__)

BASE = "__base__"  # PEFT's name in `adapter_names` for a row without an adapter


class SharedPrefixMixin(PeftModel):
    """Goes in front of a model class whose `forward` is PEFT's path."""

    # of the last batch with the attention it had; and of each device, precision and attention that a batch had
    _status: tuple[Any, EngineStatus] | None = None
    _proved: dict[Any, EngineStatus] | None = None
    # by adapter: circumstances, and what its prompt left to the texts; both hold while the watch does
    _states: dict[str, tuple[Any, PromptState]] | None = None
    _watch: Watch | None = None
    _packed_arguments: ClassVar[set[str]] = set()
    _packs_packed_rows: ClassVar[bool] = False
    _heads_of_rows: ClassVar[set[str]] = set()  # modules of which `_mixed_options` gives each row its adapter's own

    @staticmethod
    def _packed_forward(base_model: Any, embeds: torch.Tensor, layout: PackedLayout, **options: Any) -> Any:
        """A function of `shared_prefix.forward`."""
        raise NotImplementedError

    def _mixed_options(self, names: list[str]) -> dict[str, Any]:
        """Arguments of `_packed_forward` for rows that name their adapters."""
        return {}

    def _inputs_of_tokens(self) -> set[str]:
        """Further inputs that the base model reads for each token."""
        return {name for name in ("token_type_ids",) if self._takes(name)}

    def _packed_options(self) -> dict[str, Any]:
        """Arguments of `_packed_forward` that the config decides."""
        return {}

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: torch.Tensor | None = None,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """See PEFT's class.

        `adapter_names` gives each row its own adapter, as for LoRA; `"__base__"` is a row without one.
        """
        from .interface import NotPackable

        self._check_token_path(kwargs)
        inputs = input_ids if input_ids is not None else inputs_embeds
        if inputs is not None and cache_of(kwargs) is None:
            check_mask(attention_mask, *inputs.shape[:2])
        extras = {
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "task_ids": task_ids,
            **kwargs,
        }
        obstacle = "it has no text" if inputs is None else self._obstacle(attention_mask, extras)
        if inputs is not None and obstacle is None:
            mask, texts = self._read(inputs, attention_mask, kwargs.get("position_ids"))
            names = list(adapter_names) if adapter_names is not None else [self.active_adapter] * len(mask)
            if texts is None:
                obstacle = "position_ids do not count the tokens of each text from 0"
            elif bool(texts.any()) and not self._packs_packed_rows:
                obstacle = "a row holds several texts"
            else:
                layout = self._layout(mask, names, texts)
                obstacle = self._too_long(layout) or self._unshared(names)
            if obstacle is None:
                self._drop_unused(dict(kwargs))  # and say so
                options = self._packed_options()
                options |= {name: kwargs[name] for name in self._packed_arguments if kwargs.get(name) is not None}
                self._check_in_training(names)
                if labels is not None:
                    options["labels"] = labels
                if adapter_names is not None:
                    options |= self._mixed_options(names)
                # of the whole batch: hooks such as NEFTune's reckon with its shape
                embed: Any = self.word_embeddings
                words = inputs_embeds if inputs_embeds is not None else embed(input_ids)
                prompts = self._prompts(names, words)
                if not options.get("fused_lm_head"):  # it predicts from hidden states, which are not kept
                    layout.cached = self._kept_states(layout, prompts)
                text = words.flatten(0, 1)[layout.to(words.device).source]  # [S, H]
                embeds = torch.cat([*prompts.values(), text] if layout.cached is None else [text])[None]
                try:
                    output = self._packed_forward(self.get_base_model(), embeds, layout, **options)
                except NotPackable as refusal:  # the probe's batch did not show it
                    obstacle = self._refuse(refusal)
                else:
                    return output if self._wants_dict(return_dict) else output.to_tuple()
        if obstacle is not None:
            self._ran(EngineStatus(False, obstacle))
        if adapter_names is not None:
            raise ValueError(
                f"adapter_names needs the shared prefix, which this call cannot take: {obstacle}. Run the rows of "
                "each adapter alone, after set_adapter."
            )
        return super().forward(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            labels=labels,
            return_dict=return_dict,
            **extras,
        )

    def _obstacle(self, attention_mask: Any, extras: dict[str, Any]) -> str | None:
        """What one packed sequence cannot give of this call; None if there is nothing."""
        if attention_mask is not None and not (isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2):
            return "attention_mask is not a tensor [B, T]"
        if getattr(self, "_is_replica", False):  # without parameters of its own, beside others in threads
            return "DataParallel copies the model for each batch; launch a process a device instead"
        allowed = self._packed_arguments | {"position_ids"} | ({"token_type_ids"} - self._inputs_of_tokens())
        if extras.get("position_ids") is not None:  # which say the same
            allowed |= OF_PACKED_ROWS
        config: Any = self.get_base_model().config
        asked = {name for name, value in extras.items() if value is not None and value is not False} - allowed
        asked |= {name for name in ("output_hidden_states", "output_attentions") if getattr(config, name, False)}
        if asked:
            return f"it asks for {', '.join(sorted(asked))}"
        base_model: Any = self.get_base_model()
        if extras.get("fused_lm_head"):
            hooks = (*base_model._forward_hooks.values(), *base_model._forward_pre_hooks.values())
            if extras.get("shift_labels") is not None or hooks or not isinstance(base_model.forward, MethodType):
                return "it asks for fused_lm_head, of a model with hooks or a wrapped forward, or with shift_labels"
        status = self._engine_status()
        return None if status.packed else status.reason

    def _engine_status(self, last: bool = False) -> EngineStatus:
        """For a batch of now; with `last` for the last one, if there was one."""
        from .interface import attach, attention_of
        from .probe import prove

        config, base_model = self.active_peft_config, self.get_base_model()
        # a stock config in a model of ours has neither field
        if not getattr(config, "shared_prefix", True):
            return EngineStatus(False, "shared_prefix=False in the config")
        if last and self._status is not None and self._status[0] == attention_of(base_model):
            return self._status[1]
        proved, now = self._proved, self._circumstances()
        if proved is None:
            proved = self._proved = {}
        if now not in proved:
            probe = getattr(config, "shared_prefix_probe", True)
            proved[now] = prove(base_model, self._packed_forward, self.word_embeddings, probe)
        elif proved[now].packed:
            attach(base_model)
        return self._ran(proved[now])

    def _circumstances(self) -> Any:
        """What a proof holds for."""
        from .interface import attention_of
        from .precision import precision_of

        return precision_of(self.word_embeddings), attention_of(self.get_base_model())

    def _ran(self, status: EngineStatus) -> EngineStatus:
        from .interface import attention_of

        self._status = attention_of(self.get_base_model()), status
        return status

    def _refuse(self, refusal: Exception) -> str:
        """Take PEFT's path from here on, and say why."""
        obstacle = str(refusal)
        logger.info("The shared prefix is no longer used, PEFT's path is: %s.", obstacle)
        self._proved = {**(self._proved or {}), self._circumstances(): EngineStatus(False, obstacle)}
        return obstacle

    def _read(
        self, inputs: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The mask on the host, and where further texts of a row begin; None if the positions mean something else."""
        from .layout import find_texts
        from .transfer import download

        shape = inputs.shape[:2]
        read = download(*(x for x in (attention_mask, position_ids) if x is not None))
        mask = torch.ones(shape, dtype=torch.long) if attention_mask is None else read[0]
        if position_ids is None:
            return mask, torch.zeros(shape, dtype=torch.bool)
        if position_ids.dim() != 2 or position_ids.shape[1] != shape[1]:
            return mask, None
        return mask, find_texts(read[-1].expand(shape), mask)

    def _layout(self, attention_mask: torch.Tensor, names: list[str], texts: torch.Tensor) -> PackedLayout:
        from .choice import ATTENTIONS
        from .layout import pack

        if len(names) != len(attention_mask):
            raise ValueError(f"adapter_names has {len(names)} names, the batch has {len(attention_mask)} rows.")
        known = list(self.peft_config)
        unknown = sorted(set(names) - {*known, BASE})
        if unknown:
            raise ValueError(f"adapter_names has {unknown}; the model's adapters are {known}, or {BASE!r} for none.")
        used = list(dict.fromkeys(names))
        configs: dict[str, Any] = self.peft_config
        lengths = tuple(0 if name == BASE else configs[name].num_virtual_tokens for name in used)
        prompt_of_row = torch.tensor([used.index(name) for name in names], dtype=torch.long)
        layout = pack(attention_mask, lengths, prompt_of_row, texts)
        layout.attention = ATTENTIONS[self._engine_status().attention or "sdpa"]
        return layout

    def _too_long(self, layout: PackedLayout) -> str | None:
        text, prompt = layout.longest_text, max(layout.prompt_lengths)
        self._check_length(text, prompt)
        status, packed = self._engine_status(), layout.position_ids.shape[1]
        if status.max_tokens is not None and prompt + text > status.max_tokens:
            return f"{prompt + text} tokens are more than the {status.max_tokens} of its window or its short positions"
        if status.max_packed_tokens is not None and packed > status.max_packed_tokens:
            return f"its layers count places, and a pack of {packed} tokens has more than {status.max_packed_tokens}"
        return None

    def _unshared(self, names: list[str]) -> str | None:
        """What the adapters of a batch do not share beside the prompt, unless all have the active one's."""
        if set(names) == {self.active_adapter}:
            return None
        own = (name for name, module in self.base_model.named_modules() if isinstance(module, ModulesToSaveWrapper))
        unshared = sorted(set(own) - self._heads_of_rows)
        return f"each adapter has its own {', '.join(unshared)}" if unshared else None

    def _prompts(self, names: list[str], like: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each adapter's virtual tokens, [P, H], on the device and in the dtype of `like`."""
        return {
            name: self.prompt_encoder[name](self.prompt_tokens[name].to(like.device, non_blocking=True)).to(like.dtype)
            for name in dict.fromkeys(names)
            if name != BASE
        }

    def _kept_states(self, layout: PackedLayout, prompts: dict[str, torch.Tensor]) -> list[PromptState] | None:
        """What the prompts left to the texts when they ran; None where they have to run with them."""
        if torch.is_grad_enabled() or self.training or not prompts:
            return None
        if bool((layout.last < layout.num_prompt_tokens).any()):  # a row without text ends in its prompt
            return None
        if not self._engine_status().keeps_prompts:
            return None
        from .cache import prompt_state
        from .watch import Watch

        base_model, now = self.get_base_model(), self._circumstances()
        if self._watch is None or not self._watch.holds():
            self._watch, self._states = Watch(base_model), None
        if not self._watch.constant:
            return None
        kept = self._states = self._states or {}
        for name, prompt in prompts.items():
            if name not in kept or kept[name][0] != now or not torch.equal(kept[name][1].prompt, prompt):
                kept[name] = now, prompt_state(base_model, prompt)
                self._watch.expect()
        return [kept[name][1] for name in prompts]

    def train(self, mode: bool = True) -> Any:
        """See torch; prompts run again afterwards, also for `eval()`."""
        self._states = self._watch = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """What the prompts left is not part of the model, nor what was proved on this machine."""
        return {**self.__dict__, "_states": None, "_watch": None, "_status": None, "_proved": None}


def engine_status(model: Any) -> EngineStatus:
    """Tell whether a model's batches run as one packed sequence, and why.

    Args:
        model: What `get_peft_model` returned; also compiled or inside a wrapper such as DistributedDataParallel.

    Returns:
        The status of the last batch; the first call or batch on a device and in a precision runs the probe.
    """
    while not isinstance(model, PeftModel):
        inside = getattr(model, "_orig_mod", getattr(model, "module", None))
        if inside is None:
            break
        model = inside
    if isinstance(model, SharedPrefixMixin):
        return model._engine_status(last=True)
    return EngineStatus(False, f"{type(model).__name__} of this task or config has no shared prefix")
