"""Weights and optimizer states in other formats, callbacks of transformers, and metrics of torchmetrics.

The formats are safetensors, ``torch.save``, and folders of Hugging Face libraries.

Load weights::

    fx.load_weights(state, folder)  # of transformers, diffusers, timm, open_clip; or a peft adapter
    fx.load_weights(state, folder, strict=False, ignore_mismatched_sizes=True)  # a backbone, without its head
    fx.load_weights(state, folder, part="encoder")  # into a submodule
    fx.load_weights(state, folder, cast=True, report=True).cast  # float32 into a bfloat16 model: the cast names
    fx.load_weights(state, file, rename={"module.": ""})  # saved from DataParallel
    fx.load_weights(state, file, rename={"_orig_mod.": ""})  # saved from torch.compile
    fx.load_weights(state, file, entry="state_dict", rename={"model.": ""})  # a Lightning checkpoint

Save weights::

    fx.save_weights(folder, state)  # for from_pretrained; of a module adapted by peft, the adapter
    fx.save_weights(folder, fx.callbacks.averaged(state, "ema"))  # averaged weights
    fx.save_weights(folder, state, convert=lambda model: model.merge_and_unload())  # merged LoRA weights
    fx.save_weights(folder, state, convert=lambda model: model.encoder)  # a submodule

Use weights in other code::

    fx.to_module(state)  # a copy of the module given to fx.init, with the weights of the state
    fx.to_module(fx.callbacks.averaged(state), module)  # a copy of this module, with averaged weights
    module.load_state_dict(fx.state_dict(state))  # into an existing module

Use metrics of torchmetrics::

    Accuracy = fx.interop.torchmetric(torchmetrics.Accuracy("multiclass", num_classes=10))
    fx.eval_step(lambda model, batch: {"accuracy": Accuracy.from_model_output(model(batch["x"]), batch["y"])})

Convert optimizer states::

    fx.load_optimizer_state(state, optimizer)  # from torch; or its state_dict(), or a file that contains it
    fx.load_optimizer_state(state, folder)  # a Trainer checkpoint folder, or a Lightning checkpoint
    optimizer.load_state_dict(fx.optimizer_state_dict(state, optimizer))  # back to torch

Use callbacks of ``Trainer``::

    fx.fit(..., callbacks=[fx.interop.hf(EarlyStoppingCallback(3)), fx.interop.hf(ProgressCallback)])

Restore parts of fxtrain checkpoints::

    fx.restore(path, like=state, fresh="head.*")  # everything but a new head, including optimizer state and counts
    fx.restore(path, like=state, where="state.*['encoder.*']")  # a submodule with its optimizer state
"""

from fxtrain.interop._hf import hf, hf_event
from fxtrain.interop._load_weights import load_weights
from fxtrain.interop._optimizer_states import load_optimizer_state, optimizer_state_dict
from fxtrain.interop._read_weights import read_weights
from fxtrain.interop._save_weights import save_weights
from fxtrain.interop._torchmetrics import torchmetric

__all__ = [
    "hf",
    "hf_event",
    "load_optimizer_state",
    "load_weights",
    "optimizer_state_dict",
    "read_weights",
    "save_weights",
    "torchmetric",
]
