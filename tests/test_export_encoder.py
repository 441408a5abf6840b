"""Exports of speech encoders: one graph for any batch and length, equal states, and what is refused by name."""

import copy
import json
import shutil
import sys
import zipfile

import pytest
import torch
import torch.nn.functional as F
from conftest import write_tone
from transformers import (
    AutoFeatureExtractor,
    AutoModel,
    HubertConfig,
    HubertForCTC,
    HubertModel,
    Wav2Vec2BertConfig,
    Wav2Vec2BertModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperModel,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from speechkd.data.audio import load_audio
from speechkd.data.features import padding_mask
from speechkd.data.manifest import write_manifest
from speechkd.export import encoder as encoder_export
from speechkd.export import encoder_runtime
from speechkd.export.encoder import export_encoder, without_parametrizations
from speechkd.export.encoder_runtime import EncoderInput, is_encoder, load_encoder_runner
from speechkd.models.encoder_extraction import EncoderMasks, prune_encoder
from speechkd.models.encoder_inputs import EncoderInputs
from speechkd.models.speech_encoders import load_encoder, save_encoder

needs_onnx = [pytest.importorskip(name, exc_type=ImportError) for name in ("onnx", "onnxscript", "onnxruntime")]
onnx = needs_onnx[0]

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
POSITIONS = {"num_conv_pos_embedding_groups": 2, "num_conv_pos_embeddings": 16}
SEVEN = {"conv_dim": [16] * 7} | POSITIONS  # frames as of the real ones
THREE = {"conv_dim": [16] * 3, "conv_kernel": [10, 3, 3], "conv_stride": [5, 4, 4]} | POSITIONS  # faster to trace
STABLE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
WHISPER = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 48}
WINDOW = {"max_source_positions": 100}  # 2 s
ENCODERS = {
    "hubert": lambda: HubertModel(HubertConfig(**SIZES, **SEVEN, feat_proj_layer_norm=False)),
    "wav2vec2": lambda: Wav2Vec2Model(Wav2Vec2Config(**SIZES, **THREE, **STABLE)),
    "wavlm": lambda: WavLMModel(WavLMConfig(**SIZES, **THREE, num_buckets=32, max_bucket_distance=40)),
    "whisper": lambda: WhisperEncoder(WhisperConfig(**WHISPER, **WINDOW)),
}
SHAPES = ((1, 16_000), (3, 23_456), (2, 1_200))


def make_encoder(kind):
    torch.manual_seed(0)
    return ENCODERS[kind]().eval()


@pytest.fixture(scope="module")
def pruned():
    """A HuBERT that lost a head, channels and feed-forward units."""
    masks = EncoderMasks(
        conv=[torch.ones(16), (torch.arange(16) < 12).float(), *[torch.ones(16)] * 5],
        heads=[torch.tensor([1.0, 0.0])],
        ffn_units=[(torch.arange(48) < 20).float()],
        attention=torch.ones(1),
        ffn=torch.ones(1),
    )
    return prune_encoder(make_encoder("hubert"), masks)


@pytest.fixture(scope="module")
def sources(pruned, tmp_path_factory):
    """Folders of tiny random encoders by kind."""
    root = tmp_path_factory.mktemp("sources")
    for kind in ENCODERS:
        save_encoder(make_encoder(kind), root / kind, normalize_input=kind == "wav2vec2")
    pruned.save_pretrained(root / "pruned")
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(root / "pruned")
    return {kind: str(root / kind) for kind in (*ENCODERS, "pruned")}


@pytest.fixture(scope="module")
def exported(sources, tmp_path_factory):
    """Folders of exports by kind, format and precision, each made once; both precisions share what was traced."""
    root, graphs, trace = tmp_path_factory.mktemp("exports"), {}, encoder_export._to_onnx

    def traced_once(module, *rest):
        kind = type(module.encoder)
        if kind not in graphs:
            graphs[kind] = trace(module, *rest)
        return copy.deepcopy(graphs[kind])

    def export(kind, format_name, precision="float32"):
        folder = root / f"{kind}-{format_name}-{precision}"
        if not folder.exists():
            export_encoder(sources[kind], folder, format_name, precision)
        return folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder_export, "_to_onnx", traced_once)
        yield export


def make_clips(batch, length, shortest=400):
    """Waveforms that get shorter from row to row, and their mask."""
    lengths = (length * torch.arange(batch, 0, -1) // batch).clamp(min=shortest)
    waveforms = 0.1 * torch.randn(batch, length, generator=torch.Generator().manual_seed(length + 1))
    mask = padding_mask(lengths, waveforms)
    return waveforms * mask, mask


@torch.no_grad()
def valid_states(folder, run, waveforms, mask):
    """States of the valid frames by a runner and by stock transformers, each (frames, dim)."""
    stock = load_encoder(folder)[0]
    expected = stock(waveforms, attention_mask=mask.long()).last_hidden_state
    frames = padding_mask(stock._get_feat_extract_output_lengths(mask.sum(dim=-1)), expected[..., 0])
    return run(waveforms, mask)[frames], expected[frames]


def log_mel(batch, length):
    return torch.randn(batch, 80, length, generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("kind", ["hubert", "wav2vec2", "wavlm"])
def test_one_onnx_graph_gives_pytorchs_states_at_any_batch_and_length(kind, sources, exported):
    folder = exported(kind, "onnx")
    run = load_encoder_runner(str(folder))
    for batch, length in SHAPES:
        found, expected = valid_states(sources[kind], run, *make_clips(batch, length))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    onnx.checker.check_model(folder / "model.onnx")
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    assert [value.name for value in graph.input] == ["input_values", "attention_mask"]
    assert [value.name for value in graph.output] == ["last_hidden_state"]
    for value in graph.input:
        assert [axis.dim_param for axis in value.type.tensor_type.shape.dim] == ["batch_size", "num_samples"]
    assert not any(node.metadata_props for node in graph.node)


@pytest.mark.parametrize("kind", ["hubert", "wavlm"])
def test_int8_has_small_linear_layers_and_states_that_point_the_same_way(kind, sources, exported):
    folder = exported(kind, "onnx", "int8")
    run = load_encoder_runner(str(folder))
    for shape in SHAPES:
        found, expected = valid_states(sources[kind], run, *make_clips(*shape))
        assert F.cosine_similarity(found, expected, dim=-1).mean() > 0.99
        assert not torch.equal(found, expected)
    graph = onnx.load(folder / "model.onnx").graph
    operators = [node.op_type for node in graph.node]
    linear = sum(isinstance(module, torch.nn.Linear) for module in make_encoder(kind).modules())
    assert operators.count("MatMulInteger") == linear and "Gemm" not in operators
    assert "Conv" in operators and "ConvInteger" not in operators
    parameters = load_encoder_runner(sources[kind]).parameters
    assert (folder / "model.onnx_data").stat().st_size < 4 * parameters + 4096 * len(graph.initializer)
    content = json.loads((folder / "export.json").read_text())
    assert content["precision"] == "int8" and content["parameters"] == parameters
    assert {row["batch"] for row in content["parity"]} == {1, 2, 3}


def test_a_torch_export_program_gives_the_states_of_a_pruned_encoder_too(pruned, sources, exported, tmp_path):
    folder = exported("pruned", "torch_export")
    run = load_encoder_runner(str(folder))
    for batch, length in (*SHAPES, (1, 720), (5, 3_000)):
        found, expected = valid_states(sources["pruned"], run, *make_clips(batch, length, shortest=720))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="clip 0 of the batch has 719 samples, but this encoder needs 720; leave"):
        run(torch.zeros(1, 719))
    files = {"config.json", "preprocessor_config.json", "export.json", "model.pt2"}
    assert {path.name for path in folder.iterdir()} == files
    content = json.loads((folder / "export.json").read_text())
    assert content["normalize_input"] and content["parameters"] == pruned.num_parameters() == run.parameters
    with zipfile.ZipFile(folder / "model.pt2") as archive:
        assert b"site-packages" not in archive.read("model/models/model.json")
    with pytest.raises(ValueError, match="the encoder is pruned; save the PrunedEncoderModel"):
        export_encoder(pruned, tmp_path / "huggingface", "huggingface")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format_name", ["onnx", "torch_export"])
def test_a_whisper_export_takes_any_length_up_to_the_window(format_name, sources, exported):
    run = load_encoder_runner(str(exported("whisper", format_name)))
    whole, one_second = load_encoder(sources["whisper"])[0], load_encoder(sources["whisper"], window_seconds=1)[0]
    assert (run.input.longest, run.shortest) == (200, 3 if format_name == "torch_export" else 1)
    with torch.no_grad():
        for batch, encoder, length in ((1, whole, 200), (3, whole, 200), (2, one_second, 100)):
            features = log_mel(batch, length)
            torch.testing.assert_close(run(features), encoder(features).last_hidden_state, atol=1e-4, rtol=0)
    for length in (run.shortest, 7, 147):
        assert run(log_mel(2, length)).shape == (2, (length + 1) // 2, 32)
    with pytest.raises(ValueError, match="have 201 log-mel frames, and the encoder has positions for 200"):
        run(log_mel(1, 201))
    with pytest.raises(ValueError, match=r"\(1, 79, 10\), the encoder takes \(batch, 80, frames\)"):
        run(torch.zeros(1, 79, 10))
    with pytest.raises(ValueError, match="Whisper takes no mask"):
        run(log_mel(1, 10), torch.arange(10)[None] < 5)


@pytest.mark.parametrize("kind", ["wav2vec2", "whisper"])
def test_the_hugging_face_folder_loads_in_stock_transformers_with_equal_states(kind, sources, exported):
    folder = exported(kind, "huggingface")
    first, second = AutoModel.from_pretrained(sources[kind]).eval(), AutoModel.from_pretrained(folder).eval()
    if kind == "whisper":
        assert second.config.decoder_layers == 0
        first, second = first.encoder, second.encoder
        inputs = log_mel(1, 200)
    else:
        assert AutoFeatureExtractor.from_pretrained(folder).do_normalize
        assert json.loads((folder / "export.json").read_text())["normalize_input"]
        inputs = make_clips(1, 4_000)[0]
    with torch.no_grad():
        expected = first(inputs).last_hidden_state
        assert torch.equal(second(inputs).last_hidden_state, expected)
        assert torch.equal(load_encoder_runner(str(folder))(inputs), expected)


def test_the_shortest_clip_is_one_frame_and_a_shorter_one_is_named(sources, exported):
    clips, mask = make_clips(2, 16_000)
    mask[1], clips[1] = torch.arange(16_000) < 399, clips[1] * (torch.arange(16_000) < 399)
    for name in (sources["hubert"], str(exported("hubert", "onnx"))):
        run = load_encoder_runner(name)
        assert run.shortest == 400 and run(torch.zeros(1, 400)).shape == (1, 1, 32)
        with pytest.raises(ValueError, match="clip 0 of the batch has 399 samples, but this encoder needs 400; leave"):
            run(torch.zeros(1, 399))
        with pytest.raises(ValueError, match="clip 1 of the batch has 399 samples"):
            run(clips, mask)
        with pytest.raises(ValueError, match=r"mask is \(2, 16000\) of torch.int64.*torch.bool"):
            run(clips, mask.long())
        with pytest.raises(ValueError, match=r"input_values are \(16000,\), the encoder takes \(batch, samples\)"):
            run(clips[0])


def test_frames_are_those_of_the_convolutions():
    spec = EncoderInput.for_model(HubertModel(HubertConfig(**SIZES, **POSITIONS)))
    lengths = torch.tensor([400, 719, 720, 3_200, 16_000, 250_000])
    assert spec.num_frames(lengths).tolist() == [1, 1, 2, 9, 49, 781]
    assert (spec.shortest(1), spec.shortest(2)) == (400, 720)


def test_taking_the_parametrization_out_leaves_states_and_original_as_they_were():
    encoder, (clips, _) = make_encoder("hubert"), make_clips(2, 4_000)
    with torch.no_grad():
        before = encoder(clips).last_hidden_state
        plain = without_parametrizations(encoder)
        torch.testing.assert_close(plain(clips).last_hidden_state, before, atol=1e-6, rtol=0)
        assert torch.equal(encoder(clips).last_hidden_state, before)
    assert "encoder.pos_conv_embed.conv.weight" in plain.state_dict()
    assert "encoder.pos_conv_embed.conv.parametrizations.weight.original0" in encoder.state_dict()
    assert plain.num_parameters() == encoder.num_parameters() - 16  # one gain for each tap


@pytest.mark.parametrize(
    ("format_name", "precision", "message"),
    [
        ("ggml", "float32", "no format 'ggml'; choose one of huggingface, onnx, torch_export"),
        ("onnx", "float16", "onnx has no precision 'float16' for encoders; choose one of float32, int8"),
        ("torch_export", "int8", "torch_export has no precision 'int8' for encoders; choose one of float32"),
    ],
)
def test_unknown_formats_and_precisions_are_refused(format_name, precision, message, sources, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_encoder(sources["hubert"], tmp_path / "out", format_name, precision)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["wav2vec2", "whisper"])
def test_states_are_compared_on_real_clips_too(kind, sources, tmp_path):
    rows = []
    for index, seconds in enumerate((0.4, 2.5, 0.7)):
        write_tone(tmp_path / f"{index}.wav", seconds)
        rows.append({"id": str(index), "audio": f"{index}.wav", "duration_seconds": seconds, "sample_rate_hz": 16_000})
    manifest = tmp_path / "clips.jsonl"
    write_manifest(manifest, rows)
    export = export_encoder(sources[kind], tmp_path / "onnx", "onnx", "int8", manifest_path=manifest, max_clips=2)
    parity = export["parity"][-1]
    assert parity["clips"] == (2 if kind == "wav2vec2" else 1)  # this Whisper hears 2 s
    assert 0.99 < parity["mean_cosine"] < 1.0

    encoder, normalizes = load_encoder(sources[kind])
    waveform = load_audio(tmp_path / "0.wav", 16_000)[None]
    (values,) = EncoderInputs(encoder, normalize_input=normalizes)(waveform, torch.tensor([6400])).values()
    runners = [load_encoder_runner(str(folder)) for folder in (sources[kind], tmp_path / "onnx")]
    expected, found = (runner(values)[0, :20] for runner in runners)
    assert parity["max_difference"] >= (found - expected).abs().max() > 0
    with pytest.raises(ValueError, match="max_clips must be 1 or more, got 0"):
        export_encoder(sources[kind], tmp_path / "none", "onnx", manifest_path=manifest, max_clips=0)


def test_a_full_folder_and_an_export_of_an_export_are_refused(sources, exported, tmp_path):
    (tmp_path / "precious").touch()
    with pytest.raises(ValueError, match="is not empty; choose another one or remove it"):
        export_encoder(sources["hubert"], tmp_path, "huggingface")
    with pytest.raises(ValueError, match="is an export already; give the Hugging Face folder"):
        export_encoder(str(exported("hubert", "onnx")), tmp_path / "out", "torch_export")
    assert {path.name for path in tmp_path.iterdir()} == {"precious"}


def test_what_is_no_such_encoder_is_refused_with_what_it_is(tmp_path):
    bert = Wav2Vec2BertModel(Wav2Vec2BertConfig(**SIZES))
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
    small = {"vocab_size": 9, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 8}
    with_head = HubertForCTC(HubertConfig(**SIZES, **THREE))
    with_adapter = Wav2Vec2Model(Wav2Vec2Config(**SIZES, **THREE, add_adapter=True))
    for model, message in (
        (bert, "type 'wav2vec2-bert' takes input_features, and exports are for waveforms and Whisper's log-mel"),
        (WhisperModel(WhisperConfig(**WHISPER, **WINDOW, **small, **tokens)), "encoder fits, got WhisperModel"),
        (with_head, "HubertForCTC has a head around its encoder; give its base_model"),
        (with_adapter, "has an adapter that shortens its output"),
    ):
        with pytest.raises(ValueError, match=message):
            export_encoder(model, tmp_path / "out", "huggingface")
    assert not list(tmp_path.iterdir())


def test_a_run_that_fails_leaves_no_folder(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(encoder_export, "MAX_FLOAT32_DIFFERENCE", -1.0)
    with pytest.raises(ValueError, match="huggingface float32 on 1 clips of 16000 samples: states differ"):
        export_encoder(sources["hubert"], tmp_path / "out", "huggingface")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("library", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_library_is_named_with_the_extra_that_brings_it(library, sources, exported, tmp_path, monkeypatch):
    folder = str(exported("hubert", "onnx"))
    monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
    message = rf"{library}, which is not installed; pip install \"speechkd\[export\]\""
    with pytest.raises(ValueError, match=message):
        export_encoder(sources["hubert"], tmp_path / "out", "onnx")
    if library == "onnxruntime":
        with pytest.raises(ValueError, match=message):
            load_encoder_runner(folder)


def test_graphs_are_neither_compiled_nor_moved_and_other_folders_are_no_encoders(exported, tmp_path):
    folder = exported("hubert", "onnx")
    with pytest.raises(ValueError, match="is in the format onnx, which torch.compile does not run; give a Hugging"):
        load_encoder_runner(str(folder), compiled=True)
    with pytest.raises(ValueError, match="is in the format onnx, which cuda does not run"):
        load_encoder_runner(str(folder), device="cuda")
    (tmp_path / "export.json").write_text('{"format": "ctranslate2"}')
    with pytest.raises(ValueError, match="is no encoder that `export_encoder` wrote"):
        load_encoder_runner(str(tmp_path))
    for name in ("export.json", "config.json"):
        shutil.copy(folder / name, tmp_path)
    with pytest.raises(ValueError, match="model.onnx does not exist; export the encoder anew"):
        load_encoder_runner(str(tmp_path))
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ValueError, match="ONNX Runtime .* cannot run .*model.onnx"):
        load_encoder_runner(str(tmp_path))


def test_a_compiled_encoder_gives_the_same_states_at_any_length(sources, monkeypatch):
    compile_module = torch.compile  # all of it but the C++, which takes a minute
    monkeypatch.setattr(torch, "compile", lambda module, **options: compile_module(module, backend="eager", **options))
    run, plain = load_encoder_runner(sources["whisper"], compiled=True), load_encoder_runner(sources["whisper"])
    for batch, length in ((1, 100), (3, 147), (2, 8), (1, 200)):
        features = log_mel(batch, length)
        torch.testing.assert_close(run(features), plain(features), atol=1e-5, rtol=0)


def test_a_compiler_that_fails_is_named_with_the_way_out(sources, monkeypatch):
    def failing(module, **options):
        def run(*inputs):
            raise RuntimeError("no g++")

        return run

    monkeypatch.setattr(encoder_runtime.torch, "compile", failing)
    with pytest.raises(ValueError, match=r"torch.compile cannot run .*: no g\+\+; install a C\+\+ compiler"):
        load_encoder_runner(sources["hubert"], compiled=True)


def test_encoders_are_told_from_whispers_that_have_a_decoder(sources, exported, tiny_teacher, tmp_path):
    assert is_encoder(sources["hubert"]) and is_encoder(sources["whisper"]) and not is_encoder(tiny_teacher)
    assert is_encoder(str(exported("hubert", "onnx"))) and is_encoder(str(exported("whisper", "huggingface")))
    (tmp_path / "export.json").write_text('{"format": "onnx"}')  # of a whole Whisper
    assert not is_encoder(str(tmp_path))
    with pytest.raises(ValueError, match="does not exist"):
        is_encoder(str(tmp_path / "missing"))
