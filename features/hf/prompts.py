"""
The special tokens around a prompt for Hugging Face models.
"""
from features.hf import reading
from tokenizer import PromptFormat


def prompt_format(where, cfg, tokenizer):
    """The PromptFormat of hf:FOLDER: T5 reads up to the end of text, Llama begins with <s>."""
    if cfg.n_encoder_layer:
        return PromptFormat(bos=(reading.decoder_start(where),), suffix=(tokenizer.eot or 0,))
    return PromptFormat(tokenizer.bos())
