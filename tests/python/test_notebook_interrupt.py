"""The stop button of a notebook: a kernel is interrupted in the middle of long work, control is back, and nothing is lost."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from jupyter_client.manager import KernelManager

import stllava_c

if stllava_c.build_info()["sanitizers"]:
    pytest.skip("under AddressSanitizer the kernel takes long to start; test_signals sends the same signals", allow_module_level=True)

SECONDS = 5
"""Control has to be back by then. On the quiet machine it took 0.1 to 0.4 s, the data check's processes included (`-s` prints it); with ten other busy
processes on two cores up to 2 s, and where the suite runs others may be computing."""

SETUP = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import numpy as np
from tiny import sft_records, tiny_model, write_pictures
from stllava import LoraConfig, SFTConfig, SFTDataset, SFTTrainer, answer_questions, ask, AskSettings
names = write_pictures(Path("."), 4)
model = tiny_model()
"""


class Kernel:
    def __init__(self, folder: Path, sockets: str) -> None:
        self.manager = KernelManager(kernel_name="python3", transport="ipc", ip=f"{sockets}/kernel")
        self.manager.start_kernel(cwd=str(folder), env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)})
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=120)

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)

    def run(self, code: str, on_text=lambda text: None) -> tuple[dict, str]:
        """The reply to a cell, and what it printed."""
        said = []

        def hook(message):
            if message["msg_type"] == "stream":
                said.append(message["content"]["text"])
                on_text("".join(said))

        reply = self.client.execute_interactive(code, output_hook=hook, timeout=120)
        return reply["content"], "".join(said)

    def check(self, code: str) -> str:
        reply, said = self.run(code)
        assert reply["status"] == "ok", "\n".join(reply["traceback"])
        return said

    def interrupted(self, code: str, delay: float = 0.3) -> float:
        """Seconds from the interrupt to the end of a cell that would go on; the interrupt comes `delay` seconds after it printed READY."""
        sent = []

        def interrupt():
            sent.append(time.monotonic())
            self.manager.interrupt_kernel()

        def on_text(text):
            if "READY" in text and not timer.is_alive() and not sent:
                timer.start()

        timer = threading.Timer(delay, interrupt)
        reply, _ = self.run(code, on_text)
        took = time.monotonic() - sent[0]
        assert (reply["status"], reply.get("ename")) == ("error", "KeyboardInterrupt"), reply
        print(f"control was back after {took:.3f} s", file=sys.stderr)
        return took


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    with tempfile.TemporaryDirectory() as sockets:
        kernel = Kernel(tmp_path_factory.mktemp("kernel"), sockets)
        try:
            kernel.check(SETUP)
            yield kernel
        finally:
            kernel.close()


def test_training_goes_on_to_the_same_weights(kernel):
    """The third update repeats its step for ever, so that the interrupt comes inside one; the same trainer then resumes."""
    kernel.check("""
def trainer(out):
    model = tiny_model()
    model.add_lora(LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1))
    data = SFTDataset.for_model(model, sft_records(names), image_folder=".")
    return SFTTrainer(model, SFTConfig(out, max_steps=6, per_device_train_batch_size=2, learning_rate=5e-3, save_strategy="steps", save_steps=1), data)

first = trainer("interrupted")
step = first.objective.step
def endless(micro, micros, number):
    while number == 2:
        print("READY", flush=True)
        for _ in range(1000):
            step(micro, micros, number)
    return step(micro, micros, number)
first.objective.step = endless
""")
    assert kernel.interrupted("first.train()") < SECONDS
    said = kernel.check("""
first.objective.step = step
print(sorted(path.name for path in Path("interrupted").iterdir()))
again = first.train(resume_from_checkpoint="auto")
whole = trainer("whole")
whole.train()
assert again.global_step == 6
np.testing.assert_array_equal(first.model.theta, whole.model.theta)
assert Path("interrupted/log.jsonl").read_bytes() == Path("whole/log.jsonl").read_bytes()
""")
    assert "['checkpoint-1', 'checkpoint-2', 'log.jsonl']" in said


def test_generation_leaves_a_model_that_answers_as_before(kernel):
    kernel.check("""
def said():
    return model.generate(["<image>\\nWhat?"], [names[0]], max_new_tokens=8)[0][0].ids
before = said()
""")
    assert kernel.interrupted("""
print("READY", flush=True)
while True:
    model.generate(["<image>\\nWhat?"] * 8, names * 2, max_new_tokens=400, min_new_tokens=400)
""") < SECONDS
    kernel.check("assert said() == before")


def test_an_evaluation_goes_on_where_it_stopped(kernel):
    kernel.check("""
items = [{"question_id": i, "image": names[i % 4], "text": f"Question {i}?"} for i in range(40)]
opened = []
def answers(out, image_of=lambda name: name, **settings):
    return answer_questions(model, items, image_of, out=out, batch_size=8, max_new_tokens=12, min_new_tokens=12, **settings)

def endless(name):
    opened.append(name)
    while len(opened) > 2:  # the third batch
        print("READY", flush=True)
        model.generate(["<image>\\nWhat?"] * 8, names * 2, max_new_tokens=400, min_new_tokens=400)
    return name
""")
    assert kernel.interrupted("answers('eval.jsonl', endless)") < SECONDS
    assert kernel.check("print(len(Path('eval.jsonl').read_text().splitlines()))").strip() == "10", "8 and 2 questions about the first picture"
    kernel.check("""
assert answers('eval.jsonl') == answers('fresh.jsonl')
assert Path('eval.jsonl').read_bytes() == Path('fresh.jsonl').read_bytes()
""")


def test_a_data_check_stops(kernel):
    """Enough rows for processes of its own, which end too."""
    kernel.check("""
import multiprocessing
from stllava.datacheck.check import CheckSettings, check_data
records = [{**record, "id": f"{i}-{j}"} for i in range(1200) for j, record in enumerate(sft_records(names))]
""")
    assert kernel.interrupted("""
print("READY", flush=True)
while True:
    check_data(records, ".", tokenizer=model.tokenizer, settings=CheckSettings(workers=2))
""", delay=2) < SECONDS
    assert kernel.check("print(multiprocessing.active_children())") == "[]\n"
