"""Small LLaVAs with the tokenizer of the drawn task, for the tests of models, sequences and recipes."""

from pathlib import Path

import torch
from shapes_vqa import TASKS, make_tokenizer, prepare_shapes_vqa
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from speechkd.models.llava import build_llava, image_processor, make_processor

IMAGE_TOKEN = 2


def tiny_llava(*, vocab_size=44, patch_size=12, width=16, layers=2, tie=False, seed=0):
    """A random LLaVA for pictures of 36 pixels, with (36 / patch_size)**2 visual tokens."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=36,
        patch_size=patch_size,
        projection_dim=16,
    )
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tie,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    tower, decoder = CLIPVisionModel(vision), LlamaForCausalLM(text)
    return build_llava(tower, decoder, image_token_id=IMAGE_TOKEN, feature_layer=-1).eval()


def tiny_processor(model):
    tokenizer = make_tokenizer(TASKS["basic"])
    return make_processor(model, tokenizer, image_processor(36, mean=[0.5] * 3, std=[0.25] * 3))


def drawn_task(folder: Path, num_train=12, num_test=6) -> Path:
    prepare_shapes_vqa(folder, num_train=num_train, num_test=num_test)
    return folder
