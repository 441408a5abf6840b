"""The one training loop: transformers' Trainer with a teacher, summed losses and duration-bounded batches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from speechkd.data.sampler import DurationBatchSampler
from speechkd.files import write_jsonl

Batch = dict[str, Any]
LossTerms = Callable[[nn.Module, PreTrainedModel | None, Batch], tuple[Tensor, dict[str, Tensor]]]


@dataclass(kw_only=True)
class DistillationArguments(TrainingArguments):
    """Arguments of transformers' Trainer with the defaults that distillation needs.

    Losses that are not finite are never hidden, batches keep all their columns, and logging is a file.
    """

    output_dir: str
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool = False
    ddp_find_unused_parameters: bool | None = False
    logging_steps: float = 10
    save_total_limit: int | None = 2
    report_to: str | list[str] | None = "none"
    warmup_steps: float = 0


class DistillationTrainer(Trainer):
    """Trains a student on what a method says its loss is.

    Args:
        student: model that is trained and saved.
        teacher: frozen model, or None; never saved and never optimised.
        args: as for `Trainer`.
        train_dataset: map-style; its items go through `collate`.
        collate: items to a batch, a dict with `ids` (list of utterance ids) and tensors.
        sampler: batches of item indices.
        loss_terms: `(model, teacher, batch)` to the loss as a sum over items, and its terms as sums, for the log.
        count_items: `batch` to the number of items that the loss sums over; 0-dim, int64.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        *,
        args: DistillationArguments,
        train_dataset: Dataset,
        collate: Callable[[list[Any]], Batch],
        sampler: DurationBatchSampler,
        loss_terms: LossTerms,
        count_items: Callable[[Batch], Tensor],
    ) -> None:
        super().__init__(
            model=student, args=args, train_dataset=train_dataset, data_collator=collate, callbacks=[_SetEpoch(sampler)]
        )
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the count of the whole accumulated batch
        self.teacher = None if teacher is None else self._prepare_teacher(teacher)
        self.sampler, self.loss_terms, self.count_items = sampler, loss_terms, count_items
        self._term_means: dict[str, Tensor] = {}
        self._num_steps_in_log = 0

    def _prepare_teacher(self, teacher: PreTrainedModel) -> PreTrainedModel:
        teacher.requires_grad_(False).eval()
        return self.accelerator.prepare_model(teacher, evaluation_mode=True)

    def get_train_dataloader(self) -> DataLoader:
        """Plain loader over our own sampler, which already knows the rank."""
        return DataLoader(
            cast(Dataset, self.train_dataset),
            batch_sampler=self.sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=False,  # workers must see the sampler of each epoch
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """The batches of one optimizer step, and the number of items in them over all ranks."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        count = torch.zeros((), dtype=torch.int64, device=device)
        for batch in batches:
            count += self.count_items(batch).to(device)
        if self.args.world_size > 1:
            count = self.accelerator.gather(count[None]).sum()
        self._num_steps_in_log += 1
        return batches, count.clamp(min=1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Summed loss over the count of the whole step; DDP's mean over ranks is undone by `world_size`."""
        count = self.count_items(inputs) if num_items_in_batch is None else num_items_in_batch
        total, terms = self.loss_terms(model, self.teacher, inputs)
        if not torch.isfinite(total):
            values = ", ".join(f"{name} {term.item():g}" for name, term in terms.items())
            raise FloatingPointError(
                f"the loss is {total.item()} at step {self.state.global_step} ({values}) on the utterances "
                f"{', '.join(inputs['ids'])}; look at these clips, lower trainer.learning_rate, or train in float32"
            )
        for name, term in {"total": total, **terms}.items():
            mean = term.detach() / count
            self._term_means[name] = self._term_means[name] + mean if name in self._term_means else mean
        loss = total * self.args.world_size / count
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the loss terms, `loss/<name>`, averaged over the steps since the last log; keep `train_log.jsonl`."""
        if "loss" in logs and self._term_means:
            means = torch.stack(list(self._term_means.values())) / self._num_steps_in_log
            if self.args.world_size > 1:
                means = self.accelerator.reduce(means, reduction="sum")
            logs.update({f"loss/{name}": mean for name, mean in zip(self._term_means, means.tolist(), strict=True)})
            self._term_means, self._num_steps_in_log = {}, 0
        super().log(logs, start_time)
        if self.is_world_process_zero():
            write_jsonl(Path(cast(str, self.args.output_dir)) / "train_log.jsonl", self.state.log_history)


class _SetEpoch(TrainerCallback):
    """Reshuffles the sampler at each epoch; a resumed run starts with the shuffle of its own epoch."""

    def __init__(self, sampler: DurationBatchSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(int(state.epoch))
