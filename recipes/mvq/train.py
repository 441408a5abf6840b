"""MVQ: a small recogniser learns texts, and codes that a quantizer makes of a large speech encoder's states.

Guo et al. 2022, https://arxiv.org/abs/2211.00508. Launch: python recipes/mvq/train.py --config FILE
[--section.key value ...], under torchrun or accelerate too. A killed run carries on from its last checkpoint.
"""

import logging
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from recognition_corpora import DataConfig, RecognitionSet, TokensConfig, build_set, collate_recognition, spoken_texts
from recognition_objective import LossConfig, count_items, loss_terms, make_head
from teacher_targets import Targets, TeacherConfig, open_targets
from transformers import set_seed

from speechkd.cli import run_command
from speechkd.config import EvaluationConfig, parse_config
from speechkd.data.augment import SpecAugmentConfig
from speechkd.data.hub import read_utterances
from speechkd.data.sampler import DurationBatchSampler
from speechkd.files import atomic_folder, write_json
from speechkd.labels.decoding import DecodingConfig
from speechkd.labels.filters import FilterConfig
from speechkd.model_card import card_head, data_section, licence_section, teacher_section, training_section
from speechkd.models.quantizer_fit import FitConfig
from speechkd.models.recognizer import (
    BUDGETS,
    DistilledRecognizer,
    EncoderKind,
    HeadKind,
    RecognizerConfig,
    RecognizerInputs,
    RecognizerModel,
)
from speechkd.models.recognizer_decoding import RecognitionConfig
from speechkd.models.recognizer_tokens import Tokens
from speechkd.run_folder import training_facts, training_run
from speechkd.trainer import DistillationArguments, DistillationTrainer

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class StudentConfig:
    """The recogniser that learns.

    Args:
        encoder: conformer hears whole clips, emformer segments with a little of what comes.
        head: ctc, or a transducer.
        size: tiny is 2 M parameters, small and medium are as large as the Zipformers of those names, paper is 12 layers
            of 512.
        num_layers: other than those of the size; null for its own.
        subsampling: 4 gives 25 states a second, 2 gives 50.
        dropout: in the encoder.
        segment_frames: states that an Emformer computes at once.
        left_context_frames: states before them.
        right_context_frames: states after them: its latency.
        spec_augment: masks on what it hears in training, without time warping; null for none.
    """

    encoder: EncoderKind = "conformer"
    head: HeadKind = "ctc"
    size: Literal["tiny", "small", "medium", "paper"] = "tiny"
    num_layers: int | None = None
    subsampling: Literal[2, 4] = 4
    dropout: float = 0.1
    segment_frames: int = 16
    left_context_frames: int = 32
    right_context_frames: int = 4
    spec_augment: SpecAugmentConfig | None = None

    def recognizer(self, num_symbols: int) -> RecognizerConfig:
        """Configuration of the model."""
        own = asdict(self)
        names = ("encoder", "head", "subsampling", "dropout", *(name for name in own if name.endswith("_frames")))
        sizes = BUDGETS[self.size] | ({} if self.num_layers is None else {"num_layers": self.num_layers})
        return RecognizerConfig(num_symbols=num_symbols, **sizes, **{name: own[name] for name in names})


@dataclass(kw_only=True)
class QuantizerConfig:
    """How the encode stage fits a quantizer where `teacher.quantizer_dir` has none.

    Args:
        bytes_per_frame: codebooks of 256 entries, a power of two.
        phase1_steps: steps with twice as many codebooks of 16 entries.
        phase2_steps: steps with those of 256.
        max_frames: of the training manifest's clips that it is fitted on.
        seed: of all draws.
    """

    bytes_per_frame: int = 8
    phase1_steps: int = 10_000
    phase2_steps: int = 10_000
    max_frames: int = 500_000
    seed: int = 0

    def fit(self) -> FitConfig:
        """What `fit_quantizer` takes; wrong values are refused here, before the work starts."""
        values = asdict(self)
        return FitConfig(**{name: values[name] for name in values if name != "max_frames"})

    def __post_init__(self) -> None:
        self.fit()


@dataclass(kw_only=True)
class MvqConfig:
    """Train a small recogniser on texts and on a teacher's codes.

    Args:
        teacher: the large speech encoder, and where its targets are.
        quantizer: how its states become codes.
        data: manifests, where the texts come from, and batches.
        tokens: what the student writes.
        student: the recogniser.
        loss: what it learns besides the texts.
        decoding: how `data.label_teacher` transcribes.
        filters: which of its transcripts are trained on.
        recognition: how the student is decoded in evaluation.
        evaluation: how it is scored.
        trainer: arguments of transformers' Trainer.
    """

    teacher: TeacherConfig
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    data: DataConfig
    tokens: TokensConfig = field(default_factory=TokensConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)
    recognition: RecognitionConfig = field(default_factory=RecognitionConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    trainer: DistillationArguments

    def __post_init__(self) -> None:
        if self.loss.kd == "mvq" and self.teacher.quantizer_dir is None:
            raise ValueError(
                "loss.kd=mvq needs teacher.quantizer_dir, where the encode stage puts the quantizer that it fits; give "
                "a folder, or set loss.kd to none, l1 or l2"
            )
        if self.evaluation.reference == "teacher" and self.data.labels_dir is None:
            raise ValueError(
                "evaluation.reference=teacher scores on transcripts of data.labels_dir, which is null; set it, or "
                "evaluation.reference=text"
            )
        self.trainer.follow_data(self.data.num_workers, self.data.dev_manifest)


def describe_run(
    config: MvqConfig,
    student: DistilledRecognizer,
    tokens: Tokens,
    targets: Targets | None,
    train_set: RecognitionSet,
    report: dict[str, Any],
) -> dict[str, Any]:
    """Facts of the training for `run.json`, the model card and the tables."""
    recognizer, quantizer = student.recognizer, None if targets is None else targets.quantizer
    return {
        "title": f"speech recogniser {Path(config.trainer.output_dir).name}",
        "teacher": None if targets is None else targets.teacher,
        "teacher_layer": None if targets is None else targets.layer,
        "teacher_outputs": None if targets is None else "live" if targets.store is None else "stored",
        "quantizer": None if quantizer is None else quantizer.id,
        "bytes_per_frame": None if quantizer is None else quantizer.bytes_per_frame,
        "kd": config.loss.kd,
        "kd_weight": config.loss.weight,
        "kd_layer": config.loss.layer_of(recognizer.config.num_layers),
        "encoder": recognizer.config.encoder,
        "head": recognizer.config.head,
        "frame_rate_hz": recognizer.config.frame_rate_hz,
        "symbols": len(tokens),
        "parameters": recognizer.num_parameters(),
        "head_parameters": 0 if student.head is None else sum(weight.numel() for weight in student.head.parameters()),
        "texts": f"transcripts of {config.data.label_teacher}" if config.data.labels_dir else "the manifest's text",
        "left_out": report,
        **training_facts(
            config.trainer,
            license=config.teacher.license,
            train_manifest=config.data.train_manifest,
            train_utterances=len(train_set),
            train_seconds=float(train_set.manifest.durations_seconds.sum()),
            loss=config.loss.describe(recognizer.config.head),
        ),
    }


def model_card(run: dict[str, Any], scores: dict[str, Any] | None = None) -> str:
    """Model card of a recogniser.

    Args:
        run: facts of the training, of `run.json`.
        scores: of the test manifest; None before evaluation.
    """
    distilled = {
        "mvq": f"codes of {run['bytes_per_frame']} bytes a frame (quantizer {run['quantizer']})",
        "l1": "states, by L1 distance",
        "l2": "states, by L2 distance",
    }
    lines = [
        *card_head(run, "automatic-speech-recognition", "speech"),
        f"A speech recogniser of {run['parameters'] / 1e6:.1f} M parameters: {run['encoder']} with {run['head']}, "
        f"{run['frame_rate_hz']:g} states a second, {run['symbols']} symbols. Made by speechkd "
        f"{run['speechkd_version']}.",
        "",
        "`speechkd.models.recognizer_decoding.Recognizer.from_pretrained(folder).transcribe(waveforms, num_samples)` "
        "reads 16 kHz waveforms; `tokens.json` holds the symbols.",
        "",
    ]
    if run["teacher"] is None:
        lines += ["## Teacher", "", "None; trained on texts alone.", ""]
    else:
        lines += teacher_section(
            run,
            f"; layer {run['kd_layer']} learnt its layer {run['teacher_layer']}: {distilled[run['kd']]}, "
            f"{'stored before the training' if run['teacher_outputs'] == 'stored' else 'computed in each step'}.",
        )
    lines += [*data_section(run, f". Texts: {run['texts']}."), *training_section(run)]
    if scores is not None:
        lines += [
            "## Evaluation",
            "",
            f"{scores['num_utterances']} utterances of {scores['manifest']}: WER {scores['wer']:.2f} %, normaliser "
            f"{scores['normalizer']}, against {scores['reference']}; {scores['decoding']}.",
            "",
        ]
    lines += licence_section(run, "That of the teacher and of the data.")
    return "\n".join(lines)


def save_student(student: DistilledRecognizer, tokens: Tokens, run: dict[str, Any], output_dir: Path) -> None:
    """Write the recogniser without its head, its symbols and its card; the folder is complete or absent."""
    with atomic_folder(output_dir, replace=True) as temporary:
        student.recognizer.save_pretrained(temporary)
        tokens.save(temporary)
        (temporary / "README.md").write_text(model_card(run), encoding="utf-8")


def build_trainer(config: MvqConfig) -> tuple[DistillationTrainer, dict[str, Any], Tokens]:
    """Everything of a run before its first step: the trainer, the facts for `run.json`, and the symbols."""
    set_seed(config.trainer.seed)
    data, output_dir, device = config.data, Path(config.trainer.output_dir), config.trainer.device
    manifests = {"train": read_utterances(data.train_manifest)}
    if data.dev_manifest is not None:
        manifests["dev"] = read_utterances(data.dev_manifest)
    said = {split: spoken_texts(data, split, manifest, config.filters) for split, manifest in manifests.items()}
    tokens = config.tokens.make(list(said["train"][0].values()))
    sizes = config.student.recognizer(len(tokens))
    config.loss.layer_of(sizes.num_layers)  # refuses one that the student lacks
    is_live = config.teacher.store_dir(config.loss.kd) is None
    sets: dict[str, RecognitionSet] = {}
    of_split: dict[str, Targets | None] = {}
    report: dict[str, Any] = {}
    with config.trainer.main_process_first(desc="preparing the data"):
        for split, manifest in manifests.items():
            if not is_live or split == "train":
                of_split[split] = open_targets(
                    config.teacher,
                    config.loss.kd,
                    sizes.frame_rate_hz,
                    split,
                    delay_frames=config.loss.delay_frames,
                    device=device if is_live else "cpu",
                )
            texts, counts = said[split]
            folder = output_dir if split == "train" else output_dir / split
            stored = None if is_live else of_split[split]
            sets[split], more = build_set(manifest, texts, tokens, sizes, data, folder, stored)
            if split == "train":
                report = counts | more
    targets = of_split["train"]
    student = DistilledRecognizer(RecognizerModel(sizes), make_head(config.loss, sizes.width, targets))
    train_set, dev_set = sets["train"], sets.get("dev")
    trainer = DistillationTrainer(
        student,
        None,
        args=config.trainer,
        train_dataset=train_set,
        collate=collate_recognition,
        sampler=DurationBatchSampler(
            train_set.manifest.durations_seconds,
            data.max_batch_seconds,
            seed=config.trainer.seed,
            rank=config.trainer.process_index,
            world_size=config.trainer.world_size,
        ),
        loss_terms=partial(
            loss_terms,
            weights=config.loss,
            inputs=RecognizerInputs(sizes.num_mels).to(device),
            live=targets if is_live else None,
            masks=config.student.spec_augment,
            seed=config.trainer.seed,
        ),
        count_items=count_items,
        eval_dataset=dev_set,
        eval_sampler=None
        if dev_set is None
        else DurationBatchSampler(dev_set.manifest.durations_seconds, data.max_batch_seconds),
    )
    return trainer, describe_run(config, student, tokens, targets, train_set, report), tokens


def main(argv: list[str] | None = None) -> None:
    config, resolved_yaml = parse_config(MvqConfig, argv)
    output_dir = Path(config.trainer.output_dir)
    is_main = config.trainer.process_index == 0
    with training_run(config.trainer, resolved_yaml) as is_finished:
        if is_finished:
            return
        trainer, run, tokens = build_trainer(config)
        trainer.train(resume_from_checkpoint=True)
        if is_main:
            run["steps"] = trainer.state.global_step
            save_student(trainer.model, tokens, run, output_dir / "student")
            write_json(output_dir / "run.json", run)
            logger.info("student: %s", output_dir / "student")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_command(main)
