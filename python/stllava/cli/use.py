"""`stllava chat DIR` and `stllava generate ...`: a checkpoint answers, a person or a file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from stllava.errors import StllavaError

from .flags import Verbs, add_fields, load_model, loading_flags, model_flags, take_fields, template_for

if TYPE_CHECKING:
    import numpy as np

    from stllava.chat import ChatSession
    from stllava.model import LlavaModel

__all__ = ["VERBS"]

HELP = """/image FILE   shows a picture with what you say next
/reset        forgets the conversation; the picture is shown again
/help         this
/exit         ends it, as Ctrl-D does; Ctrl-C ends an answer, which stays as far as it came"""


def _decoding_flags(parser: argparse.ArgumentParser) -> None:
    from stllava.generation import DecodingSettings
    add_fields(parser, DecodingSettings, skip=("stop",))
    parser.add_argument("--stop", nargs="+", default=(), metavar="TEXT", help="texts that end an answer, besides the template's")
    parser.add_argument("--seed", type=int, default=0, help="default 0: the same answers every time")
    parser.add_argument("--conv_mode", default=None, help="conversation template; default: what the checkpoint seems to be made with")


def _decoding(args: argparse.Namespace) -> dict[str, Any]:
    from stllava.generation import DecodingSettings
    return take_fields(args, DecodingSettings) | {"stop": tuple(args.stop)}


# ---- chat --------------------------------------------------------------------------------------------------------------------


def add_chat(parser: argparse.ArgumentParser) -> None:
    """Talk with a checkpoint, about pictures or without; reads lines from the terminal or a pipe."""
    parser.epilog = "Lines that begin with a slash: " + HELP.replace("\n", "; ")
    parser.add_argument("model_name_or_path", metavar="DIR", help="checkpoint directory")
    loading_flags(parser)
    parser.add_argument("--image", "--image_file", default=None,
                        help="a picture to begin with; of a DICOM or NIfTI file also FILE#frame=N or FILE#axis=2&slice=N")
    _decoding_flags(parser)


def run_chat(args: argparse.Namespace) -> int:
    model = load_model(args)
    session = model.chat_session(template_for(args, model), seed=args.seed, **_decoding(args))
    terminal = sys.stdin.isatty()
    if terminal:
        print(HELP, file=sys.stderr)
    talk = _Talk(model, session)
    if args.image is not None:
        talk.show(args.image)
    for line in _lines("> " if terminal else None):
        if line.strip() == "/exit":
            break
        try:
            talk.take(line)
        except (StllavaError, OSError, ValueError, MemoryError) as error:
            print(f"stllava chat: {str(error) or 'out of memory'}", file=sys.stderr, flush=True)
            talk.failed = True
    return 1 if talk.failed and not terminal else 0


def _lines(prompt: str | None) -> Iterator[str]:
    """What is typed, with editing and the lines before (never kept in a file: people ask about patients), or what comes through a pipe."""
    if prompt is None:
        yield from sys.stdin
        return
    with suppress(ImportError):
        import readline  # noqa: F401 - `input` then uses it
    while True:
        try:
            yield input(prompt)
        except EOFError:
            print()
            return


class _Talk:
    """The conversation of `run_chat`, line by line."""

    def __init__(self, model: LlavaModel, session: ChatSession) -> None:
        self.model, self.session, self.failed = model, session, False
        self._picture: np.ndarray | None = None
        self._pending = False  # the picture goes with what is said next

    def show(self, file: str) -> None:
        from stllava.data.image_store import open_picture
        self._picture, self._pending = self.model.pixels([open_picture(file)])[0], True

    def take(self, line: str) -> None:
        line = line.strip()
        word, _, rest = line.partition(" ")
        if word == "/image" and rest.strip():
            self.show(rest.strip())
        elif word == "/reset" and not rest:
            self.session.reset()
            self._pending = self._picture is not None
        elif word.startswith("/"):
            print(HELP, file=sys.stderr)
            if word != "/help":
                raise ValueError(f"{line[:60]!r} is no command")
        elif line:
            self._answer(line)

    def _answer(self, text: str) -> None:
        try:
            reply = self.session.send(text, [self._picture] if self._pending and self._picture is not None else [])
            self._pending = False
            for piece in reply:
                print(piece, end="", flush=True)
            print(flush=True)
        except KeyboardInterrupt:
            print(flush=True)
            print("stllava chat: interrupted; what was said stays", file=sys.stderr, flush=True)


# ---- generate ----------------------------------------------------------------------------------------------------------------


def add_generate(parser: argparse.ArgumentParser) -> None:
    """Answer a question file (LLaVA's model_vqa): JSON lines in, JSON lines out, continued if the answers file exists."""
    model_flags(parser)
    parser.add_argument("--question_file", required=True, help="JSON lines (or a JSON list) of {question_id, image, text}")
    parser.add_argument("--image_folder", default=None, help="where the images are, a folder or an archive; questions without an image need none")
    parser.add_argument("--answers_file", required=True, help="JSON lines of {question_id, prompt, text, answer_id, model_id, metadata}")
    parser.add_argument("--num_chunks", type=int, default=1)
    parser.add_argument("--chunk_idx", type=int, default=0)
    parser.add_argument("--num_beams", type=int, default=1, help="1 only")
    parser.add_argument("--feature_cache", default=None, metavar="DIR", help="keep the images' features there, and do not compute those it has")
    parser.add_argument("--batch_size", type=int, default=16, help="questions answered together; those of one image stay together")
    _decoding_flags(parser)


def run_generate(args: argparse.Namespace) -> int:
    from stllava.conv_mode import model_name_of
    from stllava.data.chunks import get_chunk
    from stllava.data.records import read_records
    from stllava.evaluate.answers import KNOWN_FIELDS, answer_questions, read_questions
    from stllava.feature_cache import FeatureCache
    if args.num_beams != 1:
        raise ValueError(f"--num_beams is {args.num_beams}: there is no beam search, want 1 (greedy with --temperature 0, else sampling)")
    if args.batch_size < 1:
        raise ValueError(f"--batch_size is {args.batch_size}, want at least 1")
    records = read_records(args.question_file)
    questions = get_chunk(read_questions(records, args.question_file), args.num_chunks, args.chunk_idx)
    unknown = sorted({field for record in records for field in record} - KNOWN_FIELDS)
    if unknown:
        print(f"stllava generate: {args.question_file}: fields not used: {', '.join(unknown[:20])}", file=sys.stderr)
    image_of = _images_in(args.image_folder, [question.image for question in questions if question.image is not None])
    model = load_model(args)
    cache = FeatureCache(args.feature_cache, model) if args.feature_cache is not None else None
    rows = answer_questions(model, questions, image_of, template=template_for(args, model), batch_size=args.batch_size, out=args.answers_file,
                            feature_cache=cache, label="generate", model_id=model_name_of(args.model_name_or_path), seed=args.seed, **_decoding(args))
    print(f"{len(rows)} answers in {args.answers_file}")
    return 0


def _images_in(folder: str | None, names: list[str]) -> Callable[[str], Any]:
    """Name -> picture, after a look that all are there: hours of answers should not end at a missing file."""
    from stllava.data.image_store import ImageStore
    from stllava.image_source import shown_name
    if folder is None and names:
        raise ValueError(f"{len(names)} questions have an image, the first {shown_name(names[0])!r}; give --image_folder")
    store = ImageStore(folder)
    sources = {name: store.source(name) for name in dict.fromkeys(names)}
    if missing := [shown_name(f"{folder}/{name}") for name in sources if not store.exists(name)]:
        raise ValueError(f"{len(missing)} of {len(sources)} image files are missing: {', '.join(missing[:10])}{', ...' if len(missing) > 10 else ''}")
    return sources.__getitem__


VERBS: Verbs = {"chat": (add_chat, run_chat), "generate": (add_generate, run_generate)}
