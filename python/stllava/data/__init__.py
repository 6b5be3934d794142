"""Training data: files as the original and LLaVA write them -> sequences the trees are built from.

    records   JSON and JSON-lines files -> checked records, every problem listed before the first update
    steps     one record per item, appended to a file that can be continued
    sft       instruction data with self-questioning      dpo   preference pairs      pictures   image files -> pixels, cached
"""
