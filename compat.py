"""What the toolkit takes from PyTorch-NLP, in one place, so that nobody meets its broken import.

`pytorch-nlp` 0.5.0 (2019) is the last release. Its `torchnlp.samplers` imports `torch._six`, which
torch 2.0 removed. The stand-in below holds the names that were there; it is put in place once, before
torchnlp is imported, and only where torch has no such module of its own.
"""

import importlib.util
import sys
import types

if importlib.util.find_spec("torch._six") is None and "torch._six" not in sys.modules:
    _six = types.ModuleType("torch._six", "Stand-in for the module that torch 2.0 removed.")
    _six.int_classes, _six.string_classes = (int,), (str, bytes)
    sys.modules["torch._six"] = _six

from torchnlp.datasets import penn_treebank_dataset, wikitext_2_dataset
from torchnlp.encoders import LabelEncoder
from torchnlp.nn import LockedDropout
from torchnlp.samplers import BPTTBatchSampler

__all__ = [
    "BPTTBatchSampler",
    "LabelEncoder",
    "LockedDropout",
    "penn_treebank_dataset",
    "wikitext_2_dataset",
]
