"""Jobs as plain values: one file a job, `get_config()` in each."""
