"""The tokenizer of a policy and the token ids that end a response."""
