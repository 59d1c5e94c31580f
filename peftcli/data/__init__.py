"""Raw rows, before any tokenizer: where they come from, what they mean, what is wrong with them."""
