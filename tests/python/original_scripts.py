"""The command lines of the original's two scripts, every flag and value of them, over a tiny checkpoint in the original layout."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from tiny import VISION, dpo_records, sft_records, tiny_model, write_pictures

from stllava.checkpoint import directory, index, names

SFT = shlex.split("""--lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 --deepspeed ./scripts/zero3.json
    --model_name_or_path ./checkpoints/sqllava-7B-v1.5-1200k --version v1_sq --data_path data/instruct.json --image_folder data/images
    --vision_tower ./checkpoints/vit-L-336-1200k --pretrain_mm_mlp_adapter ./checkpoints/sqllava-7B-v1.5-1200k/mm_projector.bin
    --mm_projector_type cluster --mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False --image_aspect_ratio pad
    --group_by_modality_length False --bf16 True --output_dir ./checkpoints/medical/sqllava-med-7b-lora-v3-im --num_train_epochs 3
    --per_device_train_batch_size 8 --per_device_eval_batch_size 6 --gradient_accumulation_steps 4 --evaluation_strategy no --save_strategy steps
    --save_steps 50000 --save_total_limit 2 --learning_rate 2e-4 --vision_tower_lr 5e-5 --vit_lora_enable --lora_alpha_vit 64 --lora_r_vit 32
    --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --tf32 True --model_max_length 2048
    --gradient_checkpointing True --dataloader_num_workers 8 --lazy_preprocess True --report_to wandb --data_aug False --sq_r 0.5""")

DPO = shlex.split("""--lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 --deepspeed ./scripts/zero3.json
    --model_name_or_path ./checkpoints/sqllava-7B-v1.5-1200k --version v1 --data_path data/dpo.json --image_folder data/images
    --vision_tower ./checkpoints/vit-L-336-1200k
    --pretrain_mm_mlp_adapter ./checkpoints/medical/sqllava-med-7b-lora-v3-im/non_lora_trainables.bin
    --mm_projector_type cluster --mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False --image_aspect_ratio pad
    --group_by_modality_length False --bf16 True --output_dir ./checkpoints/sqllava-med-lora-7b-70k-dpo-v3-1po --num_train_epochs 1
    --per_device_train_batch_size 4 --per_device_eval_batch_size 12 --gradient_accumulation_steps 16 --evaluation_strategy no --save_strategy steps
    --save_steps 50000 --save_total_limit 5 --learning_rate 5e-6 --vision_tower_lr 2e-5 --vit_lora_enable --lora_alpha_vit 64 --lora_r_vit 32
    --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --tf32 True --model_max_length 2048
    --gradient_checkpointing True --dataloader_num_workers 8 --lazy_preprocess True --report_to wandb --data_aug False""")

ZERO3 = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1},
    "bf16": {"enabled": "auto"}, "train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto", "gradient_accumulation_steps": "auto",
    "zero_optimization": {
        "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": True}}


def replaced(words: list[str], **values: str) -> list[str]:
    """The command line with other values."""
    words = list(words)
    for name, value in values.items():
        words[words.index(f"--{name}") + 1] = value
    return words


def write_workspace(root: Path, copies: int = 10) -> None:
    """Base in shards of torch files, mm_projector.bin, tower, pictures, 4 * copies + 1 records and 4 * copies pairs."""
    base = root / "checkpoints" / "sqllava-7B-v1.5-1200k"
    model = tiny_model()
    model.save_pretrained(base, format="bin", shard_size=10**6)
    tensors = model.tensors()
    directory.write_projector(base, model.config, {name: array for name, array in tensors.items() if names.is_projector(name)}, "bin")
    tower = root / "checkpoints" / "vit-L-336-1200k"
    tower.mkdir()
    index.write_weights(tower, {names.to_tower(name): array for name, array in tensors.items() if names.is_tower(name)})
    (tower / "config.json").write_text(json.dumps({"architectures": ["CLIPVisionModel"], **VISION}))
    (root / "data" / "images").mkdir(parents=True)
    pictures = write_pictures(root / "data" / "images")
    for name, records in (("instruct", sft_records(pictures * copies)), ("dpo", dpo_records(pictures * copies))):
        (root / "data" / f"{name}.json").write_text(json.dumps(records))
