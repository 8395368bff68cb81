"""The PEFT folder: read and written."""
