"""One HTML page about a run: its curves and its routing over time, and what a checkpoint does with real text.

`metrics_table` reads the metrics, `passages` and `tracing` run a checkpoint on text, `charts` and `text_view` lay out
what the page shows, and `page` writes it.
"""
