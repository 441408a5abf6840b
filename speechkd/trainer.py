"""The one training loop: transformers' Trainer with a teacher, summed losses and duration-bounded batches."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_utils import TrainOutput

from speechkd.arguments import DistillationArguments
from speechkd.blocks import compile_blocks, shard_blocks
from speechkd.checkpoints import (
    average_checkpoints,
    checkpoint_bytes,
    explain_full_disk,
    last_complete_checkpoint,
    mark_complete,
    mark_incomplete,
    require_space,
    rotate,
)
from speechkd.data.loader import explain_dead_workers, train_loader
from speechkd.data.prefetch import prefetch
from speechkd.data.sampler import DurationBatchSampler
from speechkd.ema import EmaCallback, WeightAverage
from speechkd.files import write_jsonl
from speechkd.preemption import Preempted, TerminationRequest, sigterm_requests
from speechkd.progress import DistillationProgress, Throughput, throughput_logs

logger = logging.getLogger(__name__)

Batch = dict[str, Any]
LossTerms = Callable[[nn.Module, PreTrainedModel | None, Batch], tuple[Tensor, dict[str, Tensor]]]
EMA_FILE = "ema.safetensors"


class DistillationTrainer(Trainer):
    """Trains a student on what a method says its loss is.

    The loss is computed inside the student's forward pass, so that what acts around it (autocast, DDP, FSDP,
    compilation) covers heads that a loss applies by itself.

    Args:
        student: model that is trained and saved.
        teacher: frozen model in a dtype of its own, or None; never saved and never optimised. Under FSDP it is sharded.
        args: as for `Trainer`.
        train_dataset: map-style; its items go through `collate`.
        collate: items to a batch, a dict with `ids` (list of utterance ids) and tensors, and for the log
            `audio_seconds` and `padded_seconds`.
        sampler: batches of item indices.
        loss_terms: `(model, teacher, batch)` to the loss as a sum over items, and its terms as sums, for the log.
        count_items: `batch` to the number of items that the loss sums over; 0-dim, int64.
        eval_dataset: items to evaluate on, at `args.eval_strategy`.
        eval_sampler: their batches, for one process; the ranks share them out.
        eval_metrics: the student to further values, such as a word error rate; called on every rank.
        parameter_groups: the student to groups of `args.optim`, whose own learning rates follow the one schedule; None
            for those of `Trainer`.
    """

    model: PreTrainedModel
    args: DistillationArguments

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        *,
        args: DistillationArguments,
        train_dataset: Dataset,
        collate: Callable[[list[Any]], Batch],
        sampler: Sampler[list[int]],
        loss_terms: LossTerms,
        count_items: Callable[[Batch], Tensor],
        eval_dataset: Dataset | None = None,
        eval_sampler: DurationBatchSampler | None = None,
        eval_metrics: Callable[[PreTrainedModel], dict[str, float]] | None = None,
        parameter_groups: Callable[[Any], list[dict[str, Any]]] | None = None,
    ) -> None:
        patience = args.early_stopping_patience
        stopping: list[TrainerCallback] = [] if patience is None else [EarlyStoppingCallback(patience)]
        super().__init__(
            model=student,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=collate,
            callbacks=[_Hooks(self), *stopping],
        )
        if self.pop_callback(ProgressCallback):
            self.add_callback(DistillationProgress)
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the count of the whole accumulated batch
        self.teacher = None if teacher is None else self._prepare_teacher(teacher)
        for model in (student, self.teacher):
            if model is not None and args.block_compiler is not None:
                compile_blocks(model, **args.block_compiler)
        self.sampler, self.loss_terms, self.count_items = sampler, loss_terms, count_items
        self.eval_sampler, self.eval_metrics = eval_sampler, eval_metrics
        self.parameter_groups = parameter_groups
        if args.ema_decay is not None and self.is_fsdp_enabled:
            raise ValueError(
                "trainer.ema_decay does not work with sharded weights; set it to null or train without fsdp"
            )
        self.ema = None if args.ema_decay is None else WeightAverage(student, args.ema_decay)
        if self.ema is not None:
            self.add_callback(EmaCallback(self.ema))
        self.throughput = Throughput()
        self.termination = TerminationRequest()
        self._term_sums: dict[str, Tensor] = {}
        self._num_steps_in_log = 0
        self._batches_of: Iterator | None = None
        self._must_stop = False
        self._step_losses: list[tuple[Tensor, dict[str, Tensor], list[str]]] = []

    def _prepare_teacher(self, teacher: PreTrainedModel) -> PreTrainedModel:
        teacher.requires_grad_(False).eval()
        if not self.is_fsdp_enabled:
            return self.accelerator.prepare_model(teacher, evaluation_mode=True)
        cast(nn.Module, teacher).to(self.args.device)
        shard_blocks(teacher)
        return teacher

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """That of `args.optim`, over the groups of `parameter_groups` where there are any."""
        if self.optimizer is None and self.parameter_groups is not None:
            student = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, student)
            self.optimizer = optimizer_class(self.parameter_groups(student), **options)
        return super().create_optimizer(model)

    def train(
        self,
        resume_from_checkpoint: str | Path | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train.

        Args:
            resume_from_checkpoint: go on from this checkpoint; True takes the last complete one, if there is any.
            trial: as for `Trainer`.
            ignore_keys_for_eval: as for `Trainer`.

        Raises:
            Preempted: SIGTERM came; a checkpoint of the last step is saved.
            FloatingPointError: the loss is not finite; names its terms and utterances.
            OSError: the disk is full; the checkpoints before are kept.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(str(self.args.output_dir))
        checkpoint = str(resume_from_checkpoint) if resume_from_checkpoint else None
        if checkpoint is not None and self.ema is not None:
            self.ema.load(Path(checkpoint) / EMA_FILE)
        with explain_dead_workers(), sigterm_requests() as self.termination, self._loss_in_forward():
            result = super().train(checkpoint, trial, ignore_keys_for_eval)
        if self._must_stop and self.state.global_step < self.state.max_steps:
            raise Preempted(
                f"stopped by SIGTERM; step {self.state.global_step} is saved in {self.args.output_dir}, the same "
                "command resumes"
            )
        if self.ema is not None:
            self.ema.copy_to(self.model)
        elif self.args.average_last > 1:
            averaged = average_checkpoints(str(self.args.output_dir), last=self.args.average_last)
            self.model.load_state_dict(averaged, strict=False)  # tied weights are stored once
        return result

    @contextmanager
    def _loss_in_forward(self) -> Iterator[None]:
        """While this is open, `model(batch_to_score=batch)` gives the loss and its terms."""
        student = self.model
        if "forward" in vars(student):  # evaluation inside of training
            yield
            return
        forward = student.forward

        def forward_or_loss(*inputs: Any, batch_to_score: Batch | None = None, **named_inputs: Any) -> Any:
            if batch_to_score is None:
                return forward(*inputs, **named_inputs)
            wrapped = student.forward  # by accelerate, whose autocast would stay on if it were entered twice
            student.forward = forward
            try:
                return self.loss_terms(student, self.teacher, batch_to_score)
            finally:
                student.forward = wrapped

        student.forward = forward_or_loss
        try:
            yield
        finally:
            vars(student).pop("forward", None)

    def get_train_dataloader(self) -> DataLoader:
        """Plain loader over our own sampler, which already knows the rank."""
        return train_loader(
            cast(Dataset, self.train_dataset),
            self.sampler,
            cast(Callable, self.data_collator),
            num_workers=self.args.dataloader_num_workers,
            seed=self.args.seed,
            rank=self.args.process_index,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """The batches of one optimizer step, and the number of items in them over all ranks."""
        if epoch_iterator is not self._batches_of:
            self._batches_of, self._prefetched = epoch_iterator, prefetch(epoch_iterator, device)
        started = time.perf_counter()
        batches = [batch for _, batch in zip(range(num_batches), self._prefetched, strict=False)]
        self.throughput.add(batches, time.perf_counter() - started)
        self._num_steps_in_log += 1
        counts = torch.zeros(2, dtype=torch.int64, device=device)
        for batch in batches:
            counts[0] += self.count_items(batch)
        counts[1] = int(self.termination.received)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        self._stop_votes = counts[1]
        return batches, counts[0].clamp(min=1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Summed loss over the count of the whole step; DDP's mean over ranks is undone by `world_size`."""
        count = self.count_items(inputs) if num_items_in_batch is None else num_items_in_batch
        total, terms = model(batch_to_score=inputs)
        terms = {"total": total.detach(), **{name: term.detach() for name, term in terms.items()}}
        self._step_losses.append((total.detach(), terms, inputs["ids"]))
        for name, term in terms.items():
            mean = term / count
            self._term_sums[name] = self._term_sums[name] + mean if name in self._term_sums else mean
        loss = total * self.args.world_size / count
        return (loss, {}) if return_outputs else loss

    def finish_step(self) -> None:
        """Look at the losses of the step before the optimizer uses them: the only wait for the device in a step.

        Raises:
            FloatingPointError: one is not finite.
        """
        losses, self._step_losses = self._step_losses, []
        totals = torch.stack([total for total, _, _ in losses])
        *finite, votes = torch.cat([totals.isfinite(), self._stop_votes[None].bool()]).tolist()
        for good, (total, terms, ids) in zip(finite, losses, strict=True):
            if not good:
                values = ", ".join(f"{name} {term.item():g}" for name, term in terms.items() if name != "total")
                raise FloatingPointError(
                    f"the loss is {total.item()} at step {self.state.global_step} ({values}) on the utterances "
                    f"{', '.join(ids)}; look at these clips, lower trainer.learning_rate, or train in float32"
                )
        # several processes agree at the beginning of a step: the signal may reach them in different ones
        self._must_stop = votes or (self.args.world_size == 1 and self.termination.received)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The loss and its terms per item of the evaluation set, and what `eval_metrics` adds.

        Returns:
            `eval_loss`, `eval_loss/<term>` and `eval_<metric>`, of the averaged weights where an average is kept.
        """
        if self.eval_dataset is None or self.eval_sampler is None:
            raise ValueError("trainer.eval_strategy needs data to evaluate on; set data.dev_manifest, or set it to no")
        averaged = nullcontext() if self.ema is None else self.ema.applied(self.model)
        was_training = self.model.training
        self.model.eval()
        with averaged, self._loss_in_forward(), torch.no_grad():
            logs = self._evaluate_loss(metric_key_prefix)
            if self.eval_metrics is not None:
                extra = self.eval_metrics(self.model)
                logs.update({f"{metric_key_prefix}_{name}": value for name, value in extra.items()})
        self.model.train(was_training)
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    def _evaluate_loss(self, prefix: str) -> dict[str, float]:
        batches = list(cast(DurationBatchSampler, self.eval_sampler))
        rank, world_size, device = self.args.process_index, self.args.world_size, self.args.device
        # ranks that have none left compute one again, without counting it: FSDP needs all of them in each step
        rounds = -(-len(batches) // world_size)
        mine = [batches[(step * world_size + rank) % len(batches)] for step in range(rounds)]
        counts_here = [step * world_size + rank < len(batches) for step in range(rounds)]
        loader = train_loader(
            cast(Dataset, self.eval_dataset),
            mine,  # type: ignore[arg-type]
            cast(Callable, self.data_collator),
            num_workers=self.args.dataloader_num_workers,
            seed=self.args.seed,
            rank=rank,
        )
        sums: dict[str, Tensor] = {}
        for counted, batch in zip(counts_here, prefetch(iter(loader), device), strict=True):
            total, terms = self.model(batch_to_score=self._prepare_inputs(batch))
            values = {"count": self.count_items(batch).to(device), "loss": total}
            values |= {f"loss/{name}": term for name, term in terms.items()}
            for name, value in values.items():
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64, device=device)) + counted * value
        stacked = torch.stack(list(sums.values()))
        if world_size > 1:
            stacked = self.accelerator.reduce(stacked, reduction="sum")
        count, *rest = stacked.tolist()
        return {f"{prefix}_{name}": value / max(count, 1.0) for name, value in zip(list(sums)[1:], rest, strict=True)}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the loss terms, `loss/<name>`, averaged over the steps since the last log; keep `train_log.jsonl`."""
        if "loss" in logs and self._term_sums:
            sums = torch.tensor(self.throughput.sums(), dtype=torch.float64, device=self.args.device)
            values = torch.cat([torch.stack(list(self._term_sums.values())).double() / self._num_steps_in_log, sums])
            if self.args.world_size > 1:
                values = self.accelerator.reduce(values, reduction="sum")
            means, times = values[:-4].tolist(), values[-4:].tolist()
            logs.update({f"loss/{name}": mean for name, mean in zip(self._term_sums, means, strict=True)})
            logs.update(throughput_logs(times, self.args.world_size))
            if torch.cuda.is_available():
                logs["max_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            self._term_sums, self._num_steps_in_log = {}, 0
            self.throughput.start()
        super().log(logs, start_time)
        if self.is_world_process_zero():
            write_jsonl(Path(cast(str, self.args.output_dir)) / "train_log.jsonl", self.state.log_history)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Save, mark as complete, and only then delete older checkpoints.

        Raises:
            OSError: the disk is full; says what was needed and what there was. The checkpoints before are kept.
        """
        run_dir = Path(cast(str, self.args.output_dir))
        folder = run_dir / f"checkpoint-{self.state.global_step}"
        needed = checkpoint_bytes(self.model)
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            if self.args.should_save:
                require_space(run_dir, needed)
                mark_incomplete(folder)
            super()._save_checkpoint(model, trial)
            if self.ema is not None and self.args.should_save:
                self.ema.save(folder / EMA_FILE)
        except Exception as error:
            full = explain_full_disk(error, run_dir, needed)
            raise (error if full is None else full) from error
        finally:
            self.args.save_total_limit = keep
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(folder)
            best = self.state.best_model_checkpoint
            rotate(run_dir, keep, None if best is None else Path(best))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.ema is not None:
            self.ema.load(Path(cast(str, self.state.best_model_checkpoint)) / EMA_FILE)


class _Hooks(TrainerCallback):
    """What the trainer does between its steps."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.throughput.start()

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # a resumed run starts with the shuffle and the augmentation of its own epoch
        for seeded in (self.trainer.sampler, self.trainer.train_dataset):
            if seeded is not None and hasattr(seeded, "set_epoch"):
                seeded.set_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.finish_step()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer._must_stop and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
