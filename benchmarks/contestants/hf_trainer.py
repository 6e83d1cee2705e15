"""Hugging Face Trainer, with the same optimizer, constant learning rate and batches as the other training loops."""

import tempfile
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.contestants import ENDLESS
from benchmarks.feed import Feed
from benchmarks.workloads import Workload


class Model(nn.Module):
    """A model that returns its loss, as the Trainer requires."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.inner, self.loss = workload.module(), workload.loss

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": self.loss(self.inner(x), y)}


class Trainer(transformers.Trainer):
    feed: Feed

    def get_train_dataloader(self) -> Any:
        return self.feed.loader()


def train(workload: Workload, feed: Feed) -> dict[str, Any]:
    model = Model(workload)
    optimizer = workload.adamw(model)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=feed.total or ENDLESS,
            max_grad_norm=0.0,  # no clipping
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=workload.device == "cpu",
            dataloader_pin_memory=False,  # the batches are already on the device
        )
        trainer = Trainer(model, arguments, train_dataset=feed.loader().dataset, optimizers=(optimizer, constant))
        trainer.feed = feed
        trainer.train()
    return model.inner.state_dict()
