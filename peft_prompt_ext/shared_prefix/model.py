"""PeftModels that run a batch as one packed sequence where their base model allows it.

The rest of the engine is imported where it is first needed: every import of the plugin pays for this file.

Shapes: B rows, T padded text length, P virtual tokens, N packed tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper

from .._label_smoothing import smooth_labels_of_prompts
from .status import EngineStatus


if TYPE_CHECKING:
    from .cache import PromptState
    from .layout import PackedLayout


BASE = "__base__"  # PEFT's name in `adapter_names` for a row without an adapter


class SharedPrefixMixin(PeftModel):
    """Goes in front of a model class whose `forward` is PEFT's path."""

    # of the last batch, and of each device and precision that a batch had
    _status: EngineStatus | None = None
    _proved: dict[Any, EngineStatus] | None = None
    # by adapter: what must not have changed since, and what its prompt left to the texts
    _states: dict[str, tuple[Any, PromptState]] | None = None
    _packed_arguments: ClassVar[set[str]] = set()
    _heads_of_rows: ClassVar[set[str]] = set()  # modules of which `_mixed_options` gives each row its adapter's own

    @staticmethod
    def _packed_forward(base_model: Any, embeds: torch.Tensor, layout: PackedLayout, **options: Any) -> Any:
        """A function of `shared_prefix.forward`."""
        raise NotImplementedError

    def _mixed_options(self, names: list[str]) -> dict[str, Any]:
        """Arguments of `_packed_forward` for rows that name their adapters."""
        return {}

    def _inputs_of_tokens(self) -> set[str]:
        """Further inputs that PEFT hands to the base model for each token."""
        return set()

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
        self._check_token_path(kwargs)
        inputs = input_ids if input_ids is not None else inputs_embeds
        if labels is None and not torch.compiler.is_compiling():
            smooth_labels_of_prompts()
        extras = {
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "task_ids": task_ids,
            **kwargs,
        }
        obstacle = "it has no text" if inputs is None else self._obstacle(attention_mask, extras)
        if inputs is not None and obstacle is None:
            mask = attention_mask
            if mask is None:
                mask = inputs.new_ones(inputs.shape[:2], dtype=torch.long)
            names = list(adapter_names) if adapter_names is not None else [self.active_adapter] * len(mask)
            layout = self._layout(mask, names)
            obstacle = self._too_long(layout) or self._unshared(names)
            if obstacle is None:
                self._adjust_prompt_learning_kwargs(self.active_peft_config, kwargs=kwargs)
                options = self._packed_options()
                options |= {name: kwargs[name] for name in self._packed_arguments if kwargs.get(name) is not None}
                if labels is not None:
                    options["labels"] = labels
                if adapter_names is not None:
                    options |= self._mixed_options(names)
                text = self._text(layout, input_ids, inputs_embeds)
                prompts = self._prompts(names, text)
                layout.cached = self._kept_states(layout, prompts)
                embeds = torch.cat([*prompts.values(), text] if layout.cached is None else [text])[None]
                output = self._packed_forward(self.get_base_model(), embeds, layout, **options)
                return output if self._wants_dict(return_dict) else output.to_tuple()
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
        # PEFT ignores these, and the packed path returns no cache in any case
        allowed = self._packed_arguments | {"position_ids"} | ({"token_type_ids"} - self._inputs_of_tokens())
        config: Any = self.get_base_model().config
        asked = {name for name, value in extras.items() if value is not None and value is not False} - allowed
        asked |= {name for name in ("output_hidden_states", "output_attentions") if getattr(config, name, False)}
        if asked:
            return f"it asks for {', '.join(sorted(asked))}"
        status = self._engine_status()
        return None if status.packed else status.reason

    def _engine_status(self, last: bool = False) -> EngineStatus:
        """For a batch of now; with `last` for the last one, if there was one."""
        from .cache import precision
        from .interface import attach, attached
        from .probe import prove

        config, base_model = self.active_peft_config, self.get_base_model()
        # a stock config in a model of ours has neither field
        if not getattr(config, "shared_prefix", True):
            return EngineStatus(False, "shared_prefix=False in the config")
        # whoever changes the attention implementation takes our name away
        if self._status is not None and self._status.packed and not attached(base_model):
            self._status = self._proved = None
        if last and self._status is not None:
            return self._status
        words: Any = self.word_embeddings
        now = precision(words.weight)
        proved = self._proved = self._proved or {}
        if now not in proved:
            probe = getattr(config, "shared_prefix_probe", True)
            proved[now] = prove(base_model, self._packed_forward, words, probe)
        elif proved[now].packed:
            attach(base_model)
        self._status = proved[now]
        return self._status

    def _layout(self, attention_mask: torch.Tensor, names: list[str]) -> PackedLayout:
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
        prompt_of_row = torch.tensor([used.index(name) for name in names], device=attention_mask.device)
        layout = pack(attention_mask, lengths, prompt_of_row)
        layout.attention = ATTENTIONS[self._engine_status().attention or "sdpa"]
        return layout

    def _too_long(self, layout: PackedLayout) -> str | None:
        text, prompt = layout.rows.shape[1], max(layout.prompt_lengths)
        self._check_length(text, prompt)
        limit = self._engine_status().max_tokens
        if limit is None or prompt + text <= limit:
            return None
        return f"{prompt + text} tokens are more than the {limit} of its window, or of its short rotary positions"

    def _unshared(self, names: list[str]) -> str | None:
        """What the adapters of a batch do not share beside the prompt, unless all have the active one's."""
        if set(names) == {self.active_adapter}:
            return None
        own = (name for name, module in self.base_model.named_modules() if isinstance(module, ModulesToSaveWrapper))
        unshared = sorted(set(own) - self._heads_of_rows)
        return f"each adapter has its own {', '.join(unshared)}" if unshared else None

    def _text(
        self, layout: PackedLayout, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
    ) -> torch.Tensor:
        """Embeddings of the real text tokens, [S, H]."""
        if inputs_embeds is not None:
            return inputs_embeds[layout.row, layout.column]
        # of the whole batch: hooks such as NEFTune's reckon with its shape
        return self.word_embeddings(input_ids)[layout.row, layout.column]  # type: ignore[misc]

    def _prompts(self, names: list[str], like: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each adapter's virtual tokens, [P, H], on the device and in the dtype of `like`."""
        return {
            name: self.prompt_encoder[name](self.prompt_tokens[name].to(like.device)).to(like.dtype)
            for name in dict.fromkeys(names)
            if name != BASE
        }

    def _kept_states(self, layout: PackedLayout, prompts: dict[str, torch.Tensor]) -> list[PromptState] | None:
        """What the prompts left to the texts when they ran; None where they have to run with them."""
        if torch.is_grad_enabled() or self.training or not prompts:
            return None
        if bool((layout.last < layout.num_prompt_tokens).any()):  # a row without text ends in its prompt
            return None
        from .cache import fingerprint, prompt_state

        base_model = self.get_base_model()
        now = fingerprint(base_model, next(iter(prompts.values())))
        if now is None or not self._engine_status().keeps_prompts:
            return None
        kept = self._states = self._states or {}
        for name, prompt in prompts.items():
            if name not in kept or kept[name][0] != now or not torch.equal(kept[name][1].prompt, prompt):
                kept[name] = now, prompt_state(base_model, prompt)
        return [kept[name][1] for name in prompts]

    def train(self, mode: bool = True) -> Any:
        """See torch; prompts run again afterwards, also for `eval()`."""
        self._states = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """What the prompts left is not part of the model, nor what was proved on this machine."""
        return {**self.__dict__, "_states": None, "_status": None, "_proved": None}


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
