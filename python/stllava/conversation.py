"""Conversation templates: how a dialogue becomes the text the model reads.

A template is data (`Conversation`); its separator style names one of five renderers. A renderer returns *segments*, not
a string: each segment knows whether it is template text, somebody's words or a special token, and whether the model is
the one who writes it. `get_prompt` joins them; the label builder (`stllava.text.labels`) reads them. So labels never
depend on finding separators again in rendered text, which is how user text containing "ASSISTANT: " or "</s>" corrupts
labels in the original (spec D27, D57).

System texts are constants that checkpoints were trained on, byte for byte, including the missing space before "Also"
in `v1_sq`. Source: `llava/conversation.py` of LLaVA, LLaVA-Med 1.5 (`mistral_instruct`) and STLLaVA-Med (`v1_sq`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

from stllava.constants import DEFAULT_IMAGE_TOKEN
from stllava.errors import ConfigError, StllavaError

if TYPE_CHECKING:
    from stllava.text.interface import AnyTokenizer


class ConversationError(StllavaError, ValueError):
    """A dialogue does not fit its template: wrong roles, wrong order, an empty answer, a wrong number of images."""


class SeparatorStyle(Enum):
    """Which renderer a template uses; the names are LLaVA's."""

    SINGLE = "single"  # one separator after every message
    TWO = "two"  # `sep` after even messages, `sep2` after odd ones
    MPT = "mpt"  # as SINGLE, but the role's own text ends the tag
    PLAIN = "plain"  # texts without roles (projector pre-training)
    LLAMA_2 = "llama_2"  # [INST] ... [/INST], system text inside the first message


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a rendered dialogue.

    turn: index into `messages` of the person speaking, None for text of the template.
    special: the text is one special token of the tokenizer, written by the template and never by a user.
    target: the model itself writes this (an answer, a self-asked question, the token that ends either).
    """

    text: str
    turn: int | None = None
    special: bool = False
    target: bool = False


@dataclass(frozen=True)
class Conversation:
    """A template, and after `copy()` a dialogue written with it.

    roles: (user, assistant) or (user, assistant, virtual user who asks questions himself).
    messages: [role, text] pairs; text None or "" leaves the turn open for the model to continue.
    prompt_only: the original has a training rule for this template that is not implemented.
    version: LLaVA's own tag of the template family, kept for readers of LLaVA code; nothing here depends on it.
    """

    name: str
    system: str
    roles: tuple[str, ...]
    sep_style: SeparatorStyle
    sep: str
    sep2: str | None = None
    version: str = "Unknown"
    prompt_only: bool = False
    messages: list[list[str | None]] | tuple[()] = ()

    def copy(self) -> Conversation:
        """An independent dialogue with the same template and messages."""
        return replace(self, messages=[list(message) for message in self.messages])

    def append_message(self, role: str, text: str | None) -> None:
        """Add a turn. `role` is one of `roles`; text None opens the turn that the model is to write."""
        if not isinstance(self.messages, list):
            raise ConversationError(f"template {self.name}: call copy() first, the shared template takes no messages")
        if role not in self.roles:
            raise ConversationError(f"template {self.name}: role {role!r} is unknown, want one of {self.roles}")
        self.messages.append([role, text])

    def stop_strings(self) -> tuple[str, ...]:
        """Texts that end an answer besides the end token. Source: `stop_str` of LLaVA's `llava/serve/cli.py`."""
        end = self.sep if self.sep_style in (SeparatorStyle.SINGLE, SeparatorStyle.MPT) else self.sep2
        return (end,) if end and end not in _SPECIAL_SEPARATORS else ()

    def with_system(self, text: str) -> Conversation:
        """The same template with another system text, which no checkpoint has been trained with."""
        return replace(self.copy(), system=f"<|im_start|>system\n{text}" if self.sep_style is SeparatorStyle.MPT else text)

    def segments(self) -> list[Segment]:
        """The dialogue as it is put before the model for generation."""
        return _RENDERERS[self.sep_style](self)

    def training_segments(self) -> list[Segment]:
        """The dialogue as it is trained on. Differs from `segments` for SINGLE and PLAIN, as in the original."""
        if self.prompt_only:
            trainable = sorted(name for name, template in conv_templates.items() if not template.prompt_only)
            raise ConfigError(f"template {self.name} is for prompts only, train with one of {', '.join(trainable)}")
        return _TRAINING_RENDERERS.get(self.sep_style, _RENDERERS[self.sep_style])(self)

    def get_prompt(self) -> str:
        """The text of `segments`, without the leading begin-of-sequence token, which the tokenizer adds."""
        return "".join(segment.text for segment in self.segments())


def _said(turn: int, text: str, written: bool) -> list[Segment]:
    """A space and the words. The space belongs to the words: LLaMA pieces carry it in front ("▁Yes")."""
    return [Segment(" ", turn, target=written), Segment(text, turn, target=written)]


def _separator(text: str, target: bool = False) -> Segment:
    return Segment(text, special=text in _SPECIAL_SEPARATORS, target=target)


def _render_two(conv: Conversation) -> list[Segment]:
    assert conv.sep2 is not None
    segments = [Segment(conv.system + conv.sep)]
    for turn, (role, text) in enumerate(conv.messages):
        written = role != conv.roles[0]
        segments.append(Segment(f"{role}:"))
        if not text:
            continue
        ends_itself = role in conv.roles[2:] and text.endswith(conv.sep2)
        segments += _said(turn, text.removesuffix(conv.sep2) if ends_itself else text, written)
        if ends_itself:
            segments.append(_separator(conv.sep2, target=True))
        segments.append(_separator(conv.sep2, target=written) if turn % 2 else Segment(conv.sep))
    return segments


def _render_llama_2(conv: Conversation) -> list[Segment]:
    if conv.messages and (not conv.messages[0][1] or conv.messages[0][0] != conv.roles[0]):
        raise ConversationError(f"template {conv.name}: the first message must be a non-empty one of {conv.roles[0]}")
    assert conv.sep2 is not None
    segments: list[Segment] = []
    for turn, (_, text) in enumerate(conv.messages):
        if not text:
            continue
        if turn % 2 == 0:
            if turn > 0 and conv.sep:  # the first begin-of-sequence token comes from the tokenizer
                segments.append(_separator(conv.sep))
            segments.append(Segment("[INST] "))
            if turn == 0 and conv.system:
                segments.append(Segment(f"<<SYS>>\n{conv.system}\n<</SYS>>\n\n"))
            segments += [Segment(text, turn), Segment(" [/INST]")]
        else:
            segments += _said(turn, text, written=True)
            segments += [Segment(" ", target=True), _separator(conv.sep2, target=True)]
    return segments


def _render_single(conv: Conversation) -> list[Segment]:
    segments = [Segment(conv.system + conv.sep)]
    for turn, (role, text) in enumerate(conv.messages):
        segments.append(Segment(f"{role}:"))
        if text:
            written = role != conv.roles[0]
            segments += [*_said(turn, text, written), Segment(conv.sep, target=written)]
    return segments


def _render_mpt(conv: Conversation) -> list[Segment]:
    segments = [Segment(conv.system + conv.sep)]
    for turn, (role, text) in enumerate(conv.messages):
        segments.append(Segment(str(role)))
        if text:
            written = role != conv.roles[0]
            segments += [Segment(text, turn, target=written), Segment(conv.sep, target=written)]
    return segments


def _render_plain(conv: Conversation) -> list[Segment]:
    segments: list[Segment] = []
    for turn, (_, text) in enumerate(conv.messages):
        if text and turn % 2 == 1:
            raise ConversationError(f"template {conv.name}: turn {turn} has text, but nothing separates answers here")
        if text:
            segments += [Segment(text, turn), Segment(conv.sep)]
    return segments


def _render_single_training(conv: Conversation) -> list[Segment]:
    """LLaVA trains this style on lines "### Role: text\\n" although it generates with "###Role: text".

    The "###" that follows an answer is a target: it is what stops generation.
    """
    segments = [Segment(f"{conv.system}\n\n")]
    answered = False
    for turn, (role, text) in enumerate(conv.messages):
        segments += [Segment(conv.sep, target=answered), Segment(f" {role}:")]
        answered = role != conv.roles[0]
        segments += [*_said(turn, text or "", answered), Segment("\n", target=answered)]
    return [*segments, Segment(conv.sep, target=answered), Segment(" ")]


def _render_plain_training(conv: Conversation) -> list[Segment]:
    """The image and its caption; the question is dropped."""
    texts = [text or "" for _, text in conv.messages]
    if len(texts) != 2 or DEFAULT_IMAGE_TOKEN not in texts[0]:
        raise ConversationError(
            f"template {conv.name}: want two turns, the first with {DEFAULT_IMAGE_TOKEN}; found {len(texts)} turns"
        )
    return [
        Segment(DEFAULT_IMAGE_TOKEN, 0),
        Segment(texts[1], 1, target=True),
        Segment(conv.sep, target=True),
    ]


_RENDERERS: dict[SeparatorStyle, Callable[[Conversation], list[Segment]]] = {
    SeparatorStyle.SINGLE: _render_single,
    SeparatorStyle.TWO: _render_two,
    SeparatorStyle.MPT: _render_mpt,
    SeparatorStyle.PLAIN: _render_plain,
    SeparatorStyle.LLAMA_2: _render_llama_2,
}
_TRAINING_RENDERERS = {
    SeparatorStyle.SINGLE: _render_single_training,
    SeparatorStyle.PLAIN: _render_plain_training,
}

_SPECIAL_SEPARATORS = ("<s>", "</s>")

_SYSTEM_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_SYSTEM_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_SYSTEM_SELF_QUESTIONING = (
    _SYSTEM_USER + "Also, the artificial intelligence assistant is a curious virtual user. "
    "The virtual user asks complex questions that are relevant to the content in the image, for example, "
    "asking about background knowledge of the objects in the image, asking to discuss about events happening "
    "in the image, etc. Again, do not ask about uncertain details."
)
_SYSTEM_MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, and assist the user with a variety "
    "of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_SYSTEM_INSTRUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
_SYSTEM_MPT = (
    "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers."
)
_SYSTEM_LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
_SYSTEM_LLAVA_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


class _Registry(dict[str, Conversation]):
    """A dict whose unknown keys say which names exist."""

    def __missing__(self, name: str) -> Conversation:
        raise ConfigError(f"conversation template {name!r} is unknown, want one of {', '.join(sorted(self))}")


def _registry() -> _Registry:
    two, llama_2 = SeparatorStyle.TWO, SeparatorStyle.LLAMA_2
    v0 = Conversation("v0", _SYSTEM_HUMAN, ("Human", "Assistant"), SeparatorStyle.SINGLE, "###")
    v1 = Conversation("v1", _SYSTEM_USER, ("USER", "ASSISTANT"), two, " ", "</s>", "v1")
    v1_sq = replace(v1, name="v1_sq", system=_SYSTEM_SELF_QUESTIONING, roles=(*v1.roles, "VUSER"), version="v1_sq")
    llama = Conversation("llama_2", _SYSTEM_LLAMA_2, v1.roles, llama_2, "<s>", "</s>", "llama_v2")
    plain = Conversation("plain", "", ("", ""), SeparatorStyle.PLAIN, "\n")
    instruction, dolly_roles = ("Instruction", "Response"), ("### Instruction", "### Response")
    templates = (
        v0,
        replace(v0, name="llava_v0"),
        replace(v0, name="default"),
        v1,
        replace(v1, name="vicuna_v1"),
        replace(v1, name="llava_v1", system=_SYSTEM_HUMAN),
        v1_sq,
        llama,
        replace(llama, name="llava_llama_2", system=_SYSTEM_LLAVA_LLAMA_2),
        replace(llama, name="mistral_instruct", system="", sep=""),
        plain,
        replace(plain, name="v0_plain"),
        replace(plain, name="plain_qav", version="plain_qav", prompt_only=True),
        replace(v0, name="v0_mmtag", system=_SYSTEM_MMTAG, roles=instruction, version="v0_mmtag", prompt_only=True),
        replace(v1, name="v1_mmtag", system=_SYSTEM_MMTAG, version="v1_mmtag", prompt_only=True),
        Conversation("dolly", _SYSTEM_INSTRUCTION, dolly_roles, two, " ", "### End", "dolly", prompt_only=True),
        Conversation(
            "mpt", _SYSTEM_MPT, ("user", "assistant"), SeparatorStyle.MPT, "<|im_end|>", version="mpt", prompt_only=True
        ),
    )
    return _Registry((template.name, template) for template in templates)


conv_templates = _registry()
"""Name -> template. `copy()` a template before writing to it. An unknown name raises ConfigError (a ValueError)."""

default_conversation = conv_templates["v1"]


def as_template(template: str | Conversation) -> Conversation:
    """A template by name, or the template itself."""
    return conv_templates[template] if isinstance(template, str) else template


def check_template(template: str | Conversation, tokenizer: AnyTokenizer) -> None:
    """Raise ConfigError when dialogues of `template` cannot be trained on or generated with `tokenizer`.

    Two things must hold: each end separator is one special token, and a tag such as "ASSISTANT:" has known pieces of
    its own, so that none lies half in the tag and half in the words after it.
    """
    template = as_template(template)
    special = [text for text in (template.sep, template.sep2) if text in _SPECIAL_SEPARATORS]
    for text in special:
        if text not in tokenizer.special_ids:
            raise ConfigError(
                f"template {template.name}: {text!r} is not a special token of the tokenizer, which has "
                f"{sorted(tokenizer.special_ids)}; use the tokenizer the checkpoint was trained with"
            )
    if template.sep_style is SeparatorStyle.PLAIN:
        return
    if template.sep_style is SeparatorStyle.LLAMA_2:
        tags = ["[INST] x [/INST]"]
    else:
        tags = [f"{role}:" for role in template.roles]
    for tag in tags:
        for after_special in (False, True) if special else (False,):
            tag_ids, _ = tokenizer.encode_piecewise(tag, after_special)
            ids, _ = tokenizer.encode_piecewise(f"{tag} Yes", after_special)
            if ids[: len(tag_ids)] != tag_ids or tokenizer.unk_token_id in tag_ids:  # 'Yes' itself may be unknown
                raise ConfigError(
                    f"template {template.name}: the tokenizer joins the tag {tag!r} with the words after it or does not "
                    f"know it; ids {tag_ids} alone, {ids} in front of 'Yes'"
                )
