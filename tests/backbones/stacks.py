"""Decoder stacks of the families, small."""

import transformers as hf


def stack(family):
    """The family's decoder stack, small, with other rotary frequencies than the defaults."""
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 2, "vocab_size": 8, "max_position_embeddings": 64,
             "rope_parameters": {"rope_type": "default", "rope_theta": 12345.0},
             "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}  # fmt: skip
    if family == "chameleon":
        codec = {"embed_dim": 8, "num_embeddings": 8, "latent_channels": 8, "base_channels": 32,
                 "channel_multiplier": [1], "num_res_blocks": 1, "resolution": 8}  # fmt: skip
        return hf.ChameleonModel(hf.ChameleonConfig(**sizes, vocabulary_map={"<image>": 0}, vq_config=codec))
    if family == "emu3":
        from transformers.models.emu3.modeling_emu3 import Emu3TextModel

        return Emu3TextModel(hf.Emu3TextConfig(**sizes))
    if family == "llama with scaled frequencies":
        sizes["rope_parameters"] = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
                                    "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
    return hf.LlamaModel(hf.LlamaConfig(**sizes))
