"""Names of settings in other code, and the keys of a recipe that mean the same."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

_KEYS = {
    "accumulation": "accum accum_iter accum_steps accumulate_grad_batches accumulation_steps grad_accum "
    "grad_accum_steps gradient_accumulation gradient_accumulation_steps update_freq",
    "batch": "batch_size batchsize bs global_batch_size train_batch_size train_bs",
    "checkpoints.every_epochs or checkpoints.every_steps": "checkpoint_freq checkpoint_interval ckpt_freq save_every "
    "save_freq save_interval save_steps",
    "checkpoints.keep": "checkpoint_hist keep_checkpoints save_total_limit",
    "clip": "clip_grad clip_grad_norm clip_norm grad_clip grad_clip_norm gradient_clip gradient_clip_val "
    "gradient_clipping max_grad_norm max_norm",
    "data.augment": "aa augment augmentation augmentations auto_augment autoaugment color_jitter colorjitter cutmix "
    "cutmix_alpha cutmix_prob cutout mixup mixup_alpha mixup_prob mixup_switch_prob "
    "erasing rand_augment randaugment random_erasing reprob trivial_augment trivialaugment trivial_augment_wide",
    "data.channels_last": "memory_format",
    "data.repeat": "aug_repeats ra_reps ra_sampler repeated_aug repeated_augmentation",
    "data.classes": "n_classes nb_classes num_class num_classes",
    "data.crop": "random_crop random_resized_crop",
    "data.flip": "hflip horizontal_flip random_flip",
    "data.mean and data.std": "mean normalization normalize std",
    "data.path": "data_dir data_folder data_path data_root data_set datadir dataset dataset_dir dataset_path path root "
    "train_dir",
    "data.prefetch": "prefetch_factor",
    "data.size": "crop_size image_size img_size imgsz input_size resolution",
    "data.threads": "dataloader_num_workers n_workers num_threads num_workers nw workers",
    "data.validation_batch": "eval_batch_size test_batch_size val_batch_size validation_batch_size",
    "ema.warmup": "ema_warmup model_ema_warmup",
    "ema.decay": "ema_decay ema_momentum model_ema model_ema_decay use_ema",
    "epochs": "max_epochs n_epochs nb_epochs num_epochs num_train_epochs total_epochs train_epochs",
    "folder": "ckpt_dir exp_dir exp_name experiment experiment_name log_dir logdir name out out_dir output output_dir "
    "results_dir run_dir run_name save_dir save_folder save_path tag work_dir workdir",
    "graph": "cuda_graph cuda_graphs",
    "journal.every_steps": "log_every log_every_n_steps log_freq log_interval log_steps logging_steps print_freq",
    "journal.trackers": "log_with logger report_to tb tensorboard tracker use_wandb wandb",
    "losses.NAME.weight": "alpha ce_weight cls_weight distill_weight feat_weight kd_weight lambda lambda_kd "
    "loss_weight",
    "losses.dkd.beta": "beta",
    "losses.kd.temperature": "kd_t kd_temperature t tau temp temperature",
    "losses.ce.label_smoothing": "label_smooth label_smoothing ls smoothing",
    "method=NAME, or losses": "criterion distill distill_loss distillation distiller kd kd_loss loss loss_fn loss_type",
    "optimizer.kind": "opt optim optimizer_name",
    "optimizer.arguments": "opt_args opt_kwargs optimizer_args optimizer_kwargs",
    "optimizer.betas": "adam_betas opt_betas",
    "optimizer.eps": "adam_eps adam_epsilon opt_eps",
    "optimizer.weight_decay": "l2 wd",
    "precision": "amp amp_dtype autocast bf16 fp16 half mixed_precision use_amp",
    "schedule.factor": "decay_rate gamma lr_decay lr_decay_rate lr_gamma",
    "schedule.final_rate": "eta_min final_lr lr_min min_lr",
    "schedule.kind": "lr_policy lr_schedule lr_scheduler sched scheduler",
    "schedule.milestones": "decay_epochs lr_decay_epochs lr_decay_stages lr_milestones lr_steps step_size",
    "schedule.power": "decay_power lr_power poly_power",
    "schedule.rate": "base_lr blr init_lr initial_lr learning_rate lr max_lr",
    "schedule.warmup_epochs": "warm_up warmup warmup_steps",
    "schedule.warmup_rate": "warmup_init_lr warmup_lr",
    "student.compile or teacher.compile": "compile torch_compile torchcompile",
    "student.model": "arch backbone model model_name net network student_arch student_model",
    "teacher.expect": "expect_top1",
    "teacher.model": "model_t teacher_arch teacher_model teacher_name",
    "teacher.weights": "path_t teacher_checkpoint teacher_ckpt teacher_path teacher_weights",
    "teacher.weights or student.start.weights": "init_checkpoint pretrained pretrained_weights weights",
}
"""Names by the key that means the same, for keys at the top level and in sections other than losses."""

_ANSWERS = {
    "the launcher starts the processes: torchrun --nproc_per_node N, or accelerate launch --num_processes N": "ddp "
    "devices dist_backend dist_url distributed gpu gpus local_rank n_gpus nnodes nproc nproc_per_node num_devices "
    "num_gpus num_nodes num_processes rank world_size",
    "the same command continues an interrupted run; student.start.weights is for other initial weights": "auto_resume "
    "ckpt ckpt_path load_from resume resume_from resume_from_checkpoint",
    "every epoch ends with a validation": "check_val_every_n_epoch eval_every eval_freq eval_interval eval_steps "
    "val_every val_freq val_interval",
    "a run's length is in epochs; stop.steps only ends the command early": "iterations iters max_iter max_iters "
    "max_steps num_iters num_steps steps total_steps",
    "name the recipe without a key: train.py RECIPE": "c cfg config config_file recipe yaml",
    "use python pipeline/evaluate.py": "eval eval_only evaluate test test_only",
    "the launcher chooses DeepSpeed: accelerate launch --config_file launchers/accelerate/zero2.yaml": "deepspeed fsdp "
    "zero zero_stage",
    "training has no section of its own: epochs, batch and precision are at the top level": "hparams hyperparameters "
    "train trainer training",
}
"""Names that no key means, by what to do instead."""

_SECTIONS = {
    "checkpoints": {"every_epochs": "epochs", "every_steps": "interval steps"},
    "data": {"path": "dir folder name", "loader": "type"},
    "ema": {"decay": "beta momentum rate"},
    "journal": {"every_steps": "freq frequency interval steps"},
    "losses": {
        "label_smoothing": "eps epsilon",
        "ramp": "warmup warmup_epochs",
        "temperature": "kd_t t tau temp",
        "weight": "alpha coef coefficient factor lambda loss_weight w",
    },
    "optimizer": {"kind": "name type"},
    "schedule": {"factor": "gamma", "kind": "name policy type", "milestones": "steps", "rate": "value"},
    "student": {"model": "name type", "start.weights": "checkpoint ckpt init path pretrained weights"},
    "teacher": {"model": "name type", "weights": "checkpoint ckpt path pretrained"},
}
"""Names by key of a section, for that section; ``losses`` is any loss."""

_LOSS_KEYS = {"temperature": "kd_t kd_temperature t tau temp temperature"}
"""Names by key of several losses."""


def _inverted(names: Mapping[str, str]) -> dict[str, str]:
    return {name: key for key, text in names.items() for name in text.split()}


_KEY_OF = _inverted(_KEYS)
_ANSWER_OF = _inverted(_ANSWERS)
_LOSS_KEY_OF = _inverted(_LOSS_KEYS)


def key_for(name: str) -> str | None:
    """Return the key, or the keys as a text, that other code calls ``name``; None if it is not known."""
    return _KEY_OF.get(_normal(name))


def answer_for(name: str) -> str | None:
    """Return what to do instead of giving ``name``, for which there is no key; None if it is not known."""
    return _ANSWER_OF.get(_normal(name))


def key_in_section(above: Sequence[str], name: str, known: Collection[str]) -> str | None:
    """Return the ``known`` key of the section ``above`` that other code calls ``name``."""
    key = _inverted(_SECTIONS.get(above[0], {})).get(_normal(name)) if above else None
    return ".".join([*above, key]) if key and key.partition(".")[0] in known else None


def loss_key(name: str) -> str:
    """Return the key of losses that other code calls ``name``; the name itself if it is not known."""
    return _LOSS_KEY_OF.get(_normal(name), name)


def _normal(name: str) -> str:
    return name.lower().replace("-", "_").strip("_")
