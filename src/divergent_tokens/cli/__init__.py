"""The command `dtm`; each command has its file here."""

from divergent_tokens.cli.entry import main as main
