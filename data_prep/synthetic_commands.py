"""Synthetic spoken commands: a seeded grammar read by espeak-ng, for the demo and the tests.

Every voice is a machine. Nothing measured on this data says how a model does on people, so never report a result on it
as a result on human speech. Needs no corpus and no network: the espeakng-loader wheel (extra speechkd[bundled]) ships
the synthesizer. Commands for a home, a kitchen and a music player, each with an intent and its slots.
"""

import _ctypes
import ctypes
import hashlib
from itertools import product, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
import torch
import torchaudio.functional
from common import corpus_parser, report, require_output_dir
from tqdm import tqdm

from speechkd.data.manifest import write_manifest

SAMPLE_RATE_HZ = 16_000
TEST_PERCENT = 20  # share of the grammar's sentences that only the test manifest may use

# Constants of espeak-ng's speak_lib.h. A volume of 70 of 100 keeps the peaks from clipping.
SYNCHRONOUS_OUTPUT, DONT_EXIT, CHARACTER_POSITION, CHARS_UTF8 = 2, 0x8000, 1, 1
RATE, VOLUME, PITCH, RANGE, PUNCTUATION, CAPITALS, WORD_GAP = range(1, 8)
COMMON_SETTINGS = {VOLUME: 70, RANGE: 50, PUNCTUATION: 0, CAPITALS: 0, WORD_GAP: 0}

# Chosen because Whisper base, the demo's teacher, understands them. The values are espeak-ng's names, accent+timbre:
# it does not find British English under the language code.
VOICES = {
    "en-us": "gmw/en-US",
    "en-us+f2": "gmw/en-US+f2",
    "en-us+klatt": "gmw/en-US+klatt",
    "en-us+klatt4": "gmw/en-US+klatt4",
    "en-us+Michael": "gmw/en-US+Michael",
    "en-gb": "gmw/en",
    "en-gb-x-rp": "gmw/en-GB-x-rp",
    "en-gb+klatt": "gmw/en+klatt",
}
PACES = ((130, 40), (145, 50), (160, 60))  # words per minute, espeak's pitch of 0 to 99

POLITE = ("", "please ", "can you please ")
GRAMMAR = {
    "switch_device": ("turn {state} the {device} in the {room}", "switch the {device} in the {room} {state}"),
    "set_lights": ("set the lamp in the {room} to {percent} percent", "set the {room} lights to {percent} percent"),
    "set_temperature": (
        "set the temperature in the {room} to {degrees} degrees",
        "heat the {room} to {degrees} degrees",
    ),
    "set_timer": (
        "set a timer for {minutes} minutes for the {food}",
        "remind me to check the {food} in {minutes} minutes",
    ),
    "set_alarm": ("wake me up at {hour} in the morning on {day}", "set an alarm for {hour} in the morning on {day}"),
    "play_music": (
        "play some {genre} music in the {room}",
        "play {genre} music for {minutes} minutes in the {room}",
    ),
    "set_volume": ("turn the music in the {room} {direction} to {percent} percent",),
    "use_oven": (
        "heat the oven to {oven_degrees} degrees for the {food}",
        "cook the {food} at {oven_degrees} degrees for {minutes} minutes",
    ),
    "add_to_list": ("put {item} and {other_item} on the {list} list",),
    "ask_weather": ("tell me the weather in {city} {date}", "is it going to {weather} in {city} {date}"),
}
QUESTION_STARTS = ("is it", "can you")
SLOT_VALUES = {
    "state": ("on", "off"),
    "device": ("lights", "lamp", "fan", "heater", "television", "radio"),
    "room": ("kitchen", "bedroom", "bathroom", "living room", "garden", "garage", "office", "hallway"),
    "percent": ("ten", "fifteen", "twenty", "twenty five", "thirty", "forty", "fifty", "sixty", "seventy", "eighty"),
    "degrees": ("sixteen", "eighteen", "nineteen", "twenty", "twenty one", "twenty two", "twenty four"),
    "minutes": ("five", "ten", "fifteen", "twenty", "thirty", "forty", "fifty"),
    "food": ("pasta", "rice", "chicken", "potatoes", "salmon", "soup", "pizza", "eggs"),
    "hour": ("five", "six", "seven", "eight", "nine", "half past six", "half past seven", "half past eight"),
    "day": ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"),
    "genre": ("jazz", "rock", "classical", "country", "dance", "piano"),
    "direction": ("up", "down"),
    "oven_degrees": ("one hundred and fifty", "one hundred and eighty", "two hundred", "two hundred and twenty"),
    "item": ("milk", "butter", "cheese", "coffee", "sugar", "apples"),
    "other_item": ("bananas", "onions", "tomatoes", "orange juice", "flour", "salt", "chocolate"),
    "list": ("shopping", "kitchen", "weekend"),
    "city": ("london", "paris", "new york", "chicago", "berlin", "boston", "sydney", "dublin"),
    "date": ("today", "tomorrow", "tonight", "this weekend", "on monday", "on friday", "on sunday"),
    "weather": ("rain", "snow"),
}


class Speaker(NamedTuple):
    """One setting of the synthesizer, which stands in for a person."""

    voice: str
    words_per_minute: int
    pitch: int

    @property
    def name(self) -> str:
        return f"{self.voice}-{self.words_per_minute}wpm-pitch{self.pitch}"


SPEAKERS = [Speaker(voice, *pace) for pace in PACES for voice in VOICES]


class Command(NamedTuple):
    """A sentence with its meaning."""

    text: str
    intent: str
    slots: dict[str, str]


def all_commands(seed: int = 0) -> list[Command]:
    """Every sentence of the grammar once, in a seeded order; intents take turns until the smaller ones run out."""
    by_intent = []
    for intent, templates in GRAMMAR.items():
        commands = []
        for template in templates:
            names = [name for name in SLOT_VALUES if f"{{{name}}}" in template]
            openings = ("",) if template.startswith(QUESTION_STARTS) else POLITE
            for opening, *values in product(openings, *(SLOT_VALUES[name] for name in names)):
                slots = dict(zip(names, values, strict=True))
                commands.append(Command(opening + template.format(**slots), intent, slots))
        by_intent.append(sorted(commands, key=lambda command: _hash("order", seed, command.text)))
    return [command for turn in zip_longest(*by_intent) for command in turn if command is not None]


def choose_commands(num_train: int, num_test: int, seed: int) -> dict[str, list[Command]]:
    """Sentences of both splits. Its hash alone decides which split may use a sentence, whatever numbers and seed are.

    Raises:
        ValueError: a number is below 1, or the grammar has fewer sentences.
    """
    commands, chosen = all_commands(seed), {}
    for split, wanted in (("train", num_train), ("test", num_test)):
        allowed = [command for command in commands if (_hash(command.text) % 100 < TEST_PERCENT) == (split == "test")]
        if not 1 <= wanted <= len(allowed):
            raise ValueError(
                f"{wanted} {split} utterances are asked for, the grammar has {len(allowed)} sentences for this split; "
                f"choose --num-{split} from 1 to {len(allowed)}"
            )
        chosen[split] = allowed[:wanted]
    return chosen


def _hash(*parts: object) -> int:
    return int(hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:16], 16)


def espeak_paths() -> tuple[str, str]:
    """Library and voice data of espeak-ng, from the espeakng-loader wheel.

    Raises:
        ImportError: the wheel is not installed; the message names the extra.
    """
    try:
        import espeakng_loader
    except ImportError as error:
        raise ImportError('synthetic voices need espeakng_loader; run `pip install "speechkd[bundled]"`') from error
    return str(espeakng_loader.get_library_path()), str(espeakng_loader.get_data_path())


def synthesize(text: str, speaker: Speaker, library_path: str, data_path: str) -> tuple[np.ndarray, int]:
    """Speak one text; the same arguments give the same samples, whatever was spoken before.

    espeak-ng carries the state of its flutter and its noise from one utterance to the next, even across
    espeak_Initialize. So the library is loaded anew each time, which takes about 3 ms, and its noise is seeded.

    Args:
        text: what to say, with its final punctuation.
        speaker: voice, speed and pitch.
        library_path: the shared library.
        data_path: the folder espeak-ng-data.

    Returns:
        Samples, (samples,), int16, and their rate in Hz.

    Raises:
        ValueError: espeak-ng cannot read its data, lacks the voice or gives no sound.
    """
    chunks: list[np.ndarray] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def keep_samples(samples: Any, count: int, _events: Any) -> int:
        if samples and count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    espeak = ctypes.CDLL(library_path)
    try:
        rate_hz = espeak.espeak_Initialize(SYNCHRONOUS_OUTPUT, 0, data_path.encode(), DONT_EXIT)
        if rate_hz <= 0:
            raise ValueError(
                f"espeak-ng cannot read its data in {data_path}; reinstall espeakng-loader, in a short path"
            )
        espeak.espeak_SetSynthCallback(keep_samples)
        espeak.espeak_ng_SetRandSeed(ctypes.c_long(1))
        if espeak.espeak_SetVoiceByName(VOICES[speaker.voice].encode()) != 0:
            raise ValueError(
                f"espeak-ng has no voice {VOICES[speaker.voice]!r} in {data_path}; upgrade espeakng-loader"
            )
        for parameter, value in (COMMON_SETTINGS | {RATE: speaker.words_per_minute, PITCH: speaker.pitch}).items():
            espeak.espeak_SetParameter(parameter, value, 0)
        encoded = text.encode() + b"\0"
        size = ctypes.c_size_t(len(encoded))
        espeak.espeak_Synth(encoded, size, 0, CHARACTER_POSITION, 0, CHARS_UTF8, None, None)
        espeak.espeak_Synchronize()
        espeak.espeak_Terminate()
    finally:
        _ctypes.dlclose(espeak._handle)
    if not chunks:
        raise ValueError(f"espeak-ng gave no sound for {text!r} in the voice {speaker.name}; reinstall espeakng-loader")
    return np.concatenate(chunks), rate_hz


def prepare_synthetic_commands(
    corpus_dir: str | Path | None, output_dir: str | Path, *, num_train: int = 120, num_test: int = 40, seed: int = 0
) -> dict[str, Any]:
    """Write train.jsonl and test.jsonl of synthetic speech: other sentences in each, by the same voices.

    The same arguments give the same bytes. Report no result on this data as a result on human speech.

    Args:
        corpus_dir: not used, for there is no corpus; may be None.
        output_dir: folder for the manifests and audio/, 16 kHz mono FLAC.
        num_train: training utterances, each of another sentence.
        num_test: test utterances.
        seed: of the choice of sentences and of who says them.

    Returns:
        Number of utterances and hours per split.

    Raises:
        ImportError: espeakng_loader is not installed.
        ValueError: the grammar has too few sentences.
    """
    chosen = choose_commands(num_train, num_test, seed)
    paths = espeak_paths()
    output_dir = require_output_dir(output_dir)
    (output_dir / "audio").mkdir(exist_ok=True)
    counts: dict[str, Any] = {}
    for split, commands in chosen.items():
        rows = []
        for index, command in enumerate(tqdm(commands, desc=f"synthetic {split}", unit="clip")):
            # one step further each round, or an intent would always have the same few speakers
            speaker = SPEAKERS[(seed + index + index // len(GRAMMAR)) % len(SPEAKERS)]
            mark = "?" if command.text.startswith(QUESTION_STARTS) else "."
            rows.append(_write(output_dir, f"{split}-{index:05d}", command, speaker, mark, paths))
        counts[split] = write_manifest(output_dir / f"{split}.jsonl", rows)
        counts[f"{split}_hours"] = round(sum(row["duration_seconds"] for row in rows) / 3600, 2)
    return counts


def _write(
    output_dir: Path, key: str, command: Command, speaker: Speaker, mark: str, paths: tuple[str, str]
) -> dict[str, Any]:
    samples, rate_hz = synthesize(command.text + mark, speaker, *paths)
    waveform = torchaudio.functional.resample(torch.from_numpy(samples).float() / 32768, rate_hz, SAMPLE_RATE_HZ)
    soundfile.write(output_dir / f"audio/{key}.flac", waveform.clamp(-1, 1).numpy(), SAMPLE_RATE_HZ, subtype="PCM_16")
    return {
        "id": key,
        "audio": f"audio/{key}.flac",
        "duration_seconds": len(waveform) / SAMPLE_RATE_HZ,
        "sample_rate_hz": SAMPLE_RATE_HZ,
        "text": command.text,
        "speaker": speaker.name,
        "language": "en",
        "intent": command.intent,
        "slots": [{"name": name, "value": value} for name, value in sorted(command.slots.items())],
    }


def main(argv: list[str] | None = None) -> None:
    parser = corpus_parser(__doc__)
    parser.add_argument("--num-train", type=int, default=120, help="training utterances (120)")
    parser.add_argument("--num-test", type=int, default=40, help="test utterances (40)")
    parser.add_argument("--seed", type=int, default=0, help="of sentences and speakers (0)")
    arguments = parser.parse_args(argv)
    numbers = {name: getattr(arguments, name) for name in ("num_train", "num_test", "seed")}
    report(lambda: prepare_synthetic_commands(arguments.corpus_dir, arguments.output_dir, **numbers), arguments.json)


if __name__ == "__main__":
    main()
