"""Text: tokenizer, prompts with images, training labels."""

from stllava.text.encode import encode_conversation, tokenizer_image_token
from stllava.text.labels import Sample, Span, build_sample, draw_switches, preprocess_multimodal
from stllava.text.labels_compat import preprocess_compat
from stllava.text.tokenizer import Tokenizer

__all__ = [
    "Sample",
    "Span",
    "Tokenizer",
    "build_sample",
    "draw_switches",
    "encode_conversation",
    "preprocess_compat",
    "preprocess_multimodal",
    "tokenizer_image_token",
]
