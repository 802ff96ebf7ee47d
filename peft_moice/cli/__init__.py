"""The command line, `peft-moice` or `python -m peft_moice`: one file for each command."""
