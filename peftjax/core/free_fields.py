"""The config fields that do not affect what a run computes, only when it saves, evaluates and logs, and how it reads data."""

FREE = ("checkpoint.", "data.workers", "data.tfds_data_dir", "eval.samples", "log.", "train.eval_every")  # prefixes
