"""The `speechkd` command. Exit codes: 0 done, 1 failed, 2 bad input, 75 stopped by SIGTERM and resumable."""

import json
import logging
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from speechkd.preemption import PREEMPTED_EXIT_CODE, Preempted, sigterm_raises

logger = logging.getLogger(__name__)

T = TypeVar("T")

NORMALIZERS = ("english", "basic", "none", "keep_marks", "arabic")  # named here, as their import takes a second


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
    parser = _parser()
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.run is _doctor:
        arguments.overrides = overrides
    elif overrides:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # transformers warns at each call that max_new_tokens goes before the checkpoint's max_length, as it should
    logging.getLogger("transformers.generation").setLevel(logging.ERROR)
    result = run_command(lambda: arguments.run(arguments))
    if arguments.json:
        sys.stdout.write(json.dumps(result) + "\n")
    elif arguments.run is _bench:
        from speechkd.bench_table import table_lines

        sys.stdout.writelines(f"{line}\n" for line in table_lines(result))
    elif arguments.run is _doctor:
        from speechkd.doctor import report_lines

        sys.stdout.writelines(f"{line}\n" for line in report_lines(result))
    else:
        sys.stdout.writelines(f"{key}: {_readable(value)}\n" for key, value in result.items())
    if arguments.run in (_doctor, _label) and result.get("problems"):
        raise SystemExit(2)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="speechkd", description="Distil large speech models into small ones.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    label = commands.add_parser(
        "label", help="transcribe a manifest with a teacher", formatter_class=ArgumentDefaultsHelpFormatter
    )
    label.add_argument("--teacher", help="Hub id, folder or bundled:<name>")
    label.add_argument(
        "--targets",
        nargs="+",
        choices=("text", "encoder_states", "topk", "decoder_states"),
        default=["text"],
        help="what to keep of the teacher",
    )
    label.add_argument("--pack", action="store_true", help="join clips of one speaker to windows of up to 30 s")
    label.add_argument("--timestamps", action="store_true", help="put each segment between timestamps")
    label.add_argument("--engine", choices=("local", "ray"), default="local", help="this process, or a Ray cluster")
    label.add_argument("--num-actors", type=int, metavar="N", help="workers on Ray; one for each GPU or machine")
    instead = label.add_mutually_exclusive_group()
    instead.add_argument(
        "--verify",
        action="store_true",
        help="label nothing, check the store: against --manifest and --teacher too where they are given",
    )
    instead.add_argument("--merge", nargs="+", metavar="DIR", help="label nothing, bring these stores into one")
    _add_decoding(label, manifest_required=False)
    label.set_defaults(run=_label)

    evaluate = commands.add_parser(
        "evaluate",
        help="score a model on a manifest, or a prediction file",
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    evaluate.add_argument(
        "--task",
        choices=("asr", "slurp"),
        default="asr",
        help="what to score: asr needs --model, --manifest and --output-dir; slurp needs --predictions and --gold",
    )
    evaluate.add_argument("--model", help="Hub id, folder or bundled:<name>")
    evaluate.add_argument("--predictions", metavar="FILE", help="JSONL of predicted meanings, with --task slurp")
    evaluate.add_argument("--gold", metavar="FILE", help="annotations, such as SLURP's test.jsonl, with --task slurp")
    evaluate.add_argument(
        "--long-form", choices=("chunked", "sequential"), help="transcribe clips above 30 s too, in this way"
    )
    evaluate.add_argument("--chunk-seconds", type=float, default=30.0, help="chunk length, with --long-form chunked")
    evaluate.add_argument("--normalizer", choices=NORMALIZERS, default="english")
    evaluate.add_argument("--reference", choices=("text", "teacher"), default="text", help="what counts as right")
    evaluate.add_argument("--labels-dir", help="label store of the teacher, with --reference teacher")
    evaluate.add_argument(
        "--decoded-dir", help="label store of this model's transcripts; OUTPUT_DIR/decoded if not given"
    )
    evaluate.add_argument("--digit-error-rate", action="store_true", help="also score single digits")
    evaluate.add_argument(
        "--group-by", nargs="+", default=[], metavar="FIELD", help="error rates by speaker, language, dialect, ..."
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
    _add_decoding(evaluate, manifest_required=False, output_dir_required=False)
    evaluate.set_defaults(run=_evaluate)

    bench = commands.add_parser(
        "bench", help="compare size, speed, memory and errors of models", formatter_class=ArgumentDefaultsHelpFormatter
    )
    bench.add_argument("--models", required=True, nargs="+", help="Hub ids, folders or bundled:<name>")
    bench.add_argument("--assistant", help="student that drafts for the first model (speculative decoding)")
    bench.add_argument("--max-clips", type=int, help="only the first so many clips of the manifest; all if not given")
    bench.add_argument("--normalizer", choices=NORMALIZERS, default="english")
    bench.add_argument("--batch-size", type=int, default=8, help="clips decoded together")
    bench.add_argument("--device", help="torch device of models that are no exports; CUDA if there is one")
    _add_transcription(bench)
    bench.set_defaults(run=_bench, num_workers=0)

    export = commands.add_parser(
        "export", help="write a model in another format", formatter_class=ArgumentDefaultsHelpFormatter
    )
    export.add_argument("--model", required=True, help="Hub id, folder or bundled:<name>")
    export.add_argument("--format", required=True, choices=("huggingface", "ctranslate2", "onnx", "ggml"))
    export.add_argument("--output-dir", required=True, help="folder for the export; absent or empty")
    export.add_argument(
        "--precision",
        metavar="P",
        help="huggingface: float32, float16, bfloat16; ctranslate2: float32, float16, int8, int8_float16; "
        "onnx: float32, int8; ggml: f16, q5_0; the first one if not given",
    )
    export.add_argument(
        "--window-seconds", type=int, metavar="N", help="longest clip of the export; 30 if not given, less is faster"
    )
    export.add_argument("--max-clips", type=int, default=20, help="clips to compare with the source model")
    _add_transcription(export, manifest_required=False)
    export.set_defaults(run=_export, num_workers=0, batch_size=1)

    scores = commands.add_parser(
        "scores", help="score labels, to filter them without references", formatter_class=ArgumentDefaultsHelpFormatter
    )
    scores.add_argument("--labels", required=True, metavar="DIR", help="label store")
    scores.add_argument("--manifest", required=True, help="manifest of its utterances")
    scores.add_argument("--output-dir", required=True, help="folder for scores.jsonl; continued if it was begun")
    scores.add_argument(
        "--scores",
        required=True,
        nargs="+",
        metavar="NAME",
        help="proxy_wer, lm_nll, mean_entropy, speech_text_cosine, confidence, length_deviation, compression_ratio, "
        "repeated_5grams, words_per_second, characters_per_second, wer or cer",
    )
    scores.add_argument("--proxy-labels", metavar="DIR", help="another model's label store, for proxy_wer")
    scores.add_argument("--language-model", metavar="M", help="for lm_nll: Hub id, folder or bundled:smollm2-135m")
    scores.add_argument("--speech-encoder", metavar="M", help="for speech_text_cosine, such as a SEGUE student")
    scores.add_argument("--text-encoder", metavar="M", help="for speech_text_cosine, of the same space")
    scores.add_argument("--normalizer", choices=NORMALIZERS, default="english")
    scores.add_argument("--batch-size", type=int, default=8, help="labels that a model scores together")
    scores.add_argument("--plot", action="store_true", help="draw each score: histogram and kept hours")
    scores.add_argument("--device", help="torch device; CUDA if there is one")
    scores.set_defaults(run=_scores)

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
    for command in (label, evaluate, bench, export, scores, doctor):
        command.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser


def _add_decoding(parser: ArgumentParser, manifest_required: bool = True, output_dir_required: bool = True) -> None:
    _add_transcription(parser, manifest_required)
    parser.add_argument("--device", help="torch device; CUDA if there is one")
    parser.add_argument(
        "--batch-size", type=_number_or_auto, default=16, help="clips decoded together; auto takes what a GPU holds"
    )
    parser.add_argument(
        "--output-dir", required=output_dir_required, help="folder for the results; continued if it was begun"
    )
    parser.add_argument("--num-workers", type=int, default=0, help="processes that decode audio")
    parser.add_argument("--max-skipped-fraction", type=float, default=0.01, help="share of clips that may be unusable")


def _add_transcription(parser: ArgumentParser, manifest_required: bool = True) -> None:
    parser.add_argument("--manifest", required=manifest_required, help="JSONL manifest of data_prep")
    parser.add_argument("--language", default="en", help="language code, or none for English-only models")
    parser.add_argument("--whisper-task", choices=("transcribe", "translate"), default="transcribe")
    parser.add_argument("--max-new-tokens", type=int, default=224, help="longest transcript in tokens")


def _decoding(arguments: Namespace) -> Any:
    from speechkd.labels.pseudo_label import DecodingConfig

    return DecodingConfig(
        language=None if arguments.language == "none" else arguments.language,
        task=arguments.whisper_task,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        num_workers=arguments.num_workers,
    )


def _number_or_auto(text: str) -> int | str:
    """A batch size of the command line."""
    return text if text == "auto" else int(text)


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


EVALUATION_NEEDS = {"asr": ("model", "manifest", "output_dir"), "slurp": ("predictions", "gold")}
EVALUATION_REFUSES = {"asr": ("predictions", "gold"), "slurp": ("model", "manifest")}


def _evaluate(arguments: Namespace) -> dict[str, Any]:
    task = arguments.task
    lacking = [_option(name) for name in EVALUATION_NEEDS[task] if getattr(arguments, name) is None]
    if lacking:
        raise ValueError(f"evaluate --task {task} needs {' and '.join(lacking)}")
    useless = [_option(name) for name in EVALUATION_REFUSES[task] if getattr(arguments, name) is not None]
    if useless:
        raise ValueError(f"evaluate --task {task} does not use {' and '.join(useless)}; leave out or choose --task")
    if task == "slurp":
        from speechkd.metrics.slurp import evaluate_slurp

        return evaluate_slurp(arguments.predictions, arguments.gold, arguments.output_dir)
    return _evaluate_asr(arguments)


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


def _export(arguments: Namespace) -> dict[str, Any]:
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
