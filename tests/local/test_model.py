"""Models and tokenizers: built, saved, loaded again, and the errors of bad folders."""

from __future__ import annotations

import random
import unicodedata

import pytest
import tiny_runs
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Tokenizer

from igrpo_nemo.errors import UserError
from igrpo_nemo.local.model import context_of, load_model, open_policy, save_pretrained_folder
from igrpo_nemo.local.warmup import build_small_model
from igrpo_nemo.run.tokenizer import build_small_tokenizer, load_tokenizer


def small_model(tokenizer, seed=0):
    return build_small_model(tiny_runs.SHAPE, tokenizer, context=128, seed=seed)


@pytest.fixture
def folder(tmp_path, tokenizer):
    save_pretrained_folder(small_model(tokenizer), tokenizer, tmp_path / "model")
    return tmp_path / "model"


def _random_text(rng):
    ranges = [(32, 127), (48, 58), (9, 14), (0xA0, 0x250), (0x300, 0xD7FF), (0xE000, 0x10FFFF)]
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(1, 40)))


def test_any_text_round_trips_and_ids_survive_the_folder(folder, tokenizer):
    loaded = [AutoTokenizer.from_pretrained(folder), Qwen2Tokenizer.from_pretrained(folder)]
    rng = random.Random(0)
    for _ in range(300):
        text = _random_text(rng)
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
        for other in loaded:
            assert other.encode(text, add_special_tokens=False) == ids
            assert other.decode(ids) == tokenizer.decode(ids)
    for other in loaded:
        assert len(other) == len(tokenizer)
        assert other.eos_token == "<|im_end|>" and other.pad_token == "<|endoftext|>"
        chat = [{"role": "system", "content": "s"}, {"role": "user", "content": " {{ 1 }} "}]
        text = other.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert text == (
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n {{ 1 }} <|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        ids = other.encode(text, add_special_tokens=False)
        assert ids.count(other.eos_token_id) == 2 and other.decode(ids) == text


def test_the_configs_chat_template_is_saved_with_the_model(folder, tmp_path):
    """A base model has none: a checkpoint must not need the config to be asked a question."""
    plain = AutoTokenizer.from_pretrained(folder)
    plain.chat_template = None
    (folder / "chat_template.jinja").unlink()
    plain.save_pretrained(folder)
    template = "{{ messages[0]['content'] + ' =>' }}"
    policy = open_policy(folder, precision="float32", chat_template=template)
    save_pretrained_folder(policy.model, policy.tokenizer, tmp_path / "checkpoint")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "checkpoint")
    assert loaded.chat_template == template
    assert open_policy(folder, precision="float32").tokenizer.chat_template is None


def test_digits_are_single_tokens_and_training_text_is_short(tokenizer):
    assert tokenizer.tokenize("1234567890") == list("1234567890")
    assert len(tokenizer.encode("<think>4,6</think><answer>46</answer>")) < 25


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(UserError, match="vocab_size 200"):
        build_small_tokenizer(["text"], 200)


def test_small_models_are_deterministic_and_leave_the_random_state(tokenizer):
    state = torch.random.get_rng_state()
    first, again, other = (small_model(tokenizer, seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    for name, parameter in first.state_dict().items():
        assert torch.equal(parameter, again.state_dict()[name])
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.lm_head.weight is first.model.embed_tokens.weight
    assert first.lm_head.weight.shape == (len(tokenizer), 32)


def test_a_saved_model_is_the_same_model(folder, tokenizer):
    model = small_model(tokenizer)
    ids = torch.arange(20)[None]
    loaded = load_model(folder, device="cpu")
    assert loaded.dtype == torch.float32 and not loaded.training
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, model(ids).logits)
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id


def test_bad_folders_are_named_in_one_line(folder, tmp_path):
    def message(path):
        with pytest.raises(UserError) as caught:
            load_model(path, device="cpu")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "does not exist" in message(tmp_path / "nowhere")
    assert "does not exist" in message("./nowhere/model")
    assert "is a file" in message(folder / "config.json")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    assert str(folder) in message(folder)
    weights.unlink()
    assert "no weights" in message(folder)
    weights.write_bytes(content)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "no tokenizer" in message(folder)
    (folder / "config.json").unlink()
    assert "config.json" in message(folder)
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(folder)


def test_a_context_shorter_than_the_longest_sequence_is_found_first(policy, tmp_path):
    config = tiny_runs.tiny_config(policy, tmp_path, "policy.max_total_sequence_length=300")
    with pytest.raises(
        UserError, match="policy.max_total_sequence_length=300 .*: set it to 256 or less"
    ):
        tiny_runs.run(config)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(policy, tmp_path):
    tokenizer = load_tokenizer(policy)
    tokenizer.add_tokens([f"<extra{n}>" for n in range(400)])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="embedding has only .* rows: choose the model's own"):
        open_policy(policy, precision="float32", tokenizer_name=str(tmp_path))


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
    ],
)
def test_yarn_makes_the_context_longer(rope, context, make_model):
    model = make_model("qwen2")
    model.config.rope_parameters = rope
    assert context_of(model) == context


def test_a_folder_that_cannot_be_written_is_named(folder, tmp_path, tokenizer):
    model = small_model(tokenizer)
    with pytest.raises(UserError, match="config.json"):
        save_pretrained_folder(model, tokenizer, folder / "config.json")
