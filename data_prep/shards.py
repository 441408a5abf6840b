"""Tar shards of a manifest, for corpora of many small files (WebDataset layout).

Utterances are shuffled with a fixed seed, because training from shards mixes only what stands close together. Segments
of long recordings are cut out as 16-bit FLAC; whole files are copied as they are. Written are
<manifest name>-<number>.tar, <manifest name>.jsonl, a manifest of the same utterances inside the shards, and
<manifest name>.skipped.jsonl, what could not be read.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from common import report, require_output_dir

from speechkd.data.manifest import read_manifest
from speechkd.data.shards import write_shards
from speechkd.files import read_jsonl

SEED = 0


def prepare_shards(
    manifest_path: str | Path, output_dir: str | Path, *, utterances_per_shard: int = 1000
) -> dict[str, Any]:
    """Write the shards and their manifest.

    Args:
        manifest_path: the utterances.
        output_dir: folder of the shards; not that of the manifest, whose name theirs has.
        utterances_per_shard: at most; training needs a shard or more for each of its loading processes.

    Returns:
        Shards, utterances and skipped utterances.

    Raises:
        ValueError: the manifest is broken, or the shards cannot be written there.
    """
    manifest_path, output_dir = Path(manifest_path), require_output_dir(output_dir)
    if output_dir.resolve() == manifest_path.resolve().parent:
        raise ValueError(f"output folder {output_dir} holds {manifest_path.name} itself; choose another")
    manifest = read_manifest(manifest_path)
    shuffled = manifest.select(np.random.default_rng(SEED).permutation(len(manifest)))
    prefix = manifest_path.stem
    shards = write_shards(shuffled, output_dir, prefix=prefix, utterances_per_shard=utterances_per_shard)
    num_skipped = len(read_jsonl(output_dir / f"{prefix}.skipped.jsonl"))
    return {"shards": len(shards), "utterances": len(manifest) - num_skipped, "skipped": num_skipped}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, required=True, help="JSONL manifest of the corpus")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--utterances-per-shard", type=int, default=1000, help="at most")
    parser.add_argument("--json", action="store_true", help="print the counts as one JSON object")
    arguments = parser.parse_args(argv)
    report(
        lambda: prepare_shards(
            arguments.manifest, arguments.output_dir, utterances_per_shard=arguments.utterances_per_shard
        ),
        arguments.json,
    )


if __name__ == "__main__":
    main()
