"""Checkpoint files: bytes on disk <-> NumPy arrays under canonical tensor names.

    atomic            every write: temporary name, fsync, rename; directories with a manifest of hashes; lines that are appended
    lock              one run per output
    strict_json       JSON without duplicate keys, NaN or surprises in size
    tensor_file       dtypes, limits, the mapping name -> array that all readers return
    safetensors_file  one .safetensors file
    torch_zip         one torch .bin file; torch_pickle reads the pickle inside it without ever running it
    index             one file or many shards with an index
    peft              LoRA adapters as PEFT writes them; name_pattern: the regular expressions in their settings
    adapters          the adapters of one checkpoint: decoder, tower, replaced weights
    rounding          weights in another dtype, and what that costs
    names             canonical tensor names, their shapes, and the names each file form uses
    hf_processor      the files of transformers' LlavaProcessor
    directory         whole checkpoints: full, base + adapters, projector only; readers and writers
    rewrite           whole checkpoints merged, or in another layout, format or dtype, tensor by tensor; describe: what one holds
    gguf_container    one .gguf file of llama.cpp: typed metadata and tensors; gguf_metadata reads its keys as settings
    gguf_file         a decoder in such a file; gguf_mmproj: its tower and projector in another

Import from the modules; this file imports nothing, so that `config` can use the lower ones.
"""
