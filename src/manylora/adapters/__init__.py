"""Adapters: values, the bank that stacks them on a base, and the folder that PEFT opens too."""
