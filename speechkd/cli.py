"""The `speechkd` command. Exit codes: 0 done, 1 failed, 2 bad input, 75 stopped by SIGTERM and resumable."""

import json
import logging
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from speechkd.command_line import PROBE_TASKS, make_parser
from speechkd.preemption import PREEMPTED_EXIT_CODE, Preempted, sigterm_raises

logger = logging.getLogger(__name__)

T = TypeVar("T")


def run_command(command: Callable[[], T]) -> T:
    """Call a command; errors that a user can mend become a message and an exit code, any other keeps its traceback.

    A function and not a context manager, whose own `__exit__` a signal could interrupt before it handles anything.

    Raises:
        SystemExit: 2 for bad input and for what the system refuses (missing files, a full disk), 1 for a loss that is
            not finite, 75 after SIGTERM.
    """
    try:
        with sigterm_raises():
            return command()
    except Preempted as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(PREEMPTED_EXIT_CODE) from error
    except (ValueError, OSError, FloatingPointError) as error:
        logger.debug("traceback", exc_info=True)
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(1 if isinstance(error, FloatingPointError) else 2) from error
    finally:
        distributed = sys.modules.get("torch.distributed")  # importing torch takes seconds that --help need not have
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()


def main(argv: list[str] | None = None) -> None:
    """Entry point of `speechkd`."""
    parser = make_parser()
    arguments, overrides = parser.parse_known_args(argv)
    command = arguments.command
    if command == "doctor":
        arguments.overrides = overrides
    elif overrides:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # transformers warns at each call that max_new_tokens goes before the checkpoint's max_length, as it should
    logging.getLogger("transformers.generation").setLevel(logging.ERROR)
    result = run_command(lambda: COMMANDS[command](arguments))
    if arguments.json:
        sys.stdout.write(json.dumps(result) + "\n")
    elif command == "bench":
        from speechkd.bench_table import table_lines

        sys.stdout.writelines(f"{line}\n" for line in table_lines(result))
    elif command == "doctor":
        from speechkd.doctor import report_lines

        sys.stdout.writelines(f"{line}\n" for line in report_lines(result))
    else:
        sys.stdout.writelines(f"{key}: {_readable(value)}\n" for key, value in result.items())
    if command in ("doctor", "label") and result.get("problems"):
        raise SystemExit(2)


def _decoding(arguments: Namespace) -> Any:
    from speechkd.labels.pseudo_label import DecodingConfig

    return DecodingConfig(
        language=None if arguments.language == "none" else arguments.language,
        task=arguments.whisper_task,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        num_workers=arguments.num_workers,
    )


def _label(arguments: Namespace) -> dict[str, Any]:
    if arguments.verify:
        from speechkd.labels.verify import verify_store

        return verify_store(arguments.output_dir, arguments.manifest, arguments.teacher)
    if arguments.merge:
        from speechkd.labels.verify import merge_stores

        merged = merge_stores(arguments.merge, arguments.output_dir)
        return {"output_dir": arguments.output_dir, "num_utterances": sum(1 for _ in merged.rows())}
    from speechkd.labels.pseudo_label import label_manifest

    lacking = [f"--{name}" for name in ("teacher", "manifest") if getattr(arguments, name) is None]
    if lacking:
        raise ValueError(f"labelling needs {' and '.join(lacking)}; only --verify and --merge do without")
    if "mvq" in arguments.targets or arguments.quantizers:
        return _label_codes(arguments)
    store = label_manifest(
        arguments.teacher,
        arguments.manifest,
        arguments.output_dir,
        decoding=replace(_decoding(arguments), timestamps=arguments.timestamps),
        targets=tuple(arguments.targets),
        pack=arguments.pack,
        max_skipped_fraction=arguments.max_skipped_fraction,
        device=arguments.device,
        engine=arguments.engine,
        num_actors=arguments.num_actors,
    )
    rows = list(store.rows())
    seconds = sum(row["duration_seconds"] for row in rows)
    compute_seconds = sum(row["compute_seconds"] for row in rows)
    return {
        "output_dir": arguments.output_dir,
        "num_utterances": len(rows),
        "audio_hours": seconds / 3600,
        "rtfx": seconds / compute_seconds if rows else 0.0,
    }


def _label_codes(arguments: Namespace) -> dict[str, Any]:
    from speechkd.labels.mvq_labels import codes_summary, label_codes

    if arguments.targets != ["mvq"] or not arguments.quantizers:
        raise ValueError(
            f"--targets mvq stands alone and needs --quantizers, got --targets {' '.join(arguments.targets)} and "
            f"--quantizers {' '.join(arguments.quantizers or ['none'])}; label text into another folder, and fit a "
            "quantizer with `speechkd fit-quantizer`"
        )
    if arguments.engine != "local" or arguments.pack or arguments.timestamps or arguments.batch_size == "auto":
        raise ValueError(
            "--targets mvq works without --pack, --timestamps, --engine ray and --batch-size auto; leave them out, and "
            "label parts of a corpus on several machines for --merge"
        )
    store = label_codes(
        arguments.teacher,
        arguments.quantizers,
        arguments.manifest,
        arguments.output_dir,
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
        max_skipped_fraction=arguments.max_skipped_fraction,
        device=arguments.device,
    )
    return codes_summary(store)


def _fit_quantizer(arguments: Namespace) -> dict[str, Any]:
    from speechkd.labels.mvq_labels import fit_quantizer
    from speechkd.models.quantizer_fit import FitConfig

    return fit_quantizer(
        arguments.teacher,
        arguments.layer,
        arguments.manifest,
        arguments.output_dir,
        config=FitConfig(
            bytes_per_frame=arguments.bytes_per_frame,
            phase1_steps=arguments.phase1_steps,
            phase2_steps=arguments.phase2_steps,
            seed=arguments.seed,
        ),
        max_frames=arguments.max_frames,
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
        max_skipped_fraction=arguments.max_skipped_fraction,
        device=arguments.device,
    )


PROBING_ONLY = (
    *("train_manifest", "dev_manifest", "trials", "queries", "dev_queries"),
    *("features_dir", "seeds", "num_steps", "learning_rate"),
)
TRANSCRIPTION_ONLY = (
    *("long_form", "labels_dir", "decoded_dir", "compare_with", "group_by", "digit_error_rate", "non_speech_clips"),
)
EVALUATION_NEEDS = {
    "transcription": ("model", "manifest", "output_dir"),
    "probing": ("model", "manifest", "output_dir"),
    "slurp": ("predictions", "gold"),
}
EVALUATION_REFUSES = {
    "transcription": ("predictions", "gold", *PROBING_ONLY),
    "probing": ("predictions", "gold", *TRANSCRIPTION_ONLY),
    "slurp": ("model", "manifest", *PROBING_ONLY),
}


def _evaluate(arguments: Namespace) -> dict[str, Any]:
    task = arguments.task
    kind = "probing" if task in PROBE_TASKS else task
    if task == "asr" and arguments.train_manifest is None:
        kind = "transcription"
    lacking = [_option(name) for name in EVALUATION_NEEDS[kind] if getattr(arguments, name) is None]
    if lacking:
        raise ValueError(f"evaluate --task {task} needs {' and '.join(lacking)}")
    useless = [_option(name) for name in EVALUATION_REFUSES[kind] if getattr(arguments, name)]
    if useless:
        probes = ", or probe with --train-manifest" if kind == "transcription" else ""
        raise ValueError(
            f"evaluate --task {task} does not use {' and '.join(useless)}; leave out or choose --task{probes}"
        )
    if kind == "slurp":
        from speechkd.metrics.slurp import evaluate_slurp

        return evaluate_slurp(arguments.predictions, arguments.gold, arguments.output_dir)
    return _probe(arguments) if kind == "probing" else _evaluate_asr(arguments)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _evaluate_asr(arguments: Namespace) -> dict[str, Any]:
    from speechkd.evaluate import evaluate_asr
    from speechkd.models.long_form import LongFormConfig

    long_form = (
        LongFormConfig(method=arguments.long_form, chunk_seconds=arguments.chunk_seconds)
        if arguments.long_form
        else None
    )
    return evaluate_asr(
        arguments.model,
        arguments.manifest,
        arguments.output_dir,
        decoding=_decoding(arguments),
        long_form=long_form,
        normalizer=arguments.normalizer,
        reference=arguments.reference,
        labels_dir=arguments.labels_dir,
        decoded_dir=arguments.decoded_dir,
        digit_errors=arguments.digit_error_rate,
        group_by=arguments.group_by,
        num_resamples=arguments.bootstrap,
        compare_with=arguments.compare_with,
        num_non_speech_clips=arguments.non_speech_clips,
        max_skipped_fraction=arguments.max_skipped_fraction,
        device=arguments.device,
    )


def _probe(arguments: Namespace) -> dict[str, Any]:
    from speechkd.probe import evaluate_probe

    if arguments.batch_size == "auto":
        raise ValueError("--batch-size auto is for transcription; give the number of clips to encode together")
    return evaluate_probe(
        arguments.task,
        arguments.model,
        arguments.manifest,
        arguments.output_dir,
        train_manifest=arguments.train_manifest,
        dev_manifest=arguments.dev_manifest,
        trials=arguments.trials,
        queries=arguments.queries,
        dev_queries=arguments.dev_queries,
        features_dir=arguments.features_dir,
        seeds=arguments.seeds or (0,),
        num_steps=arguments.num_steps,
        learning_rate=arguments.learning_rate,
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
        max_skipped_fraction=arguments.max_skipped_fraction,
        device=arguments.device,
    )


def _bench(arguments: Namespace) -> dict[str, Any]:
    from speechkd.export.encoder_runtime import is_encoder

    if arguments.manifest is None:
        from speechkd.bench_encoders import bench_encoders

        if arguments.assistant is not None or arguments.max_clips is not None:
            raise ValueError("bench --assistant and --max-clips are for models that transcribe; give --manifest")
        return bench_encoders(
            arguments.models, seconds=arguments.seconds, rounds=arguments.rounds, device=arguments.device
        )
    encoders = [name for name in arguments.models if is_encoder(name)]
    if encoders:
        raise ValueError(f"{', '.join(encoders)} cannot transcribe; leave --manifest out to compare encoders on noise")
    from speechkd.bench import bench_models

    return bench_models(
        arguments.models,
        arguments.manifest,
        decoding=_decoding(arguments),
        assistant_name=arguments.assistant,
        max_clips=arguments.max_clips,
        normalizer=arguments.normalizer,
        device=arguments.device,
    )


def _export(arguments: Namespace) -> dict[str, Any]:
    from speechkd.export.encoder_runtime import is_encoder

    if arguments.format == "torch_export" or is_encoder(arguments.model):
        from speechkd.export.encoder import export_encoder

        if arguments.window_seconds is not None:
            raise ValueError("the export of an encoder takes clips of any length; leave --window-seconds out")
        return export_encoder(
            arguments.model,
            arguments.output_dir,
            arguments.format,
            arguments.precision or "float32",
            manifest_path=arguments.manifest,
            max_clips=arguments.max_clips,
        )
    from speechkd.export import export_model

    return export_model(
        arguments.model,
        arguments.format,
        arguments.output_dir,
        precision=arguments.precision,
        window_seconds=arguments.window_seconds,
        manifest_path=arguments.manifest,
        max_clips=arguments.max_clips,
        decoding=_decoding(arguments),
    )


def _scores(arguments: Namespace) -> dict[str, Any]:
    from speechkd.labels.score_labels import score_labels

    return score_labels(
        arguments.labels,
        arguments.manifest,
        arguments.output_dir,
        arguments.scores,
        proxy_labels=arguments.proxy_labels,
        language_model=arguments.language_model,
        speech_encoder=arguments.speech_encoder,
        text_encoder=arguments.text_encoder,
        normalizer=arguments.normalizer,
        batch_size=arguments.batch_size,
        plot=arguments.plot,
        device=arguments.device,
    )


def _doctor(arguments: Namespace) -> dict[str, Any]:
    from speechkd.doctor import examine

    return examine(arguments.manifest, arguments.config, arguments.overrides)


COMMANDS: dict[str, Callable[[Namespace], dict[str, Any]]] = {
    "label": _label,
    "evaluate": _evaluate,
    "bench": _bench,
    "export": _export,
    "fit-quantizer": _fit_quantizer,
    "scores": _scores,
    "doctor": _doctor,
}


def _readable(value: Any, indent: str = "  ") -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and value and all(isinstance(item, int | float) for item in value):
        return " ".join(map(_readable, value))
    if isinstance(value, list):
        return "".join(f"\n  - {item}" for item in value) or "none"
    if isinstance(value, dict) and any(isinstance(item, dict) for item in value.values()):
        return "".join(f"\n{indent}{key}: {_readable(item, indent + '  ')}" for key, item in value.items())
    if isinstance(value, dict):
        return ", ".join(f"{key} {_readable(item)}" for key, item in value.items())
    return str(value)
