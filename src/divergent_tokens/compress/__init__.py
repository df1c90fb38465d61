"""Changes a model, and never measures one."""
