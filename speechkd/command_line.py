"""What `speechkd` takes on the command line. Nothing of weight is imported here, so that `--help` is there at once."""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser

NORMALIZERS = ("english", "basic", "none", "keep_marks", "arabic")  # named here, as their import takes a second
PROBE_TASKS = ("ks", "ic", "sid", "sf", "er", "sv", "asr", "pr", "qbe")  # "asr" with --train-manifest


def make_parser() -> ArgumentParser:
    """The parser of all commands; `command` of its result is the name of the one that was given."""
    parser = ArgumentParser(prog="speechkd", description="Distil large speech models into small ones.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    def command(name: str, purpose: str) -> ArgumentParser:
        return commands.add_parser(name, help=purpose, formatter_class=ArgumentDefaultsHelpFormatter)

    label = command("label", "transcribe a manifest with a teacher")
    evaluate = command("evaluate", "score a model on a manifest, probe an encoder, or score a prediction file")
    bench = command("bench", "compare size, speed, memory and errors of models")
    export = command("export", "write a model in another format")
    fit_quantizer = command("fit-quantizer", "fit the codebooks of --targets mvq on a layer of a speech encoder")
    scores = command("scores", "score labels, to filter them without references")
    doctor = commands.add_parser(
        "doctor",
        help="examine this machine, a configuration and a manifest",
        usage="speechkd doctor [-h] [--config FILE] [--manifest FILE] [--json] [--section.key value ...]",
        epilog="--section.key value changes a setting of the configuration. Ends with 2 if there are problems.",
        allow_abbrev=False,
    )
    doctor.add_argument("--config", metavar="FILE", help="check this recipe configuration, without training")
    doctor.add_argument("--manifest", metavar="FILE", help="validate this manifest")
    _add_label(label)
    _add_evaluate(evaluate)
    _add_probing(evaluate)
    _add_bench(bench)
    _add_export(export)
    _add_fit_quantizer(fit_quantizer)
    _add_scores(scores)
    for parser_of_command in (label, evaluate, bench, export, fit_quantizer, scores, doctor):
        parser_of_command.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser


def _add_label(parser: ArgumentParser) -> None:
    parser.add_argument("--teacher", help="Hub id, folder or bundled:<name>")
    parser.add_argument(
        "--targets",
        nargs="+",
        choices=("text", "encoder_states", "topk", "decoder_states", "mvq"),
        default=["text"],
        help="what to keep of the teacher; mvq, alone, are codes of a speech encoder's states, with --quantizers",
    )
    parser.add_argument(
        "--quantizers", nargs="+", metavar="DIR", help="of fit-quantizer, one for each layer, with --targets mvq"
    )
    parser.add_argument("--pack", action="store_true", help="join clips of one speaker to windows of up to 30 s")
    parser.add_argument("--timestamps", action="store_true", help="put each segment between timestamps")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="this process, or a Ray cluster")
    parser.add_argument("--num-actors", type=int, metavar="N", help="workers on Ray; one for each GPU or machine")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--verify",
        action="store_true",
        help="label nothing, check the store: against --manifest and --teacher too where they are given",
    )
    instead.add_argument("--merge", nargs="+", metavar="DIR", help="label nothing, bring these stores into one")
    _add_decoding(parser, manifest_required=False)


def _add_evaluate(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--task",
        choices=("asr", "slurp", *(task for task in PROBE_TASKS if task != "asr")),
        default="asr",
        help="what to score: asr needs --model, --manifest and --output-dir; slurp needs --predictions and --gold; the "
        "others probe an encoder as SUPERB does, and asr does so with --train-manifest",
    )
    parser.add_argument("--model", help="Hub id, folder or bundled:<name>; log-mel, of probing, is no encoder at all")
    parser.add_argument("--predictions", metavar="FILE", help="JSONL of predicted meanings, with --task slurp")
    parser.add_argument("--gold", metavar="FILE", help="annotations, such as SLURP's test.jsonl, with --task slurp")
    parser.add_argument(
        "--long-form", choices=("chunked", "sequential"), help="transcribe clips above 30 s too, in this way"
    )
    parser.add_argument("--chunk-seconds", type=float, default=30.0, help="chunk length, with --long-form chunked")
    parser.add_argument("--normalizer", choices=NORMALIZERS, default="english")
    parser.add_argument("--reference", choices=("text", "teacher"), default="text", help="what counts as right")
    parser.add_argument("--labels-dir", help="label store of the teacher, with --reference teacher")
    parser.add_argument(
        "--decoded-dir", help="label store of this model's transcripts; OUTPUT_DIR/decoded if not given"
    )
    parser.add_argument("--digit-error-rate", action="store_true", help="also score single digits")
    parser.add_argument(
        "--group-by", nargs="+", default=[], metavar="FIELD", help="error rates by speaker, language, dialect, ..."
    )
    parser.add_argument(
        "--bootstrap", type=int, default=1000, metavar="N", help="resamples behind the 95%% intervals; 0 for none"
    )
    parser.add_argument(
        "--compare-with", metavar="DIR", help="output folder of another system's evaluation, for a paired bootstrap"
    )
    parser.add_argument(
        "--non-speech-clips", type=int, default=0, metavar="N", help="also decode N clips each of noises and silence"
    )
    _add_decoding(parser, manifest_required=False, output_dir_required=False)


def _add_probing(parser: ArgumentParser) -> None:
    probing = parser.add_argument_group("probing", "A head is trained on the states of a frozen encoder, as in SUPERB.")
    probing.add_argument("--train-manifest", metavar="FILE", help="what heads learn from")
    probing.add_argument("--dev-manifest", metavar="FILE", help="by which the best head is kept; the last if not given")
    probing.add_argument("--trials", metavar="FILE", help="of sv: lines of <1 or 0> <id> <id>")
    probing.add_argument("--queries", metavar="FILE", help="of qbe: manifest of what is looked for in --manifest")
    probing.add_argument("--dev-queries", metavar="FILE", help="of qbe: manifest by which the layer is chosen")
    probing.add_argument("--features-dir", metavar="DIR", help="states on disk; OUTPUT_DIR/features if not given")
    probing.add_argument("--seeds", nargs="+", type=int, metavar="N", help="a head for each; 0 if not given")
    probing.add_argument("--num-steps", type=int, metavar="N", help="updates of a head; SUPERB's if not given")
    probing.add_argument("--learning-rate", type=float, metavar="X", help="of a head; SUPERB's if not given")


def _add_bench(parser: ArgumentParser) -> None:
    parser.add_argument("--models", required=True, nargs="+", help="Hub ids, folders or bundled:<name>")
    parser.add_argument("--assistant", help="student that drafts for the first model (speculative decoding)")
    parser.add_argument("--max-clips", type=int, help="only the first so many clips of the manifest; all if not given")
    parser.add_argument("--normalizer", choices=NORMALIZERS, default="english")
    parser.add_argument("--batch-size", type=int, default=8, help="clips decoded together")
    parser.add_argument("--device", help="torch device of models that are no exports; CUDA if there is one")
    parser.add_argument(
        "--seconds", nargs="+", type=float, default=[1.0, 4.0, 15.0], metavar="S", help="clips, without --manifest"
    )
    parser.add_argument("--rounds", type=int, default=5, help="times that each is measured, without --manifest")
    _add_transcription(parser, manifest_required=False)
    parser.set_defaults(num_workers=0)


def _add_export(parser: ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="Hub id, folder or bundled:<name>")
    parser.add_argument(
        "--format", required=True, choices=("huggingface", "ctranslate2", "onnx", "ggml", "torch_export")
    )
    parser.add_argument("--output-dir", required=True, help="folder for the export; absent or empty")
    parser.add_argument(
        "--precision",
        metavar="P",
        help="huggingface: float32, float16, bfloat16; ctranslate2: float32, float16, int8, int8_float16; "
        "onnx: float32, int8; ggml: f16, q5_0; torch_export: float32; the first one if not given. Of speech encoders: "
        "huggingface and torch_export float32, onnx float32, int8",
    )
    parser.add_argument(
        "--window-seconds", type=int, metavar="N", help="longest clip of the export; 30 if not given, less is faster"
    )
    parser.add_argument("--max-clips", type=int, default=20, help="clips to compare with the source model")
    _add_transcription(parser, manifest_required=False)
    parser.set_defaults(num_workers=0, batch_size=1)


def _add_fit_quantizer(parser: ArgumentParser) -> None:
    parser.add_argument("--teacher", required=True, help="Hub id, folder or bundled:<name> of a speech encoder")
    parser.add_argument("--layer", required=True, type=int, help="1 is the output of the first block")
    parser.add_argument("--manifest", required=True, help="JSONL manifest of data_prep")
    parser.add_argument("--output-dir", required=True, help="folder for the quantizer; absent or empty")
    parser.add_argument("--bytes-per-frame", type=int, default=8, help="codebooks of 256 entries, a power of two")
    parser.add_argument("--max-frames", type=int, default=500_000, help="frames of the teacher to fit on")
    parser.add_argument("--phase1-steps", type=int, default=10_000, help="steps with codebooks of 16 entries")
    parser.add_argument("--phase2-steps", type=int, default=10_000, help="steps with codebooks of 256 entries")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=8, help="clips that the teacher hears together")
    parser.add_argument("--num-workers", type=int, default=0, help="processes that decode audio")
    parser.add_argument("--max-skipped-fraction", type=float, default=0.01, help="share of clips that may be unusable")
    parser.add_argument("--device", help="torch device; CUDA if there is one")


def _add_scores(parser: ArgumentParser) -> None:
    parser.add_argument("--labels", required=True, metavar="DIR", help="label store")
    parser.add_argument("--manifest", required=True, help="manifest of its utterances")
    parser.add_argument("--output-dir", required=True, help="folder for scores.jsonl; continued if it was begun")
    parser.add_argument(
        "--scores",
        required=True,
        nargs="+",
        metavar="NAME",
        help="proxy_wer, lm_nll, mean_entropy, speech_text_cosine, confidence, length_deviation, compression_ratio, "
        "repeated_5grams, words_per_second, characters_per_second, wer or cer",
    )
    parser.add_argument("--proxy-labels", metavar="DIR", help="another model's label store, for proxy_wer")
    parser.add_argument("--language-model", metavar="M", help="for lm_nll: Hub id, folder or bundled:smollm2-135m")
    parser.add_argument("--speech-encoder", metavar="M", help="for speech_text_cosine, such as a SEGUE student")
    parser.add_argument("--text-encoder", metavar="M", help="for speech_text_cosine, of the same space")
    parser.add_argument("--normalizer", choices=NORMALIZERS, default="english")
    parser.add_argument("--batch-size", type=int, default=8, help="labels that a model scores together")
    parser.add_argument("--plot", action="store_true", help="draw each score: histogram and kept hours")
    parser.add_argument("--device", help="torch device; CUDA if there is one")


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


def _number_or_auto(text: str) -> int | str:
    """A batch size of the command line."""
    return text if text == "auto" else int(text)
