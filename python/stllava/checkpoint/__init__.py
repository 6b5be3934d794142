"""Checkpoint files: bytes on disk <-> NumPy arrays under canonical tensor names.

    atomic            every write: temporary name, fsync, rename; directories with a manifest of hashes; lines that are appended
    lock              one run per output
    strict_json       JSON without duplicate keys, NaN or surprises in size
    tensor_file       dtypes, limits, the mapping name -> array that all readers return
    safetensors_file  one .safetensors file
    torch_zip         one torch .bin file; torch_pickle reads the pickle inside it without ever running it
    index             one file or many shards with an index
    peft              LoRA adapters as PEFT writes them
    names             canonical tensor names, their shapes, and the names each file form uses
    directory         whole checkpoints: full, base + adapters, projector only; readers and writers
    gguf_container    one .gguf file of llama.cpp: typed metadata and tensors; gguf_metadata reads its keys as settings
    gguf_file         a decoder in such a file; gguf_mmproj: its tower and projector in another

Import from the modules; this file imports nothing, so that `config` can use the lower ones.
"""
