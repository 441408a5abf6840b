"""Speech Commands v0.01 and v0.02: English words of a second, 16 kHz (Warden 2018, https://arxiv.org/abs/1804.03209).

Layout: speech_commands_<version>/ with <word>/<speaker>_nohash_<number>.wav, _background_noise_/*.wav,
validation_list.txt and testing_list.txt; beside it, if wanted, speech_commands_test_set_<version>/ with one folder a
class of SUPERB's 12. `intent` holds the class: ten words, _unknown_ for any other, _silence_ for a second of noise;
`text` holds the word that is said. `--download` fetches both archives (CC BY 4.0).
"""

import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

from common import corpus_parser, finish, probe_clip, report, require_corpus_dir, require_output_dir
from download import fetch, unpack
from tqdm import tqdm

from speechkd.data.audio import AudioError
from speechkd.data.manifest import write_manifest

KEYWORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
UNKNOWN, SILENCE = "_unknown_", "_silence_"
NOISE_FOLDER = "_background_noise_"
LISTS = {"dev": "validation_list.txt", "test": "testing_list.txt"}
# which part of each noise file the cuts of a split start in, so that the splits hear different noise
NOISE_PARTS = {"train": (0.0, 0.8), "dev": (0.8, 0.9), "test": (0.9, 1.0)}
ARCHIVES_URL = "http://download.tensorflow.org/data"
CHECKSUMS = {  # those of torchaudio and tensorflow_datasets; nobody publishes one for the test set of v0.01
    "speech_commands_v0.01": "sha256:743935421bb51cccdb6bdd152e04c5c70274e935c82119ad7faeec31780d811d",
    "speech_commands_v0.02": "sha256:af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58",
    "speech_commands_test_set_v0.02": "sha256:cc2a00c1147c2254e9be3fa0f779d8c17421dc349b86366567a8edfa9acd51df",
}


def prepare_speech_commands(
    corpus_dir: str | Path | None, output_dir: str | Path, *, version: str = "v0.01", seed: int = 0
) -> dict[str, Any]:
    """Write train.jsonl, dev.jsonl and test.jsonl by the official lists, and test_superb.jsonl from SUPERB's test set.

    SUPERB (Yang et al. 2021, https://arxiv.org/abs/2105.01051) trains on v0.01 with class-balanced sampling, draws
    _silence_ anew from the noise files at each step, and tests on the separate test set. Here the cuts are fixed by
    `seed`: as many in a split as it has clips of one keyword on average. All words that are no keyword are kept.

    Args:
        corpus_dir: folder that holds speech_commands_<version>/, or that folder itself.
        output_dir: folder for the manifests, which refer to the audio in place.
        version: "v0.01" (30 words) or "v0.02" (35 words).
        seed: of the cuts of noise.

    Returns:
        Utterances per manifest, and skipped clips.

    Raises:
        ValueError: the folder is not the corpus, or has no usable clip or noise.
    """
    corpus_dir = require_corpus_dir(corpus_dir, f"speech_commands_{version}/<word>/*.wav").resolve()
    root = corpus_dir if (corpus_dir / LISTS["dev"]).is_file() else corpus_dir / f"speech_commands_{version}"
    for name in LISTS.values():
        if not (root / name).is_file():
            raise ValueError(f"{root / name} does not exist; give the folder with speech_commands_{version}/ in it")
    output_dir = require_output_dir(output_dir)
    manifest_dir = output_dir.resolve()
    skipped: list[dict[str, str]] = []
    split_of = {line: split for split, name in LISTS.items() for line in (root / name).read_text().split()}
    clips = sorted(path for path in root.glob("*/*.wav") if not path.parent.name.startswith("_"))
    skipped += [
        {"id": line.removesuffix(".wav"), "reason": f"{root / line} does not exist, {LISTS[split]} names it"}
        for line, split in sorted(split_of.items())
        if not (root / line).is_file()
    ]
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "dev": [], "test": []}
    for path in tqdm(clips, desc=f"speech_commands {version}", unit="clip"):
        word, split = path.parent.name, split_of.get(path.relative_to(root).as_posix(), "train")
        splits[split] += _clip(path, f"{word}/{path.stem}", word, word, manifest_dir, skipped)
    noises = _noises(root / NOISE_FOLDER, skipped)
    for split, utterances in splits.items():
        utterances += _silences(split, noises, _mean_clips(utterances), manifest_dir, seed)
    # the archive of one version must not be tested on the test set of the other
    test_set = root.with_name(f"speech_commands_test_set_{version}")
    if root.name == f"speech_commands_{version}" and test_set.is_dir():
        splits["test_superb"] = _test_set(test_set, manifest_dir, skipped)
    counts: dict[str, Any] = {
        name: write_manifest(output_dir / f"{name}.jsonl", utterances) for name, utterances in splits.items()
    }
    return finish(output_dir, counts, skipped)


def _clip(
    path: Path, key: str, label: str, text: str | None, manifest_dir: Path, skipped: list[dict[str, str]]
) -> list[dict[str, Any]]:
    """The utterance of one file, or none and a line in `skipped`."""
    try:
        duration_seconds, rate_hz = probe_clip(path)
    except AudioError as error:
        skipped.append({"id": key, "reason": str(error)})
        return []
    return [
        {
            "id": key,
            "audio": os.path.relpath(path, manifest_dir),
            "duration_seconds": duration_seconds,
            "sample_rate_hz": rate_hz,
            "text": text,
            "speaker": path.name.split("_nohash_")[0] if "_nohash_" in path.name else None,
            "language": "en",
            "intent": label if label in (*KEYWORDS, SILENCE) else UNKNOWN,
        }
    ]


def _mean_clips(utterances: list[dict[str, Any]]) -> int:
    """Clips of one keyword on average."""
    per_class = Counter(utterance["intent"] for utterance in utterances)
    return round(sum(per_class[word] for word in KEYWORDS) / len(KEYWORDS))


def _noises(folder: Path, skipped: list[dict[str, str]]) -> list[tuple[Path, float, int]]:
    """Noise files of a second or more, their lengths in seconds and rates in Hz."""
    noises = []
    for path in sorted(folder.glob("*.wav")):
        try:
            duration_seconds, rate_hz = probe_clip(path)
            if duration_seconds < 1:
                raise AudioError(f"{path}: lasts {duration_seconds:.2f} s, shorter than a cut of 1 s")
        except AudioError as error:
            skipped.append({"id": f"{NOISE_FOLDER}/{path.stem}", "reason": str(error)})
            continue
        noises.append((path, duration_seconds, rate_hz))
    if not noises:
        raise ValueError(f"no usable noise in {folder}; the class {SILENCE} is cut from its wav files, copy them there")
    return noises


def _silences(
    split: str, noises: list[tuple[Path, float, int]], number: int, manifest_dir: Path, seed: int
) -> list[dict[str, Any]]:
    """Cuts of one second, the noise files in turn."""
    generator = random.Random(f"{seed}-{split}")
    silences = []
    for index in range(number):
        path, noise_seconds, rate_hz = noises[index % len(noises)]
        first, last = (round(share * (noise_seconds - 1) * rate_hz) for share in NOISE_PARTS[split])
        silences.append(
            {
                "id": f"{SILENCE}/{split}-{index:05d}",
                "audio": os.path.relpath(path, manifest_dir),
                "duration_seconds": 1.0,
                "sample_rate_hz": rate_hz,
                "offset_seconds": generator.randint(first, last) / rate_hz,
                "intent": SILENCE,
            }
        )
    return silences


def _test_set(folder: Path, manifest_dir: Path, skipped: list[dict[str, str]]) -> list[dict[str, Any]]:
    """SUPERB's test set: the folder is the class; what word an _unknown_ clip says is not told."""
    utterances = []
    for path in tqdm(sorted(folder.glob("*/*.wav")), desc=folder.name, unit="clip"):
        label = path.parent.name
        key = f"test_set/{label}/{path.stem}"
        utterances += _clip(path, key, label, label if label in KEYWORDS else None, manifest_dir, skipped)
    return utterances


def download_speech_commands(corpus_dir: Path, version: str) -> None:
    """Fetch and unpack speech_commands_<version>/ and speech_commands_test_set_<version>/ unless they are there.

    Raises:
        ValueError: the server cannot be reached, or an archive has another checksum.
    """
    for name in (f"speech_commands_{version}", f"speech_commands_test_set_{version}"):
        if not (corpus_dir / name).is_dir():
            archive = fetch(
                f"{ARCHIVES_URL}/{name}.tar.gz", corpus_dir / f"{name}.tar.gz", checksum=CHECKSUMS.get(name)
            )
            unpack(archive, corpus_dir / name)
            archive.unlink()


def main(argv: list[str] | None = None) -> None:
    parser = corpus_parser(__doc__)
    parser.add_argument("--version", choices=["v0.01", "v0.02"], default="v0.01", help="SUPERB uses v0.01")
    parser.add_argument("--seed", type=int, default=0, help="of the cuts of noise (0)")
    arguments = parser.parse_args(argv)

    def prepare() -> dict[str, Any]:
        if arguments.download:
            if arguments.corpus_dir is None:
                raise ValueError("--download needs --corpus-dir, the folder to unpack Speech Commands into")
            download_speech_commands(arguments.corpus_dir, arguments.version)
        return prepare_speech_commands(
            arguments.corpus_dir, arguments.output_dir, version=arguments.version, seed=arguments.seed
        )

    report(prepare, arguments.json)


if __name__ == "__main__":
    main()
