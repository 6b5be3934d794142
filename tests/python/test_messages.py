"""TRL and Hugging Face rows -> pairs and conversations, and back."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from stllava.data.dpo import normalise_pair
from stllava.data.formats.messages import images_of, instruction, messages_of, preference
from stllava.data.records import read_records
from stllava.errors import FormatError


def user(content: object) -> dict[str, object]:
    return {"role": "user", "content": content}


def assistant(content: object) -> dict[str, object]:
    return {"role": "assistant", "content": content}


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


PARTS = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
WANTED = {"image": "a.png", "chosen_conversations": turns("<image>\nWhat is it?", "A lung."),
          "reject_conversations": turns("<image>\nWhat is it?", "A car.")}


@pytest.mark.parametrize("row", [
    {"prompt": [user(PARTS)], "chosen": [assistant([{"type": "text", "text": "A lung."}])], "rejected": [assistant([{"type": "text", "text": "A car."}])]},
    {"prompt": [user("What is it?")], "chosen": [assistant("A lung.")], "rejected": [assistant("A car.")]},
    {"prompt": [user("<image>\nWhat is it?")], "chosen": [assistant("A lung.")], "rejected": [assistant("A car.")]},
    {"prompt": "What is it?", "chosen": "A lung.", "rejected": "A car."},
    {"question": "What is it?", "chosen": "A lung.", "rejected": "A car."},  # RLAIF-V
    {"prompt": "What is it?", "chosen": [assistant("A lung.")], "rejected": [assistant("A car.")]},
    {"chosen": [user("What is it?"), assistant("A lung.")], "rejected": [user("What is it?"), assistant("A car.")]},
    {"prompt": "What is it?", "chosen": [user("What is it?"), assistant("A lung.")], "rejected": [user("What is it?"), assistant("A car.")]},  # UltraFeedback
    {"chosen": [user(PARTS), assistant("A lung.")], "rejected": [user(PARTS), assistant("A car.")]},
    {"prompt": [user([{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}])], "chosen": [assistant("A lung.")],
     "rejected": [assistant("A car.")]},  # as Arrow fills it up
], ids=lambda row: "-".join(f"{k}:{type(v).__name__}" for k, v in row.items()))
@pytest.mark.parametrize("field", [{"images": ["a.png"]}, {"image": "a.png"}, {"image": ["a.png"]}, {"images": ["a.png"], "image": None}])
def test_preference_rows(row: dict, field: dict) -> None:
    assert preference(row | field) == normalise_pair(row | field) == WANTED
    assert read_records([row | field]) == [WANTED]


def test_fields_that_are_not_of_the_pair_stay() -> None:
    row = {"id": 3, "prompt": "Q", "chosen": "a", "rejected": "b", "score_chosen": 0.5, "images": [], "question": "kept, as prompt is the prompt"}
    assert preference(row) == {"id": 3, "score_chosen": 0.5, "question": "kept, as prompt is the prompt", "chosen_conversations": turns("Q", "a"),
                               "reject_conversations": turns("Q", "b")}


def test_earlier_turns_are_the_prompt() -> None:
    head = [user("Q"), assistant("A"), user("More?")]
    want = (turns("Q", "A", "More?", "yes"), turns("Q", "A", "More?", "no"))
    for row in ({"prompt": head, "chosen": [assistant("yes")], "rejected": [assistant("no")]},
                {"chosen": [*head, assistant("yes")], "rejected": [*head, assistant("no")]}):
        pair = preference(row)
        assert (pair["chosen_conversations"], pair["reject_conversations"]) == want


def test_plain_text_without_a_prompt_is_cut_where_trl_cuts_it() -> None:
    pair = preference({"chosen": "The sky is blue.", "rejected": "The sky is green."})
    assert pair["chosen_conversations"] == turns("The sky is", " blue.") and pair["reject_conversations"] == turns("The sky is", " green.")


@pytest.mark.parametrize(("row", "message"), [
    ({"chosen": "a", "rejected": "b"}, "no prompt"),
    ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "no prompt"),
    ({"chosen": [user("P"), assistant("a")], "rejected": [user("Q"), assistant("b")]}, "no prompt"),
    ({"prompt": "P", "chosen": [user("Q"), assistant("a")], "rejected": [user("Q"), assistant("b")]}, "'prompt' differs"),
    ({"prompt": "P", "chosen": "a", "rejected": None}, "'rejected' is nothing"),
    ({"prompt": "P", "chosen": 3, "rejected": "b"}, "'chosen' is a int"),
    ({"prompt": "P", "chosen": [], "rejected": []}, "'chosen' is a list"),
    ({"prompt": 3, "chosen": "a", "rejected": "b"}, "'prompt' is a int"),
    ({"prompt": [{"role": "system", "content": "Be kind."}, user("Q")], "chosen": "a", "rejected": "b"}, "system message"),
    ({"prompt": [{"role": "tool", "content": "x"}], "chosen": "a", "rejected": "b"}, "role 'tool'"),
    ({"prompt": ["Q"], "chosen": "a", "rejected": "b"}, "message 0 is a str"),
    ({"prompt": [user(None)], "chosen": "a", "rejected": "b"}, "content is nothing"),
    ({"prompt": [user([{"type": "audio"}])], "chosen": "a", "rejected": "b"}, "part a dict"),
    ({"prompt": [user([{"type": "text", "text": 3}])], "chosen": "a", "rejected": "b"}, "part a dict"),
    ({"prompt": [user(PARTS)], "chosen": "a", "rejected": "b"}, "1 image parts for 0 images"),
    ({"prompt": [user(PARTS)], "chosen": "a", "rejected": "b", "images": ["a", "b"]}, "1 image parts for 2 images"),
    ({"prompt": [user([{"type": "image", "image": "x.png"}])], "chosen": "a", "rejected": "b", "images": ["a"]}, "too; want one of the two"),
])
def test_rows_that_are_no_pairs(row: dict, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        preference(row)
    assert normalise_pair(row) == row and read_records([row]) == [row]  # the data set names it with its row


def test_several_images_keep_their_places() -> None:
    content = [{"type": "text", "text": "Before:"}, {"type": "image"}, {"type": "text", "text": "after:"}, {"type": "image"}, {"type": "text", "text": "Grown?"}]
    record = instruction({"messages": [user(content), assistant("Yes.")], "images": ["a.png", "b.png"]})
    assert record == {"image": ["a.png", "b.png"], "conversations": turns("Before:\n<image>\nafter:\n<image>\nGrown?", "Yes.")}
    assert instruction({"messages": [user("Grown?"), assistant("Yes.")], "images": ["a.png", "b.png"]})["conversations"][0]["value"] == "<image>\n<image>\nGrown?"
    own = [{"type": "image", "image": "a.png"}, {"type": "image", "path": "b.png"}, {"type": "text", "text": "Grown?"}]
    assert images_of(instruction({"messages": [user(own), assistant("Yes.")]})) == ["a.png", "b.png"]


def test_prompt_and_completion() -> None:
    want = {"image": "a.png", "conversations": turns("<image>\nQ", "A")}
    assert instruction({"prompt": "Q", "completion": "A", "image": "a.png"}) == want
    assert instruction({"prompt": [user("Q")], "completion": [assistant("A")], "images": ["a.png"]}) == want


text = st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda s: "<image>" not in s and s.strip("\n") == s)


@given(st.lists(text, min_size=2, max_size=6), st.sampled_from(["<image>\n{}", "{}\n<image>", "{}", "{}\n<image>\n{}"]))
def test_turns_to_messages_and_back(texts: list[str], form: str) -> None:
    texts = texts[:len(texts) // 2 * 2]
    texts[0] = form.replace("{}", texts[0])
    images = ["a.png"] * texts[0].count("<image>")
    for parts in (True, False):
        record = instruction({"messages": messages_of(turns(*texts), parts=parts), "images": images})
        assert record["conversations"] == turns(*texts) and images_of(record) == images


@pytest.mark.parametrize("bad", [[{"from": "human"}], [{"from": "gpt", "value": 3}], [{"from": "system", "value": "x"}]])
def test_turns_that_are_none(bad: list) -> None:
    with pytest.raises(FormatError, match="turn 0"):
        messages_of(bad, parts=True)
