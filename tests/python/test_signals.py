"""Signals: Ctrl-C ends a long step early, SIGTERM ends a run after a checkpoint, and neither loses anything.

Each test sends a signal to a child, which sets its handlers itself: the background job of a shell starts with SIGINT ignored.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")

# A model whose passes take seconds. `interrupted(call)` sends SIGINT `delay` seconds after the call began and returns for how long it went on.
SLOW = """
import os, signal, sys, threading, time
sys.path.insert(0, sys.argv[1])
from tiny_core import *
signal.signal(signal.SIGINT, signal.default_int_handler)
decoder = {**DECODER, "n_layers": 2, "hidden_size": 256, "head_dim": 64, "intermediate_size": 1024}
model = tiny(decoder=decoder, projector={**PROJECTOR, "out_size": 256})
stllava_c.set_num_threads(2)
model.set_trainable(["model.embed_tokens.weight"])
run, batch, small = stllava_c.Run(model), text_batch(model, tuple(np.arange(12000) % 128)), text_batch(model)

def interrupted(call, delay=0.2):
    def send():
        times.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)
    times = []
    timer = threading.Timer(delay, send)
    timer.start()
    try:
        call()
    except KeyboardInterrupt:
        return time.monotonic() - times[0]
    sys.exit("the call came to its end first")


def refused(call):
    try:
        call()
    except stllava_c.Error as error:
        return error.code == "state"
    return False
"""


def child(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent), *arguments], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_interrupt_ends_a_long_pass():
    """12,000 rows: seconds on two cores. Control is back within half a second on an idle machine; here, others may be computing. That a pass ended
    early is seen from what it left: nothing."""
    child(SLOW + """
want = run.forward(small)
assert interrupted(lambda: run.forward(batch, train=True)) < 2
assert refused(lambda: run.logits([0]))
np.testing.assert_array_equal(run.forward(small), want)
assert interrupted(lambda: stllava_c.Generator(model, batch, max_new_tokens=4)) < 2
generator = stllava_c.Generator(model, small, max_new_tokens=2)
assert interrupted(lambda: generator.extend(batch, keep_rows=3, max_new_tokens=1)) < 2
assert (generator.n_rows, generator.n_active) == (3, 0)
generator.extend(text_batch(model, (9,)), keep_rows=3, max_new_tokens=1)
np.testing.assert_array_equal(generator.logits(), stllava_c.Generator(model, small, max_new_tokens=2).logits())

middle = text_batch(model, tuple(np.arange(6000) % 128))
logp = run.forward(middle, train=True)
assert interrupted(lambda: run.backward(np.ones_like(logp)), delay=0.1) < 2
assert not model.grad.numpy().any()  # the embedding's gradient comes last
assert refused(lambda: run.backward(np.ones_like(logp)))
model.zero_grad()
logp = run.forward(small, train=True)
run.backward(np.ones_like(logp))
assert np.isfinite(model.grad.numpy()).all()
""")


def test_a_handler_runs_inside_a_call_and_cannot_use_its_model():
    child(SLOW + """
seen = []
generator = stllava_c.Generator(model, small, max_new_tokens=4)

def handler(number, frame):
    for use in (lambda: run.forward(small), lambda: model.theta, model.close, generator.step, generator.close):
        try:
            use()
        except stllava_c.Error as error:
            seen.append(error.code)
    other = tiny()
    seen.append(stllava_c.Run(other).forward(text_batch(other)).shape)

signal.signal(signal.SIGUSR1, handler)
middle = text_batch(model, tuple(np.arange(4000) % 128))
threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGUSR1)).start()
calls = 0
while not seen:
    logp = run.forward(middle)
    calls += 1
assert seen == ["state"] * 5 + [(3,)], seen
np.testing.assert_array_equal(run.forward(middle), logp)
""")


# A training run on the tiny model. `at(step, what)` calls back when that many updates are done; `finish()` trains, and prints how it ended.
TRAIN = """
import os, signal, sys, threading, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from kill_worker import *
from stllava.train.callbacks import TrainerCallback
from stllava.train.terminate import Terminated
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
folder = Path(sys.argv[2])
images = folder / "images"
if not images.is_dir():
    images.mkdir()
    write_pictures(images, 5)

class At(TrainerCallback):
    def __init__(self, step, number):
        self.step, self.number = step, number
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)

def trainer(out, *callbacks, **settings):
    model = model_for(dropout=0.2)
    data = SFTDataset(sft_records(sorted(path.name for path in images.iterdir())), model.tokenizer, model.image_processor, image_folder=images,
                      tokens_per_image=model.core.tokens_per_image)
    return SFTTrainer(model, SFTConfig(str(folder / out), max_steps=6, per_device_train_batch_size=2, learning_rate=5e-3, logging_steps=4,
                                       disable_tqdm=True, resume_from_checkpoint="auto", **settings), data, callbacks=callbacks)

def bytes_of(out):
    return (folder / out / "log.jsonl").read_bytes(), model_bytes[out]

def finish(out, **settings):
    t = trainer(out, **settings)
    assert t.train().global_step == 6
    model_bytes[out] = t.model.core.theta.numpy().tobytes() + t.updater.exp_avg_sq.tobytes()

model_bytes = {}
"""


def test_sigterm_saves_at_the_end_of_the_step_and_ends_with_143(tmp_path):
    code = TRAIN + """
trainer("out", At(3, signal.SIGTERM)).train()
print("not reached")
"""
    done = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (143, ""), done.stderr
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]
    child(TRAIN + """
finish("out")
finish("whole")
assert bytes_of("out") == bytes_of("whole")

# the handler before is back, however training ended; the exception says where to go on
def mine(number, frame): ...
signal.signal(signal.SIGTERM, mine)
try:
    trainer("again", At(2, signal.SIGTERM), save_strategy="steps", save_steps=2).train()
except Terminated as stop:
    assert stop.code == 143 and stop.checkpoint == folder / "again" / "checkpoint-2", stop
assert signal.getsignal(signal.SIGTERM) is mine
finish("again")
assert signal.getsignal(signal.SIGTERM) is mine and bytes_of("again") == bytes_of("whole")

# where the process ignores SIGTERM, and beside the main thread, training leaves the signal alone
signal.signal(signal.SIGTERM, signal.SIG_IGN)
t = trainer("ignored", At(2, signal.SIGTERM))
assert t.train().global_step == 6 and signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
thread = threading.Thread(target=lambda: finish("thread"))
thread.start()
thread.join()
assert bytes_of("thread") == bytes_of("whole")
""", str(tmp_path))


def test_a_run_interrupted_in_a_step_goes_on_as_if_nothing_had_happened(tmp_path):
    """Ctrl-C comes while the third update computes: in the middle of its second forward."""
    child(TRAIN + """
t = trainer("out", save_strategy="steps", save_steps=1)
real, calls = t.objective.step, []

def step(micro, micros, number):
    calls.append(number)
    if number == 2:
        os.kill(os.getpid(), signal.SIGINT)  # handled inside the core, or at the next byte code
    return real(micro, micros, number)

t.objective.step = step
try:
    t.train()
    sys.exit("not interrupted")
except KeyboardInterrupt:
    assert calls[-1] == 2
assert not list((folder / "out").glob(".*")), "the lock and all partial files are gone"
finish("out")
finish("whole")
assert bytes_of("out") == bytes_of("whole")
""", str(tmp_path))


def test_ctrl_c_ends_an_answer_and_not_the_chat(tmp_path):
    """It comes in the middle of a step of the second answer, whose words so far are part of what the third turn sees; without an answer it ends all."""
    said = child("""
import contextlib, io, os, signal, sys
sys.path.insert(0, sys.argv[1])
from talking import talking_model
import stllava_c
from stllava import cli
signal.signal(signal.SIGINT, signal.default_int_handler)
model = talking_model()
model.save_pretrained(sys.argv[2])
real, steps = stllava_c.Generator, []

class Generator:
    def __init__(self, *args, **options):
        self.core = real(*args, **options)
    def __getattr__(self, name):
        return getattr(self.core, name)
    def step(self):
        steps.append(1)
        if len(steps) == 4 + 3:
            os.kill(os.getpid(), signal.SIGINT)
        return self.core.step()

stllava_c.Generator = Generator
sys.stdin = io.StringIO("What is it?\\nWhy?\\nAnd now?\\n")
with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()) as out:
    assert cli.main(["chat", sys.argv[2], "--max_new_tokens", "4"]) == 0
first, second, third = out.getvalue().splitlines()
assert "interrupted; what was said stays" in err.getvalue()
assert (len(first.split()), len(second.split())) == (4, 2), out.getvalue()
talk = [("user", "What is it?"), ("assistant", first), ("user", "Why?"), ("assistant", second), ("user", "And now?")]
assert third == model.chat([{"role": role, "content": text} for role, text in talk], max_new_tokens=4)

class Stdin(io.StringIO):
    def __iter__(self):
        os.kill(os.getpid(), signal.SIGINT)
        yield "never"
sys.stdin = Stdin()
with contextlib.redirect_stderr(io.StringIO()) as err:
    assert cli.main(["chat", sys.argv[2]]) == 130
print(err.getvalue())
""", str(tmp_path / "model"))
    assert said.strip() == "stllava: interrupted"


def test_ctrl_c_in_generate_and_eval_keeps_what_was_answered(tmp_path):
    """It comes in the middle of the third batch; the same command then goes on, and its files are those of a run that nothing disturbed."""
    child("""
import contextlib, io, json, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from talking import picture, talking_model
import stllava_c
from stllava import cli
signal.signal(signal.SIGINT, signal.default_int_handler)
folder = Path(sys.argv[2])
os.chdir(folder)
talking_model().save_pretrained("model")
for i in range(4):
    picture(i).save(f"{i}.png")
items = [{"id": i, "image": f"{i % 4}.png", "answer_type": "CLOSED" if i % 2 else "OPEN", "conversations": [
    {"from": "human", "value": f"<image> Question {i}?"}, {"from": "gpt", "value": "the lung"}]} for i in range(12)]
Path("items.json").write_text(json.dumps(items))
real, made, at = stllava_c.Generator, [], [3]

class Generator:
    def __init__(self, *args, **options):
        made.append(1)
        self.core = real(*args, **options)
    def __getattr__(self, name):
        return getattr(self.core, name)
    def step(self):
        if len(made) == at[0]:
            os.kill(os.getpid(), signal.SIGINT)
        return self.core.step()

stllava_c.Generator = Generator
common = ["--batch_size", "3", "--max_new_tokens", "4", "--image_folder", "."]
for words, file in ((["generate", "--model_path", "model", "--question_file", "items.json", *common, "--answers_file", "OUT.jsonl"], "OUT.jsonl"),
                    (["eval", "model", "--question_file", "items.json", *common, "--out", "OUT"], "OUT/answers.jsonl")):
    def run(name):
        made.clear()
        with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
            return cli.main([word.replace("OUT", name) for word in words]), said.getvalue()
    at[0] = 3
    code, said = run(f"{words[0]}-1")
    assert code == 130 and "stllava: interrupted" in said, (code, said)
    one, two = (Path(file.replace("OUT", f"{words[0]}-{n}")) for n in (1, 2))
    assert len(one.read_text().splitlines()) == 6
    at[0] = 0
    assert run(f"{words[0]}-1")[0] == 0 and len(made) == 2, made
    assert run(f"{words[0]}-2")[0] == 0 and len(made) == 4, made
    assert one.read_bytes() == two.read_bytes()
""", str(tmp_path))


def test_the_command_line_says_how_it_ended(tmp_path):
    child(TRAIN + """
import contextlib, io
from stllava import cli
from stllava.train import loop, sft
from stllava.train.terminate import TERMINATED
model = model_for(0)
model.save_pretrained(folder / "model")
(folder / "data.json").write_text(json.dumps(sft_records(sorted(path.name for path in images.iterdir()))))
words = ["sft", "--model_name_or_path", str(folder / "model"), "--data_path", str(folder / "data.json"), "--image_folder", str(images),
         "--output_dir", str(folder / "out"), "--max_steps", "4", "--disable_tqdm", "--lora_enable", "--resume_from_checkpoint", "auto"]
real = loop.Trainer._after_step

def after_step(self, log):
    real(self, log)
    if self.state.global_step == 2:
        os.kill(os.getpid(), send)

loop.Trainer._after_step = after_step
for send, code, text in ((signal.SIGTERM, 143, "checkpoint-2"), (signal.SIGINT, 130, "interrupted")):
    if send == signal.SIGINT:
        words[words.index("--output_dir") + 1] = str(folder / "other")
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert cli.main(words) == code
    assert text in said.getvalue(), said.getvalue()
loop.Trainer._after_step = real
words[words.index("--output_dir") + 1] = str(folder / "out")
assert cli.main(words) == 0
""", str(tmp_path))
