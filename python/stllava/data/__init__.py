"""Training data: files as the original and LLaVA write them -> sequences the trees are built from.

    records   one JSON file -> checked records, every problem listed before the first update
    sft       instruction data with self-questioning      dpo   preference pairs      pictures   image files -> pixels, cached
"""
