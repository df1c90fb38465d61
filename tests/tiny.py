"""Tiny random models of every architecture that the suite holds, and a tokenizer for them."""

from collections.abc import Callable
from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    Mamba2Config,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

VOCABULARY = 256
SPREAD = 3.0
"""Standard deviation of a tiny network's logits; less where it caps them."""
SENTENCES = [
    "the quick brown fox jumps over the lazy dog and runs into the forest near the river",
    "a model that was compressed may write another text than the one it was made from",
    "def add(a, b): return a + b  # two numbers 1 2 3 4 5 6 7 8 9 0",
    "Counting tokens one by one shows where two continuations part from each other",
]

_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SMALL),
    # Its logits and embeddings have more rows than the tokenizer has tokens.
    "llama-padded": lambda: LlamaConfig(**{**_SMALL, "vocab_size": VOCABULARY + 37}),
    "qwen3": lambda: Qwen3Config(**_SMALL, head_dim=16),
    # Sliding windows shorter than the sequences, its own head dimension, scaled embeddings.
    "gemma3": lambda: Gemma3TextConfig(
        **_SMALL,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    ),
    "opt": lambda: OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        do_layer_norm_before=False,
    ),
    "gemma2": lambda: Gemma2Config(
        **_SMALL,
        head_dim=16,
        sliding_window=8,
        final_logit_softcapping=3.0,
        attn_logit_softcapping=5.0,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "granite": lambda: GraniteConfig(
        **_SMALL, logits_scaling=4.0, embedding_multiplier=2.0, residual_multiplier=0.5
    ),
    "cohere": lambda: CohereConfig(**_SMALL, logit_scale=0.25),
    "qwen3-moe": lambda: Qwen3MoeConfig(
        **_SMALL, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    ),
    "gpt-oss": lambda: GptOssConfig(
        **_SMALL,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "mamba2": lambda: Mamba2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=8,
        head_dim=8,
        state_size=8,
        n_groups=2,
        chunk_size=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    ),
    "qwen3-next": lambda: Qwen3NextConfig(
        **_SMALL,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        layer_types=["linear_attention", "full_attention"],
    ),
}
ARCHITECTURES = tuple(CONFIGS)
FINAL_NORMS = ("norm.weight", "norm_f.weight", "ln_f.weight")


@torch.no_grad()
def network(architecture: str, seed: int = 0, scale: float = 14.0) -> PreTrainedModel:
    """A random network whose text is varied: its distributions are not flat, and loops are rare."""
    torch.manual_seed(seed)
    built = AutoModelForCausalLM.from_config(CONFIGS[architecture]()).float().eval()
    ends = (built.get_input_embeddings().weight, built.get_output_embeddings().weight)
    for name, parameter in built.named_parameters():
        if parameter.ndim >= 2:
            parameter.mul_(5.0 if any(parameter is end for end in ends) else scale)
        elif ".post_" in name and not parameter.any():
            parameter.fill_(scale)  # Gemma's layers would drown in its embeddings
        elif name.count(".") == 2 and name.endswith(FINAL_NORMS):
            # Random signs: with tied embeddings a token would otherwise be followed by itself.
            signs = torch.randint(0, 2, parameter.shape) * 2.0 - 1
            parameter.copy_(signs if parameter.any() else signs - 1)  # Gemma's gain is 1 + weight
    for _ in range(2):  # tied embeddings change the layers' input too
        ids = torch.randint(4, 200, (2, 12))
        ends[1].mul_(SPREAD / built(ids).logits.std(-1).mean())
    return built


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most 256 + a few tokens, trained on four sentences."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 5,
        special_tokens=["<s>", "</s>", "<pad>", "<unk>"],
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
