import subprocess
import sys
from functools import partial

import pytest
import torch
from llava_models import IMAGE_TOKEN, drawn_task, tiny_llava, tiny_processor
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from speechkd.data.conversations import read_conversations
from speechkd.data.visual_sequences import SequenceFormat, collate, encode
from speechkd.models.llava import (
    build_llava,
    check_pair,
    decoder_states,
    load_llava,
    load_vision_tower,
    num_visual_tokens,
    save_llava,
    train_only,
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return read_conversations(drawn_task(tmp_path_factory.mktemp("shapes")) / "train.jsonl")


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


def make_batch(model, rows, **options):
    form = SequenceFormat(processor=tiny_processor(model), num_visual_tokens=num_visual_tokens(model), **options)
    return collate([encode(row, form) for row in rows], form=form)


def test_a_model_has_as_many_visual_tokens_as_patches(model):
    assert num_visual_tokens(model) == 9 == model.config.image_seq_length
    assert num_visual_tokens(tiny_llava(patch_size=9)) == 16
    projector = model.model.multi_modal_projector
    assert projector.linear_1.weight.shape == (16, 16) and projector.linear_2.weight.shape == (16, 16)


def test_a_saved_model_is_a_stock_llava(model, rows, tmp_path):
    save_llava(model, tiny_processor(model), tmp_path / "model")
    row = rows[0]
    torch.save([row["image"], row["conversation"][0]["value"]], tmp_path / "input.pt")
    code = (
        "import sys, torch\n"
        "from PIL import Image\n"
        "from transformers import AutoProcessor, LlavaForConditionalGeneration\n"
        "model = LlavaForConditionalGeneration.from_pretrained(sys.argv[1])\n"
        "processor = AutoProcessor.from_pretrained(sys.argv[1])\n"
        "image, text = torch.load(sys.argv[2], weights_only=True)\n"
        "inputs = processor(images=Image.open(image), text=text, return_tensors='pt')\n"
        "torch.save(model(**inputs).logits.detach(), sys.argv[3])\n"
        "model.generate(**inputs, max_new_tokens=3)\n"
        "assert 'speechkd' not in sys.modules"
    )
    files = [str(tmp_path / name) for name in ("model", "input.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", code, *files], check=True, cwd=tmp_path)
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    batch = make_batch(model, [{**row, "conversation": row["conversation"][:2], "kinds": None}])
    ours = model.lm_head(decoder_states(model, batch).last)
    torch.testing.assert_close(ours[:, : logits.shape[1]], logits, atol=1e-5, rtol=1e-4)


def test_a_stock_llava_is_loaded_as_it_is(model, tmp_path):
    save_llava(model, tiny_processor(model), tmp_path)
    loaded, processor = load_llava(str(tmp_path))
    assert processor.image_token_id == IMAGE_TOKEN and not loaded.training
    for name, weight in model.state_dict().items():
        assert loaded.state_dict()[name].equal(weight), name
    check_pair(loaded, model)


def test_a_model_that_is_no_llava_or_lacks_weights_is_refused(model, tmp_path):
    config = LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8, intermediate_size=8)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="is of type 'llama', but this needs 'llava'"):
        load_llava(str(tmp_path / "llama"))
    with pytest.raises(ValueError, match="is neither an existing folder nor a Hub id"):
        load_llava("no such model")
    state = {name: weight for name, weight in model.state_dict().items() if "linear_2" not in name}
    model.save_pretrained(tmp_path / "partly", state_dict=state)
    tiny_processor(model).save_pretrained(tmp_path / "partly")
    with pytest.raises(ValueError, match="has no weights for 2 parameters, first .*linear_2.bias"):
        load_llava(str(tmp_path / "partly"))


def test_a_pair_with_other_vocabularies_or_visual_tokens_is_refused(model):
    with pytest.raises(ValueError, match="the student has 44 tokens and the teacher 50"):
        check_pair(model, tiny_llava(vocab_size=50))
    with pytest.raises(ValueError, match="the student has 9 visual tokens for a picture and the teacher 16"):
        check_pair(model, tiny_llava(patch_size=9))
    other = tiny_llava()
    other.config.image_token_index = 3
    with pytest.raises(ValueError, match="the student's image token is 2 and the teacher's 3"):
        check_pair(model, other)


def test_independent_questions_equal_separate_passes(model, rows):
    batch = make_batch(model, [rows[i] for i in range(3)], independent=True)
    together = model.lm_head(decoder_states(model, batch).last)
    predicting = batch["labels"][:, 1:] != -100
    packed = together[:, :-1][predicting]
    singles = []
    for row in (rows[i] for i in range(3)):
        for start in range(0, len(row["conversation"]), 2):
            question, answer = row["conversation"][start : start + 2]
            text = question["value"].replace("<image>\n", "")
            turns = [{"from": "human", "value": f"<image>\n{text}"}, answer]
            single = make_batch(model, [{**row, "conversation": turns, "kinds": None}])
            assert single["attention_mask"].ndim == 2
            logits = model.lm_head(decoder_states(model, single).last)
            singles.append(logits[:, :-1][single["labels"][:, 1:] != -100])
    assert (packed - torch.cat(singles)).abs().max().item() < 1e-5


def test_a_dialogue_sees_what_was_said_before(model, rows):
    row = rows[0]
    first, last = row["conversation"][:2], row["conversation"][-2:]
    whole = make_batch(model, [row])
    alone = make_batch(
        model, [{**row, "conversation": [{**first[0], "value": f"<image>\n{last[0]['value']}"}, last[1]]}]
    )
    ends = [model.lm_head(decoder_states(model, batch).last)[0, -2] for batch in (whole, alone)]
    assert (ends[0] - ends[1]).abs().max() > 1e-4


def test_text_alone_goes_through_and_padding_changes_nothing(model, rows):
    text = {**rows[0], "image": None, "id": "text"}
    text["conversation"] = [{"from": "human", "value": "how many objects ?"}, {"from": "gpt", "value": "2"}]
    alone = make_batch(model, [text])
    assert "pixel_values" not in alone and not alone["visual"].any()
    mixed = make_batch(model, [rows[0], text])
    length = alone["input_ids"].shape[1]
    for batch in (alone, mixed):
        assert decoder_states(model, batch).last.isfinite().all()
    torch.testing.assert_close(decoder_states(model, mixed).last[1, :length], decoder_states(model, alone).last[0])


@pytest.mark.parametrize("part", ["vision", "projector", "decoder"])
def test_a_part_alone_learns(rows, part):
    model = tiny_llava().train()
    train_only(model, [part])
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    model.lm_head(decoder_states(model, make_batch(model, [rows[0]])).last).logsumexp(-1).sum().backward()
    torch.optim.SGD(trained, lr=0.1).step()
    moved = {name for name, weight in model.state_dict().items() if not weight.equal(before[name])}
    prefix = {
        "vision": "model.vision_tower.",
        "projector": "model.multi_modal_projector.",
        "decoder": ("model.language_model.", "lm_head."),
    }[part]
    assert moved and all(name.startswith(prefix) for name in moved)


def test_an_unknown_part_is_refused(model):
    with pytest.raises(ValueError, match=r"some of vision, projector, decoder, got \['head'\]"):
        train_only(model, ["head"])


def test_a_decoder_with_tied_embeddings_stays_tied(tmp_path):
    model = tiny_llava(tie=True)
    save_llava(model, tiny_processor(model), tmp_path)
    loaded, _ = load_llava(str(tmp_path))
    embeddings = loaded.get_input_embeddings().weight
    assert loaded.lm_head.weight.data_ptr() == embeddings.data_ptr()
    assert embeddings.equal(model.get_input_embeddings().weight)


def test_towers_of_clip_and_siglip(tmp_path):
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "vocab_size": 20}
    clip = CLIPModel(CLIPConfig(vision_config={**small, "image_size": 36, "patch_size": 12}, text_config=text))
    clip.save_pretrained(tmp_path / "clip")
    tower, strategy = load_vision_tower(str(tmp_path / "clip"))
    assert strategy == "default" and tower.config.model_type == "clip_vision_model"
    assert all(
        clip.vision_model.state_dict()[n.removeprefix("vision_model.")].equal(w) for n, w in tower.state_dict().items()
    )
    SiglipVisionModel(SiglipVisionConfig(**small, image_size=36, patch_size=12)).save_pretrained(tmp_path / "siglip")
    tower, strategy = load_vision_tower(str(tmp_path / "siglip"))
    decoder = LlamaForCausalLM(LlamaConfig(**small, vocab_size=44))
    model = build_llava(tower, decoder, image_token_id=IMAGE_TOKEN, strategy=strategy)
    assert strategy == "full" and num_visual_tokens(model) == 9
    assert tiny_processor(model).num_additional_image_tokens == 0
    decoder.save_pretrained(tmp_path / "decoder")
    with pytest.raises(ValueError, match="is of type 'llama'; a vision tower is one of clip, siglip"):
        load_vision_tower(str(tmp_path / "decoder"))


def test_a_decoder_without_the_image_token_is_refused(model):
    decoder = LlamaForCausalLM(model.config.text_config)
    build = partial(build_llava, model.model.vision_tower, decoder)
    with pytest.raises(ValueError, match="image_token_id=44 has no embedding, the decoder has 44"):
        build(image_token_id=44)
