"""Weights and optimizer states of other programs: safetensors, ``torch.save``, and folders of Hugging Face libraries.

Load::

    fx.load_weights(state, folder)  # of transformers, diffusers, timm, open_clip; an adapter of peft
    fx.load_weights(state, folder, strict=False, ignore_mismatched_sizes=True)  # a body, without its head
    fx.load_weights(state, folder, part="encoder")  # into a submodule
    fx.load_weights(state, folder, cast=True, report=True).cast  # float32 into a bfloat16 model: the names cast
    fx.load_weights(state, file, rename={"module.": ""})  # saved from DataParallel
    fx.load_weights(state, file, rename={"_orig_mod.": ""})  # saved from torch.compile
    fx.load_weights(state, file, entry="state_dict", rename={"model.": ""})  # a checkpoint of Lightning

Save::

    fx.save_weights(folder, state)  # for from_pretrained; of a module adapted by peft, the adapter
    fx.save_weights(folder, fx.callbacks.averaged(state, "ema"))  # averaged weights
    fx.save_weights(folder, state, convert=lambda model: model.merge_and_unload())  # merged weights of LoRA
    fx.save_weights(folder, state, convert=lambda model: model.encoder)  # a submodule

Optimizer states::

    fx.load_optimizer_state(state, optimizer)  # of a plain loop; or its state_dict(), or a file with it
    fx.load_optimizer_state(state, folder)  # a checkpoint folder of Trainer, or a checkpoint of Lightning
    optimizer.load_state_dict(fx.optimizer_state_dict(state, optimizer))  # back to torch

Checkpoints of fxtrain::

    fx.restore(path, like=state, fresh="head.*")  # all but a new head, optimizer state and counts included
    fx.restore(path, like=state, where="state.*['encoder.*']")  # a submodule with its optimizer state
"""

from fxtrain.interop._load import load_weights as load_weights
from fxtrain.interop._optimizer_states import load_optimizer_state as load_optimizer_state
from fxtrain.interop._optimizer_states import optimizer_state_dict as optimizer_state_dict
from fxtrain.interop._read import read_weights as read_weights
from fxtrain.interop._save import save_weights as save_weights
