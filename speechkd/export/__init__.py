"""Students in formats that other tools read."""

import logging
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

logger = logging.getLogger(__name__)

Format = Literal["huggingface", "ctranslate2", "onnx", "ggml"]


def export_model(
    model_name: str,
    format_name: Format,
    output_dir: str | Path,
    *,
    precision: str | None = None,
    window_seconds: int | None = None,
    manifest_path: str | Path | None = None,
    max_clips: int | None = None,
    decoding: Any = None,
) -> dict[str, Any]:
    """Export a Whisper and compare its transcripts with those of the source in float32 PyTorch.

    The folder gets `export.json` (what was made of what, and the parity) and, with a manifest, `parity.json` (the
    texts that differ). It stands under its name when all is done, or not at all.

    Args:
        model_name: Hub id, folder or `bundled:<name>`.
        format_name: what to write.
        output_dir: absent or empty.
        precision: of the weights; the format's first one if not given.
        window_seconds: longest clip that the export takes, instead of 30 s: less work for short utterances. In Hugging
            Face, ONNX and ggml the encoder loses its later positions. CTranslate2 keeps them, because faster-whisper
            always fills 30 s; its own library takes features of that length and `export.json` says so.
        manifest_path: clips to compare on; without it nothing is compared, and a warning says so.
        max_clips: only the first so many.
        decoding: a `DecodingConfig`: language, task and limit for the comparison; English by default.

    Returns:
        Content of `export.json`, `output_dir` and `size_megabytes`.

    Raises:
        ValueError: the output folder is not empty, an unknown precision or window, a missing library, clips longer than
            the window, or no clip to compare on.
    """
    # imported here because recipes take speechkd.export.huggingface alone
    from transformers.utils import cached_file

    from speechkd.data.features import SAMPLE_RATE_HZ, SAMPLES_PER_POSITION
    from speechkd.export.ctranslate2 import CTRANSLATE2_PRECISIONS, export_ctranslate2
    from speechkd.export.ggml import GGML_PRECISIONS, export_ggml
    from speechkd.export.huggingface import HUGGINGFACE_PRECISIONS, export_huggingface, export_short_window
    from speechkd.export.onnx import ONNX_PRECISIONS, export_onnx
    from speechkd.export.parity import check_clips_fit, check_parity, log_parity
    from speechkd.export.transcribers import EXPORT_FILE, huggingface_transcriber, load_transcriber, read_export
    from speechkd.files import atomic_folder, write_json
    from speechkd.labels.decoding import DecodingConfig
    from speechkd.models.whisper import shorten_window
    from speechkd.teachers import load_processor, load_whisper, resolve_model, teacher_identity

    formats: dict[str, tuple[tuple[str, ...], Any]] = {
        "huggingface": (HUGGINGFACE_PRECISIONS, export_huggingface),
        "ctranslate2": (CTRANSLATE2_PRECISIONS, export_ctranslate2),
        "onnx": (ONNX_PRECISIONS, export_onnx),
        "ggml": (GGML_PRECISIONS, export_ggml),
    }
    precisions, write_format = formats[format_name]
    precision = precision or precisions[0]
    if precision not in precisions:
        raise ValueError(f"{format_name} has no precision {precision!r}; choose one of {', '.join(precisions)}")
    if max_clips is not None and max_clips < 1:
        raise ValueError(f"max_clips must be 1 or more, got {max_clips}")
    output_dir = Path(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"output folder {output_dir} is not empty; choose another one or remove it")
    if (read_export(model_name) or {}).get("format", "huggingface") != "huggingface":
        raise ValueError(f"{model_name} is an export already; give the Hugging Face folder that it was made of")
    model = load_whisper(model_name)
    identity = teacher_identity(model_name, model)
    parameters = model.num_parameters()
    load_processor(model_name)
    if window_seconds is not None:
        shorten_window(model, window_seconds)  # refuses a window that the model does not have
        parameters = parameters if format_name == "ctranslate2" else model.num_parameters()
        if manifest_path is not None:
            check_clips_fit(manifest_path, window_seconds, max_clips)
    resolved = Path(resolve_model(model_name))
    # a Hub id: the two lines above have put all its files beside its config
    folder = resolved if resolved.is_dir() else Path(str(cached_file(str(resolved), "config.json"))).parent
    export: dict[str, Any] = {
        "format": format_name,
        "precision": precision,
        "model": identity,
        "encoder_layers": model.config.encoder_layers,
        "decoder_layers": model.config.decoder_layers,
        "parameters": parameters,
        "speechkd_version": version("speechkd"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "window_seconds": model.config.max_source_positions * SAMPLES_PER_POSITION / SAMPLE_RATE_HZ,
        "parity": None,
    }
    del model
    if format_name == "ctranslate2" and "float16" in precision:
        logger.warning(
            "float16 weights of CTranslate2 are computed in float16 on a GPU; a CPU falls back to float32 for them"
        )
    with atomic_folder(output_dir) as written:
        if window_seconds is not None and format_name != "ctranslate2":
            export_short_window(folder, written.with_name("short"), window_seconds)
            folder = written.with_name("short")
        write_format(folder, written, precision=precision)
        write_json(written / EXPORT_FILE, export)
        if manifest_path is None:
            logger.warning("NO PARITY CHECK: nothing was transcribed; give --manifest to compare on its clips")
        else:
            decoding = decoding or DecodingConfig()
            settings = {
                "language": decoding.language,
                "task": decoding.task,
                "max_new_tokens": decoding.max_new_tokens,
            }
            source = huggingface_transcriber(model_name, **settings)
            exported = load_transcriber(str(written), **settings)
            parity = check_parity(source, exported, manifest_path, max_clips=max_clips)
            log_parity(parity)
            write_json(written / "parity.json", parity)
            export["parity"] = {key: value for key, value in parity.items() if key != "differing"}
            write_json(written / EXPORT_FILE, export)
    size_bytes = sum(path.stat().st_size for path in output_dir.rglob("*") if path.is_file())
    return {"output_dir": str(output_dir), "size_megabytes": size_bytes / 1e6} | export
