from hub import decoder_start, find, knows, load, tokenizer  # noqa: F401
