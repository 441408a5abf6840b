"""Thousands of broken manifests and configurations: each is accepted, or refused by name and place."""

import contextlib
import copy
import io
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pytest
import yaml
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from train import DistilWhisperConfig

from speechkd.config import DataConfig, EvaluationConfig, TeacherConfig, parse_config
from speechkd.data.manifest import FIELDS, ManifestError, read_manifest

fuzz = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])

any_text = st.text(st.characters(exclude_categories=()), max_size=8)  # with lone surrogates and control characters
numbers = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**53 + 1, 2**63, 10**30, 10**400, -(10**400), 1e308, 5e-324]),
    st.floats(),  # with NaN and infinities
)
scalars = st.none() | st.booleans() | numbers | any_text
junk = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3), max_leaves=6
)

ROWS = [
    {
        "id": f"tone-{number}",
        "audio": f"{number}.wav",
        "duration_seconds": 1.5 + number,
        "sample_rate_hz": 16_000,
        "offset_seconds": 0.5,
        "text": "ein Ton ü",
        "speaker": "a",
        "dialect": "north",
        "language": "de",
        "intent": "play",
        "slots": [{"name": "pitch", "value": "high"}],
    }
    for number in range(3)
]
LONG_NAME = "n" * 5000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with three files that stand for recordings, and an Arrow cache of its own."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(3):
        (folder / f"{number}.wav").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("arrow"))
        datasets.disable_progress_bars()
        yield folder
        datasets.enable_progress_bars()


def read_or_refuse(path: Path) -> str | None:
    """The refusal; None after checking that what was accepted came back as it was written."""
    try:
        manifest = read_manifest(path)
    except ManifestError as error:
        message = str(error)
        # a problem has its file and line; an empty file has no line to name
        assert re.search(rf"^{re.escape(str(path))}:\d+: ", message, re.MULTILINE) or "holds no utterance" in message
        return message
    lines = [line for line in path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    for utterance, line in zip(manifest, lines, strict=True):
        written = json.loads(line)
        for name in {"duration_seconds", "offset_seconds"} & {key for key in written if written[key] is not None}:
            written[name] = float(written[name])  # Arrow holds no longer whole numbers
        assert {name: written.get(name) for name in FIELDS} == {**utterance, "audio": written["audio"]}
        assert 0 < utterance["duration_seconds"] < math.inf and 0 < utterance["sample_rate_hz"] <= 10**7
    return None


@st.composite
def rows_with_junk(draw):
    """Rows of which one is changed, and its line number."""
    rows = copy.deepcopy(ROWS)
    number = draw(st.integers(0, 2))
    row = rows[number]
    name = draw(st.sampled_from(list(FIELDS)))
    match draw(st.sampled_from(["set", "set", "set", "slot", "delete", "add", "replace", "repeat", "name"])):
        case "set":
            row[name] = draw(junk)
        case "slot":
            row["slots"] = [draw(junk | st.fixed_dictionaries({"name": scalars, "value": scalars}))]
        case "delete":
            del row[name]
        case "add":
            row[draw(any_text)] = draw(junk)
        case "replace":
            rows[number] = draw(junk)
        case "repeat":
            row["id"] = rows[number - 1]["id"]
        case "name":
            row["audio"] = draw(st.sampled_from(["", ".", "../0.wav", "\0", LONG_NAME, "a/" * 3000, "0.wav/1.wav"]))
    return rows, number + 1


@settings(fuzz, max_examples=1000)
@given(rows_with_junk())
def test_a_manifest_with_a_junk_row_is_read_or_refused_at_its_line(corpus, changed):
    rows, line = changed
    path = corpus / "junk.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    message = read_or_refuse(path)
    if message is not None:
        lines = {int(number) for number in re.findall(rf"^{re.escape(str(path))}:(\d+): ", message, re.MULTILINE)}
        assert lines in ({line}, {3})  # a repeated id is reported where it comes again
        assert lines == {line} or "repeats the id of line" in message


SPLICES = [b"\xef\xbb\xbf", b"\xff\xfe", b"\r\n", b"\r", b"\n\n", b"\x00", b"\xc3", b"NaN", b"1e999", b"-", b'"', b"\\"]
LONG_SPLICES = [b"[" * 100_000, b'{"a":' * 5000, b"9" * 5000, "\u2028\ufeff".encode(), b"\\ud800", b"\x1f\x85", b"}\n{"]


@st.composite
def damaged(draw, valid: bytes, splices: list[bytes]):
    """`valid` after one to three cuts, overwrites, splices or a change of its encoding or line ends."""
    content = valid
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        stop = min(len(content), start + draw(st.integers(0, 20)))
        splice = draw(st.binary(max_size=4) | st.sampled_from(splices))
        match draw(st.sampled_from(["cut", "truncate", "overwrite", "splice", "first", "again", "encoding", "crlf"])):
            case "cut":
                content = content[:start] + content[stop:]
            case "truncate":
                content = content[:start]
            case "overwrite":
                content = content[:start] + splice + content[stop:]
            case "splice":
                content = content[:start] + splice + content[start:]
            case "first":
                content = splice + content
            case "again":
                content += content[start:]
            case "encoding":
                content = content.decode("utf-8", "replace").encode(
                    draw(st.sampled_from(["utf-16", "latin-1"])), "replace"
                )
            case "crlf":
                content = content.replace(b"\n", b"\r\n")
    return content


MANIFEST = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


@settings(fuzz, max_examples=1000)
@given(damaged(MANIFEST, SPLICES + LONG_SPLICES))
def test_a_manifest_of_damaged_bytes_is_read_or_refused_with_file_and_line(corpus, content):
    path = corpus / "bytes.jsonl"
    path.write_bytes(content)
    read_or_refuse(path)


@pytest.mark.parametrize(
    "content",
    [
        MANIFEST,
        b"\xef\xbb\xbf" + MANIFEST,
        MANIFEST.replace(b"\n", b"\r\n"),
        b"\n \n" + MANIFEST.replace(b"\n", b"\n\n"),
    ],
    ids=["plain", "byte order mark", "carriage returns", "empty lines"],
)
def test_a_manifest_of_another_editor_is_read_whole(corpus, content):
    path = corpus / "editor.jsonl"
    path.write_bytes(content)
    assert read_or_refuse(path) is None
    assert read_manifest(path).ids == [row["id"] for row in ROWS]


@dataclass(kw_only=True)
class Sections:
    """The sections that recipes share; parsed in a fraction of the time of a whole recipe.

    Args:
        teacher: as in Distil-Whisper.
        data: as there.
        evaluation: as there.
    """

    teacher: TeacherConfig | None
    data: DataConfig
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


RECIPE = yaml.safe_load((ROOT / "recipes/distil_whisper/fsdd.yaml").read_text(encoding="utf-8"))
SHARED = {name: RECIPE[name] for name in ("teacher", "data", "evaluation")}


def parse_or_refuse(config_class: type, path: Path, *places: str) -> str | None:
    """The refusal, which must name one of `places`; None where the configuration was accepted."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            config, resolved = parse_config(config_class, ["--config", str(path)])
    except SystemExit as error:
        message = errors.getvalue()
        assert error.code == 2 and message.startswith("error: ") and any(place in message for place in places), message
        return message
    assert isinstance(config, config_class) and yaml.safe_load(resolved)["data"]
    return None


def spellings(key: object) -> tuple[str, str]:
    """A key as it is and as a message shows it."""
    return str(key), repr(key).strip("'\"")


@st.composite
def config_with_junk(draw, valid: dict):
    """A configuration of which one section or value is changed, and the keys that a refusal may name."""
    config = copy.deepcopy(valid)
    section = draw(st.sampled_from(list(config)))
    name = draw(st.sampled_from([*config[section], "batch_size", "max_wer", "language", "normalizer"]))
    match draw(st.sampled_from(["set", "set", "set", "delete", "add", "section", "delete section", "add section"])):
        case "set":
            config[section][name] = draw(junk)
        case "delete":
            config[section].pop(name, None)
        case "add":
            name = draw(scalars)
            config[section][name] = draw(junk)
        case "section":
            config[section] = draw(junk)
        case "delete section":
            del config[section]
        case "add section":
            section = name = draw(scalars)
            config[section] = draw(junk)
    return config, section, name


KEYS = [f"{section}.{name}" for section, values in RECIPE.items() for name in values]


@settings(fuzz, max_examples=1000)
@given(config_with_junk(SHARED))
def test_a_configuration_with_junk_is_accepted_or_refused_by_its_key(corpus, changed):
    config, section, name = changed
    path = corpus / "junk.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    parse_or_refuse(Sections, path, f"{path}:", *spellings(section), *spellings(name))


YAML_SPLICES = [
    b"&a [*a]",
    b"&a {b: *a}",
    b"!!python/object/apply:os.system [ls]",
    b"!!timestamp 2020-99-99",
    b"? [1]\n",
]
YAML_SPLICES += [
    b"<<: *x",
    b"%YAML 9.9\n",
    b"\n---\n",
    b"\t",
    b": ",
    b"{",
    b"- ",
    b"!!int x",
    b"!!binary 1",
    b"| \n",
    b"...",
]


@settings(fuzz, max_examples=1000)
@given(damaged(yaml.safe_dump(SHARED).encode(), SPLICES + LONG_SPLICES + YAML_SPLICES))
def test_a_configuration_of_damaged_bytes_is_accepted_or_refused_by_file_or_key(corpus, content):
    path = corpus / "bytes.yaml"
    path.write_bytes(content)
    parse_or_refuse(Sections, path, str(path), *KEYS, *SHARED)


@settings(fuzz, max_examples=20)
@given(config_with_junk(RECIPE))
def test_a_whole_recipe_with_junk_is_accepted_or_refused_by_its_key(corpus, changed):
    config, section, name = changed
    path = corpus / "recipe.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    parse_or_refuse(DistilWhisperConfig, path, f"{path}:", *spellings(section), *spellings(name))


@pytest.mark.parametrize("nesting", ["[", "- ", '{"a": '])
def test_endless_nesting_is_refused_and_crashes_no_parser(corpus, nesting):
    (corpus / "deep.yaml").write_text(f"data:\n  {nesting * 100_000}\n")
    assert "nested too deeply" in parse_or_refuse(Sections, corpus / "deep.yaml", "deep.yaml")
    (corpus / "deep.jsonl").write_text(nesting.strip() * 100_000 + "\n")
    assert "deep.jsonl:1: not JSON" in read_or_refuse(corpus / "deep.jsonl")


def test_aliases_that_expand_without_end_are_refused(corpus):
    levels = "\n".join(f"  l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 12))
    (corpus / "bomb.yaml").write_text(f"data:\n  l0: &l0 [x]\n{levels}\n")
    message = parse_or_refuse(Sections, corpus / "bomb.yaml", "data.l")
    assert "nested too deeply or repeated by aliases too often" in message


def test_a_key_that_is_given_twice_is_refused_instead_of_losing_one_value(corpus):
    (corpus / "twice.yaml").write_text("data:\n  num_workers: 1\n  num_workers: 2\n")
    assert "twice.yaml:2: data has the key 'num_workers' twice" in parse_or_refuse(
        Sections, corpus / "twice.yaml", "data"
    )
