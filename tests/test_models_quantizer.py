import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from speechkd.models.quantizer import (
    Quantizer,
    QuantizerError,
    codes_per_byte,
    load_quantizer,
    pack_codes,
    quantizer_from_state_dict,
    save_quantizer,
    unpack_codes,
)
from speechkd.models.quantizer_fit import index_entropy_losses, training_terms

GRID_FRAMES = torch.tensor([[2.2, 0.9], [3.9, 11.6], [0.1, 2.4], [-1.0, 20.0]])


def grid_quantizer(skew=0.0):
    """Codebook 0 moves along x, codebook 1 along y and, with a skew, along x; the search starts at code 0."""
    quantizer = Quantizer(2, 2, 16)
    steps = torch.arange(16.0)
    with torch.no_grad():
        quantizer.to_logits.weight.zero_()
        quantizer.to_logits.bias.zero_()
        quantizer.centers[0] = torch.stack([steps, 0 * steps], dim=-1)
        quantizer.centers[1] = torch.stack([skew * steps, steps], dim=-1)
    return quantizer


def random_quantizer(dim=12, num_codebooks=4, codebook_size=16, seed=0):
    torch.manual_seed(seed)
    quantizer = Quantizer(dim, num_codebooks, codebook_size)
    with torch.no_grad():
        quantizer.centers.normal_()
        quantizer.refresh_id()
    return quantizer


@pytest.mark.parametrize("keep_current", [True, False])
def test_grid_values(keep_current):
    quantizer = grid_quantizer()
    codes = quantizer.search(GRID_FRAMES, 1, keep_current=keep_current)
    assert codes.tolist() == [[2, 1], [4, 12], [0, 2], [0, 15]]
    decoded = quantizer.decode(codes)
    assert (decoded - GRID_FRAMES).square().sum(dim=-1).tolist() == pytest.approx([0.05, 0.17, 0.17, 26.0], abs=1e-5)
    packed = quantizer.encode(GRID_FRAMES, 1, keep_current=keep_current)
    assert packed.dtype == torch.uint8 and packed.tolist() == [[18], [196], [32], [240]]
    assert quantizer.decode(packed).equal(decoded)
    assert quantizer.data_mean().tolist() == [7.5, 7.5]
    terms = training_terms(quantizer, GRID_FRAMES, codes)
    assert terms["reconstruction"].item() == pytest.approx(0.0642577, abs=1e-6)
    assert terms["log_prob"].item() == pytest.approx(math.log(16), abs=1e-6)
    assert terms["entropy"].item() == pytest.approx(0, abs=1e-6)
    assert index_entropy_losses(codes, 16).mean().item() == pytest.approx(0.5625, abs=1e-6)


@pytest.mark.parametrize("keep_current", [True, False])
def test_skewed_grid_finds_the_best_of_all_combinations(keep_current):
    quantizer = grid_quantizer(skew=0.5)
    codes = quantizer.search(GRID_FRAMES, 1, keep_current=keep_current)
    assert codes.tolist() == [[2, 1], [0, 11], [0, 2], [0, 15]]
    errors = (quantizer.decode(codes) - GRID_FRAMES).square().sum(dim=-1)
    assert errors.tolist() == pytest.approx([0.10, 2.92, 0.97, 97.25], abs=1e-4)


def test_start_of_the_search_scales_and_decoding_follow_their_formulas():
    quantizer = random_quantizer()
    frames = torch.randn(3, 5, 12)
    with torch.no_grad():
        quantizer.logits_scale.fill_(0.07)
        quantizer.centers_scale.fill_(-0.05)
    expected = frames * math.exp(0.7) @ quantizer.to_logits.weight.T + quantizer.to_logits.bias
    torch.testing.assert_close(quantizer.logits(frames), expected.view(3, 5, 4, 16))
    codes = quantizer.search(frames, 0)
    assert codes.equal(expected.view(3, 5, 4, 16).argmax(dim=-1))
    entries = math.exp(-0.5) * quantizer.centers
    summed = sum(entries[book, codes[..., book]] for book in range(4))
    torch.testing.assert_close(quantizer.decode(codes), summed)


def test_start_values_are_those_of_a_linear_layer_and_the_sizes_the_published_ones():
    quantizer = Quantizer(1280, 8)
    bound = 1 / math.sqrt(1280)
    for parameter in (quantizer.to_logits.weight, quantizer.to_logits.bias):
        assert 0.99 * bound < parameter.abs().max() <= bound
    assert quantizer.centers.flatten(0, 1).equal(quantizer.to_logits.weight)
    assert quantizer.logits_scale == 0 == quantizer.centers_scale
    sizes = [sum(p.numel() for p in model.parameters()) for model in (quantizer, Quantizer(1024, 16))]
    assert sizes == [5_244_930, 8_392_706]


def test_codes_have_the_promised_shape_and_type_and_do_not_depend_on_the_batch():
    quantizer = random_quantizer(8, 4, 256)
    frames = torch.randn(3, 7, 8)
    codes = quantizer.encode(frames)
    assert codes.shape == (3, 7, 4) and codes.dtype == torch.uint8
    assert quantizer.decode(codes).shape == (3, 7, 8)
    assert quantizer.encode(frames).equal(codes)
    for row in range(3):
        for frame in range(7):
            assert quantizer.encode(frames[row, frame]).equal(codes[row, frame])
    assert quantizer.encode(frames.half()).shape == (3, 7, 4)
    assert quantizer.encode(torch.empty(0, 8)).shape == (0, 4)
    assert quantizer.decode(torch.empty(0, 4, dtype=torch.uint8)).shape == (0, 8)


def test_autocast_changes_no_code_and_no_logit():
    quantizer = random_quantizer()
    frames = torch.randn(50, 12)
    codes, logits = quantizer.encode(frames), quantizer.logits(frames)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert quantizer.encode(frames).equal(codes) and quantizer.logits(frames).equal(logits)


def test_packing_of_four_codes_and_back():
    codes = torch.tensor([[3, 1, 2, 0]])
    assert pack_codes(codes, 4).tolist() == [[39]]
    assert unpack_codes(torch.tensor([[39]], dtype=torch.uint8), 4, 4).equal(codes)


@pytest.mark.parametrize("num_codebooks", [1, 2, 4, 8, 16])
@pytest.mark.parametrize(("codebook_size", "per_byte"), [(2, 8), (4, 4), (8, 2), (16, 2), (32, 1), (256, 1)])
def test_packing_loses_nothing(num_codebooks, codebook_size, per_byte):
    codes = torch.randint(codebook_size, (9, num_codebooks))
    codes[0] = codebook_size - 1
    packed = pack_codes(codes, codebook_size)
    assert packed.shape[1] == num_codebooks // min(num_codebooks, per_byte)
    assert codes_per_byte(num_codebooks, codebook_size) == min(num_codebooks, per_byte)
    assert unpack_codes(packed, num_codebooks, codebook_size).equal(codes)


@pytest.mark.parametrize(("dim", "num_codebooks", "ratio"), [(1024, 16, 256), (1280, 8, 640), (1280, 16, 320)])
def test_storage_ratio_and_bytes(dim, num_codebooks, ratio):
    quantizer = Quantizer(dim, num_codebooks)
    assert quantizer.storage_ratio == ratio and quantizer.bytes_per_frame == num_codebooks
    assert 300 * 3600 * 50 * Quantizer(2, 8).bytes_per_frame == 432_000_000
    assert Quantizer(dim, num_codebooks, 16).storage_ratio == 2 * ratio


def test_a_saved_quantizer_gives_the_same_codes(tmp_path):
    quantizer = random_quantizer()
    quantizer.source = {"teacher": {"name": "t", "weights_sha256": "ab"}, "layer": 3}
    save_quantizer(quantizer, tmp_path / "quantizer")
    loaded = load_quantizer(tmp_path / "quantizer")
    frames = torch.randn(40, 12)
    assert loaded.encode(frames).equal(quantizer.encode(frames)) and not loaded.training
    assert (loaded.id, loaded.source) == (quantizer.id, quantizer.source)


@pytest.mark.parametrize("file", ["quantizer.pt", "quantizer.safetensors"])
def test_a_state_dict_of_the_public_package_loads(tmp_path, file):
    quantizer = random_quantizer()
    weights = {
        "to_logits.weight": torch.randn(64, 12),
        "to_logits.bias": torch.randn(64),
        "centers": torch.randn(4, 16, 12),
        "logits_scale": torch.tensor(0.02),
        "centers_scale": torch.tensor(-0.03),
        "id_buf": torch.tensor(list(b"0a1b2c3d"), dtype=torch.uint8),
    }
    assert set(quantizer.state_dict()) == set(weights)
    (torch.save if file.endswith(".pt") else save_file)(weights, tmp_path / file)
    loaded = load_quantizer(tmp_path / file)
    assert loaded.id == "0a1b2c3d" and loaded.source is None
    assert all(loaded.state_dict()[name].equal(weights[name]) for name in weights)


def test_loading_leaves_the_random_numbers_of_the_caller_alone(tmp_path):
    save_quantizer(random_quantizer(), tmp_path)
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    load_quantizer(tmp_path)
    assert torch.randn(3).equal(expected)


def test_ids_name_the_weights():
    quantizer, same, other = random_quantizer(), random_quantizer(), random_quantizer(seed=1)
    assert re.fullmatch("[0-9a-f]{8}", quantizer.id)
    assert quantizer.id == same.id != other.id
    quantizer.check_id(same.id)
    with pytest.raises(QuantizerError, match=rf"the codes were made by quantizer {other.id}, but this is.* {same.id}"):
        same.check_id(other.id)


def test_weights_and_configuration_of_two_quantizers_are_refused(tmp_path):
    ours, other = random_quantizer(), random_quantizer(seed=1)
    save_quantizer(ours, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "id": other.id}))
    with pytest.raises(QuantizerError, match=rf"made by quantizer {other.id}, but this is quantizer {ours.id}"):
        load_quantizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "format_version": 9}))
    with pytest.raises(QuantizerError, match="has format 9, this version reads 1"):
        load_quantizer(tmp_path)


def test_files_that_are_no_quantizer_are_refused(tmp_path):
    with pytest.raises(QuantizerError, match="lacks config.json or model.safetensors; fit one with"):
        load_quantizer(tmp_path)
    (tmp_path / "broken.pt").write_bytes(b"not a state dict")
    with pytest.raises(QuantizerError, match=r"broken.pt cannot be read"):
        load_quantizer(tmp_path / "broken.pt")
    save_quantizer(random_quantizer(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    changes = [
        ({"centers": None}, "has no centers; give"),
        ({"centers": torch.zeros(4, 16)}, r"centers \(4, 16\), not \(codebooks, entries, dim\)"),
        ({"centers": torch.zeros(4, 12, 12)}, "codebook_size must be a power of two from 2 to 256, got 12"),
        (
            {"to_logits.bias": torch.zeros(63)},
            r"to_logits.bias is \(63,\), but with centers \(4, 16, 12\) it is \(64,\)",
        ),
        ({"centers_scale": torch.tensor(math.nan)}, "centers_scale holds NaN"),
        ({"id_buf": torch.zeros(8, dtype=torch.uint8)}, r"id_buf is \[0, 0, .* not the codes of eight hex"),
    ]
    for change, message in changes:
        changed = {name: tensor for name, tensor in (weights | change).items() if tensor is not None}
        with pytest.raises(QuantizerError, match=message):
            quantizer_from_state_dict(changed)


BAD_SIZES = [
    ((8, 3), "num_codebooks must be a power of two from 1 to 256, got 3; take 2"),
    ((8, 0), "num_codebooks must be a power of two from 1 to 256, got 0; take 1"),
    ((8, 4, 100), "codebook_size must be a power of two from 2 to 256, got 100; take 128"),
    ((8, 4, 512), "codebook_size must be a power of two from 2 to 256, got 512; take 256"),
    ((8, 4, 1), "codebook_size must be a power of two from 2 to 256, got 1; take 2"),
    ((0, 4), "dim must be 1 or more, got 0"),
]


@pytest.mark.parametrize(("sizes", "message"), BAD_SIZES)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(QuantizerError, match=message):
        Quantizer(*sizes)


def test_frames_and_codes_that_do_not_fit_are_refused():
    quantizer = random_quantizer()
    frames = torch.randn(2, 5, 12)
    with pytest.raises(QuantizerError, match=rf"frames are \(2, 5\), but quantizer {quantizer.id} takes \(..., 12\)"):
        quantizer.encode(frames[..., 0])
    frames[1, 2, 3], frames[1, 4, 0] = math.nan, math.inf
    with pytest.raises(QuantizerError, match="2 of 10 frames hold NaN or infinity, the first is frame 7"):
        quantizer.encode(frames)
    for codes in (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 4)):
        with pytest.raises(QuantizerError, match=rf"but quantizer {quantizer.id} has 4 codes in 2 bytes a frame"):
            quantizer.decode(codes)
    for wrong in (16, -100):
        with pytest.raises(QuantizerError, match=rf"code {wrong} is no entry of the 16 of quantizer {quantizer.id}"):
            quantizer.decode(torch.tensor([[0, 1, wrong, 2]]))
    with pytest.raises(QuantizerError, match="bytes of codes go up to 200, but 2 codes of 8 entries end at 63"):
        Quantizer(4, 2, 8).decode(torch.tensor([[200]], dtype=torch.uint8))
