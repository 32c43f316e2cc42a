"""One TPU chip, twenty minutes, one JSON file to send back: `python -m tpu.first_hour` (see __main__.py)."""
