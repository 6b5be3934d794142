"""Our side of the benchmarks: `ours.py CASE`, a worker; a case of `cases.CASES`, `projector` or `picture`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import numpy as np
from cases import BETA, CASES, CLUSTER, IGNORE, IMAGE_TOKEN, LEARNING_RATE, MAX_GRAD_NORM, PICTURE, PICTURE_SIZE, Case
from worker import serve

import stllava_c
from stllava.checkpoint.names import lora_pair
from stllava.checkpoint.peft import LoraConfig
from stllava.images import ImageProcessor
from stllava.model import LlavaModel
from stllava.train.arguments import DPOConfig, SFTConfig
from stllava.train.dpo import DPOObjective
from stllava.train.groups import default_trainable, parameter_groups
from stllava.train.sft import SFTObjective
from stllava.train.update import Updater
from stllava.tree import Sequence


class CaseDataset:
    """A case as a data set of one item."""

    def __init__(self, case: Case) -> None:
        self.images = case.pixels()
        self.samples = [Sequence(np.concatenate([[IMAGE_TOKEN], s.ids]), np.concatenate([[IGNORE], s.labels]), (s.image,), i)
                        for i, s in enumerate(case.samples())]

    def __len__(self) -> int:
        return 1

    def sequences(self, item: int, epoch: int) -> list[Sequence]:
        return self.samples

    def pair(self, item: int, epoch: int) -> tuple[Sequence, Sequence]:
        chosen, rejected = self.samples
        return chosen, rejected

    def pixels(self, key: object) -> np.ndarray:
        return self.images[key]


def training_step(case: Case) -> Callable[[], float]:
    """The trainer's own update, without its log and its checkpoints; the value is the loss."""
    model = LlavaModel.from_pretrained(case.model.directory)
    adapters = {}
    for module, a, b in case.model.adapters():
        adapters.update(zip(lora_pair(module), (a, b), strict=True))
    targets = frozenset(name.rsplit(".", 1)[1] for name in case.model.linears())
    model.attach_lora(LoraConfig(r=case.model.rank, lora_alpha=2 * case.model.rank, target_modules=targets), adapters)

    settings = {"output_dir": "", "learning_rate": LEARNING_RATE, "max_grad_norm": MAX_GRAD_NORM, "lr_scheduler_type": "constant"}
    if case.kind == "dpo":  # the reference reads the policy's image features and has no adapters, as the peer's
        args = DPOConfig(**settings, beta=BETA, ref_image_features="policy", ref_adapters=False)
    else:
        args = SFTConfig(**settings)
    groups = parameter_groups(model, default_trainable(model), args)
    objective = DPOObjective(model, args) if case.kind == "dpo" else SFTObjective(model, args)
    updater = Updater(model, groups, objective, args, total_steps=10**6)
    micros = [objective.collate(CaseDataset(case), [(0, 0)])]

    def step() -> float:
        metrics = updater.gradients(updater.n_updates, micros)
        updater.apply(updater.n_updates)
        return metrics["loss"]

    return step


def projector_step() -> Callable[[], float]:
    """Forward and backward; the value is the root mean square of the input's gradient."""
    c = CLUSTER
    model = stllava_c.Model({"vision": None, "decoder": None, "projector": {
        "kind": "cluster", "depth": 1, "in_size": c.width, "out_size": c.out, "n_centers": c.centers, "n_rounds": c.rounds}})
    for name, array in c.tensors().items():
        model.bind(f"model.mm_projector.{name}", array)
    model.set_trainable([info.name for info in model.tensors() if info.bound])
    run = stllava_c.Run(model)
    x, dout = c.arrays()
    model.zero_grad()  # gradients are there before the first step, as the peer's

    def step() -> float:
        model.zero_grad()
        run.projector_forward(x, train=True)
        return float(np.sqrt(np.mean(np.square(run.projector_backward(dout)))))

    return step


def picture_step() -> Callable[[], float]:
    """Bytes of a file to what the tower reads; the value is the mean size of a number."""
    data, processor = PICTURE.read_bytes(), ImageProcessor(size=PICTURE_SIZE, aspect="pad")
    return lambda: float(np.abs(processor(data)).mean())


if __name__ == "__main__":
    stllava_c.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    other = {"projector": projector_step, "picture": picture_step}
    serve(other.get(sys.argv[1]) or (lambda: training_step(CASES[sys.argv[1]])))
