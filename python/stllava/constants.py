"""Numbers and strings that checkpoints, data files and prompts share with LLaVA."""

IGNORE_INDEX = -100
"""Label of a position that is not a target."""

IMAGE_TOKEN_INDEX = -200
"""Id that stands for one whole image in `input_ids`; the model replaces it by the projected patch features."""

DEFAULT_IMAGE_TOKEN = "<image>"
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"
DEFAULT_IM_START_TOKEN = "<im_start>"
DEFAULT_IM_END_TOKEN = "<im_end>"
IMAGE_PLACEHOLDER = "<image-placeholder>"
"""Where a question wants its image; scripts replace it by `DEFAULT_IMAGE_TOKEN`."""
