"""Benchmarks of the engine: `headrace bench`. Each prints, with `--json`, one JSON object as its last line."""
