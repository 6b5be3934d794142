"""The closed list of what the check can find: one table, from which the screen, the page and the tests take theirs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

__all__ = ["KINDS", "SEVERITIES", "Finding", "Found", "Kind", "Severity"]

Severity: TypeAlias = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


class Kind(NamedTuple):
    """error: training refuses the row. warning: it trains, on something that is probably not meant. note: worth knowing."""

    severity: Severity
    means: str
    todo: str


KINDS: dict[str, Kind] = {
    # the file and its rows
    "file": Kind("error", "the data file cannot be read", "mend the file; nothing else was looked at"),
    "no_turns": Kind("error", "no dialogue where one belongs", "give every row a list of turns under 'conversations'"),
    "turn_shape": Kind("error", "a turn is not {'from': text, 'value': text}", "write every turn with both keys, values as text"),
    "role_unknown": Kind("error", "a turn is neither from 'human' nor from 'gpt'", "rename the role, or put its text into the question"),
    "role_order": Kind("error", "questions and answers do not alternate", "join neighbouring turns of one speaker, or split the row"),
    "starts_with_gpt": Kind("note", "the dialogue begins with an answer, which is left out", "nothing, if that answer is not needed"),
    "ends_with_question": Kind("error", "the last question has no answer", "remove it, or answer it"),
    "turn_empty": Kind("error", "a question or an answer without text", "remove the pair of turns"),
    "row_too_long": Kind("error", "a row has more characters than the limit", "split the row"),
    "field_unknown": Kind("note", "a field that nothing reads", "nothing; if it was meant to be read, look at its spelling"),
    "text_only": Kind("note", "some rows have no image", "nothing, if that is meant; such rows never ask themselves"),
    "answer_type": Kind("warning", "answer_type is neither OPEN nor CLOSED as it stands", "write OPEN or CLOSED"),
    "yes_no_case": Kind("note", "yes and no are written in several ways", "write them in one way: each is a target of its own"),
    # image markers and characters
    "marker_missing": Kind("error", "the row has an image, but no <image> says where", "put '<image>\\n' in front of the first question"),
    "marker_without_image": Kind("error", "<image> in a row without image", "give the row its image, or remove the marker"),
    "marker_place": Kind("error", "<image> outside the first question; with several images, in an answer",
                         "move it there; as literal text it cannot be trained on"),
    "marker_count": Kind("error", "several images, and not as many <image>", "give every image its marker, in the order of the images"),
    "marker_repeated": Kind("warning", "several <image> in the first question, one image", "leave one; training makes it one"),
    "special_token_text": Kind("warning", "the text of a control token in somebody's words",
                               "remove it, unless people wrote it: here it stays text, the original's tokenizer makes it a control token"),
    "role_tag_text": Kind("warning", "a role tag of the template in somebody's words",
                          "take two dialogues in one turn apart; the original's labels break at such a tag, ours do not"),
    "characters": Kind("warning", "replacement or control characters", "read the source with its right encoding, remove control characters"),
    "half_character": Kind("error", "half a surrogate pair, which is no character", "write the character whole, or remove it"),
    "mojibake": Kind("warning", "UTF-8 that was read as Windows-1252", "decode the source as UTF-8"),
    # ids and repetition
    "id_duplicate": Kind("warning", "two rows have one id", "make ids unique: self-questions are drawn by them, results are found by them"),
    "row_duplicate": Kind("warning", "two rows are the same", "remove one, unless its weight is meant"),
    "answers_conflict": Kind("warning", "one image, one question, different answers", "look which is right"),
    # tokens
    "answer_cut": Kind("warning", "the end of an answer lies behind the limit", "raise --model_max_length, or shorten the row"),
    "answer_lost": Kind("warning", "whole answers lie behind the limit", "raise --model_max_length, or split the row"),
    "no_target": Kind("error", "no target is left before the limit", "raise --model_max_length, or shorten the question"),
    "image_cut": Kind("error", "the image lies behind the limit", "put the image in front, shorten the question"),
    "original_mismatch": Kind("warning", "the original masks this row whole (\"tokenization mismatch\"); here it trains",
                              "remove control tokens and role tags from the text if the original's result must be met"),
    "original_labels": Kind("warning", "the original would train on other tokens of this row", "as above; --show ROW shows ours"),
    "conversation": Kind("error", "the template cannot hold this row", "see the text"),
    # pairs
    "pair_side": Kind("error", "one side of a pair is missing", "give chosen_conversations and reject_conversations"),
    "pair_prompt": Kind("error", "the two sides answer different prompts", "make all turns but the last the same"),
    "pair_same": Kind("error", "both sides give the same answer", "remove the pair"),
    "pair_same_normalised": Kind("warning", "the two answers differ in case, punctuation or white space only",
                                 "remove the pair, unless form is what it teaches"),
    "pair_length": Kind("warning", "one answer is many times longer than the other", "look whether length is all that the pair teaches"),
    # pictures
    "image_name": Kind("error", "an image name that is not allowed", "use a relative name inside the image folder"),
    "image_missing": Kind("error", "the image file is not there", "look at --image_folder and the name, or remove the row"),
    "image_empty": Kind("error", "the image file is empty", "copy it again"),
    "image_damaged": Kind("error", "the image cannot be read", "copy it again, or remove the row"),
    "image_limit": Kind("error", "the image is larger than the limits", "scale it down"),
    "image_extension": Kind("warning", "the name says another format than the content", "rename it; what is read is decided by the content"),
    "image_size": Kind("warning", "an unusually small or oblong image", "look whether it is a picture of the case"),
    "image_blank": Kind("warning", "all pixels have one colour (--deep)", "look whether the export went wrong"),
    "image_rotated": Kind("note", "EXIF says turn the picture, and that is done (the original ignores it)", "nothing, or store it upright"),
    "image_alpha": Kind("note", "transparency is laid on the padding colour (the original drops it)", "nothing, or store it without"),
    "image_16bit": Kind("note", "more than 8 bits: grey is stretched from its own range (the original clamps at 255), colour keeps its high bytes",
                        "window it yourself if absolute grey values matter"),
    "image_frames": Kind("note", "several frames or pages, of which the first is read", "nothing, if the first is meant"),
    "image_colours": Kind("note", "colours other than RGB and grey are converted", "nothing"),
    "image_text": Kind("warning", "text may be burned into a medical picture", "clean the pixels first; nothing here does it"),
    "image_duplicate": Kind("warning", "two names, the same bytes", "use one name, so that its rows share work"),
    "image_near_duplicate": Kind("warning", "two images look alike (--near_duplicates, --deep)", "look whether they are one picture"),
    # against other files
    "leak_image": Kind("warning", "an image is in the other file too", "split by image"),
    "leak_near_duplicate": Kind("warning", "an image looks like one of the other file (--near_duplicates, --deep)",
                                "look whether they are one picture"),
    "leak_patient": Kind("warning", "a patient or study is in the other file too", "split by patient"),
    "leak_row": Kind("warning", "an image with the same question is in the other file too", "remove the row"),
}

Found: TypeAlias = tuple[str, str]
"""(kind, what was found)."""


@dataclass(frozen=True, slots=True)
class Finding:
    """`row` counts from 0; None: of the whole file. `id`: the row's own, else its number."""

    kind: str
    text: str
    row: int | None = None
    id: str | None = None

    @property
    def severity(self) -> Severity:
        return KINDS[self.kind].severity

    def to_dict(self) -> dict[str, Any]:
        return {"row": self.row, "id": self.id, "kind": self.kind, "severity": self.severity, "text": self.text} | {
            key: value for key, value in asdict(self).items() if key not in ("row", "id", "kind", "text")}
