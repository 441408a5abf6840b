import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from speechkd.models.llava import build_llava, num_visual_tokens
from speechkd.models.open_clip_tower import clip_vision_model, load_open_clip_tower

open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed: speechkd[open_clip]")


def add_model(folder, name, vision, **more):
    text = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    (folder / f"{name}.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text, **more}))
    open_clip.add_model_config(folder)


VISION = {"image_size": 36, "patch_size": 12, "width": 32, "layers": 3, "head_width": 16, "mlp_ratio": 2.0}


@pytest.mark.parametrize("quick", [False, True])
def test_a_small_custom_tower_gives_the_states_of_open_clip(tmp_path, quick):
    add_model(tmp_path, f"tiny-shapes-{quick}", {**VISION, "output_tokens": True}, quick_gelu=quick)
    torch.manual_seed(0)
    visual = open_clip.create_model(f"tiny-shapes-{quick}").visual.eval()
    with torch.no_grad():
        for weight in visual.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    tower = clip_vision_model(visual)
    pixels = torch.randn(2, 3, 36, 36)
    pooled, patches = visual(pixels)
    ours = tower(pixels, output_hidden_states=True)
    torch.testing.assert_close(ours.pooler_output @ visual.proj, pooled, atol=1e-5, rtol=1e-4)
    normed = tower.post_layernorm(ours.hidden_states[-1][:, 1:])  # open_clip norms its tokens, LLaVA does not
    torch.testing.assert_close(normed, patches, atol=1e-5, rtol=1e-4)


def test_a_tower_by_name_becomes_the_eyes_of_a_llava(tmp_path):
    add_model(tmp_path, "tiny-named", VISION)
    tower, pictures = load_open_clip_tower("open_clip:tiny-named")
    assert pictures.size["height"] == 36 and len(pictures.image_mean) == 3
    decoder = LlamaForCausalLM(
        LlamaConfig(vocab_size=44, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    assert num_visual_tokens(build_llava(tower, decoder, image_token_id=2)) == 9


def test_towers_that_clip_cannot_be_are_refused(tmp_path):
    with pytest.raises(ValueError, match="open_clip:no-such: open_clip cannot make it"):
        load_open_clip_tower("open_clip:no-such")
    add_model(tmp_path, "tiny-pooling", {**VISION, "attentional_pool": True, "attn_pooler_heads": 2})
    with pytest.raises(ValueError, match="or one with attention pooling, which CLIPVisionModel cannot be"):
        load_open_clip_tower("open_clip:tiny-pooling")
    add_model(tmp_path, "tiny-scales", {**VISION, "ls_init_value": 0.1})
    with pytest.raises(ValueError, match="has other weights than a CLIPVisionModel, first .*ls_1"):
        load_open_clip_tower("open_clip:tiny-scales")
