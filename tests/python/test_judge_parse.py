import pytest

from stllava.selftrain.judge_parse import NO_SCORES, parse_scores

REPLIES = [  # reply, the original's rule, strict
    ("8 7", (8, 7), (8, 7)),
    ("8, 7", NO_SCORES, (8, 7)),
    ("8,7", (8, 7), (8, 7)),
    ("8.5 7", (8.5, 7), (8.5, 7)),
    ("Answer 1: 8", NO_SCORES, NO_SCORES),
    ("", NO_SCORES, NO_SCORES),
    ("\n8 7", NO_SCORES, NO_SCORES),
    ("8 7\nThe first answer names the organ.", (8, 7), (8, 7)),
    ("8 7\r\nbecause", (8, 7), (8, 7)),
    (" 8  7 ", NO_SCORES, (8, 7)),
    ("8 7 6", NO_SCORES, NO_SCORES),
    ("8", NO_SCORES, NO_SCORES),
    ("8 seven", NO_SCORES, NO_SCORES),
    ("87", NO_SCORES, NO_SCORES),
    ("0 11", (0, 11), NO_SCORES),
    ("-3 5", (-3, 5), NO_SCORES),
    ("inf 5", (float("inf"), 5), NO_SCORES),
]


@pytest.mark.parametrize(("reply", "original", "strict"), REPLIES, ids=[repr(row[0])[:20] for row in REPLIES])
def test_replies(reply, original, strict):
    assert parse_scores(reply, strict=False) == original
    assert parse_scores(reply) == strict
