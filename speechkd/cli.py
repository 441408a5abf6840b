"""The `speechkd` command. Exit codes: 0 done, 1 failed, 2 bad input, 75 stopped by SIGTERM and resumable."""

import json
import logging
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from speechkd.preemption import PREEMPTED_EXIT_CODE, Preempted, sigterm_raises

logger = logging.getLogger(__name__)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn errors that a user can mend into their message and an exit code; anything else keeps its traceback.

    Raises:
        SystemExit: 2 for bad input and for what the system refuses (missing files, a full disk), 1 for a loss that is
            not finite, 75 after SIGTERM.
    """
    try:
        with sigterm_raises():
            yield
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
    parser = _parser()
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.run is _doctor:
        arguments.overrides = overrides
    elif overrides:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # transformers warns at each call that max_new_tokens goes before the checkpoint's max_length, as it should
    logging.getLogger("transformers.generation").setLevel(logging.ERROR)
    with exit_codes():
        result = arguments.run(arguments)
    if arguments.json:
        sys.stdout.write(json.dumps(result) + "\n")
    elif arguments.run is _bench:
        from speechkd.bench import table_lines

        sys.stdout.writelines(f"{line}\n" for line in table_lines(result))
    elif arguments.run is _doctor:
        from speechkd.doctor import report_lines

        sys.stdout.writelines(f"{line}\n" for line in report_lines(result))
    else:
        sys.stdout.writelines(f"{key}: {_readable(value)}\n" for key, value in result.items())
    if arguments.run is _doctor and result["problems"]:
        raise SystemExit(2)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="speechkd", description="Distil large speech models into small ones.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    label = commands.add_parser(
        "label", help="transcribe a manifest with a teacher", formatter_class=ArgumentDefaultsHelpFormatter
    )
    label.add_argument("--teacher", required=True, help="Hub id, folder or bundled:<name>")
    label.add_argument(
        "--targets", nargs="+", choices=("text", "encoder_states"), default=["text"], help="what to keep of the teacher"
    )
    label.add_argument("--pack", action="store_true", help="join clips of one speaker to windows of up to 30 s")
    label.add_argument("--timestamps", action="store_true", help="put each segment between timestamps")
    _add_decoding(label)
    label.set_defaults(run=_label)

    evaluate = commands.add_parser(
        "evaluate", help="score a model on a manifest", formatter_class=ArgumentDefaultsHelpFormatter
    )
    evaluate.add_argument("--model", required=True, help="Hub id, folder or bundled:<name>")
    evaluate.add_argument("--task", choices=("asr",), default="asr", help="what to score")
    evaluate.add_argument("--normalizer", choices=("english", "basic", "none"), default="english")
    evaluate.add_argument("--reference", choices=("text", "teacher"), default="text", help="what counts as right")
    evaluate.add_argument("--labels-dir", help="label store of the teacher, with --reference teacher")
    evaluate.add_argument(
        "--decoded-dir", help="label store of this model's transcripts; OUTPUT_DIR/decoded if not given"
    )
    evaluate.add_argument("--digit-error-rate", action="store_true", help="also score single digits")
    evaluate.add_argument(
        "--group-by", nargs="+", default=[], metavar="FIELD", help="error rates by speaker, language or another field"
    )
    evaluate.add_argument(
        "--bootstrap", type=int, default=1000, metavar="N", help="resamples behind the 95%% intervals; 0 for none"
    )
    evaluate.add_argument(
        "--compare-with", metavar="DIR", help="output folder of another system's evaluation, for a paired bootstrap"
    )
    evaluate.add_argument(
        "--non-speech-clips", type=int, default=0, metavar="N", help="also decode N clips each of noises and silence"
    )
    _add_decoding(evaluate)
    evaluate.set_defaults(run=_evaluate)

    bench = commands.add_parser(
        "bench", help="compare size, speed, memory and errors of models", formatter_class=ArgumentDefaultsHelpFormatter
    )
    bench.add_argument("--models", required=True, nargs="+", help="Hub ids, folders or bundled:<name>")
    bench.add_argument("--assistant", help="student that drafts for the first model (speculative decoding)")
    bench.add_argument("--max-clips", type=int, help="only the first so many clips of the manifest; all if not given")
    bench.add_argument("--normalizer", choices=("english", "basic", "none"), default="english")
    _add_transcription(bench, batch_size=8)
    bench.set_defaults(run=_bench, num_workers=0)

    doctor = commands.add_parser(
        "doctor",
        help="examine this machine, a configuration and a manifest",
        usage="speechkd doctor [-h] [--config FILE] [--manifest FILE] [--json] [--section.key value ...]",
        epilog="--section.key value changes a setting of the configuration. Ends with 2 if there are problems.",
        allow_abbrev=False,
    )
    doctor.add_argument("--config", metavar="FILE", help="check this recipe configuration, without training")
    doctor.add_argument("--manifest", metavar="FILE", help="validate this manifest")
    doctor.set_defaults(run=_doctor)
    for command in (label, evaluate, bench, doctor):
        command.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser


def _add_decoding(parser: ArgumentParser) -> None:
    _add_transcription(parser, batch_size=16)
    parser.add_argument("--output-dir", required=True, help="folder for the results; continued if it was begun")
    parser.add_argument("--num-workers", type=int, default=0, help="processes that decode audio")
    parser.add_argument("--max-skipped-fraction", type=float, default=0.01, help="share of clips that may be unusable")


def _add_transcription(parser: ArgumentParser, batch_size: int) -> None:
    parser.add_argument("--manifest", required=True, help="JSONL manifest of data_prep")
    parser.add_argument("--language", default="en", help="language code, or none for English-only models")
    parser.add_argument("--whisper-task", choices=("transcribe", "translate"), default="transcribe")
    parser.add_argument("--batch-size", type=int, default=batch_size, help="clips decoded together")
    parser.add_argument("--max-new-tokens", type=int, default=224, help="longest transcript in tokens")
    parser.add_argument("--device", help="torch device; CUDA if there is one")


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
    from speechkd.labels.pseudo_label import label_manifest

    store = label_manifest(
        arguments.teacher,
        arguments.manifest,
        arguments.output_dir,
        decoding=replace(_decoding(arguments), timestamps=arguments.timestamps),
        targets=tuple(arguments.targets),
        pack=arguments.pack,
        max_skipped_fraction=arguments.max_skipped_fraction,
        device=arguments.device,
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


def _evaluate(arguments: Namespace) -> dict[str, Any]:
    from speechkd.evaluate import evaluate_asr

    return evaluate_asr(
        arguments.model,
        arguments.manifest,
        arguments.output_dir,
        decoding=_decoding(arguments),
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


def _bench(arguments: Namespace) -> dict[str, Any]:
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


def _doctor(arguments: Namespace) -> dict[str, Any]:
    from speechkd.doctor import examine

    return examine(arguments.manifest, arguments.config, arguments.overrides)


def _readable(value: Any, indent: str = "  ") -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "".join(f"\n  - {item}" for item in value) or "none"
    if isinstance(value, dict) and any(isinstance(item, dict) for item in value.values()):
        return "".join(f"\n{indent}{key}: {_readable(item, indent + '  ')}" for key, item in value.items())
    if isinstance(value, dict):
        return ", ".join(f"{key} {_readable(item)}" for key, item in value.items())
    return str(value)
