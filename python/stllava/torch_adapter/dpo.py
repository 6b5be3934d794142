"""TRL's DPOTrainer over a `LlavaModule`.

TRL (>= 1.16) asks a model for log-probabilities, not for logits: it puts a fused head over `forward` and calls it with ``fused_lm_head=True``. The
core has such a head of its own, so that the trainer here takes TRL's away again. Losses, metrics and the loop are TRL's.
"""

from __future__ import annotations

import tempfile
from typing import Any

import datasets
import torch
import transformers
import trl

from stllava.errors import ConfigError
from stllava.model import LlavaModel
from stllava.torch_adapter.data import TorchDataset, collate_pairs
from stllava.torch_adapter.module import LlavaModule

__all__ = ["StllavaDPOTrainer", "hf_tokenizer"]

_ITEM = "stllava_item"


def hf_tokenizer(llava: LlavaModel) -> Any:
    """The model's tokenizer as transformers reads it."""
    with tempfile.TemporaryDirectory() as folder:
        llava.tokenizer.save_pretrained(folder)
        return transformers.AutoTokenizer.from_pretrained(folder)


class StllavaDPOTrainer(trl.DPOTrainer):
    """trl.DPOTrainer, but for how it comes by log-probabilities.

    Args as there, except:
        model: a `LlavaModule` or a `LlavaModel`.
        ref_model: None: the model as it is now, adapters and projector included, frozen.
        train_dataset, eval_dataset: rows for TRL, of text only; or a `stllava.DPODataset`, pictures included, which needs no `processing_class`.

    `save_model` writes TRL's files, from which a run resumes, and beside them those of `LlavaModel.save_pretrained`.
    """

    def __init__(self, model: LlavaModule | LlavaModel, ref_model: torch.nn.Module | None = None, args: Any = None, data_collator: Any = None,
                 train_dataset: Any = None, eval_dataset: Any = None, processing_class: Any = None, **options: Any) -> None:
        module = LlavaModule(model) if isinstance(model, LlavaModel) else model
        if options.get("peft_config") is not None:
            raise ConfigError("peft_config: peft cannot see into the core; add_lora() on the model before", field="peft_config")
        args = trl.DPOConfig("trainer_output") if args is None else args
        for name in ("sync_ref_model", "precompute_ref_log_probs"):  # both look at parameters of the reference, which has none of its own
            if getattr(args, name):
                raise ConfigError(f"{name}: not over the core's reference; leave it out" +
                                  ("; stllava.DPOTrainer has it" if name.startswith("precompute") else ""), field=name)
        if "alpha_divergence" in args.f_divergence_type:
            module.log_prob_dtype = torch.float32  # TRL has no limits for float64 there
        if hasattr(train_dataset, "pair"):
            given = [train_dataset, *([] if eval_dataset is None else [eval_dataset])]
            train_dataset, *rest = map(_items, given, _starts(given))
            eval_dataset, data_collator = rest[0] if rest else None, _PairsOf(given)
            args.remove_unused_columns = False
        reference = module.reference() if ref_model is None else ref_model
        super().__init__(model=module, ref_model=reference, args=args, data_collator=data_collator, train_dataset=train_dataset,
                         eval_dataset=eval_dataset, processing_class=hf_tokenizer(module.llava) if processing_class is None else processing_class,
                         **options)
        for one in (module, reference):
            one.__dict__.pop("forward", None)  # TRL's fused head, and what accelerate put around it

    def _prepare_dataset(self, dataset: Any, *rest: Any, **named: Any) -> Any:
        return dataset if _ITEM in dataset.column_names else super()._prepare_dataset(dataset, *rest, **named)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        self.model.llava.write_files(output_dir or self.args.output_dir)


class _PairsOf:
    """Collates numbers of items of several data sets, counted through."""

    def __init__(self, given: list[Any]) -> None:
        self._rows = [(TorchDataset(one), i) for one in given for i in range(len(one))]

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        chosen = (self._rows[item[_ITEM]] for item in items)
        return collate_pairs([dataset[i] for dataset, i in chosen])


def _starts(given: list[Any]) -> list[int]:
    return [sum(map(len, given[:i])) for i in range(len(given))]


def _items(one: Any, start: int) -> datasets.Dataset:
    return datasets.Dataset.from_dict({_ITEM: list(range(start, start + len(one)))})
