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


def table_lines(result: dict[str, Any]) -> Iterator[str]:
    """What `bench_models` found as a table for a terminal, one row a model."""
    rows = [["model", *(title for title, _ in COLUMNS.values())]]
    for model in result["models"]:
        cells = ["-" if model[key] is None else format(model[key], form) for key, (_, form) in COLUMNS.items()]
        rows.append([model["name"], *cells])
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        yield "  ".join([name.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:], strict=True))])
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
