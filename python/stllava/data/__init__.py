"""Training data: files as the original and LLaVA write them -> sequences the trees are built from.

    records   files and directories in any published layout (`formats`) -> checked records, every problem listed before the first update
    benchmarks  VQA-RAD, SLAKE, PathVQA as test items       select   splits, samples, merging
    steps     one record per item, appended to a file that can be continued
    sft       instruction data with self-questioning      dpo   preference pairs      pictures   image files -> pixels, cached
"""
