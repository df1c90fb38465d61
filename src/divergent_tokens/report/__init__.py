"""Records in, tables out; runs no model."""
