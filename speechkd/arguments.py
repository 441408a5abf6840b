"""Arguments of the training loop: those of transformers' Trainer, with other defaults and a few more."""

import os
from dataclasses import dataclass, field

import torch
from transformers import IntervalStrategy, TrainingArguments


@dataclass(kw_only=True)
class DistillationArguments(TrainingArguments):
    """Arguments of transformers' Trainer with the defaults that distillation needs.

    Losses that are not finite are never hidden, batches keep all their columns, and logging is a file and TensorBoard.

    `torch_compile` compiles each transformer block of student and teacher, and nothing else: quick to compile, and the
    names of the weights stay.

    Args:
        ema_decay: keep an exponential moving average of the weights, which is evaluated and becomes the student; null
            for none, 0.999 is usual.
        average_last: the student is the mean of this many last checkpoints; 0 and 1 take the last weights.
        early_stopping_patience: stop after this many evaluations without a better metric; null never does.
    """

    output_dir: str = field()  # without this, the null of the class above is its default
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool = False
    ddp_find_unused_parameters: bool | None = False
    logging_steps: float = 10
    save_total_limit: int | None = 2
    report_to: None | str | list[str] = "tensorboard"
    warmup_steps: float = 0
    ema_decay: float | None = None
    average_last: int = 0
    early_stopping_patience: int | None = None

    def __post_init__(self) -> None:
        self.block_compiler: dict[str, str | None] | None = None
        if self.torch_compile or self.torch_compile_backend or self.torch_compile_mode:
            self.block_compiler = {"backend": self.torch_compile_backend or "inductor", "mode": self.torch_compile_mode}
            # accelerate would compile the whole forward pass, in which we compute the loss
            self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = False, None, None
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available():
            # not told so, accelerate would take the processes of a machine without a GPU for separate runs
            self.use_cpu, self.ddp_backend = True, self.ddp_backend or "gloo"
        super().__post_init__()
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"trainer.ema_decay must be between 0 and 1, got {self.ema_decay}; null keeps no average")
        if self.average_last < 0:
            raise ValueError(f"trainer.average_last must be 0 or more, got {self.average_last}")
        if self.average_last > 1:
            if self.ema_decay is not None or self.load_best_model_at_end:
                raise ValueError(
                    f"trainer.average_last={self.average_last}, ema_decay={self.ema_decay} and load_best_model_at_end="
                    f"{self.load_best_model_at_end} each say which weights the student gets; choose one"
                )
            if self.save_total_limit is not None and self.save_total_limit < self.average_last:
                raise ValueError(
                    f"trainer.average_last={self.average_last} needs as many checkpoints, but save_total_limit="
                    f"{self.save_total_limit}; raise it"
                )
        if self.early_stopping_patience is not None and not self.load_best_model_at_end:
            raise ValueError(
                "trainer.early_stopping_patience needs load_best_model_at_end=true and an eval_strategy, so that the "
                "best student is kept"
            )

    def follow_data(self, num_workers: int, dev_manifest: str | None) -> None:
        """Take over what a recipe's `data` section says, which a `trainer` section must not contradict.

        Args:
            num_workers: processes that prepare batches.
            dev_manifest: what `eval_strategy` evaluates on; None for nothing.

        Raises:
            ValueError: `dataloader_num_workers` is another number, or there is nothing to evaluate on.
        """
        if self.dataloader_num_workers not in (0, num_workers):
            raise ValueError(
                f"trainer.dataloader_num_workers={self.dataloader_num_workers} is not data.num_workers={num_workers}; "
                "set data.num_workers alone"
            )
        self.dataloader_num_workers = num_workers
        if self.eval_strategy != "no" and dev_manifest is None:
            strategy = IntervalStrategy(self.eval_strategy).value
            raise ValueError(f"trainer.eval_strategy={strategy} needs data.dev_manifest")
