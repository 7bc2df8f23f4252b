"""Speed and memory of this project beside its peers, measured in one run: what `launch/benchmark.py` does."""
