"""Pages for people: the report of a run, an inspected answer, an ablation."""
