"""The PEFT tuner: its config, its layer, its model, and verbs on adapters."""
