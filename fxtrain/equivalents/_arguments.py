"""Where the arguments of Keras, Lightning and transformers went, as advice for error messages."""

from __future__ import annotations

from collections.abc import Mapping

_BATCH = "The batch size belongs to the data: fxtrain.data.batches(data, 32)."
_EPOCHS = "Use fxtrain.fit(state, step, data, epochs=10)."
_STEPS = "Use fxtrain.fit(state, step, data, steps=1000)."
_ACCUMULATE = "Use fxtrain.train_step(loss_fn, tx, accumulate=4), which splits each batch into 4."
_CLIP = "Clip in the optimizer: fxtrain.optim.chain(fxtrain.optim.clip_by_global_norm(1.0), tx)."
_PRECISION = 'Use fxtrain.train_step(loss_fn, tx, precision="bf16"), and the same in fxtrain.eval_step.'
_COMPILE = "Use fxtrain.compile(step)."
_OPTIMIZER = "Give the optimizer to both fxtrain.init(module, tx) and fxtrain.train_step(loss_fn, tx)."
_RATE = "The learning rate is an argument of the optimizer: fxtrain.optim.adamw(1e-3)."
_SCHEDULE = (
    "Give the optimizer a schedule: fxtrain.optim.adamw(fxtrain.schedules.warmup(fxtrain.schedules.cosine(1e-3, 900), "
    "100))."
)
_LOSS = "The loss is a function (model, batch): fxtrain.train_step(loss_fn, tx)."
_METRICS = "Return metrics with the loss, (loss, metrics), or from the function given to fxtrain.eval_step(measure)."
_WEIGHTS = (
    "Weight the loss in the loss function, as in torch.nn.functional.cross_entropy(logits, labels, weight=weights)."
)
_EVALUATION = "Use fxtrain.fit(state, step, data, epochs=1, eval_step=eval_step, eval_data=eval_data)."
_WHEN = "Use fxtrain.fit(state, step, data, epochs=1, eval_when=500), with eval_step= and eval_data=."
_SPLIT = "Split the data first, as in torch.utils.data.random_split, and give one part as eval_data=."
_SHUFFLE = "The order belongs to the data: fxtrain.data.batches(data, 32, shuffle=True, seed=0)."
_DROP = "Use fxtrain.data.batches(data, 32, drop_last=True)."
_LOADER = "Loading belongs to the data: fxtrain.data.from_loader(torch.utils.data.DataLoader(...))."
_PREFETCH = "Use fxtrain.data.prefetch(source), or fxtrain.data.from_loader(loader), whose workers load ahead."
_LIMIT = "Give data with fewer batches, or fxtrain.fit(state, step, data, steps=100)."
_PROGRESS = "Use fxtrain.fit(state, step, data, epochs=1, progress=True)."
_WRITE = "Use observers=[fxtrain.observers.write(fxtrain.writers.tensorboard(folder), every=50)]."
_FOLDER = "Use checkpointer=fxtrain.checkpointer(folder)."
_SAVE = "Use callbacks=[fxtrain.callbacks.save(every=1000)] with checkpointer=fxtrain.checkpointer(folder)."
_KEEP = "Use fxtrain.checkpointer(folder, keep=3)."
_BEST = 'Use callbacks=[fxtrain.callbacks.save_best("loss")] with fxtrain.checkpointer(folder, best="loss").'
_RESUME = "Use fxtrain.fit(state, step, data, epochs=1, checkpointer=checkpointer, resume=True)."
_SEED = "Use fxtrain.init(module, tx, seed=0). A run is a function of its seed."
_DEVICE = "Use fxtrain.init(module, tx, device=device). The run is where its state is."
_EXPORT = "Use observers=[fxtrain.observers.export(folder)]."
_SUMMARY = "Use observers=[fxtrain.observers.summary()]."
_PROFILE = "Use observers=[fxtrain.observers.profile()]."
_CHECKPOINTING = (
    "Call module.gradient_checkpointing_enable() or torch.utils.checkpoint in the module, before fxtrain.init."
)
_DEBUG = "Use observers=[fxtrain.observers.debug()], and fxtrain.callbacks.nan_guard()."
_MEMORY = "Use observers=[fxtrain.observers.memory()]."
_MODULE = "Change the module before fxtrain.init(module, tx)."
_BETAS = "Use fxtrain.optim.adamw(1e-3, b1=0.9, b2=0.999, eps=1e-8)."
_DECAY = "Use fxtrain.optim.adamw(1e-3, weight_decay=0.01)."
_FIND = "Use fxtrain.find_batch_size before the run."
_TIME = "Use callbacks=[fxtrain.callbacks.time_limit(hours=8)]."
_RUN = "Use fxtrain.fit(state, step, data, epochs=1, run=fxtrain.RunInfo(name=name))."
_HF_MODEL = "Save for transformers with fxtrain.save_weights(folder, state), and push the folder with its tools."
_ONE_DEVICE = "There is no counterpart: a run uses one process and one device."
_NOTHING = "There is nothing to set in fxtrain. Leave it out."

ARGUMENTS: Mapping[str, str] = {
    # Keras: fit and compile
    "x": "Give data of batches as the third argument: fxtrain.data.batches((x, y), 32).",
    "y": "Give data of batches as the third argument: fxtrain.data.batches((x, y), 32).",
    "batch_size": _BATCH,
    "verbose": _PROGRESS,
    "validation_split": _SPLIT,
    "validation_data": _EVALUATION,
    "shuffle": _SHUFFLE,
    "class_weight": _WEIGHTS,
    "sample_weight": "Put the weights in the batch, and return fxtrain.weighted(loss, weights.sum()) as the loss.",
    "initial_epoch": "A state knows its step: fxtrain.fit(result.state, step, data, epochs=20) continues to epoch 20.",
    "steps_per_epoch": "An epoch has the length of the data. Use fxtrain.fit(state, step, data, steps=1000).",
    "validation_steps": _LIMIT,
    "validation_batch_size": "The batch size belongs to eval_data: fxtrain.data.batches(data, 32, shuffle=False).",
    "validation_freq": "Use fxtrain.fit(state, step, data, epochs=9, eval_when=fxtrain.every(epochs=2)).",
    "optimizer": _OPTIMIZER,
    "optimizers": _OPTIMIZER,
    "loss": _LOSS,
    "loss_weights": "Add the weighted losses in the loss function.",
    "metrics": _METRICS,
    "weighted_metrics": _METRICS,
    "run_eagerly": "A step is eager unless fxtrain.compile(step) compiles it.",
    "steps_per_execution": "Use fxtrain.compile(step, steps_per_call=8).",
    "jit_compile": _COMPILE,
    "auto_scale_loss": 'Use fxtrain.train_step(loss_fn, tx, precision="fp16"), which scales the loss.',
    # Lightning: Trainer
    "accelerator": _DEVICE,
    "strategy": _ONE_DEVICE,
    "devices": _ONE_DEVICE,
    "num_nodes": _ONE_DEVICE,
    "precision": _PRECISION,
    "logger": _WRITE,
    "fast_dev_run": _LIMIT,
    "max_epochs": _EPOCHS,
    "min_epochs": 'Use fxtrain.callbacks.early_stopping("loss", patience=3, unit="epochs", start_from=5).',
    "max_steps": _STEPS,
    "min_steps": 'Use fxtrain.callbacks.early_stopping("loss", patience=99, unit="steps", start_from=500).',
    "max_time": _TIME,
    "limit_train_batches": _LIMIT,
    "limit_val_batches": _LIMIT,
    "limit_test_batches": _LIMIT,
    "limit_predict_batches": _LIMIT,
    "overfit_batches": _LIMIT,
    "val_check_interval": _WHEN,
    "check_val_every_n_epoch": "Use fxtrain.fit(state, step, data, epochs=9, eval_when=fxtrain.every(epochs=2)).",
    "num_sanity_val_steps": "Call fxtrain.evaluate(state, eval_step, data) before the run.",
    "log_every_n_steps": _WRITE,
    "enable_checkpointing": _FOLDER,
    "enable_progress_bar": _PROGRESS,
    "enable_model_summary": _SUMMARY,
    "accumulate_grad_batches": _ACCUMULATE,
    "gradient_clip_val": _CLIP,
    "gradient_clip_algorithm": "Use fxtrain.optim.clip_by_global_norm(1.0), or fxtrain.optim.clip_by_value(1.0).",
    "deterministic": _SEED,
    "benchmark": "Set torch.backends.cudnn.benchmark.",
    "inference_mode": "fxtrain.eval_step(measure) computes no gradients. Leave it out.",
    "use_distributed_sampler": _ONE_DEVICE,
    "profiler": _PROFILE,
    "detect_anomaly": _DEBUG,
    "barebones": _NOTHING,
    "plugins": _NOTHING,
    "sync_batchnorm": _ONE_DEVICE,
    "reload_dataloaders_every_n_epochs": "Give a source that depends on the index: fxtrain.data.Source.",
    "default_root_dir": _FOLDER,
    "enable_autolog_hparams": _RUN,
    "model_registry": _NOTHING,
    "ckpt_path": _RESUME,
    "datamodule": "Give data of batches as the third argument, and eval_data=.",
    "train_dataloaders": _LOADER,
    "val_dataloaders": _EVALUATION,
    "weights_only": "fxtrain.restore reads tensors only, and runs no code of a checkpoint.",
    # transformers: Trainer
    "args": "Give one of these arguments to fxtrain.fit by name, and the error says where it went.",
    "model": "Give the module to fxtrain.init(module, tx), whose state is the first argument.",
    "data_collator": "Use fxtrain.data.batches(data, 32, collate=collate).",
    "train_dataset": "Give data of batches as the third argument: fxtrain.data.batches(dataset, 32).",
    "eval_dataset": _EVALUATION,
    "compute_metrics": _METRICS,
    "compute_loss_func": _LOSS,
    "optimizer_cls_and_kwargs": _OPTIMIZER,
    "preprocess_logits_for_metrics": "Return what callbacks need: fxtrain.eval_step(measure, outputs=True).",
    "processing_class": "Tokenize the data before the run, or in its source.",
    "tokenizer": "Tokenize the data before the run, or in its source.",
    "model_init": "Give the module to fxtrain.init(module, tx), whose state is the first argument.",
}

TRAINING_ARGUMENTS: Mapping[str, str] = {
    "output_dir": _FOLDER,
    "num_train_epochs": _EPOCHS,
    "optim": _OPTIMIZER,
    "optim_args": _OPTIMIZER,
    "optim_target_modules": 'Use fxtrain.with_trainable(state, tx, "head.*"), or fxtrain.optim.partition.',
    "learning_rate": _RATE,
    "weight_decay": _DECAY,
    "max_grad_norm": _CLIP,
    "gradient_accumulation_steps": _ACCUMULATE,
    "average_tokens_across_devices": _ONE_DEVICE,
    "label_smoothing_factor": "Smooth in the loss function: cross_entropy(logits, labels, label_smoothing=0.1).",
    "tf32": "Call torch.set_float32_matmul_precision('high').",
    "use_liger_kernel": _MODULE,
    "liger_kernel_config": _MODULE,
    "use_cache": _MODULE,
    "neftune_noise_alpha": "Add the noise in the loss function, where torch's random functions depend on the seed.",
    "torch_empty_cache_steps": _NOTHING,
    "auto_find_batch_size": _FIND,
    "include_num_input_tokens_seen": "Use callbacks=[fxtrain.callbacks.throughput()].",
    "disable_tqdm": _PROGRESS,
    "run_name": _RUN,
    "report_to": _WRITE,
    "eval_on_start": "Call fxtrain.evaluate(state, eval_step, data) before the run.",
    "prediction_loss_only": _METRICS,
    "include_for_metrics": _METRICS,
    "batch_eval_metrics": _METRICS,
    "save_total_limit": _KEEP,
    "load_best_model_at_end": 'Use callbacks=[fxtrain.callbacks.restore_best("loss")].',
    "metric_for_best_model": _BEST,
    "greater_is_better": 'Use fxtrain.callbacks.save_best("accuracy", mode="max").',
    "ignore_data_skip": "A resumed run always continues at its position in the data.",
    "restore_callback_states_from_checkpoint": "Callback state is part of every checkpoint.",
    "full_determinism": _SEED,
    "seed": _SEED,
    "data_seed": _SHUFFLE,
    "use_cpu": _DEVICE,
    "accelerator_config": _ONE_DEVICE,
    "parallelism_config": _ONE_DEVICE,
    "remove_unused_columns": "The loss function reads the entries of the batch that it needs.",
    "label_names": "The loss function reads the labels: batch['labels'].",
    "train_sampling_strategy": _SHUFFLE,
    "length_column_name": "Use fxtrain.data.bucketed, which groups by length.",
    "deepspeed": _ONE_DEVICE,
    "debug": _DEBUG,
    "skip_memory_metrics": _MEMORY,
    "do_train": "Call fxtrain.fit to train.",
    "do_eval": _EVALUATION,
    "do_predict": "Call fxtrain.view(state), which is the model as a function.",
    "resume_from_checkpoint": _RESUME,
    "local_rank": _ONE_DEVICE,
    "project": 'Use fxtrain.writers.wandb(folder, project="mine").',
    "enable_jit_checkpoint": "A run with a checkpointer saves when SIGTERM interrupts it.",
    "warmup_ratio": _SCHEDULE,
    "evaluation_strategy": _WHEN,
}
"""Advice by name, for arguments of transformers that no entry of ``GROUPS`` covers."""

GROUPS: Mapping[str, str] = {
    "per_device": _BATCH,
    "lr_scheduler": _SCHEDULE,
    "warmup": _SCHEDULE,
    "adam_": _BETAS,
    "bf16": _PRECISION,
    "fp16": _PRECISION,
    "activation_checkpointing": _CHECKPOINTING,
    "gradient_checkpointing": _CHECKPOINTING,
    "torch_compile": _COMPILE,
    "trackio": "Give the TrackioCallback of transformers as a callback, with fxtrain.interop.hf(callback).",
    "logging": _WRITE,
    "log_": _WRITE,
    "eval_": _WHEN,
    "save_": _SAVE,
    "hub_": _HF_MODEL,
    "push_to_hub": _HF_MODEL,
    "dataloader_drop_last": _DROP,
    "dataloader": _PREFETCH,
    "ddp": _ONE_DEVICE,
    "fsdp": _ONE_DEVICE,
}
"""Advice by the beginning of a name, for arguments of transformers that belong together."""

OF_FUNCTIONS: Mapping[str, Mapping[str, str]] = {
    "early_stopping": {
        "monitor": 'The metric comes first: fxtrain.callbacks.early_stopping("loss", patience=3).',
        "restore_best_weights": 'Add fxtrain.callbacks.restore_best("loss").',
        "start_from_epoch": 'Use fxtrain.callbacks.early_stopping("loss", patience=3, unit="epochs", start_from=5).',
        "check_finite": "Add fxtrain.callbacks.nan_guard().",
        "stopping_threshold": 'Add fxtrain.callbacks.stop_at("loss", 0.1).',
        "divergence_threshold": 'Add fxtrain.callbacks.stop_on_divergence("loss").',
        "strict": "A metric that is missing always raises.",
        "log_rank_zero_only": _NOTHING,
        "check_on_train_epoch_end": "Evaluate the training data to watch its metrics: eval_data= of fxtrain.fit.",
        "early_stopping_patience": 'Use fxtrain.callbacks.early_stopping("loss", patience=3).',
        "early_stopping_threshold": 'Use fxtrain.callbacks.early_stopping("loss", patience=3, min_delta=0.001).',
        "threshold": 'Use fxtrain.callbacks.early_stopping("loss", patience=3, min_delta=0.001).',
    },
    "reduce_on_plateau": {
        "monitor": 'The metric comes first: fxtrain.callbacks.reduce_on_plateau("loss").',
        "optimizer": "Make its learning rate part of the state: fxtrain.optim.inject_hyperparams(fxtrain.optim.sgd).",
        "eps": 'Use fxtrain.callbacks.reduce_on_plateau("loss", minimum=1e-5).',
        "min_lr": 'Use fxtrain.callbacks.reduce_on_plateau("loss", minimum=1e-5).',
        "threshold": 'Use fxtrain.callbacks.reduce_on_plateau("loss", min_delta=1e-4).',
        "threshold_mode": 'Use fxtrain.callbacks.reduce_on_plateau("loss", min_delta=1e-4, relative=True).',
    },
    "save_best": {
        "monitor": 'The metric comes first: fxtrain.callbacks.save_best("loss").',
        "save_best_only": "It saves at improvements only.",
        "save_top_k": _KEEP,
    },
    "restore_best": {"monitor": 'The metric comes first: fxtrain.callbacks.restore_best("loss").'},
    "save": {
        "save_freq": "Use fxtrain.callbacks.save(every=1000).",
        "every_n_epochs": "Use fxtrain.callbacks.save(every=fxtrain.every(epochs=1)).",
        "every_n_train_steps": "Use fxtrain.callbacks.save(every=1000).",
    },
    "checkpointer": {
        "dirpath": "The folder comes first: fxtrain.checkpointer(folder).",
        "filepath": "The folder comes first: fxtrain.checkpointer(folder).",
        "max_to_keep": _KEEP,
        "save_top_k": _KEEP,
        "monitor": _BEST,
        "save_best_only": _BEST,
        "filename": "The folder comes first, and names its checkpoints by step: fxtrain.checkpointer(folder).",
        "auto_insert_metric_name": _NOTHING,
        "enable_version_counter": _NOTHING,
        "save_on_train_epoch_end": _SAVE,
        "save_on_exception": "A run with a checkpointer saves when it is interrupted.",
        "train_time_interval": _SAVE,
        "every_n_epochs": "Use callbacks=[fxtrain.callbacks.save(every=fxtrain.every(epochs=1))].",
        "initial_value_threshold": _BEST,
        "save_last": "The last checkpoint is always kept.",
        "save_weights_only": _EXPORT,
        "every_n_train_steps": _SAVE,
        "save_freq": _SAVE,
    },
    "time_limit": {
        "duration": "Use fxtrain.callbacks.time_limit(hours=8).",
        "interval": "The time is checked at each step. Leave it out.",
    },
    "swa": {
        "swa_epoch_start": "Use fxtrain.callbacks.swa(start=1000), in steps.",
        "swa_lrs": "Give the optimizer a schedule: fxtrain.optim.sgd(fxtrain.schedules.cosine(0.1, 1000)).",
    },
    "ema": {
        "momentum": "Use fxtrain.callbacks.ema(0.999).",
        "update_freq": "Use fxtrain.callbacks.ema(0.999, every=5).",
    },
    "adam": {
        "weight_decay": (
            "Use fxtrain.optim.adamw(1e-3, weight_decay=0.01), or add the decay to the gradients: "
            "fxtrain.optim.chain(fxtrain.optim.add_decayed_weights(0.01), tx)."
        ),
    },
    "cosine": {
        "T_max": "Use {function}(1e-3, decay_steps=1000).",
        "eta_min": "Use {function}(1e-3, 1000, alpha=0.1), a fraction of the initial value.",
    },
    "exponential": {"gamma": "Use {function}(1e-3, 1, decay_rate=0.99)."},
    "optim": {
        "lr": "The learning rate comes first: {function}(1e-3).",
        "betas": "Use fxtrain.optim.adamw(1e-3, b1=0.9, b2=0.999).",
        "beta_1": "Use b1=0.9.",
        "beta_2": "Use b2=0.999.",
        "epsilon": "Use eps=1e-8.",
        "params": "Parameters are given to fxtrain.init(module, tx). The learning rate comes first: {function}(1e-3).",
        "weight_decay": "Add the decay before it: fxtrain.optim.chain(fxtrain.optim.add_decayed_weights(1e-4), tx).",
        "decoupled_weight_decay": "Use fxtrain.optim.adamw(1e-3, weight_decay=0.01), whose decay is decoupled.",
        "alpha": "Use fxtrain.optim.rmsprop(1e-3, decay=0.99).",
        "lr_decay": "Give it a schedule: fxtrain.optim.adagrad(lambda step: 0.1 / (1 + 0.01 * step)).",
        "maximize": "Negate the loss.",
        "fused": _COMPILE,
        "foreach": _COMPILE,
        "capturable": _COMPILE,
        "differentiable": _NOTHING,
        "clipnorm": "Clip first: fxtrain.optim.chain(fxtrain.optim.clip_by_global_norm(1.0), tx).",
        "global_clipnorm": "Clip first: fxtrain.optim.chain(fxtrain.optim.clip_by_global_norm(1.0), tx).",
        "clipvalue": "Clip first: fxtrain.optim.chain(fxtrain.optim.clip_by_value(1.0), tx).",
        "use_ema": "Use callbacks=[fxtrain.callbacks.ema(0.999)].",
    },
    "batches": {
        "num_workers": _LOADER,
        "pin_memory": _LOADER,
        "sampler": _LOADER,
        "batch_sampler": _LOADER,
        "timeout": _LOADER,
        "worker_init_fn": _LOADER,
        "multiprocessing_context": _LOADER,
        "generator": "Use fxtrain.data.batches(data, 32, seed=0).",
        "prefetch_factor": _PREFETCH,
        "persistent_workers": _LOADER,
        "pin_memory_device": _LOADER,
        "in_order": _LOADER,
        "dataset": "The data comes first: fxtrain.data.batches(data, 32).",
        "collate_fn": "Use fxtrain.data.batches(data, 32, collate=collate).",
    },
}
"""Advice on arguments that have another meaning in one function, or in all of ``fxtrain.optim``."""


def advice_on_argument(function: str, argument: str, room: str = "") -> str:
    """Returns advice on an argument of another library that a function does not have, or an empty string.

    Args:
        function: The function's name.
        argument: The argument's name.
        room: The package of the function, such as ``"optim"``.

    Example:
        >>> advice_on_argument("fit", "max_epochs")
        'Use fxtrain.fit(state, step, data, epochs=10).'
        >>> advice_on_argument("fit", "epoch")
        ''
    """
    for advice in (OF_FUNCTIONS.get(function, {}), OF_FUNCTIONS.get(room, {}), ARGUMENTS, TRAINING_ARGUMENTS):
        if argument in advice:
            return advice[argument].format(function=f"fxtrain.{room}.{function}")
    return next((advice for start, advice in GROUPS.items() if argument.startswith(start)), "")
