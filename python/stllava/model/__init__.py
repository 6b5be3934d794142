"""The model: `llava`, a class around one core model that knows names and files."""

from stllava.model.llava import NUMPY_DTYPE, Dtype, LlavaModel, StoredDtype, sequence_sums

__all__ = ["LlavaModel", "Dtype", "StoredDtype", "NUMPY_DTYPE", "sequence_sums"]
