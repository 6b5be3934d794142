"""Span labels: equal to the original's where it is right, and right where it is not."""

import pytest
from hypothesis import given, settings, strategies as st
from text_data import dialogues, label_files, load, tokenizer

from stllava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from stllava.conversation import ConversationError, SeparatorStyle, conv_templates
from stllava.text import build_sample, draw_switches, preprocess_compat, preprocess_multimodal
from stllava.text.labels import draw_uniform, switches_from_draws

TRAINABLE = [name for name, template in conv_templates.items() if not template.prompt_only]
SPECIAL_TEXT = ("<s>", "</s>", "<unk>")


def turns_of(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def original_is_wrong(template, turns):
    """The cases in which the original's labels are not the standard (spec 9.1.5), besides a declared mismatch."""
    texts = [turn["value"] for turn in turns]
    style = conv_templates[template].sep_style
    return (
        style is SeparatorStyle.SINGLE  # D66: the mask drifts
        or any(special in text for text in texts for special in SPECIAL_TEXT)  # D13, D60
        or any(not text.strip() for text in texts)  # D58
        or (style is SeparatorStyle.TWO and any("ASSISTANT:" in text for text in texts))  # D27, D57
        or (style is SeparatorStyle.LLAMA_2 and any("[/INST]" in text for text in texts))
    )


def text_of_spans(sample):
    spans = [sample.input_ids[span.begin : span.end] for span in sample.spans]
    return [tokenizer().decode(ids, skip_special_tokens=False) for ids in spans]


@pytest.mark.parametrize("path", label_files(), ids=lambda path: path.name)
def test_equal_to_every_recorded_sample_where_the_original_is_right(path):
    recorded = load(path)
    template, max_length = recorded["template"], recorded["model_max_length"]
    n_compared = 0
    for want in recorded["samples"]:
        dialogue = dialogues()[want["id"]]
        turns = dialogue["conversations"]
        if "error" in want or want["mismatch"] or original_is_wrong(template, turns):
            continue
        draws = {draw["turn"]: draw["u"] for draw in want.get("draws", ())}
        sample = build_sample(
            turns,
            template,
            tokenizer(recorded.get("legacy", True)),
            has_image="image" in dialogue,
            switched=switches_from_draws(draws, recorded["sq_r"] or 0.0),
            max_length=max_length,
        )
        assert sample.prompt == want["prompt"]
        assert sample.input_ids == want.get("collated_input_ids", want["input_ids"]), want["id"]
        assert sample.labels == want.get("collated_labels", want["labels"]), want["id"]
        n_compared += 1
    # v0 always drifts; plain takes single-turn samples with image only.
    assert n_compared >= {"v0": 0, "plain": 0 if max_length == 64 else 4}.get(template, 4 if max_length == 64 else 11)


WORDS = st.text(st.one_of(st.sampled_from(list(" \n:.abAB1é毛🫁")), st.characters(codec="utf-8")), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(WORDS, min_size=2, max_size=8).map(lambda texts: texts[: len(texts) // 2 * 2]),
    template=st.sampled_from(["v1", "v1_sq", "llama_2", "llava_llama_2", "mistral_instruct"]),
    legacy=st.booleans(),
    has_image=st.booleans(),
    sq_r=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_equal_to_the_original_on_random_dialogues(texts, template, legacy, has_image, sq_r):
    turns = turns_of(*texts)
    if has_image:
        turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    if original_is_wrong(template, turns) or any("<image>" in text for text in texts):
        return
    draws = {i: draw_uniform(0, 0, texts[0], i) for i in range(2, len(turns), 2)}
    want = preprocess_compat(turns, template, tokenizer(legacy), has_image, sq_r=sq_r, draws=draws)
    switched = switches_from_draws(draws, sq_r) if template == "v1_sq" and has_image else set()
    got = build_sample(turns, template, tokenizer(legacy), has_image=has_image, switched=switched)
    assert got.prompt == want["prompt"] and got.input_ids == want["input_ids"]
    if not want["mismatch"]:
        assert got.labels == want["labels"]


HOSTILE = st.lists(
    st.sampled_from(
        ["</s>", "<s>", "<unk>", " ASSISTANT: ", "USER: ", "VUSER: ", "[/INST] ", "[INST]", "### ", "\n", " ", "x", "Yes."]
    ),
    min_size=1,
    max_size=6,
).map("".join)


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(HOSTILE, min_size=4, max_size=4), template=st.sampled_from(TRAINABLE), legacy=st.booleans())
def test_whatever_people_write_the_targets_are_the_answers(texts, template, legacy):
    if any(not text.strip() for text in texts):
        return
    if conv_templates[template].sep_style is SeparatorStyle.PLAIN:
        texts = ["<image>", texts[1]]
    else:
        texts = [f"<image>\n{texts[0]}", *texts[1:]]
    sample = build_sample(turns_of(*texts), template, tokenizer(legacy), has_image=True)
    ends = {"v0": "\n###", "llava_v0": "\n###", "default": "\n###", "plain": "\n", "v0_plain": "\n"}
    end = ends.get(template, " </s>" if conv_templates[template].sep_style is SeparatorStyle.LLAMA_2 else "</s>")
    assert [span.turn for span in sample.spans] == list(range(1, len(texts), 2))
    for answer, span in zip(texts[1::2], sample.spans, strict=True):
        ids = sample.input_ids[span.begin : span.end]
        if end.endswith("</s>"):
            assert ids.pop() == tokenizer().eos_token_id
        assert {0, 1, 2}.isdisjoint(ids)  # nothing anybody wrote is a special token
        assert tokenizer().decode(ids) == answer + end.removesuffix("</s>")
    specials = [i for i in sample.input_ids if i in (0, 1, 2)]
    n_template_specials = 3 if end.endswith("</s>") else 1  # the begin token and one end token per answer
    if conv_templates[template].sep == "<s>":
        n_template_specials += 1  # the second question's own begin token
    assert len(specials) == n_template_specials


def test_switched_turns_are_targets_with_their_end_token_and_without_their_tag():
    turns = turns_of("<image>\nFirst?", "One.", "Second?", "Two.", "Third?", "Three.")
    sample = build_sample(turns, "v1_sq", tokenizer(), has_image=True, switched={4})
    assert text_of_spans(sample) == [" One.</s>", " Two.</s>", " Third?</s>", " Three.</s>"]
    assert [span.turn for span in sample.spans] == [1, 3, 4, 5]
    assert "VUSER: Third?</s> ASSISTANT: Three.</s>" in sample.prompt


def test_without_switches_v1_sq_differs_from_v1_by_its_system_text_only():
    for dialogue in dialogues().values():
        turns = dialogue["conversations"]
        if any(not turn["value"] for turn in turns):
            continue
        plain, asking = (
            build_sample(turns, name, tokenizer(), has_image="image" in dialogue) for name in ("v1", "v1_sq")
        )
        extra = len(asking.labels) - len(plain.labels)
        first = plain.spans[0].begin
        assert asking.labels[extra + first :] == plain.labels[first:]
        assert set(asking.labels[: extra + first]) == {IGNORE_INDEX}


def test_leading_answer_is_dropped_and_counted():
    turns = dialogues()["starts_with_gpt"]["conversations"]
    for name in ("v1", "v1_sq", "llama_2", "v0"):
        sample = build_sample(turns, name, tokenizer(), has_image=True)
        assert sample.n_leading_dropped == 1
        assert sample.input_ids == build_sample(turns[1:], name, tokenizer(), has_image=True).input_ids


def test_cut():
    turns = dialogues()["multi_turn"]["conversations"]
    whole = build_sample(turns, "v1", tokenizer(), has_image=True)
    cut = build_sample(turns, "v1", tokenizer(), has_image=True, max_length=60)
    assert cut.input_ids == whole.input_ids[:60] and cut.labels == whole.labels[:60]
    assert cut.n_cut == len(whole.input_ids) - 60 and whole.n_cut == 0
    assert cut.spans[-1].end == 60 < whole.spans[-1].end


def test_image_marker_is_one_position_and_no_target():
    sample = build_sample(turns_of("Where <image> is it?", "Here."), "v1", tokenizer(), has_image=True)
    position = sample.input_ids.index(IMAGE_TOKEN_INDEX)
    assert sample.input_ids.count(IMAGE_TOKEN_INDEX) == 1 and sample.labels[position] == IGNORE_INDEX
    assert "USER: <image>\nWhere  is it? ASSISTANT:" in sample.prompt


def test_preprocess_multimodal():
    turns = turns_of("a <image> b\n<image>", " kept ", "<image>", "x")
    values = [turn["value"] for turn in preprocess_multimodal(turns)]
    assert values == ["<image>\na  b", " kept ", "<image>", "x"]
    assert [turn["value"] for turn in preprocess_multimodal(preprocess_multimodal(turns))] == values
    assert turns[0]["value"] == "a <image> b\n<image>"


@pytest.mark.parametrize(
    ("turns", "options", "message"),
    [
        (turns_of("q", "a")[::-1], {}, "pairs"),
        (turns_of("q", "a", "q"), {}, "pairs"),
        ([], {}, "0 turns.*pairs"),
        ([*turns_of("q"), *turns_of("q")], {}, "turn 1: from 'human'"),
        ([{"from": "user", "value": "q"}, {"from": "gpt", "value": "a"}], {}, "turn 0: from 'user'"),
        ([{"from": "human"}], {}, "turn 0: key 'value' is missing"),
        ([{"from": "human", "value": 3}], {}, "turn 0: value is a int"),
        (turns_of("q", " \n"), {}, "turn 1: the answer is empty"),
        (turns_of("", "a"), {}, "turn 0: the question is empty"),
        (turns_of("q", "a"), {"has_image": True}, "0 <image> markers for 1 images"),
        (turns_of("<image> q", "a"), {}, "1 <image> markers for 0 images"),
        (turns_of("<image> q", "an <image>"), {"has_image": True}, "2 <image> markers for 1 images"),
        (turns_of("q", "a", "<image> q", "a"), {"has_image": True}, "marker is in turn 2"),
        (turns_of("<image>", "a", "q", "a"), {"has_image": True, "switched": {2}}, "no virtual user"),
        (turns_of("<image>", "a"), {"has_image": True, "switched": {0}}, "cannot be switched"),
        (turns_of("q", "a", "q", "a"), {"switched": {2}}, "only samples with an image"),
    ],
)
def test_dialogues_that_are_refused(turns, options, message):
    with pytest.raises(ConversationError, match=message):
        build_sample(turns, "v1", tokenizer(), **{"has_image": False, **options})


def test_unknown_and_prompt_only_templates_are_refused():
    with pytest.raises(ValueError, match="v2.*mistral_instruct"):
        build_sample(turns_of("q", "a"), "v2", tokenizer(), has_image=False)
    with pytest.raises(ValueError, match="prompts only"):
        build_sample(turns_of("q", "a"), "dolly", tokenizer(), has_image=False)


def test_draws():
    assert draw_switches(9, 0.0, 1, 0, "a") == set()
    assert draw_switches(9, 1.0, 1, 0, "a") == {2, 4, 6}  # odd: a leading gpt turn is dropped first
    assert draw_switches(8, 1.0, 1, 0, "a") == {2, 4, 6}
    assert draw_switches(2, 1.0, 1, 0, "a") == set()
    assert draw_switches(40, 0.5, 1, 2, "a") == draw_switches(40, 0.5, 1, 2, "a")
    assert switches_from_draws({2: 0.5, 4: 0.49}, 0.5) == {4}
    with pytest.raises(ValueError, match="1.5"):
        draw_switches(4, 1.5, 0, 0, 0)


def test_draws_are_uniform_and_depend_on_every_part_of_the_key():
    n = 4000
    for vary in range(4):
        keys = [[7, 7, 7, 7] for _ in range(n)]
        for i, key in enumerate(keys):
            key[vary] = i
        draws = [draw_uniform(*key) for key in keys]
        assert min(draws) >= 0.0 and max(draws) < 1.0 and len(set(draws)) == n
        # Mean of n uniforms: standard deviation 1/sqrt(12 n) = 0.0046; six of them.
        assert abs(sum(draws) / n - 0.5) < 0.028
