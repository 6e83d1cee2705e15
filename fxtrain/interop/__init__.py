"""Weights in the files of other programs: safetensors, ``torch.save``, and folders of Hugging Face libraries."""

from fxtrain.interop.load import load_weights as load_weights
from fxtrain.interop.read import read_weights as read_weights
from fxtrain.interop.save import save_weights as save_weights
