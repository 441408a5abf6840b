"""Runs `speechkd` commands as processes of their own that start at once.

Importing torch and transformers takes seconds and these tests start over a hundred processes, so this program imports
everything once and forks a child for each command. It does no computation itself: a fork copies no threads.
"""

import atexit
import json
import logging
import os
import signal
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes/distil_whisper"))

import train

import speechkd.cli
import speechkd.labels.pseudo_label as pseudo_label
from speechkd.cli import run_command


def run_train(argv: list[str]) -> None:
    """What `python recipes/distil_whisper/train.py` does."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_command(lambda: train.main(argv))


def run_label(argv: list[str]) -> None:
    """What `speechkd label` does."""
    speechkd.cli.main(["label", *argv])


def run_label_in_small_shards(argv: list[str]) -> None:
    """`speechkd label` with many shards, so that kills fall between and into them."""
    pseudo_label.SHARD_UTTERANCES = 4
    run_label(argv)


COMMANDS = {"train": run_train, "label": run_label, "label_in_small_shards": run_label_in_small_shards}


def run_child(command: str, argv: list[str], log: str) -> None:
    """Be the process that was asked for; does not return."""
    os.setsid()  # a process group of its own, which can be signalled as a whole
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = 0
    try:
        COMMANDS[command](argv)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # not back into the loop of the server, and without a second for taking torch apart


def main() -> None:
    """Answer each line, `[command, argv, log]`, with the child's process id, and when it ended with its status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which then closes the pipe
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # nothing else may be printed there
    answers.write("ready\n")
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if request[0] == "wait":
            _, status = os.waitpid(request[1], 0)
            answers.write(f"{os.waitstatus_to_exitcode(status)}\n")
            continue
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            run_child(*request)
        answers.write(f"{child}\n")


if __name__ == "__main__":
    main()
