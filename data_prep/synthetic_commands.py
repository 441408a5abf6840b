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
import torchaudio
from common import corpus_parser, report
from tqdm import tqdm

from speechkd.data.manifest import write_manifest
from speechkd.files import atomic_write

SAMPLE_RATE_HZ = 16_000
SYNCHRONOUS_OUTPUT, CHARS_UTF8, DONT_EXIT = 2, 1, 0x8000  # constants of espeak's speak_lib.h
TEST_PERCENT = 20  # share of the grammar's sentences that only the test manifest may use

# Names as in espeak-ng's folder lang/; it does not find British English under its language code.
VOICES = {
    "en-us": "gmw/en-US",
    "en-gb": "gmw/en",
    "en-gb-x-rp": "gmw/en-GB-x-rp",
    "en-gb-scotland": "gmw/en-GB-scotland",
    "en-029": "gmw/en-029",
    "en-us-nyc": "gmw/en-US-nyc",
    "gbclan": "gmw/en-GB-x-gbclan",
    "gbcwmd": "gmw/en-GB-x-gbcwmd",
    "en-us+f2": "gmw/en-US+f2",
    "en-us+f3": "gmw/en-US+f3",
    "en-us+m3": "gmw/en-US+m3",
    "en-us+m7": "gmw/en-US+m7",
    "en-us+Andrea": "gmw/en-US+Andrea",
    "en-us+linda": "gmw/en-US+linda",
    "en-gb+f2": "gmw/en+f2",
    "en-gb+m3": "gmw/en+m3",
    "en-us+Michael": "gmw/en-US+Michael",
    "en-us+klatt": "gmw/en-US+klatt",
}
PACES = ((135, 40), (150, 52), (165, 64))  # words per minute, espeak's pitch of 0 to 99

ROOMS = ["kitchen", "bedroom", "bathroom", "living room", "dining room", "garage", "office", "hallway"]
NUMBERS = ["ten", "fifteen", "twenty", "twenty five", "thirty", "forty", "fifty", "sixty", "seventy", "eighty"]
FOODS = ["pasta", "rice", "chicken", "potatoes", "bread", "soup", "pizza", "eggs"]
POLITE = ["", "please ", "could you ", "can you please "]

# intent: (templates, values of the slots in them); {polite} is no slot
GRAMMAR: dict[str, tuple[list[str], dict[str, list[str]]]] = {
    "switch_device": (
        ["{polite}turn {state} the {device} in the {room}", "{polite}switch the {device} in the {room} {state}"],
        {"state": ["on", "off"], "device": ["lights", "lamp", "fan", "heater", "television", "radio"], "room": ROOMS},
    ),
    "dim_lights": (
        [
            "{polite}dim the lights in the {room} to {percent} percent",
            "{polite}set the {room} lights to {percent} percent",
        ],
        {"room": ROOMS, "percent": NUMBERS},
    ),
    "set_temperature": (
        [
            "{polite}set the temperature in the {room} to {degrees} degrees",
            "{polite}heat the {room} to {degrees} degrees",
        ],
        {
            "room": ROOMS,
            "degrees": ["sixteen", "eighteen", "nineteen", "twenty", "twenty one", "twenty two", "twenty four"],
        },
    ),
    "set_timer": (
        [
            "{polite}set a timer for {minutes} minutes for the {food}",
            "{polite}remind me to check the {food} in {minutes} minutes",
        ],
        {"minutes": ["five", *NUMBERS[:7]], "food": FOODS},
    ),
    "set_alarm": (
        [
            "{polite}wake me up at {hour} in the morning on {day}",
            "{polite}set an alarm for {hour} in the morning on {day}",
        ],
        {
            "hour": ["five thirty", "six", "six thirty", "seven", "seven fifteen", "eight", "eight thirty", "nine"],
            "day": ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"],
        },
    ),
    "play_music": (
        [
            "{polite}play some {genre} music in the {room}",
            "{polite}play {genre} music for {minutes} minutes in the {room}",
        ],
        {"genre": ["jazz", "rock", "classical", "country", "dance", "piano"], "room": ROOMS, "minutes": NUMBERS[2:5]},
    ),
    "set_volume": (
        ["{polite}turn the volume in the {room} {direction} to {percent} percent"],
        {"room": ROOMS, "direction": ["up", "down"], "percent": NUMBERS},
    ),
    "use_oven": (
        [
            "{polite}heat the oven to {degrees} degrees for the {food}",
            "{polite}bake the {food} at {degrees} degrees for {minutes} minutes",
        ],
        {
            "degrees": ["one hundred and fifty", "one hundred and eighty", "two hundred", "two hundred and twenty"],
            "food": ["bread", "pizza", "potatoes", "chicken", "cake", "fish"],
            "minutes": NUMBERS[2:7],
        },
    ),
    "add_to_list": (
        ["{polite}add {item} and {other} to the {list} list"],
        {
            "item": ["milk", "butter", "cheese", "coffee", "sugar", "apples"],
            "other": ["bananas", "onions", "tomatoes", "orange juice", "flour", "salt", "chocolate"],
            "list": ["shopping", "kitchen", "weekend"],
        },
    ),
    "ask_weather": (
        ["what will the weather be like in {city} {day}", "will it {weather} in {city} {day}"],
        {
            "city": ["london", "paris", "new york", "chicago", "berlin", "boston", "sydney", "dublin"],
            "day": ["today", "tomorrow", "tonight", "this weekend", "on monday", "on friday", "on sunday"],
            "weather": ["rain", "snow"],
        },
    ),
}


class Speaker(NamedTuple):
    """One setting of the synthesizer, which stands in for a person."""

    voice: str
    words_per_minute: int
    pitch: int

    @property
    def name(self) -> str:
        return f"{self.voice}-{self.words_per_minute}wpm-pitch{self.pitch}"


SPEAKERS = [Speaker(voice, *pace) for voice in VOICES for pace in PACES]


class Command(NamedTuple):
    """A sentence with its meaning."""

    text: str
    intent: str
    slots: dict[str, str]


def all_commands() -> list[Command]:
    """Every sentence of the grammar once; intents take turns until the smaller ones run out."""
    by_intent = []
    for intent, (templates, values) in GRAMMAR.items():
        commands = {}
        for template in templates:
            names = [name for name in values if f"{{{name}}}" in template]
            openings = POLITE if "{polite}" in template else [""]
            for polite, *choice in product(openings, *(values[name] for name in names)):
                slots = dict(zip(names, choice, strict=True))
                text = template.format(polite=polite, **slots)
                commands[text] = Command(text, intent, slots)
        by_intent.append(sorted(commands.values(), key=lambda command: _hash(command.text)))
    return [command for turn in zip_longest(*by_intent) for command in turn if command is not None]


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
        raise ImportError('synthetic voices need espeak-ng; run `pip install "speechkd[bundled]"`') from error
    return str(espeakng_loader.get_library_path()), str(espeakng_loader.get_data_path())


def synthesize(text: str, speaker: Speaker, library_path: str, data_path: str) -> tuple[np.ndarray, int]:
    """Speak one sentence.

    The library is loaded anew for each sentence: its state outlives even espeak_Terminate, and a sentence would sound
    different after another one.

    Returns:
        Samples, (samples,), int16, and their rate in Hz.

    Raises:
        ValueError: this build of espeak-ng lacks the voice.
    """
    chunks: list[np.ndarray] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def keep(samples, count, _events):  # type: ignore[no-untyped-def]
        if samples and count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    espeak = ctypes.CDLL(library_path)
    rate_hz = espeak.espeak_Initialize(SYNCHRONOUS_OUTPUT, 0, data_path.encode(), DONT_EXIT)
    espeak.espeak_SetSynthCallback(keep)
    espeak.espeak_ng_SetRandSeed(ctypes.c_long(1))
    if espeak.espeak_SetVoiceByName(VOICES[speaker.voice].encode()) != 0:
        raise ValueError(f"espeak-ng has no voice {VOICES[speaker.voice]!r}; install espeakng-loader 0.2 or later")
    # espeak_PARAMETER: 1 rate, 2 volume, 3 pitch, 4 pitch range
    for parameter, value in ((1, speaker.words_per_minute), (2, 70), (3, speaker.pitch), (4, 50)):
        espeak.espeak_SetParameter(parameter, value, 0)
    encoded = text.encode() + b"\0"
    espeak.espeak_Synth(encoded, ctypes.c_size_t(len(encoded)), 0, 1, 0, CHARS_UTF8, None, None)
    espeak.espeak_Synchronize()
    espeak.espeak_Terminate()
    _ctypes.dlclose(espeak._handle)
    return np.concatenate(chunks), rate_hz


def prepare_synthetic_commands(
    corpus_dir: str | Path | None,
    output_dir: str | Path,
    *,
    num_train: int = 144,
    num_test: int = 48,
    seed: int = 0,
) -> dict[str, Any]:
    """Speak sentences into FLAC files and write train.jsonl and test.jsonl; no sentence is in both.

    Args:
        corpus_dir: not used; every corpus script has it.
        output_dir: folder for manifests and audio, 16 kHz mono.
        num_train: training utterances.
        num_test: test utterances, by the same voices.
        seed: of the choice of sentences and voices.

    Returns:
        Number of utterances per split and of voices.

    Raises:
        ValueError: more utterances are asked for than the grammar has sentences.
    """
    output_dir = Path(output_dir)
    commands = all_commands()
    pools = {
        "train": [command for command in commands if _hash(command.text) % 100 >= TEST_PERCENT],
        "test": [command for command in commands if _hash(command.text) % 100 < TEST_PERCENT],
    }
    paths = espeak_paths()
    counts: dict[str, Any] = {}
    for split, number in (("train", num_train), ("test", num_test)):
        pool = sorted(pools[split], key=lambda command: _hash(seed, command.text))
        if number > len(pool):
            raise ValueError(f"{number} {split} utterances are asked for, the grammar has {len(pool)} sentences for it")
        rows = []
        for index, command in enumerate(tqdm(pool[:number], desc=f"synthetic {split}", unit="clip")):
            speaker = SPEAKERS[(index + seed) % len(SPEAKERS)]
            rows.append(_utterance(output_dir, f"synthetic-{split}-{index:05d}", command, speaker, paths))
        counts[split] = write_manifest(output_dir / f"{split}.jsonl", rows)
    return {**counts, "voices": len(SPEAKERS)}


def _utterance(
    output_dir: Path, key: str, command: Command, speaker: Speaker, paths: tuple[str, str]
) -> dict[str, Any]:
    spoken, rate_hz = synthesize(command.text, speaker, *paths)
    samples = torchaudio.functional.resample(
        torch.from_numpy(spoken.astype(np.float32) / 32768), rate_hz, SAMPLE_RATE_HZ
    )
    path = output_dir / "audio" / f"{key}.flac"
    with atomic_write(path) as temporary:
        soundfile.write(temporary, samples.numpy(), SAMPLE_RATE_HZ, format="FLAC")
    return {
        "id": key,
        "audio": f"audio/{path.name}",
        "duration_seconds": len(samples) / SAMPLE_RATE_HZ,
        "sample_rate_hz": SAMPLE_RATE_HZ,
        "text": command.text,
        "speaker": speaker.name,
        "language": "en",
        "intent": command.intent,
        "slots": [{"name": name, "value": value} for name, value in command.slots.items()],
    }


def main(argv: list[str] | None = None) -> None:
    parser = corpus_parser(__doc__)
    parser.add_argument("--num-train", type=int, default=144, help="training utterances")
    parser.add_argument("--num-test", type=int, default=48, help="test utterances")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    report(
        lambda: prepare_synthetic_commands(
            arguments.corpus_dir,
            arguments.output_dir,
            num_train=arguments.num_train,
            num_test=arguments.num_test,
            seed=arguments.seed,
        ),
        arguments.json,
    )


if __name__ == "__main__":
    main()
