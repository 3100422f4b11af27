"""The benchmark behind ``tools/bench.py``: who takes part, what they do, how it is measured and told."""
