"""What tests share: tiny checkpoints and an oracle of their own."""
