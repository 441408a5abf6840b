"""Spoken digits and coffee orders, the corpora of the small SUPERB, each as its own script prepares it.

Layout: fsdd/ as data_prep/fsdd.py wants it, barista/ as data_prep/barista.py does; links will do. Manifests go into
fsdd/ and barista/ of the output folder.
"""

from pathlib import Path
from typing import Any

from barista import prepare_barista
from common import corpus_parser, refuse_download, report, require_corpus_dir
from fsdd import prepare_fsdd


def prepare_mini(corpus_dir: str | Path | None, output_dir: str | Path) -> dict[str, Any]:
    """Write the manifests of both corpora.

    Args:
        corpus_dir: folder with fsdd/ and barista/.
        output_dir: folder for fsdd/ and barista/ with their manifests.

    Returns:
        Counts of each corpus, under its name.

    Raises:
        ValueError: one of the folders is not the corpus.
    """
    corpus_dir, output_dir = require_corpus_dir(corpus_dir, "fsdd/recordings/ and barista/data/"), Path(output_dir)
    return {
        "fsdd": prepare_fsdd(corpus_dir / "fsdd", output_dir / "fsdd"),
        "barista": prepare_barista(corpus_dir / "barista", output_dir / "barista"),
    }


def main(argv: list[str] | None = None) -> None:
    arguments = corpus_parser(__doc__).parse_args(argv)

    def prepare() -> dict[str, Any]:
        repositories = "Jakobovski/free-spoken-digit-dataset, and Picovoice/speech-to-intent-benchmark"
        refuse_download(arguments.download, repositories)
        return prepare_mini(arguments.corpus_dir, arguments.output_dir)

    report(prepare, arguments.json)


if __name__ == "__main__":
    main()
