"""LlavaModule: a torch.nn.Module whose parameters lie in the core's buffer and whose passes are the core's."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Seq
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import stllava_c
from stllava.compat import Entries, ScriptConfig, as_array
from stllava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from stllava.errors import ConfigError
from stllava.model import LlavaModel
from stllava.train.groups import default_trainable
from stllava.tree import Sequence, TreeBatch

__all__ = ["LlavaModule"]

ROWS_AT_ONCE = 256  # of logits, when only statistics of them are kept


class LlavaModule(torch.nn.Module):
    """A `LlavaModel` for torch's optimisers and training loops.

    Every training tensor is a `torch.nn.Parameter` under its canonical name, a view of the model's flat buffer: what an optimiser changes, the model
    computes with, and the other way round. Frozen tensors are no parameters. Gradients are those of the core, bit for bit. A pass keeps its
    activations until its backward; several may wait.

    Args:
        llava: the model, adapters attached where wanted; `llava` stays the way to save, chat and generate.
        trainable: names of what trains; None: what trains in it already, else every adapter and the projector, or all tensors of a model without
            adapters. Tensors no output depends on are left out. The set may not change while the module lives.
        seed: of dropout, which is on in training mode; the step is the number of passes before with it.
        share_prefixes, vision_grad: as in `TrainingArguments` (`vit_grad`).
        log_prob_dtype: of `log_probs` and `loss`; the core gives float64.
    """

    main_input_name = "input_ids"
    accepts_loss_kwargs = True  # transformers: `num_items_in_batch`
    is_gradient_checkpointing = False  # transformers: nothing to switch off in passes without gradient

    def __init__(self, llava: LlavaModel, *, trainable: Seq[str] | None = None, seed: int = 0, share_prefixes: bool = True, vision_grad: bool = True,
                 log_prob_dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        wanted = list(trainable) if trainable is not None else llava.trainable or default_trainable(llava)
        infos = llava.tensor_infos()
        wanted = [name for name in wanted if infos[name].influences]
        if wanted != llava.trainable:
            llava.set_trainable(wanted)
        self._set_up(llava, None, share_prefixes, vision_grad, log_prob_dtype)
        self.seed, self.n_passes = seed, 0
        flat = torch.from_numpy(llava.theta)
        self._slices = llava.trainable_slices()
        self._in_order = [torch.nn.Parameter(flat[where].view(tuple(infos[name].shape))) for name, where in self._slices.items()]
        for name, parameter in zip(self._slices, self._in_order, strict=True):
            _put(self, name, parameter)

    def _set_up(self, llava: LlavaModel, theta: np.ndarray | None, share: bool, vision_grad: bool, log_prob_dtype: torch.dtype) -> None:
        self.llava, self._theta = llava, theta
        self.share_prefixes, self.vision_grad, self.log_prob_dtype = share, vision_grad, log_prob_dtype
        self._free_runs: list[stllava_c.Run] = []
        self._recompute = (0, 0)
        special = {name: getattr(llava.tokenizer, name) if llava.has_tokenizer else None for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        self.config = ScriptConfig(llava.config, _attn_implementation="eager", **special)
        self.generation_config = SimpleNamespace(**special)
        self.warnings_issued: dict[str, bool] = {}

    def reference(self) -> LlavaModule:
        """The model as it is now, frozen: a copy of what trains, everything else shared. In training mode too it has no dropout and no gradient."""
        frozen = LlavaModule.__new__(LlavaModule)
        torch.nn.Module.__init__(frozen)
        frozen._set_up(self.llava, np.array(self.llava.theta), self.share_prefixes, self.vision_grad, self.log_prob_dtype)
        frozen._slices, frozen._in_order = {}, []
        frozen.eval()
        return frozen

    # ---- passes ----------------------------------------------------------------------------------------------------------------------

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None,
                images: torch.Tensor | None = None, pixel_values: torch.Tensor | None = None, num_items_in_batch: Any = None,
                output_logits: bool | None = None, fused_lm_head: bool = False, use_cache: bool | None = None,
                return_dict: bool | None = None) -> Entries:
        """One pass over a batch.

        Args:
            input_ids: (b, t), -200 for an image. attention_mask: (b, t), 0 where padding is; None: there is none.
            labels: (b, t), -100 where nothing is to be predicted; position i is predicted at i - 1.
            images (or pixel_values): (n, 3, S, S), one per -200, in order.
            num_items_in_batch: what the loss is divided by; None: the number of targets.
            output_logits: None: where no labels are given. fused_lm_head: what TRL asks for: entropies and logit means beside `log_probs`.
            use_cache, return_dict: no effect.

        Returns:
            a dictionary with attributes: with labels `loss` () and `log_probs` (b, t - 1), 0 where there is no target, both with gradient; `logits`
            (b, t, vocab_size), 0 at padding, without one: the core takes d loss / d log-prob only, so a loss must come from `log_probs`. At an
            image stand the logits of its last row. With `fused_lm_head` `entropy`, `mean_logits`, `is_top1`, `log_sum_sq_probs` (b, t - 1).

        Raises:
            ConfigError: images and markers do not match.
        """
        images = pixel_values if images is None else images
        out = Entries()
        if labels is not None:
            rows = _Rows(self, input_ids, attention_mask, labels, images)
            logp = self._log_probs(rows)
            n = len(rows.where) if num_items_in_batch is None else num_items_in_batch
            out["loss"] = -logp.sum() / max(int(n), 1)
            out["log_probs"] = rows.spread(logp)
            if fused_lm_head:
                out |= self._statistics(rows)
        if labels is None if output_logits is None else output_logits:
            out["logits"] = self._logits(input_ids, attention_mask, images)
        return out

    def _log_probs(self, rows: _Rows) -> torch.Tensor:
        parameters = self._in_order
        if not len(rows.where):  # nothing to compute, and a gradient of zeros
            return sum((p.sum() * 0 for p in parameters), torch.zeros(())).to(self.log_prob_dtype).expand(0)
        if torch.is_grad_enabled() and parameters:
            logp = _Pass.apply(self, rows, *parameters)
        else:
            rows.run = self.llava.run
            logp = torch.from_numpy(rows.run.forward(rows.batch, pixels=rows.pixels, **self._how()))
        return logp.to(self.log_prob_dtype)

    def _how(self) -> dict[str, Any]:
        """Keyword arguments of every pass."""
        theta = {} if self._theta is None else {"theta": self._theta}
        return {"adapters": self.llava.adapters_enabled, **theta}

    def _statistics(self, rows: _Rows) -> dict[str, torch.Tensor]:
        """What TRL logs of the distributions at the targets. The activations of `rows.run` are still those of its pass."""
        targets = rows.batch.target_token
        values = {name: np.zeros(len(targets)) for name in ("entropy", "mean_logits", "log_sum_sq_probs")}
        top1 = np.zeros(len(targets), bool)
        for begin in range(0, len(targets), ROWS_AT_ONCE):
            part = slice(begin, begin + ROWS_AT_ONCE)
            logits = rows.run.logits(rows.batch.target_row[part]).astype(np.float64)
            logp = logits - logits.max(axis=1, keepdims=True)
            logp -= np.log(np.exp(logp).sum(axis=1, keepdims=True))
            p = np.exp(logp)
            values["entropy"][part] = -(p * logp).sum(axis=1)
            values["mean_logits"][part] = logits.mean(axis=1)
            values["log_sum_sq_probs"][part] = np.log((p * p).sum(axis=1))
            top1[part] = logits.argmax(axis=1) == targets[part]
        spread = {name: rows.spread(torch.from_numpy(array)).to(self.log_prob_dtype) for name, array in values.items()}
        return {**spread, "is_top1": rows.spread(torch.from_numpy(top1))}

    def _logits(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, images: torch.Tensor | None) -> torch.Tensor:
        """Each sequence on its own, so that its rows follow one another."""
        rows = _Rows(self, input_ids, attention_mask, None, images, share=False)
        run = self.llava.run
        run.forward(rows.batch, pixels=rows.pixels, **self._how())
        out = torch.zeros((*input_ids.shape, self.llava.config.vocab_size), dtype=torch.float64 if self.llava.dtype == "f64" else torch.float32)
        for i, kept in enumerate(rows.kept):
            widths = np.where(rows.ids[i, kept] == IMAGE_TOKEN_INDEX, self.llava.core.tokens_per_image, 1)
            last = rows.batch.segment_row[rows.trees.order[i]] + np.cumsum(widths) - 1
            out[i, torch.from_numpy(kept)] = torch.from_numpy(run.logits(last))
        return out

    def _take_run(self) -> stllava_c.Run:
        """A run for one pass, whose activations it keeps until the backward; then it is free for another."""
        run = self._free_runs.pop() if self._free_runs else stllava_c.Run(self.llava.core)
        run.set_recompute(*self._recompute)
        return run

    # ---- what transformers and TRL ask of a model --------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.llava.dtype == "f64" else torch.float32

    def _apply(self, fn: Any, recurse: bool = True) -> LlavaModule:
        """`to`, `half`, `cuda` and their like: allowed where they change nothing, since a moved parameter would no longer be the core's."""
        if any(p.data_ptr() != fn(p).data_ptr() for p in self._in_order):  # in this order: fn may work in place
            raise ConfigError(f"the parameters lie in the core's memory: they stay {self.dtype} on the CPU", field="dtype")
        return self

    def activation_checkpointing_enable(self, **_settings: Any) -> None:
        """Every layer's activations are computed again in the backward pass; settings of torch's own way to do it have no effect."""
        self._recompute = self.llava.config.n_layers

    gradient_checkpointing_enable = activation_checkpointing_enable  # before transformers 5

    def add_model_tags(self, tags: Any) -> None:
        """Nothing: tags are for a page on a hub."""

    def save_pretrained(self, path: str, **_options: Any) -> None:
        """As `LlavaModel.save_pretrained`."""
        self.llava.save_pretrained(path)


class _Pass(torch.autograd.Function):
    """logp[target] = forward(parameters); the core's backward gives the parameters' gradients."""

    @staticmethod
    def forward(ctx: Any, module: LlavaModule, rows: _Rows, *parameters: torch.Tensor) -> torch.Tensor:
        rows.run = module._take_run()
        logp = rows.run.forward(rows.batch, pixels=rows.pixels, train=True, vision_grad=module.vision_grad, dropout=module.training, seed=module.seed,
                                step=module.n_passes, **module._how())
        module.n_passes += module.training
        ctx.save_for_backward(*parameters)  # so that torch tells when one has changed before backward, or backward comes twice
        ctx.module, ctx.rows = module, rows
        return torch.from_numpy(logp)

    @staticmethod
    def backward(ctx: Any, dlogp: torch.Tensor) -> tuple[Any, ...]:
        _ = ctx.saved_tensors
        module, llava = ctx.module, ctx.module.llava
        llava.core.zero_grad()
        ctx.rows.run.backward(dlogp.to(torch.float64).contiguous().numpy())
        flat = torch.from_numpy(np.array(llava.grad))
        module._free_runs.append(ctx.rows.run)
        ctx.rows = None
        return None, None, *(flat[where].view(p.shape) for where, p in zip(module._slices.values(), module._in_order, strict=True))


class _Rows:
    """A batch of torch's as the core takes it, and where its targets lie in (b, t - 1)."""

    run: stllava_c.Run

    def __init__(self, module: LlavaModule, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, labels: torch.Tensor | None,
                 images: torch.Tensor | None, *, share: bool | None = None) -> None:
        self.ids = as_array(input_ids)
        if self.ids.ndim != 2:
            raise ConfigError(f"input_ids has shape {self.ids.shape}, want (batch, tokens)", field="input_ids")
        mask = np.ones_like(self.ids) if attention_mask is None else as_array(attention_mask)
        targets = np.full_like(self.ids, IGNORE_INDEX) if labels is None else as_array(labels)
        self.kept = [np.flatnonzero(row) for row in mask]
        pictures, keys = _pictures(images)
        n_markers = [int((self.ids[i, kept] == IMAGE_TOKEN_INDEX).sum()) for i, kept in enumerate(self.kept)]
        if sum(n_markers) != len(keys):
            raise ConfigError(f"{sum(n_markers)} image markers (-200) in the batch, but {len(keys)} images; give one per marker, in order",
                              field="images")
        ends = np.cumsum(n_markers)
        sequences = [Sequence(self.ids[i, kept], targets[i, kept], tuple(keys[end - n:end]), sample=i)
                     for i, (kept, end, n) in enumerate(zip(self.kept, ends, n_markers, strict=True))]
        self.trees: TreeBatch
        self.trees, self.batch = module.llava.batch(sequences, share=module.share_prefixes if share is None else share)
        self.pixels = module.llava._stack(self.trees, pictures)
        self.shape = (self.ids.shape[0], self.ids.shape[1] - 1)
        of_leaf = {int(leaf): i for i, leaf in enumerate(self.trees.order)}
        places = [of_leaf[leaf] * self.shape[1] + self._places(of_leaf[leaf], targets) for leaf in range(len(sequences))]
        self.where = torch.from_numpy(np.concatenate(places))

    def _places(self, i: int, targets: np.ndarray) -> np.ndarray:
        """Positions before the targets of row i; the first token has none before it."""
        later = self.kept[i][1:]
        places: np.ndarray = later[targets[i, later] != IGNORE_INDEX] - 1
        return places

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """(n_targets,) in the core's order -> (b, t - 1), 0 elsewhere."""
        flat = torch.zeros(self.shape[0] * self.shape[1], dtype=values.dtype)
        return flat.index_put((self.where,), values).view(self.shape)


def _pictures(images: torch.Tensor | None) -> tuple[dict[bytes, np.ndarray], list[bytes]]:
    """Pictures by what they show, so that a picture that comes twice, as in a pair, is computed once."""
    pictures: dict[bytes, np.ndarray] = {}
    keys = []
    for image in () if images is None else images:
        array = np.ascontiguousarray(as_array(image))
        if array.ndim != 3 or array.shape[0] != 3:
            raise ConfigError(f"images: a picture of shape {array.shape}, want (3, S, S)", field="images")
        keys.append(hashlib.blake2b(array.tobytes(), digest_size=16).digest())
        pictures[keys[-1]] = array
    return pictures, keys


def _put(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> None:
    """Registers under a dotted name, with an empty module for each part of it."""
    *parts, last = name.split(".")
    for part in parts:
        if not hasattr(module, part):
            module.add_module(part, torch.nn.Module())
        module = getattr(module, part)
    module.register_parameter(last, parameter)
