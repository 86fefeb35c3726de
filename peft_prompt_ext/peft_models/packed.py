"""PeftModels that run a batch as one packed sequence if their base model allows it.

The engine is imported in functions, so that `import peft_prompt_ext` stays fast.

Shapes: B rows, T padded text length, P virtual tokens, S real text tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper

from ..labels import IGNORE_INDEX
from ..shared_prefix.status import EngineStatus
from .base import PromptTuningMixin
from .decoding.feed import find_cache
from .position import is_suffix
from .tokens import PACKED_ROW_INPUTS, check_mask


if TYPE_CHECKING:
    from ..shared_prefix.engine import Engine
    from ..shared_prefix.layout import PackedLayout
    from ..shared_prefix.packed_pass import PackedPass


BASE = "__base__"  # PEFT's name in `adapter_names` for a row without an adapter


@dataclass(eq=False)
class TextKeys:
    """The key of each text in the cache, none if a text may not be kept.

    An object, because torch.compile would compile again for other keys in a list.
    """

    keys: list[bytes]


class Plan(NamedTuple):
    """A packed batch before it runs.

    Attributes:
        layout: The place of each token.
        names: The adapter of each row.
        status: The result of the proof.
        texts: With prompts behind all texts, their keys; None: trunks and branches run together.
    """

    layout: PackedLayout
    names: list[str]
    status: EngineStatus
    texts: TextKeys | None = None


class PackedMixin(PromptTuningMixin):
    """The first base class of a model whose base model may be causal, before PEFT's class."""

    _packed_arguments: ClassVar[set[str]] = set()
    _packs_packed_rows: ClassVar[bool] = False
    _heads_of_rows: ClassVar[set[str]] = set()  # modules that `_packed_forward` can select for each row
    loss_alone = False  # whether the caller reads nothing but the loss, as a Trainer does in training
    has_answers = False  # whether the batch has labels, in a step of a Trainer that may not pass them
    _engine: Engine

    @staticmethod
    def _packed_forward(base_model: Any, embeds: torch.Tensor, packed: PackedPass, **options: Any) -> Any:
        """Call a function of `shared_prefix.forward`."""
        raise NotImplementedError

    def _mixed_options(self, names: list[str]) -> dict[str, Any]:
        """Return the arguments of `_packed_forward` for `adapter_names`."""
        return {}

    def _packed_options(self) -> dict[str, Any]:
        """Return the arguments of `_packed_forward` that the config sets."""
        return {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        from ..shared_prefix.engine import Engine

        self._engine = Engine()
        super().__init__(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """See torch; a copy has an engine of its own."""
        return {**self.__dict__, "_engine": type(self._engine)()}

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

        `adapter_names` selects an adapter for each row, as for LoRA; `"__base__"` selects none.

        Raises:
            ValueError: The mask does not fit the text, or a batch with `adapter_names` cannot run packed.
        """
        self._check_token_path(kwargs)
        text = inputs_embeds if inputs_embeds is not None else input_ids  # with both, ids do not say what a text is
        if text is not None and find_cache(kwargs) is None:
            check_mask(attention_mask, *text.shape[:2])
        outputs = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        start = kwargs.pop("answer_start", None)
        extras = {**outputs, "task_ids": task_ids, **kwargs}
        plan = self._plan(text, attention_mask, adapter_names, extras, start)
        if isinstance(plan, Plan):
            self._engine.set_last_status(self.get_base_model(), plan.status)
            output = self._run_packed(plan, input_ids, inputs_embeds, labels, adapter_names, kwargs)
            if not isinstance(output, EngineStatus):
                return output if self._wants_dict(return_dict) else output.to_tuple()
            plan = output
        if start is not None:  # a packed batch was proved
            self._engine.check_causal(self.get_base_model(), self.word_embeddings)
        self._engine.set_last_status(self.get_base_model(), plan)
        if adapter_names is not None:
            raise ValueError(
                f"adapter_names needs a packed batch, and this batch takes PEFT's path: {plan.reason}. Run the rows "
                "of each adapter alone, after set_adapter."
            )
        return super().forward(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            labels=labels,
            return_dict=return_dict,
            answer_start=start,
            **extras,
        )

    @property
    def has_suffix(self) -> bool:
        """Whether the active prompt stands behind the text."""
        return bool(self.active_adapter) and is_suffix(self.active_peft_config)

    def find_answer_start(self, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Find the columns of a batch's first labels, as the argument `answer_start`, for a call without labels."""
        labels = inputs.get("labels")
        if labels is None or not self.predicts_next or inputs.get("answer_start") is not None:
            return {}
        labelled = labels != IGNORE_INDEX
        start = torch.where(labelled.any(1), labelled.int().argmax(1), labels.shape[1])
        return {"answer_start": start}

    def _plan(
        self,
        text: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        adapter_names: Sequence[str] | None,
        extras: dict[str, Any],
        start: torch.Tensor | None,
    ) -> Plan | EngineStatus:
        """Plan a packed batch, or return the status of a batch that takes PEFT's path.

        `start` is the number of columns in front of each row's prompt, [B] on the host; None: 0 in all rows.
        """
        obstacle = "the call has no text" if text is None else self._find_obstacle(attention_mask, extras)
        if text is None or obstacle is not None:
            return EngineStatus(False, obstacle or "")
        one_pass = self._needs_one_pass()
        status = self._prove(behind=start is not None or one_pass)
        if not status.packed:
            return status
        mask, texts = _read_batch(text, attention_mask, extras.get("position_ids"))
        if texts is None:
            return EngineStatus(False, "position_ids do not count the tokens of each text from 0")
        if bool(texts.any()) and not self._packs_packed_rows:
            return EngineStatus(False, "a row holds several texts")
        names = list(adapter_names) if adapter_names is not None else [self.active_adapter] * len(mask)
        if start is None:
            plan = Plan(self._lay_out(mask, names, texts), names, status)
        else:
            if bool(texts.any()):
                raise ValueError(
                    "position_ids begin again at 0 inside a row, so the row holds several texts. With "
                    "prompt_position='suffix' pass one text per row (TRL: packing=False, padding_free=False)."
                )
            plan = self._plan_behind(text, mask, names, status, start, one_pass)
        layout = plan.layout
        configs: dict[str, Any] = self.peft_config
        prompt = max((configs[name].num_virtual_tokens for name in names if name != BASE), default=0)
        self._check_length(layout.longest_row - prompt, prompt)
        obstacle = _find_length_obstacle(layout, status) or self._find_unshared(names)
        return plan if obstacle is None else EngineStatus(False, obstacle)

    @torch.compiler.disable  # reads values, where a trace would break
    def _plan_behind(
        self,
        text: torch.Tensor,
        mask: torch.Tensor,
        names: list[str],
        status: EngineStatus,
        start: torch.Tensor,
        one_pass: bool,
    ) -> Plan:
        """Plan a batch where some prompts stand behind the texts; rows with the same text share it."""
        from ..shared_prefix.layout import pack_behind
        from ..shared_prefix.transfer import download
        from ..shared_prefix.watch import has_hooks

        lengths, prompt_of_row = self._list_prompts(mask, names)
        runs_alone = bool((start > 0).all()) and not one_pass and not self._texts_learn(text)
        keys: list[bytes] = []
        if runs_alone and text.dim() == 2 and not has_hooks(vars(self.word_embeddings)):
            in_front = (mask != 0) & (torch.arange(mask.shape[1]) < start[:, None])
            ids = download(text)[0]
            keys = [row[real].numpy().tobytes() for row, real in zip(ids, in_front, strict=True)]
        layout = pack_behind(mask, lengths, prompt_of_row, start, keys or range(len(mask)))
        return Plan(layout, names, status, TextKeys(list(dict.fromkeys(keys))) if runs_alone else None)

    def _needs_one_pass(self) -> bool:
        """Whether batches of any positions run in one pass.

        Sharded weights are gathered for each pass, so all processes have to run the same passes, and batches of other
        processes may have prompts in front of the texts, rows without text, or no need of a text's logits.
        """
        from ..shared_prefix.watch import is_sharded

        if not any(map(is_suffix, self.peft_config.values())):
            return False
        base_model: Any = self.get_base_model()
        return is_sharded(base_model.modules(), base_model.parameters())

    def _texts_learn(self, text: torch.Tensor) -> bool:
        """Whether texts need gradients: the input has some, or a module of the base model but a classifier's head."""
        if not torch.is_grad_enabled():
            return False
        trained = (name for name, parameter in self.base_model.named_parameters() if parameter.requires_grad)
        return text.requires_grad or any(name.split(".")[0] not in self._heads_of_rows for name in trained)

    def _find_obstacle(self, attention_mask: Any, extras: dict[str, Any]) -> str | None:
        """Find what a packed batch does not support in this call; None if nothing."""
        if attention_mask is not None and not (isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2):
            return "attention_mask is not a tensor [B, T]"
        if getattr(self, "_is_replica", False):  # has no own parameters, and runs in a thread
            return "DataParallel copies the model for each batch; launch a process a device instead"
        allowed = self._packed_arguments | {"position_ids"}
        if not self._takes("token_type_ids"):
            allowed = allowed | {"token_type_ids"}
        if extras.get("position_ids") is not None:  # these have the same information
            allowed = allowed | PACKED_ROW_INPUTS
        base_model: Any = self.get_base_model()
        unsupported = {name for name, value in extras.items() if value is not None and value is not False} - allowed
        outputs = ("output_hidden_states", "output_attentions")
        unsupported |= {name for name in outputs if getattr(base_model.config, name, False)}
        if unsupported:
            return f"packed batches do not support {', '.join(sorted(unsupported))}"
        if extras.get("fused_lm_head"):
            hooks = (*base_model._forward_hooks.values(), *base_model._forward_pre_hooks.values())
            if extras.get("shift_labels") is not None or hooks or not isinstance(base_model.forward, MethodType):
                return "packed batches do not support fused_lm_head with hooks, a wrapped forward or shift_labels"
        return None

    def _prove(self, behind: bool | None = None) -> EngineStatus:
        """Prove that a batch may run packed, as the model is now; by default for the active prompt's position."""
        config = self.active_peft_config
        # a stock config has neither field
        if not getattr(config, "shared_prefix", True):
            return EngineStatus(False, "shared_prefix=False in the config")
        probe = getattr(config, "shared_prefix_probe", True)
        behind = is_suffix(config) if behind is None else behind
        return self._engine.prove(self.get_base_model(), self._packed_forward, self.word_embeddings, probe, behind)

    def _status(self) -> EngineStatus:
        """Return the status of the last batch; without one, prove it."""
        if not getattr(self.active_peft_config, "shared_prefix", True):
            return self._prove()
        status = self._engine.get_last_status(self.get_base_model()) or self._prove()
        texts = self._engine.texts
        return status if texts is None else replace(status, texts=texts.status)

    def _lay_out(self, attention_mask: torch.Tensor, names: list[str], texts: torch.Tensor) -> PackedLayout:
        from ..shared_prefix.layout import pack

        lengths, prompt_of_row = self._list_prompts(attention_mask, names)
        return pack(attention_mask, lengths, prompt_of_row, texts)

    def _list_prompts(self, attention_mask: torch.Tensor, names: list[str]) -> tuple[tuple[int, ...], torch.Tensor]:
        """List the lengths of a batch's prompts, and the number of each row's prompt among them, [B].

        Raises:
            ValueError: There is not one name for each row, or a name is unknown.
        """
        if len(names) != len(attention_mask):
            raise ValueError(f"adapter_names has {len(names)} names, the batch has {len(attention_mask)} rows.")
        known = list(self.peft_config)
        unknown = sorted(set(names) - {*known, BASE})
        if unknown:
            raise ValueError(f"adapter_names has {unknown}; the model's adapters are {known}, or {BASE!r} for none.")
        used = list(dict.fromkeys(names))
        configs: dict[str, Any] = self.peft_config
        lengths = tuple(0 if name == BASE else configs[name].num_virtual_tokens for name in used)
        return lengths, torch.tensor([used.index(name) for name in names], dtype=torch.long)

    def _find_unshared(self, names: list[str]) -> str | None:
        """Find modules that differ between the adapters of a batch; None if all rows have the active adapter."""
        if set(names) == {self.active_adapter}:
            return None
        own = (name for name, module in self.base_model.named_modules() if isinstance(module, ModulesToSaveWrapper))
        unshared = sorted(set(own) - self._heads_of_rows)
        return f"each adapter has its own {', '.join(unshared)}" if unshared else None

    def _run_packed(
        self,
        plan: Plan,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        labels: torch.Tensor | None,
        adapter_names: Sequence[str] | None,
        kwargs: dict[str, Any],
    ) -> Any:
        """Run a planned batch. Returns the output, or a status if the base model does not support the batch."""
        from ..shared_prefix.attention.select import ATTENTIONS
        from ..shared_prefix.interface import NotPackable
        from ..shared_prefix.packed_pass import PackedPass

        self._drop_unused(dict(kwargs))  # and warn of it
        self._check_in_training(plan.names)
        options = self._packed_options()
        options |= {name: kwargs[name] for name in self._packed_arguments if kwargs.get(name) is not None}
        if labels is not None:
            options["labels"] = labels
        if adapter_names is not None:
            options |= self._mixed_options(plan.names)
        # embed the padded batch, because hooks such as NEFTune's depend on its shape
        embed: Any = self.word_embeddings
        words = inputs_embeds if inputs_embeds is not None else embed(input_ids)
        prompts = self._embed_prompts(plan.names, words)
        packed = PackedPass(plan.layout, ATTENTIONS[plan.status.attention or "sdpa"])
        if plan.texts is not None:
            embeds = self._embed_behind(plan, prompts, words, packed)
        else:
            # fused_lm_head reads the prompt's hidden states
            if self._may_keep(plan, prompts) and not options.get("fused_lm_head"):
                packed.trunks = self._engine.keep(self.get_base_model(), embed, prompts)
            embeds = _embed(plan.layout, prompts, words)[packed.first_place :][None]
        try:
            return self._packed_forward(self.get_base_model(), embeds, packed, **options)
        except NotPackable as refusal:  # the probe did not detect it
            return self._engine.refuse(self.get_base_model(), embed, refusal)

    def _may_keep(self, plan: Plan, prompts: dict[str, torch.Tensor]) -> bool:
        """Whether the batch may use kept prefixes; the prompt of a row without text has to run."""
        if torch.is_grad_enabled() or self.training or not prompts or not plan.status.keeps_prompts:
            return False
        behind = any(is_suffix(self.peft_config[name]) for name in prompts)
        return not behind and not bool((plan.layout.last < plan.layout.num_trunk_tokens).any())

    @torch.compiler.disable  # a trace would be of one number of texts and of their lengths
    def _embed_behind(
        self, plan: Plan, prompts: dict[str, torch.Tensor], words: torch.Tensor, packed: PackedPass
    ) -> torch.Tensor:
        """Embed the branches, [1, S, H], and give the pass its texts, which run without gradients or are kept."""
        from ..shared_prefix.texts import Texts

        tokens = _embed(plan.layout, prompts, words)
        count = plan.layout.num_trunk_tokens
        if not count:  # all texts are empty
            return tokens[None]
        base_model, config = self.get_base_model(), self.active_peft_config
        keys = plan.texts.keys if plan.texts is not None else []
        cache = None
        if keys:
            cache = self._engine.keep_texts(base_model, self.word_embeddings, plan.status.attention, config)
        packed.trunks = Texts(
            base_model,
            packed.attention,
            tokens[:count],
            plan.layout.trunk_lengths,
            cache,
            keys,
            self._engine.expect_writes,
        )
        return tokens[count:][None]

    def _embed_prompts(self, names: list[str], like: torch.Tensor) -> dict[str, torch.Tensor]:
        """Get each adapter's virtual tokens, [P, H], on the device and in the dtype of `like`."""
        return {
            name: self.prompt_encoder[name](self.prompt_tokens[name].to(like.device, non_blocking=True)).to(like.dtype)
            for name in dict.fromkeys(names)
            if name != BASE
        }

    def train(self, mode: bool = True) -> Any:
        """See torch; drops kept prefixes, also in `eval()`."""
        self._engine.forget_prefixes()
        if mode != self.training:  # a Trainer calls train() in each step, and a checksum takes as long as half a step
            self._engine.recheck_texts()
        return super().train(mode)


def _read_batch(
    text: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Read the mask, and the first tokens of a row's further texts; None if the positions are unsupported."""
    from ..shared_prefix.layout import find_texts
    from ..shared_prefix.transfer import download

    shape = text.shape[:2]
    read = download(*(x for x in (attention_mask, position_ids) if x is not None))
    mask = torch.ones(shape, dtype=torch.long) if attention_mask is None else read[0]
    if position_ids is None:
        return mask, torch.zeros(shape, dtype=torch.bool)
    if position_ids.dim() != 2 or position_ids.shape[1] != shape[1]:
        return mask, None
    return mask, find_texts(read[-1].expand(shape), mask)


def _embed(layout: PackedLayout, prompts: dict[str, torch.Tensor], words: torch.Tensor) -> torch.Tensor:
    """Embed the packed sequence, [N, H], from prompts [P, H] and the padded batch's words [B, T, H]."""
    from ..shared_prefix.repeat import repeat

    flat, count = words.flatten(0, 1), sum(map(len, prompts.values()))
    sources = layout.to(words.device).sources
    if layout.trunk_lengths == tuple(map(len, prompts.values())) and not layout.has_prompts_behind:
        return torch.cat([*prompts.values(), flat[sources[count:] - count]])
    virtual = torch.cat([*prompts.values(), flat[:1]])  # a row at least
    is_virtual = (sources < count)[:, None]
    return torch.where(is_virtual, repeat(virtual, sources.clamp(max=count)), flat[(sources - count).clamp(min=0)])


def _find_length_obstacle(layout: PackedLayout, status: EngineStatus) -> str | None:
    row, packed = layout.longest_row, layout.num_tokens
    if status.max_tokens is not None and row > status.max_tokens:
        return f"a row of {row} tokens is longer than {status.max_tokens}, its window or its short positions"
    if status.max_packed_tokens is not None and packed > status.max_packed_tokens:
        return f"its layers count tokens, and the pack has {packed}, more than {status.max_packed_tokens}"
    return None


def engine_status(model: Any) -> EngineStatus:
    """Get a model's engine status: whether its batches run as one packed sequence, and why.

    Args:
        model: A model from `get_peft_model`, also compiled or in a wrapper such as DistributedDataParallel.

    Returns:
        The status of the last batch. Before the first batch, and after a change of the attention, the probe runs.
    """
    while not isinstance(model, PeftModel):
        inside = getattr(model, "_orig_mod", getattr(model, "module", None))
        if inside is None:
            break
        model = inside
    if not isinstance(model, PackedMixin):
        return EngineStatus(False, f"{type(model).__name__} of this task or config has no shared prefix")
    return model._status()
