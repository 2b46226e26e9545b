"""What the core does without: one folder a feature, each of which can be deleted. See docs/change.md."""
