"""How the logits are read, made and cut into pieces, by platform and strategy."""
