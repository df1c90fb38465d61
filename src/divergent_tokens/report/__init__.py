"""Records in; tables, figures and pages out. Runs no model."""
