"""s3prl's DistilHuBERT files: names, both directions bit for bit, and what is refused."""

import argparse
import math

import pytest
import torch
from torch import nn
from transformers import HubertConfig, HubertModel

from speechkd.losses.layerwise import PredictionHeads
from speechkd.models.distilhubert import compact_encoder
from speechkd.models.s3prl_checkpoint import read_s3prl, write_s3prl

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
CONVOLUTIONS = {"conv_dim": [16] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
CLIPS = torch.randn(2, 2000, generator=torch.Generator().manual_seed(0))


def make_student(num_heads=3, **changes):
    torch.manual_seed(0)
    teacher = HubertModel(HubertConfig(**(SIZES | CONVOLUTIONS | {"num_hidden_layers": 4} | changes)))
    return compact_encoder(teacher, 2).eval(), PredictionHeads(32, 24, num_heads, inner_dim=20).eval()


class S3prlDistiller(nn.Module):
    """The shapes and names of s3prl's class, from its own modules of torch, as its checkpoint has them."""

    def __init__(self, heads, layer_norm=False):
        super().__init__()
        kernels = (10, 3, 3, 3, 3, 2, 2)
        self.feature_extractor = nn.Module()
        blocks = []
        for index, kernel in enumerate(kernels):
            block = [nn.Conv1d(1 if index == 0 else 16, 16, kernel, 2, bias=False), nn.Dropout(0.0)]
            if layer_norm:
                block.append(nn.Sequential(nn.Identity(), nn.LayerNorm(16)))
            elif index == 0:
                block.append(nn.GroupNorm(16, 16))
            blocks.append(nn.Sequential(*block))
        self.feature_extractor.conv_layers = nn.ModuleList(blocks)
        self.post_extract_proj = nn.Linear(16, 32)
        self.encoder = nn.Module()
        convolution = nn.Conv1d(32, 32, 16, padding=8, groups=2)
        with pytest.warns(FutureWarning):  # the old weight norm, with the old names
            self.encoder.pos_conv = nn.Sequential(nn.utils.weight_norm(convolution, dim=2), nn.Identity(), nn.GELU())
        self.encoder.layers = nn.ModuleList(self._block() for _ in range(2))
        self.encoder.layer_norm = nn.LayerNorm(32)
        last = nn.Module()
        if heads == 1:
            last.layer = nn.Linear(20, 24)
        else:
            last.weight = nn.Parameter(torch.randn(heads, 20, 24))
            last.bias = nn.Parameter(torch.randn(1, 1, heads, 24))
        self.output_layer = nn.Sequential(nn.Linear(32, 20 * heads), nn.GELU(), last)

    @staticmethod
    def _block():
        block = nn.Module()
        block.self_attn = nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(block.self_attn, name, nn.Linear(32, 32))
        block.self_attn_layer_norm, block.final_layer_norm = nn.LayerNorm(32), nn.LayerNorm(32)
        block.fc1, block.fc2 = nn.Linear(32, 48), nn.Linear(48, 32)
        return block


def make_checkpoint(path, heads=3, layer_norm=False, **changes):
    torch.manual_seed(1)
    model = S3prlDistiller(heads, layer_norm)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn_like(value))
    config = {
        "extractor_mode": "layer_norm" if layer_norm else "default",
        "extractor_conv_feature_layers": "[(16,10,5)] + [(16,3,2)] * 4 + [(16,2,2)] * 2",
        "feature_grad_mult": 0.1,
        "conv_pos": 16,
        "conv_pos_groups": 2,
        "encoder_layers": 2,
        "encoder_embed_dim": 32,
        "encoder_ffn_embed_dim": 48,
        "encoder_attention_heads": 2,
        "out_layer_inter_dim": 20,
        "final_dim": 24,
        "n_tasks": heads,
        "pred_layer_id": [4, 8, 12][:heads],
    }
    optimizer = torch.optim.AdamW(model.parameters()).state_dict()
    states = {"Distiller": model.state_dict(), "Config": {"distiller": config}, "Optimizer": optimizer, "Step": 7}
    torch.save(states | {"Args": argparse.Namespace(upstream="distiller")} | changes, path)
    return states["Distiller"]


def same_bits(left, right):
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key]) or left[key].dtype != right[key].dtype] == []


@pytest.mark.parametrize(("heads", "layer_norm"), [(3, False), (1, False), (2, True)])
def test_reading_and_writing_give_the_file_back_bit_for_bit(tmp_path, heads, layer_norm):
    weights = make_checkpoint(tmp_path / "theirs.ckpt", heads, layer_norm)
    read = read_s3prl(tmp_path / "theirs.ckpt")
    assert read.layers == [4, 8, 12][:heads] and read.feature_grad_mult == 0.1
    assert not read.encoder.training and not read.heads.training
    write_s3prl(tmp_path / "ours.ckpt", read.encoder, read.heads, read.layers)
    written = torch.load(tmp_path / "ours.ckpt", weights_only=True)
    same_bits(written["Distiller"], weights)
    again = read_s3prl(tmp_path / "ours.ckpt")
    same_bits(again.encoder.state_dict(), read.encoder.state_dict())
    same_bits(again.heads.state_dict(), read.heads.state_dict())


@pytest.mark.parametrize("changes", [{}, {"feat_extract_norm": "layer", "do_stable_layer_norm": True}])
def test_writing_and_reading_give_the_student_back(tmp_path, changes):
    encoder, heads = make_student(**changes)
    write_s3prl(tmp_path / "student.ckpt", encoder, heads, [1, 2, 4], feature_grad_mult=0.5)
    read = read_s3prl(tmp_path / "student.ckpt")
    same_bits(read.encoder.state_dict(), encoder.state_dict())
    same_bits(read.heads.state_dict(), heads.state_dict())
    assert read.layers == [1, 2, 4] and read.feature_grad_mult == 0.5
    with torch.no_grad():
        theirs, ours = (model(CLIPS, output_hidden_states=True).hidden_states for model in (read.encoder, encoder))
        assert torch.equal(theirs[-1], ours[-1]) and torch.equal(read.heads(theirs), heads(ours))


def test_the_heads_compute_what_s3prl_does(tmp_path):
    weights = make_checkpoint(tmp_path / "theirs.ckpt")
    states = torch.randn(2, 5, 32)
    # its split linear on (batch, frames, heads * 20): parts in order, then heads moved before the frames
    parts = nn.functional.gelu(states @ weights["output_layer.0.weight"].T + weights["output_layer.0.bias"])
    each = [
        parts[..., 20 * i : 20 * i + 20] @ weights["output_layer.2.weight"][i] + weights["output_layer.2.bias"][0, 0, i]
        for i in range(3)
    ]
    with torch.no_grad():
        predictions = read_s3prl(tmp_path / "theirs.ckpt").heads([states])
    torch.testing.assert_close(predictions, torch.stack(each, dim=1), rtol=1e-4, atol=1e-4)


def test_the_positional_convolution_is_the_same_function(tmp_path):
    make_checkpoint(tmp_path / "theirs.ckpt")
    torch.manual_seed(1)
    model = S3prlDistiller(3)
    model.load_state_dict(torch.load(tmp_path / "theirs.ckpt", weights_only=False)["Distiller"])
    read = read_s3prl(tmp_path / "theirs.ckpt")
    states = torch.randn(2, 9, 32)
    expected = nn.functional.gelu(model.encoder.pos_conv[0](states.transpose(1, 2))[..., :-1]).transpose(1, 2)
    torch.testing.assert_close(read.encoder.encoder.pos_conv_embed(states), expected, rtol=1e-4, atol=1e-4)


def test_a_vector_for_masked_frames_is_left_out(tmp_path):
    encoder, heads = make_student()
    config = HubertConfig(**(encoder.config.to_dict() | {"mask_time_prob": 0.05}))
    with_vector = HubertModel(config)
    with_vector.load_state_dict(encoder.state_dict(), strict=False)
    write_s3prl(tmp_path / "student.ckpt", with_vector, heads, [1, 2, 4])
    same_bits(read_s3prl(tmp_path / "student.ckpt").encoder.state_dict(), encoder.state_dict())


def rewrite(path, change):
    states = torch.load(path, weights_only=False)
    change(states)
    torch.save(states, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda states: states["Distiller"].pop("encoder.layers.1.fc1.weight"),
            r"missing encoder\.layers\.1\.fc1\.wei",
        ),
        (lambda states: states["Distiller"].update(mask_emb=torch.zeros(1)), "not known mask_emb"),
        (
            lambda states: states["Distiller"].update({"post_extract_proj.bias": torch.zeros(5)}),
            r"post_extract_proj\.bias is \(5,\), but its Config gives .* \(32,\)",
        ),
        (
            lambda states: states["Config"]["distiller"].update(task_emb_type="self-hidden"),
            "'self-hidden' has no count",
        ),
        (lambda states: states["Config"]["distiller"].update(attention_type="sparse"), "attention_type='sparse'"),
        (lambda states: states["Config"]["distiller"].update(pred_layer_id=[4]), r"n_tasks=3 heads, but .* \[4\]"),
        (lambda states: states["Config"]["distiller"].update(encoder_layers=3), "missing encoder.layers.2"),
        (
            lambda states: states["Config"]["distiller"].update(extractor_conv_feature_layers="__import__('os').name"),
            "is not of the form",
        ),
        (
            lambda states: states["Config"]["distiller"].update(extractor_conv_feature_layers="[(1,2,3)] * 10**9"),
            "is not of the form",
        ),
        (lambda states: states.pop("Distiller"), "lacks the dictionaries Distiller and Config"),
    ],
)
def test_checkpoints_of_another_kind_are_refused(tmp_path, change, message):
    make_checkpoint(tmp_path / "theirs.ckpt")
    rewrite(tmp_path / "theirs.ckpt", change)
    with pytest.raises(ValueError, match=message):
        read_s3prl(tmp_path / "theirs.ckpt")


def test_other_files_are_refused_and_no_code_is_run(tmp_path):
    with pytest.raises(ValueError, match="cannot be opened"):
        read_s3prl(tmp_path / "none.ckpt")
    (tmp_path / "text.ckpt").write_text("no checkpoint", encoding="utf-8")
    with pytest.raises(ValueError, match="is not read as an s3prl checkpoint"):
        read_s3prl(tmp_path / "text.ckpt")
    make_checkpoint(tmp_path / "code.ckpt", Schedule=math.sqrt)
    with pytest.raises(ValueError, match="holds Python objects"):
        read_s3prl(tmp_path / "code.ckpt")
    torch.save([1], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="it has list"):
        read_s3prl(tmp_path / "list.ckpt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feat_proj_layer_norm": True}, "cannot express feat_proj_layer_norm=True, only False"),
        ({"conv_bias": True}, "cannot express conv_bias=True"),
        ({"layer_norm_eps": 1e-6}, "cannot express layer_norm_eps=1e-06"),
        ({"conv_dim": [32] * 7}, "has no projection where"),
    ],
)
def test_what_s3prl_cannot_express_is_refused(tmp_path, changes, message):
    _, heads = make_student()
    encoder = HubertModel(HubertConfig(**(SIZES | CONVOLUTIONS | {"feat_proj_layer_norm": False} | changes)))
    with pytest.raises(ValueError, match=message):
        write_s3prl(tmp_path / "student.ckpt", encoder, heads, [1, 2, 4])
    assert not list(tmp_path.iterdir())


def test_layers_as_many_as_heads(tmp_path):
    encoder, heads = make_student()
    with pytest.raises(ValueError, match=r"layers \[1, 2\] do not fit 3 heads"):
        write_s3prl(tmp_path / "student.ckpt", encoder, heads, [1, 2])
