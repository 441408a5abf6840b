"""Transcribe a manifest in order with a student as its teacher's draft, and let the draft learn from its rejections.

Launch: python recipes/distil_whisper/refresh_draft.py --teacher T --assistant DIR --manifest FILE --output-dir DIR
Writes student/ (the refreshed draft), transcripts.jsonl (the teacher's text), refresh.json; the same command resumes.
"""

import argparse
import logging
from pathlib import Path

from speechkd.cli import run_command
from speechkd.files import write_json
from speechkd.models.draft_refresh import RefreshConfig, acceptance, refresh_on_manifest

ASSISTED = "{share}: {accepted_tokens_per_step:.2f} accepted tokens a step, {rate:.0f} % of drafts"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True, help="Hub id, folder or bundled:<name>")
    parser.add_argument("--assistant", required=True, help="student that drafts: Hub id or folder")
    parser.add_argument("--manifest", required=True, help="clips, in the order in which they come")
    parser.add_argument("--output-dir", required=True, help="folder for the results; continued if it was begun")
    parser.add_argument("--language", default="en", help="language code, or none for English-only models")
    parser.add_argument("--refresh-every", type=int, default=16, help="clips between two refreshes; 0 for none")
    parser.add_argument("--num-steps", type=int, default=4, help="optimizer steps of a refresh")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--max-new-tokens", type=int, default=224, help="longest transcript in tokens")
    parser.add_argument("--device", help="torch device; CUDA if there is one")
    arguments = parser.parse_args(argv)
    rows = refresh_on_manifest(
        arguments.teacher,
        arguments.assistant,
        arguments.manifest,
        arguments.output_dir,
        config=RefreshConfig(
            refresh_every=arguments.refresh_every,
            num_steps=arguments.num_steps,
            learning_rate=arguments.learning_rate,
        ),
        language=None if arguments.language == "none" else arguments.language,
        max_new_tokens=arguments.max_new_tokens,
        device=arguments.device,
    )
    third = max(1, len(rows) // 3)
    shares = {"first third": rows[:third], "last third": rows[-third:], "all": rows}
    result = {share: acceptance(of_share) for share, of_share in shares.items()}
    write_json(Path(arguments.output_dir) / "refresh.json", result)
    for share, found in result.items():
        print(ASSISTED.format(share=share, rate=100 * found["acceptance_rate"], **found))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_command(main)
