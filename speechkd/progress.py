"""What a training run shows: one bar with the loss terms, and how well the data keeps up."""

import time
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments


class Throughput:
    """Audio and waiting time of one process since the last log."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin a new period."""
        self.started = time.perf_counter()
        self.waited_seconds = self.audio_seconds = self.padded_seconds = 0.0

    def add(self, batches: list[dict[str, Any]], waited_seconds: float) -> None:
        """Count the batches of one step, as `audio_seconds` and `padded_seconds` in them say, where they do."""
        self.waited_seconds += waited_seconds
        self.audio_seconds += sum(batch.get("audio_seconds", 0.0) for batch in batches)
        self.padded_seconds += sum(batch.get("padded_seconds", 0.0) for batch in batches)

    def sums(self) -> list[float]:
        """Elapsed, waited, audio and padded seconds; they may be added over processes."""
        return [time.perf_counter() - self.started, self.waited_seconds, self.audio_seconds, self.padded_seconds]


def throughput_logs(sums: list[float], num_processes: int) -> dict[str, float]:
    """Log values of `Throughput.sums` added over processes.

    Returns:
        `data_wait`, the share of the time that the step waited for its batches; with audio also `padding`, the share
        of the padded seconds that is no audio, and `audio_hours_per_second` of all processes together.
    """
    elapsed, waited, audio, padded = sums
    logs = {"data_wait": waited / elapsed if elapsed else 0.0}
    if padded:
        logs["padding"] = 1 - audio / padded
        logs["audio_hours_per_second"] = audio / 3600 / (elapsed / num_processes) if elapsed else 0.0
    return logs


class DistillationProgress(ProgressCallback):
    """One bar whose end shows the last logged loss terms, data-wait and padding shares and the speed."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="training", unit="step", dynamic_ncols=True
            )
        self.current_step = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is not None and logs:
            self.training_bar.set_postfix_str(progress_text(logs))


def progress_text(logs: dict[str, Any]) -> str:
    """One log entry as the end of a progress bar."""
    parts = [
        f"{name.removeprefix('loss/')} {value:.4g}"
        for name, value in logs.items()
        if name.startswith("loss/") or name == "eval_loss"
    ]
    for name, label in (("data_wait", "data-wait"), ("padding", "padding")):
        if name in logs:
            parts.append(f"{label} {100 * logs[name]:.1f} %")
    if "audio_hours_per_second" in logs:
        parts.append(f"{logs['audio_hours_per_second']:.3g} audio-h/s")
    return ", ".join(parts)
