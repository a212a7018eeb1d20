"""Shared fixtures: a tiny tokenizer, tiny random models of several architectures, and the embedded real model."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job hands that on
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

SENTENCES = [
    "The capital of France is Paris. The capital of Spain is Madrid.",
    "The mayor of Port Ellery is Ines Varro, who was born in Quenby.",
    "A question: who built the bridge over the river Ostrin? An answer: Oskar Tveld did, in 1687.",
    "New facts move from documents into weights, and what was known before should stay as it was.",
]


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE tokenizer of 400 tokens with bos, eos and pad, trained on a few sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(SENTENCES * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )


def make_tiny(architecture: str, *, seed: int = 0, layers: int = 4, vocab: int = 400, hidden: int = 32):
    """A random causal LM in float32: `llama`, `gpt2`, `qwen2` or `gemma3`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if architecture == "gpt2":
        config = AutoConfig.for_model(
            "gpt2", vocab_size=vocab, n_embd=hidden, n_layer=layers, n_head=4, n_positions=512,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
    else:
        name = "gemma3_text" if architecture == "gemma3" else architecture
        config = AutoConfig.for_model(
            name, vocab_size=vocab, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, head_dim=hidden // 4, max_position_embeddings=512,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        for parameter in model.parameters():  # the default initialisation gives nearly flat logits
            if parameter.dim() > 1:
                parameter.data.mul_(4.0)
    return model.eval()


@pytest.fixture
def tiny_lm():
    """Factory of tiny random models, fresh at every call: `tiny_lm("llama", seed=1)`."""
    return make_tiny


@pytest.fixture(scope="session")
def smollm_path():
    """Folder of the converted SmolLM2-135M-Instruct in the user's cache."""
    from transfuse.core.models import resolve

    return resolve("smollm2-135m")


@pytest.fixture
def smollm(smollm_path):
    """SmolLM2-135M-Instruct with its tokenizer, freshly loaded (about half a second)."""
    from transfuse.core.models import load

    return load("smollm2-135m")
