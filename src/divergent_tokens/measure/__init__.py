"""How far apart two models are; nothing here changes a model for good."""
