"""What `speechkd bench` measured as a table for a terminal."""

from collections.abc import Iterator
from typing import Any

COLUMNS = {
    "size_megabytes": ("disk MB", ".0f"),
    "parameters": ("parameters", ",d"),
    "load_seconds": ("load s", ".2f"),
    "latency_median_seconds": ("median s", ".3f"),
    "latency_p95_seconds": ("95 % s", ".3f"),
    "rtfx": ("RTFx", ".1f"),
    "rtfx_batched": ("RTFx batched", ".1f"),
    "peak_memory_megabytes": ("memory MB", ".0f"),
    "wer": ("WER %", ".2f"),
}

SHARED = ("size_megabytes", "parameters", "load_seconds", "rtfx_batched", "peak_memory_megabytes")


def encoder_columns(seconds: list[float]) -> dict[str, tuple[str, str]]:
    """Columns of `bench_encoders` for clips of these lengths; the 95 % are for `--json`, or rows would be too long."""
    columns = {key: COLUMNS[key] for key in SHARED[:3]}
    for length in seconds:
        columns |= {
            f"latency_median_seconds_{length:g}s": (f"median {length:g} s", ".3f"),
            f"speed_ratio_{length:g}s": (f"speed {length:g} s", ".2f"),
        }
    return columns | {key: COLUMNS[key] for key in SHARED[3:]}


def table_lines(result: dict[str, Any]) -> Iterator[str]:
    """What `bench_models` or `bench_encoders` found as a table for a terminal, one row a model."""
    columns = encoder_columns(result["seconds"]) if "seconds" in result else COLUMNS
    rows = [["model", *(title for title, _ in columns.values())]]
    for model in result["models"]:
        cells = ["-" if model[key] is None else format(model[key], form) for key, (_, form) in columns.items()]
        rows.append([model["name"], *cells])
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        yield "  ".join([name.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:], strict=True))])
    if "seconds" in result:
        yield (
            f"noise, {result['rounds']} rounds, batches of {result['batch_size']} clips of "
            f"{result['batch_clip_seconds']:g} s, {result['device']}, {result['num_threads']} threads, "
            f"{result['date']}; speed beside {result['models'][0]['name']}"
        )
        return
    yield (
        f"{result['num_clips']} clips, {result['audio_seconds']:.0f} s ({result['num_skipped']} skipped), batches of "
        f"{result['batch_size']}, {result['device']}, {result['num_threads']} threads; "
        f"WER against {result['reference']}"
    )
    if "speculative" in result:
        found = result["speculative"]
        yield (
            f"speculative decoding: {found['accepted_tokens_per_step']:.2f} accepted tokens a step "
            f"({100 * found['acceptance_rate']:.0f} % of drafts), {found['speed_ratio']:.2f} times as fast a clip, "
            f"{found['decoding_ratio']:.2f} times in decoding, {found['num_identical_texts']} of "
            f"{result['num_clips']} texts identical"
        )
