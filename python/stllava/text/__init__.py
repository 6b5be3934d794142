"""Text: tokenizers (`load_tokenizer` picks the class), prompts with images, training labels."""

from stllava.text.encode import encode_conversation, tokenizer_image_token
from stllava.text.interface import AnyTokenizer, has_tokenizer, load_tokenizer
from stllava.text.labels import Sample, Span, build_sample, draw_switches, preprocess_multimodal
from stllava.text.labels_compat import preprocess_compat
from stllava.text.tokenizer import Tokenizer

__all__ = [
    "AnyTokenizer",
    "Sample",
    "Span",
    "Tokenizer",
    "build_sample",
    "draw_switches",
    "encode_conversation",
    "has_tokenizer",
    "load_tokenizer",
    "preprocess_compat",
    "preprocess_multimodal",
    "tokenizer_image_token",
]
