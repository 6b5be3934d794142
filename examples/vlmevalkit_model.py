"""stllava in VLMEvalKit. Copy this file into its checkout as vlmeval/vlm/stllava.py, and give the model a name in vlmeval/config.py:

    from vlmeval.vlm.stllava import StllavaModel
    supported_VLM["my-model"] = partial(StllavaModel, model_path="DIR")

then `python run.py --data PathVQA_TEST --model my-model`, with any data set that it has.
"""

from vlmeval.vlm.base import BaseModel

from stllava import LlavaModel


class StllavaModel(BaseModel):
    INSTALL_REQ = False
    INTERLEAVE = True  # it gets the whole message; the pictures are shown before its text

    def __init__(self, model_path, model_base=None, max_new_tokens=512, **settings):
        super().__init__()
        self.model = LlavaModel.from_pretrained(model_path, model_base)
        self.settings = {"max_new_tokens": max_new_tokens, **settings}

    def generate_inner(self, message, dataset=None):
        parts = [{"type": part["type"], part["type"]: part["value"]} for part in message]
        return self.model.chat([{"role": "user", "content": parts}], **self.settings)
