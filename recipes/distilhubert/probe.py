"""What compact encoders keep of their teacher: the small SUPERB on spoken digits and orders, for several encoders.

Launch: python recipes/distilhubert/probe.py --encoders teacher=PATH student=PATH log-mel=log-mel fresh=random:PATH \
    --fsdd-dir data/fsdd --barista-dir data/barista --output exp/distilhubert/probes.json
The first encoder is the teacher and log-mel the baseline of retention. An encoder that is in the output with the same
weights is not done again. With --readme FILE --marker NAME the table goes there.
"""

import argparse
import hashlib
import json
import logging
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from probe_tasks import DIGITS, ORDERS, STRINGS, MiniProtocol, MiniTasks, make_tasks, read_corpora, score_seed
from tabulate_probes import format_table

from speechkd.cli import run_command
from speechkd.data.manifest import Manifest
from speechkd.doctor import made_on
from speechkd.features_store import FrameStates, store_states, stored_states
from speechkd.files import folder_lock, write_json
from speechkd.frame_encoders import MAX_CLIP_SECONDS, FrameEncoder, fitting_window_seconds, load_frame_encoder
from speechkd.probing import mean_and_deviation
from speechkd.readme_tables import parse_table_arguments, show_table

logger = logging.getLogger(__name__)

FRESH = "random:"
FRESH_SEED = 0  # of new weights; seeds of heads vary, the encoder stays


def probe_encoders(
    encoders: dict[str, str],
    fsdd_dir: str | Path,
    barista_dir: str | Path,
    output: str | Path,
    *,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    features_dir: str | Path | None = None,
    protocol: MiniProtocol | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Score encoders on all small tasks, one after the other.

    Args:
        encoders: name to a Hub id, a folder, `bundled:<name>`, "log-mel", or "random:" and one of these for new weights
            in its configuration.
        fsdd_dir: manifests of `data_prep/fsdd.py`.
        barista_dir: manifests of `data_prep/barista.py`.
        output: JSON file, written after each encoder.
        seeds: of the heads.
        features_dir: where states are kept; by default `features` beside the output.
        protocol: None takes `MiniProtocol()`.
        device: where encoders and heads run; by default CUDA if there is one.

    Returns:
        What the file holds.

    Raises:
        ValueError: a manifest does not fit, an encoder cannot be loaded, or the file holds results of other settings.
        AudioError: a clip cannot be used; encoders would be scored on different clips.
    """
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds must be different numbers of 0 or more, one at least, got {list(seeds)}")
    output, protocol = Path(output), protocol or MiniProtocol()
    features_dir = Path(features_dir or output.parent / "features")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    corpora = read_corpora(fsdd_dir, barista_dir)
    tasks = make_tasks(corpora, protocol, seeds)
    settings = {
        "seeds": list(seeds),
        "protocol": asdict(protocol),
        "manifests_sha256": {
            f"{kind}/{manifest.path.name}": hashlib.sha256(manifest.path.read_bytes()).hexdigest()
            for kind, manifests in corpora.items()
            for manifest in manifests
        },
    }
    with folder_lock(output.parent):
        content = _open_results(output, settings)
        # all are loaded once before the first is probed: a wrong path is found now, not hours later
        identities = {name: _load(source, device).identity["weights_sha256"] for name, source in encoders.items()}
        for name, source in encoders.items():
            if content["encoders"].get(name, {}).get("weights_sha256") == identities[name]:
                logger.info("%s: done before", name)
                continue
            content["encoders"][name] = _probe(source, corpora, tasks, protocol, seeds, features_dir, device)
            write_json(output, content)
        # those of earlier runs stay, behind these
        content["encoders"] = {name: content["encoders"][name] for name in [*encoders, *content["encoders"]]}
        write_json(output, content)
    return content


def _open_results(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    if not path.is_file():
        return {"settings": settings, "encoders": {}}
    content = json.loads(path.read_text(encoding="utf-8"))
    changed = [key for key in settings if content["settings"].get(key) != settings[key]]
    if changed:
        raise ValueError(
            f"{path} holds results of other {' and '.join(changed)}, and scores would not compare; choose another "
            "--output, or remove the file"
        )
    return content


def _load(source: str, device: torch.device, **whisper: Any) -> FrameEncoder:
    is_fresh = source.startswith(FRESH)
    return load_frame_encoder(
        source.removeprefix(FRESH),
        fresh_seed=FRESH_SEED if is_fresh else None,
        device=device,
        **whisper,
    )


def _probe(
    source: str,
    corpora: dict[str, list[Manifest]],
    tasks: MiniTasks,
    protocol: MiniProtocol,
    seeds: Sequence[int],
    features_dir: Path,
    device: torch.device,
) -> dict[str, Any]:
    """Facts and scores of one encoder."""
    started = time.perf_counter()
    encoder = _load(source, device)
    stores = {}
    for kind, manifests in corpora.items():
        # a Whisper hears short clips and little silence behind them: in a window of 30 s it would work on nothing else
        window = {"window_seconds": fitting_window_seconds(manifests), "grid_seconds": protocol.grid_seconds}
        hearing = _load(source, device, **window) if encoder.max_seconds < MAX_CLIP_SECONDS else encoder
        stores[kind] = [
            store_states(hearing, manifest, features_dir, mean=kind == ORDERS, max_skipped_fraction=0.0, device=device)
            for manifest in manifests
        ]
    frames = stored_states([*stores[DIGITS], *stores[STRINGS]])
    orders = stored_states(stores[ORDERS])
    digit_ids = [key for manifest in corpora[DIGITS] for key in manifest.ids]
    means = FrameStates({**frames.means(digit_ids).arrays, **orders.means(orders.arrays).arrays})
    states_seconds = time.perf_counter() - started
    runs, times = [], []
    for seed in seeds:
        scores, seconds = score_seed(tasks, frames, means, protocol, seed=seed, device=device)
        logger.info("%s, seed %d: %s", source, seed, ", ".join(f"{key} {value:.4g}" for key, value in scores.items()))
        runs.append(scores)
        times.append(seconds)
    return {
        "source": source,
        "weights_sha256": encoder.identity["weights_sha256"],
        "num_layers": encoder.num_layers,
        "width": encoder.width,
        "scores": mean_and_deviation(runs),
        "states_seconds": states_seconds,
        "head_seconds": {name: sum(seconds[name] for seconds in times) for name in times[0]},
        **made_on(device),
    }


def _named(pairs: Sequence[str]) -> dict[str, str]:
    """Encoders by name, of NAME=SOURCE each."""
    named: dict[str, str] = {}
    for pair in pairs:
        name, separator, source = pair.partition("=")
        if not (name and separator and source) or name in named:
            raise ValueError(
                f"encoder {pair!r} is not NAME=PATH with a name of its own; write teacher=bundled:whisper-base"
            )
        named[name] = source
    return named


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The small SUPERB for several encoders.")
    parser.add_argument(
        "--encoders",
        required=True,
        nargs="+",
        metavar="NAME=SOURCE",
        help="the teacher first; a source is a Hub id, a folder, bundled:<name>, log-mel, or random:<one of these>",
    )
    parser.add_argument("--fsdd-dir", required=True, help="manifests of data_prep/fsdd.py")
    parser.add_argument("--barista-dir", required=True, help="manifests of data_prep/barista.py")
    parser.add_argument("--output", required=True, help="JSON file of results; continued if it was begun")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--features-dir", help="states on disk; features beside the output if not given")
    parser.add_argument("--device", help="torch device; CUDA if there is one")
    arguments = parse_table_arguments(parser, argv)
    content = probe_encoders(
        _named(arguments.encoders),
        arguments.fsdd_dir,
        arguments.barista_dir,
        arguments.output,
        seeds=arguments.seeds,
        features_dir=arguments.features_dir,
        device=arguments.device,
    )
    command = shlex.join(["python", "recipes/distilhubert/probe.py", *(sys.argv[1:] if argv is None else argv)])
    write_json(arguments.output, {**content, "command": command})
    show_table(format_table(content), arguments)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_command(main)
