"""The limits that readers of files enforce before they allocate: one table, tested at L - 1, L and L + 1 in tests/hostile/test_limits.py.

They are far beyond every real model and data set, and small enough that no file can take the machine with it.
"""

MAX_JSON_BYTES = 16 * 2**20
"""Configuration, index and manifest files. The index of 100,000 tensors has about 10 MB."""
MAX_JSON_DEPTH = 64
"""Objects and lists inside each other, in every JSON text."""
MAX_JSON_ITEMS = 200_000
"""Items of all lists and objects of a configuration, index or manifest file together: a parsed item takes up to 30 times its text."""

MAX_HEADER_BYTES = 100_000_000
"""Header of a safetensors file, the format's own limit; also of a GGUF file."""
MAX_STRING_CHARS = 16 * 2**20
"""One value of a safetensors or GGUF file's metadata."""
MAX_TENSORS = 100_000
"""Tensors of a file; also entries of a torch zip archive. The largest public models have as many in all their files together."""
MAX_SHARDS = 4096
"""Files of an index."""
MAX_RANK = 8
MAX_NAME_BYTES = 512
"""Name of a tensor, UTF-8."""
MAX_GGUF_KEYS = 10_000
"""Keys of a GGUF file's metadata; it has about 30."""
MAX_GGUF_STRINGS = 2**20
"""Strings in all arrays of a GGUF file's metadata together: the tokens of a vocabulary and its merges."""
MAX_PICKLE_BYTES = 64 * 2**20
"""The table of tensors in a torch zip file."""

MAX_DATA_BYTES = 8 * 2**30
"""A data file, which is read whole."""
MAX_ROW_CHARS = 4 * 2**20
"""One record of a data file, as JSON without white space."""

MAX_IMAGE_BYTES = 64 * 2**20
"""An image file. This and the next two are the core's limits too (csrc/image/decode.h)."""
MAX_SIDE_PX = 65_535
MAX_PIXELS = 178_956_970
MAX_JPEG_SCANS = 100
"""Each scan of a progressive JPEG walks over all its blocks; encoders write about 10."""
MAX_PNG_TEXTS = 16
"""Compressed text chunks of a PNG; each may unpack to 1 MB before Pillow refuses it."""
MAX_PLAIN_PIXELS = 2**22
"""Pictures larger than this must not have more than MAX_PIXELS_PER_BYTE pixels for each byte of their file."""
MAX_PIXELS_PER_BYTE = 1024

MAX_MEDICAL_BYTES = 2**30
"""A DICOM or NIfTI file, which may hold many pictures; also the voxels of a volume."""
MAX_FRAMES = 4096
"""Frames of a DICOM file."""
MAX_MEMBERS = 2**20
"""Entries of a zip or tar archive of pictures."""
MAX_UNPACKED_BYTES = 32 * 2**30
"""A compressed tar archive, unpacked."""
MAX_PLAIN_UNPACKED_BYTES = 16 * 2**20
"""What unpacks to more than this must not have more than MAX_UNPACKED_PER_BYTE bytes for each of its packed bytes."""
MAX_UNPACKED_PER_BYTE = 200

MAX_VOCABULARY = 2**20
"""Pieces of a tokenizer, and ids that its added tokens may have."""
MAX_PIECE_BYTES = 1024
MAX_ADDED_TOKENS = 1000
MAX_TOKENIZER_BYTES = 16 * 2**20
"""The file tokenizer.model."""
MAX_TOKENIZER_JSON_BYTES = 64 * 2**20
"""The file tokenizer.json; that of a vocabulary of 256,000 has 33 MB."""
MAX_TOKENIZER_JSON_ITEMS = 4 * 2**20
"""Items in it: tokens, and merges of three each."""

MAX_WIDTH = 2**20
"""Widths, vocabulary and positions in a model configuration."""
MAX_LAYERS = 1024
MAX_NUMBER = 1e30
"""Factors in configurations (rope_theta, lora_alpha, ...); a float32 holds them and their products with a size."""
MAX_LORA_RANK = 65536
