"""The training loop: everything around an update. One loop for every objective."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from stllava.checkpoint import atomic
from stllava.checkpoint.lock import run_lock
from stllava.errors import ConfigError, NumericsError
from stllava.model import LlavaModel
from stllava.progress import progress_bar

from .arguments import TrainingArguments
from .callbacks import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, is_better, metric_of
from .from_script import ScriptNames, add_adapters, dataset_of, model_of, refuse
from .groups import default_trainable, parameter_groups
from .guard import TrainingGuard
from .numerics import explained
from .output import write_model
from .plan import Grouping, Plan
from .state import STATE_FILE, find_checkpoint, load_weights, resume_checkpoint, rotate, save_checkpoint, state_json
from .terminate import Terminated, noticing_sigterm
from .trackers import trackers
from .update import Micro, Objective, Updater

__all__ = ["Trainer", "TrainOutput"]


@dataclass(slots=True)
class TrainOutput:
    """`metrics`: train_runtime (s), train_samples_per_second, train_steps_per_second, train_loss. `training_loss`:
    mean over all updates of the run, those before a resume included."""

    global_step: int
    training_loss: float
    metrics: dict[str, float] = field(default_factory=dict)

    def _repr_html_(self) -> str:
        from stllava.model.summary import html_table
        return html_table([{"global_step": str(self.global_step), **{name: f"{value:.4g}" for name, value in self.metrics.items()}}])


class Trainer(ScriptNames):
    """Trains a model on a data set. Subclasses say what the loss is (`make_objective`).

    Args:
        model: a `LlavaModel`, adapters attached where wanted, or the path of one; `trainable` names what trains (default: every adapter and the
            projector, or all tensors of a model without adapters).
        args: settings; None: the defaults, in trainer_output.
        train_dataset, eval_dataset: what the objective asks for; or a file, or rows (a list of dictionaries, a `datasets.Dataset`), from which it is
            made with `processing_class` (or `tokenizer`: ours; None: the model's), `image_folder`, `template` (None: the model's) and
            `args.max_length`.
        peft_config: adapters for the decoder, see `from_script.add_adapters`.
        script: further arguments of transformers' and TRL's trainers, whose neutral values pass (`ref_model` None, `optimizers` (None, None)).
        callbacks: `TrainerCallback`s, beside those that `args.report_to` and `args.early_stopping_patience` ask for.
        compute_metrics: called with the trainer after each evaluation; its dictionary joins the logged one.

    Raises:
        ConfigError, NumericsError, UntrainedError (see `train.guard`), OSError (unwritable output directory), before anything is lost.
    """

    Config: ClassVar[type[TrainingArguments]] = TrainingArguments

    def __init__(self, model: LlavaModel | str | Path, args: TrainingArguments | None = None, train_dataset: Any = None, eval_dataset: Any = None, *,
                 trainable: Seq[str] | None = None, callbacks: Seq[TrainerCallback | type[TrainerCallback]] | None = (),
                 compute_metrics: Callable[[Trainer], dict[str, float]] | None = None, processing_class: Any = None, tokenizer: Any = None,
                 peft_config: Any = None, image_folder: str | Path | None = None, template: str | None = None, **script: Any) -> None:
        refuse(script)
        args = self.Config("trainer_output") if args is None else args
        if not isinstance(args, self.Config):
            raise TypeError(f"{type(self).__name__} needs {self.Config.__name__}, got {type(args).__name__}")
        self.model, self.args = model_of(model), args
        adapted = None if peft_config is None else add_adapters(self.model, peft_config, args.seed)
        wanted = trainable if trainable is not None else adapted if adapted is not None else default_trainable(self.model)
        self._dataset_of = partial(dataset_of, make=self.make_dataset, model=self.model, tokenizer=tokenizer if processing_class is None else
                                   processing_class, image_folder=image_folder, template=template, max_length=getattr(args, "max_length", 2048))
        self.train_dataset, self.eval_dataset = self._dataset_of(train_dataset), self._dataset_of(eval_dataset)
        if self.train_dataset is None:
            raise ConfigError("there is no train_dataset", field="train_dataset")
        if args.eval_strategy != "no" and eval_dataset is None:
            raise ConfigError(f"eval_strategy is {args.eval_strategy!r}, but there is no eval_dataset", field="eval_strategy")
        self.callbacks: list[TrainerCallback] = []
        for callback in (*(callbacks or ()), *trackers(args)):
            self.add_callback(callback)
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience, args.early_stopping_threshold))
        self.compute_metrics = compute_metrics
        self.plan = _plan(args, self.train_dataset)
        self.groups = parameter_groups(self.model, list(wanted), args)
        if args.gradient_checkpointing:
            self.model.run.set_recompute(*self.model.config.n_layers)
        self.objective: Objective = self.make_objective()
        self.updater = Updater(self.model, self.groups, self.objective, args, self.plan.total_steps)
        self.state = TrainerState(max_steps=self.plan.total_steps, num_train_epochs=args.num_train_epochs)
        self.control = TrainerControl()

    def make_objective(self) -> Objective:
        raise NotImplementedError

    def make_dataset(self, data: Any, *args: Any, **settings: Any) -> Any:
        """The data set of a file or of rows."""
        raise NotImplementedError

    def before_training(self) -> None:
        """What an objective needs once, before the first update."""

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """A class is called without arguments."""
        self.callbacks.append(callback() if isinstance(callback, type) else callback)

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:
        """Trains to the end, or until a callback or a signal stops it.

        Args:
            resume_from_checkpoint: a directory; True: the newest complete checkpoint of the output directory; "auto": the same, or from the
                start where there is none. Default: `args.resume_from_checkpoint`.

        Raises:
            LockedError: another run writes into the output directory.
            Terminated: SIGTERM came; the running step was finished and saved. A SystemExit with code 143.
            KeyboardInterrupt: within half a second of Ctrl-C, also in a long step. The last complete checkpoint stands.
        """
        with run_lock(atomic.make_directory(self.args.output_dir)), noticing_sigterm() as terminated:
            return self._train(resume_from_checkpoint or self.args.resume_from_checkpoint, terminated)

    def _train(self, resume: str | bool | None, terminated: Callable[[], bool]) -> TrainOutput:
        args, state, started = self.args, self.state, time.monotonic()
        output_dir = Path(args.output_dir)
        self.control = TrainerControl()
        atomic.recover(output_dir)
        self.before_training()
        if found := find_checkpoint(output_dir, resume):
            state = self.state = resume_checkpoint(found, self.updater, self.plan)
            rotate(found, args.save_total_limit, state.best_model_checkpoint)  # what ended the run before may have kept it from this
        log_file = output_dir / "log.jsonl"
        atomic.write_bytes(log_file, "".join(_line(row) for row in state.log_history).encode())  # rows after the checkpoint go
        first = state.global_step
        guard = TrainingGuard(self.model, allow=args.allow_untrained or first > 0)  # it has to see the first updates
        self._call("on_train_begin")
        n_items = 0
        with progress_bar(self.plan.total_steps, label=type(self).__name__.removesuffix("Trainer"), unit="step", done=first,
                          show=not args.disable_tqdm) as bar, atomic.appending(log_file) as log:
            for step, micros in self._updates(first):
                if step % self.plan.steps_per_epoch == 0:
                    self._call("on_epoch_begin")
                self._call("on_step_begin")
                entry = self._update(step, micros, guard, log)
                n_items += sum(len(micro.items) for micro in micros)
                state.global_step, state.epoch = step + 1, round(self.plan.epoch_of(step + 1), 4)
                bar.update()
                if entry is not None:
                    state.window.append(entry)
                    state.total_loss += entry["loss"]
                    bar.set_postfix(loss=f"{entry['loss']:.4f}", refresh=False)
                self._after_step(log)
                if self.control.should_training_stop or terminated():
                    break
        if stopped := terminated():
            is_saved = state.global_step == first or self.control.should_save
            checkpoint = output_dir / f"checkpoint-{state.global_step}" if is_saved else self._save()
        updates = self.updater.n_updates
        if self.updater.groups.order:
            guard.at_end(updates)
        if args.load_best_model_at_end and state.best_model_checkpoint is not None and not stopped:
            load_weights(Path(state.best_model_checkpoint), self.updater)
        self.save_state()
        self._call("on_train_end")
        if stopped:
            raise Terminated(checkpoint)
        seconds = time.monotonic() - started
        done = state.global_step - first
        mean = state.total_loss / updates if updates else float("nan")
        return TrainOutput(state.global_step, mean, {
            "train_runtime": seconds, "train_samples_per_second": n_items / seconds, "train_steps_per_second": done / seconds, "train_loss": mean})

    def _updates(self, first: int) -> Iterator[tuple[int, list[Micro]]]:
        """Micro-batches of every update, built ahead by threads (results do not depend on how many)."""
        workers = self.args.dataloader_num_workers
        steps = range(first, self.plan.total_steps)
        if workers == 0:
            for step in steps:
                yield step, [self.objective.collate(self.train_dataset, items) for items in self.plan.update(step)]
            return
        pool = ThreadPoolExecutor(workers, thread_name_prefix="loader")
        ahead: list[tuple[int, list[Future[Micro]]]] = []
        try:
            for step in steps:
                ahead.append((step, [pool.submit(self.objective.collate, self.train_dataset, items) for items in self.plan.update(step)]))
                if len(ahead) > 2:
                    number, futures = ahead.pop(0)
                    yield number, [future.result() for future in futures]
            for number, futures in ahead:
                yield number, [future.result() for future in futures]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # nobody waits for a batch that an exception made useless

    def _update(self, step: int, micros: list[Micro], guard: TrainingGuard, log: Any) -> dict[str, Any] | None:
        """One update; None if it was skipped because a number was not finite."""
        try:
            entry = self.updater.gradients(step, micros)
            guard.after_backward(step, self.plan.total_steps)
            return {**entry, **self.updater.apply(step, micros)}
        except NumericsError as error:
            if self.args.nan_policy == "stop":
                raise
            epoch = round(self.plan.epoch_of(step + 1), 4)
            self._record({"skipped": str(error), "sample_ids": error.sample_ids, "epoch": epoch, "step": step + 1}, log)
            self.updater.skip(error)
            return None

    def _log(self, log: Any) -> None:
        """Means over the window for numbers of the loss, the last value for rates."""
        window, self.state.window = self.state.window, []
        last = window[-1]
        entry = {key: sum(row[key] for row in window) / len(window) for key in last
                 if key not in ("micro_batch_losses", "lr_groups", "learning_rate")}
        rate = last["learning_rate"]
        if self.args.hf_compat == "4.31":  # which logs the rate of the next update (spec D63)
            rate = self.groups.base_lr[0] * self.updater.schedule(self.state.global_step)
        entry |= {"learning_rate": rate, "epoch": self.state.epoch, "step": self.state.global_step}
        self._record(entry, log)
        self._call("on_log", logs=entry)

    def _record(self, entry: dict[str, Any], log: Any) -> None:
        self.state.log_history.append(entry)
        log.write(_line(entry))

    def _due(self, strategy: str, steps: str) -> bool:
        if strategy == "epoch":
            return self.state.global_step % self.plan.steps_per_epoch == 0
        return strategy == "steps" and self.state.global_step % self.args.steps_of(steps, self.plan.total_steps) == 0

    def _after_step(self, log: Any) -> None:
        args, state, control = self.args, self.state, self.control
        at_an_end = state.global_step == self.plan.total_steps or (args.logging_first_step and state.global_step == 1)
        control.should_log = at_an_end or self._due(args.logging_strategy, "logging_steps")
        control.should_save = self._due(args.save_strategy, "save_steps")
        control.should_evaluate = self._due(args.eval_strategy, "eval_steps")
        self._call("on_step_end")
        if state.global_step % self.plan.steps_per_epoch == 0:
            self._call("on_epoch_end")
        if control.should_log and state.window:
            self._log(log)
        if control.should_evaluate:
            metrics = self.evaluate()
            entry = {**metrics, "epoch": state.epoch, "step": state.global_step}
            self._record(entry, log)
            self._call("on_log", logs=entry)
            if args.metric_for_best_model is not None and is_better(args, value := metric_of(args, metrics), state.best_metric):
                state.best_metric, state.best_global_step = value, state.global_step
                control.should_save |= args.save_strategy == "best"
        if control.should_save:
            self._save()

    def _save(self) -> Path:
        state, output_dir = self.state, Path(self.args.output_dir)
        if state.best_global_step == state.global_step:
            state.best_model_checkpoint = str(output_dir / f"checkpoint-{state.global_step}")
        checkpoint = save_checkpoint(output_dir, self.updater, state, self.plan)
        rotate(checkpoint, self.args.save_total_limit, state.best_model_checkpoint)
        self._call("on_save")
        return checkpoint

    def _call(self, hook: str, **kwargs: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self.args, self.state, self.control, model=self.model, **kwargs)

    # ---- evaluation and saving ---------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
        """eval_loss and the objective's metrics (``eval_`` prefix), weighted over the data set; then `compute_metrics`."""
        dataset = self.eval_dataset if eval_dataset is None else self._dataset_of(eval_dataset)
        if dataset is None:
            raise ConfigError("an evaluation needs data: pass eval_dataset", field="eval_dataset")
        total, weight = 0.0, 0
        sums: dict[str, float] = {}
        size = self.args.per_device_eval_batch_size
        for start in range(0, len(dataset), size):
            items = [(item, 0) for item in range(start, min(start + size, len(dataset)))]
            micro = self.objective.collate(dataset, items)
            with explained("evaluation", micro, self.model):
                loss, n, values = self.objective.evaluate(micro)
            total, weight = total + loss, weight + n
            for key, value in values.items():
                sums[key] = sums.get(key, 0.0) + n * value
        metrics = {"eval_loss": total / weight, **{f"eval_{key}": value / weight for key, value in sums.items()}}
        if self.compute_metrics is not None:
            metrics.update(self.compute_metrics(self))
        self._call("on_evaluate", metrics=metrics)
        return metrics

    def save_model(self, output_dir: str | None = None) -> None:
        """The model's files, as the original's scripts leave them (see `train.output`)."""
        with run_lock(atomic.make_directory(output_dir or self.args.output_dir)) as target, atomic.atomic_directory(target) as temporary:
            write_model(temporary, self.model, self.args)

    def save_state(self) -> None:
        """trainer_state.json in the output directory, with transformers' fields; `train` does it at its end."""
        atomic.write_bytes(Path(self.args.output_dir) / STATE_FILE, state_json(self.state, self.args, self.plan).encode())


def _plan(args: TrainingArguments, dataset: Any) -> Plan:
    grouping: Grouping = "length" if args.group_by_length else "modality_length" if args.group_by_modality_length else ""
    lengths = getattr(dataset, "lengths" if grouping == "length" else "modality_lengths", None) if grouping else None
    return Plan(len(dataset), args.per_device_train_batch_size, args.gradient_accumulation_steps, args.num_train_epochs, args.max_steps,
                args.seed if args.data_seed is None else args.data_seed, args.hf_compat, args.shuffle, args.dataloader_drop_last, grouping, lengths)


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, sort_keys=True) + "\n"
